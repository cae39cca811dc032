"""LongRoPE: the set of frequencies depends on the model or the text, never on other texts in the batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import long_rope
import numpy as np
import pytest
from hugging_face import HuggingFace
from tiny_case import N_THREADS, Case

import fedbpt
from fedbpt.engine.native_generator import NativeGenerator
from fedbpt.engine.text_generator import Placed, Sampling, Token

N = long_rope.N_ORIGINAL
LENGTHS = [1, 20, 300, N - 1, N, N + 1, 800]


@dataclass(frozen=True)
class Choices:
    """A model, and transformers' results under each rule for choosing the frequencies."""

    case: Case
    by_length: HuggingFace
    """Transformers' own rule: the short set for texts of up to N tokens, the long set for others."""
    always_long: HuggingFace
    """The long set for every text."""

    def assert_one_rule(self, scored: list[tuple[np.ndarray, np.ndarray]]) -> None:
        """Assert that all ``scored`` texts, with logits up to a constant, follow the same rule."""
        spread = self.by_length.logits(self.case.ids(64)).std()
        errors = [
            max(np.abs(normalized(logits) - normalized(rule.logits(ids)[-1])).max() for ids, logits in scored)
            for rule in (self.by_length, self.always_long)
        ]
        assert min(errors) <= self.case.model.tolerance * spread


@pytest.fixture(scope="module", params=[architecture.name for architecture in long_rope.ARCHITECTURES])
def choices(request: pytest.FixtureRequest, architecture_case: Callable[..., Case]) -> Choices:
    case = architecture_case(request.param)
    long_alone = replace(
        case.model, config={**case.model.config, **long_rope.config(short_factor=long_rope.ROPE["long_factor"])}
    )
    return Choices(case, case.reference, HuggingFace(long_alone))


def normalized(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities in nats."""
    return logits - np.logaddexp.reduce(logits.astype(np.float64))


def no_prompt(case: Case) -> np.ndarray:
    return np.zeros((1, 0, case.model.n_embd), np.float32)


def test_the_two_sets_are_far_apart(choices: Choices) -> None:
    short = choices.case.ids(N)
    difference = np.abs(choices.by_length.logits(short) - choices.always_long.logits(short))[-1].max()
    assert difference > 0.5
    long = choices.case.ids(800)
    np.testing.assert_allclose(choices.by_length.logits(long), choices.always_long.logits(long), atol=1e-3)


def test_texts_alone_with_others_and_after_long_ones_follow_one_rule(choices: Choices) -> None:
    case, texts = choices.case, choices.case.texts(LENGTHS)
    scorer = fedbpt.load_model(case.path, n_threads=N_THREADS)
    scored = []
    for together in (*([text] for text in texts), texts[:3] * 8, texts[:-1], texts[::-1]):
        logits = scorer.score_with_soft_prompt(together, no_prompt(case))[0]
        scored += list(zip(together, logits, strict=True))
    choices.assert_one_rule(scored)


@pytest.mark.parametrize("placement", ["front", "cue"])
def test_soft_prompts_follow_the_same_rule_whatever_was_scored_before(choices: Choices, placement: str) -> None:
    case, scorer = choices.case, fedbpt.load_model(choices.case.path, n_threads=N_THREADS)
    tokens, prefix = case.ids(5, seed=3), case.ids(4, seed=4)
    rows = scorer.token_embeddings(tokens)
    scored = []
    for lengths in ([20], [20, 800], [90, 20], [20]):
        texts = case.texts(lengths)
        logits = scorer.score_with_soft_prompt(texts, rows, None, placement, prefix)[0]
        for text, found in zip(texts, logits, strict=True):
            parts = [prefix, tokens, text] if placement == "front" else [prefix, text[:-5], tokens]
            scored.append((np.concatenate(parts), found))
    choices.assert_one_rule(scored)


def test_a_plan_gives_the_same_before_and_after_another_plan_with_longer_texts(choices: Choices) -> None:
    scorer = fedbpt.load_model(choices.case.path, n_threads=N_THREADS)
    text, embeds = choices.case.ids(60), choices.case.prompts(1, 3)
    plan = scorer.compile([text], None, "cue")
    before = plan.score(embeds)
    scorer.compile([choices.case.ids(800)], None, "cue").score(embeds)
    scorer.compile(choices.case.texts([30] * 32), None, "cue").score(embeds)
    np.testing.assert_allclose(plan.score(embeds), before, atol=1e-3)


def test_texts_of_both_sets_are_generated_together_as_alone(choices: Choices) -> None:
    case = choices.case
    given = [Placed(case.ids(n, seed=n)) for n in (20, N - 2, N + 5)]

    def new() -> NativeGenerator:
        return NativeGenerator(case.scorer._engine, case.scorer._files)

    generator = new()
    streams = [generator.open(each, Sampling()) for each in given]
    steps = [generator.next_all(streams, [0] * 3) for _ in range(6)]  # the second text outgrows the short set
    for i, each in enumerate(given):
        stream = new().open(each, Sampling())
        alone = [stream.next() for _ in range(6)]
        for found, expected in zip((step[i] for step in steps), alone, strict=True):
            assert isinstance(found, Token)
            assert found.id == expected.id
            assert abs(found.log_prob - expected.log_prob) < 1e-3


def test_generated_texts_follow_one_rule_whatever_came_before(choices: Choices) -> None:
    case, scored = choices.case, []
    for history in ([], [800], [20, 800, 20]):
        generator = NativeGenerator(case.scorer._engine, case.scorer._files)
        for n in history:
            generator.open(Placed(case.ids(n, seed=5)), Sampling()).next()
        for n in (20, 300, 800):
            ids, log_p = case.ids(n), np.empty(case.model.n_vocab)
            for token, value in generator.open(Placed(ids), Sampling()).next(case.model.n_vocab).likeliest:
                log_p[token] = value
            scored.append((ids, log_p))
    choices.assert_one_rule(scored)


def test_states_of_short_and_long_texts_scored_together_are_those_of_each_alone(choices: Choices) -> None:
    texts = choices.case.texts([800, 20, N + 1, 300])
    together = choices.case.scorer.compile(texts, [], layers=(0, 1)).states()
    for text, states in zip(texts, together, strict=True):
        alone = choices.case.scorer.compile([text], [], layers=(0, 1)).states()
        np.testing.assert_allclose(states, alone[0], atol=1e-3 * float(alone.std()))


def test_answers_that_cross_the_length_leave_scores_as_they_were(choices: Choices) -> None:
    """A plan keeps the KV of its texts; an answer may need it with the other set of frequencies."""
    case = choices.case
    texts = [case.ids(N - 4), case.ids(20)]
    plan = case.scorer.compile(texts, None, "cue")
    answers = {n: plan.generate(no_prompt(case), max_tokens=n) for n in (2, 12, 3)}
    fresh = case.scorer.compile(texts, None, "cue")
    np.testing.assert_array_equal(plan.score(no_prompt(case)), fresh.score(no_prompt(case)))
    short = case.scorer.compile(texts, None, "cue").generate(no_prompt(case), max_tokens=3)
    assert [a.ids.tolist() for a in answers[3][0]] == [a.ids.tolist() for a in short[0]]
