"""Scores of every architecture against transformers: plain, soft prompts in both placements, continuations, labels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hugging_face import HuggingFace, selection_biases
from numpy.typing import NDArray
from table import ARCHITECTURES
from tiny_case import Case

LABELS = [259, 3, 411]  # neither sorted nor adjacent
WORDS = [[259], [3, 411], [7, 8, 9, 10]]


def spread(case: Case) -> float:
    """Standard deviation of the model's logits."""
    return float(case.reference.logits(case.ids(64)).std())


def assert_close(case: Case, actual: NDArray[np.float32], expected: NDArray[np.float64], n: int = 1) -> None:
    """Assert equality within the tolerance of ``n`` logits, relative to the spread of the model's logits."""
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= n * case.model.tolerance * spread(case)


def no_prompt(case: Case) -> NDArray[np.float32]:
    return np.zeros((1, 0, case.model.n_embd), np.float32)


def log_probabilities(case: Case, inputs: NDArray[np.float64], ids: list[int]) -> float:
    """Log-probability of ``ids`` after the embedding rows ``inputs`` [n, n_embd], in nats."""
    rows = np.concatenate([inputs, case.reference.token_embeddings(ids[:-1])])
    logits = case.reference.logits(rows)[len(inputs) - 1 :]
    top = logits.max(axis=1, keepdims=True)
    log_p = logits - top - np.log(np.exp(logits - top).sum(axis=1, keepdims=True))
    return float(log_p[np.arange(len(ids)), ids].sum())


def test_every_weight_changes_the_logits_by_far_more_than_the_tolerance(case: Case) -> None:
    """Otherwise the other tests would not notice a part that the file or llama.cpp lacks."""
    import torch

    assert 1.5 < spread(case) < 8
    whole = case.reference.forward(case.reference.token_embeddings(case.ids(64)))
    logits = whole[-8:]
    direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
    (logits * direction).sum().backward()
    with torch.no_grad():
        moves = {
            name: float((values.grad * values).norm()) / logits.numel() ** 0.5 / spread(case)
            for name, values in case.reference.model.named_parameters()
            if values.grad is not None
        }
        for name, values in selection_biases(case.reference.model):
            kept = values.clone()
            values.zero_()
            without = case.reference.forward(case.reference.token_embeddings(case.ids(64)))
            values.copy_(kept)
            moves[name] = float((without - whole).abs().max()) / spread(case)
    case.reference.model.zero_grad()
    assert {name: moved for name, moved in moves.items() if moved < 10 * case.model.tolerance} == {}


@pytest.mark.parametrize("name", [name for name, architecture in ARCHITECTURES.items() if architecture.n_window])
def test_windows_are_short_enough_to_show(architecture_case: Callable[..., Case], name: str) -> None:
    case = architecture_case(name)
    wide = replace(case.model, config={**case.model.config, "sliding_window": 512})
    text = case.ids(300)
    difference = np.abs(case.reference.logits(text) - HuggingFace(wide).logits(text)).max(axis=1)
    assert difference[: case.model.n_window].max() == 0
    assert difference[case.model.n_window :].max() > 100 * case.model.tolerance * spread(case)


def test_texts_match_at_every_length(case: Case) -> None:
    whole = case.ids(300)
    ends = [1, 2, 3, 23, 24, 25, 60, 61, 127, 128, 129, 300]
    scored = case.scorer.score_with_soft_prompt([whole[:end] for end in ends], no_prompt(case))
    assert_close(case, scored[0], case.reference.logits(whole)[np.array(ends) - 1])


def test_rows_in_front_match(case: Case) -> None:
    texts, embeds, prefix = case.texts([1, 90]), case.prompts(2, 5), case.ids(7, seed=99)
    how = {"placement": "front", "prefix": prefix}
    assert_close(
        case, case.scorer.score_with_soft_prompt(texts, embeds, **how), case.reference.score(texts, embeds, **how)
    )


def test_rows_in_the_cue_match_with_kept_kv(case: Case) -> None:
    texts, prefix = case.texts([5, 90]), case.ids(7, seed=99)
    plan = case.scorer.compile(texts, None, "cue", prefix)
    plan.score(case.prompts(1, 5, seed=1))
    before = plan.n_tokens
    embeds = case.prompts(2, 5)
    assert_close(case, plan.score(embeds), case.reference.score(texts, embeds, None, "cue", prefix))
    assert plan.n_kept == 2
    assert plan.n_tokens - before == 2 * 2 * 5


def test_a_label_head_gives_the_logits_of_the_whole_layer(case: Case) -> None:
    texts, embeds = case.texts([4, 30]), case.prompts(2, 3)
    for placement in ("front", "cue"):
        every = case.scorer.score_with_soft_prompt(texts, embeds, placement=placement)
        some = case.scorer.score_with_soft_prompt(texts, embeds, LABELS, placement)
        assert_close(case, some, every[:, :, LABELS])


def test_continuations_match(case: Case) -> None:
    [text], embeds = case.texts([40]), case.prompts(1, 3)
    embedded = case.reference.token_embeddings(text)
    for placement, parts in (("front", [embeds[0], embedded]), ("cue", [embedded[:-3], embeds[0]])):
        found = case.scorer.compile([text], LABELS, placement, continuations=[WORDS]).score(embeds)[0, 0]
        inputs = np.concatenate(parts)
        expected = [log_probabilities(case, inputs, word) for word in WORDS]
        assert_close(case, found[: len(WORDS)], np.array(expected), n=4)
        assert_close(case, found[len(WORDS) :], case.reference.logits(inputs)[-1, LABELS])


def test_rows_that_are_token_embeddings_score_as_the_tokens(case: Case) -> None:
    tokens, [text] = case.ids(20, seed=8), case.texts([9])
    assert np.abs(case.scorer.token_embeddings(tokens) - case.reference.token_embeddings(tokens)).max() <= 1e-6
    by_rows = case.scorer.score_with_soft_prompt([text], case.scorer.token_embeddings(tokens))
    joined = np.concatenate([tokens, text])
    assert_close(case, by_rows, case.reference.logits(joined)[None, None, -1])


def test_a_short_text_scores_the_same_before_with_and_after_long_ones(case: Case) -> None:
    short, long = case.ids(20), case.ids(450)
    expected = case.reference.logits(short)[-1]
    for texts in ([short], [long, short], [short, *case.texts([30] * 31)], [short]):
        scored = case.scorer.score_with_soft_prompt(texts, no_prompt(case))[0]
        assert_close(case, scored[[text is short for text in texts]], expected[None])
