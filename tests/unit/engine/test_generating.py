"""Text generation with the toy model: its input, its pieces and its end."""

from __future__ import annotations

import numpy as np
import pytest

from fedbpt import PromptSpec
from fedbpt.engine.text_generator import Placed, Sampling
from fedbpt.engine.text_stream import SLICE, Generation, place
from fedbpt.errors import InputError, ScoringInterrupted
from fedbpt.objective.objective import Objective
from fedbpt.protocol.specs import ObjectiveSpec, Template
from tests.support.raises import raises
from tests.support.toy_generator import END
from tests.support.toy_scorer import BOS, ToyScorer

TEMPLATE = Template(pattern="Q: {text}\nAnswer: (", label_words=())
ROWS = np.random.default_rng(3).standard_normal((2, 8)).astype(np.float32)


def text_of(generation: Generation) -> str:
    return "".join(piece.text for piece in generation)


def bytes_of(text: str) -> list[int]:
    return list(text.encode())


def test_in_the_cue_rows_replace_its_last_tokens() -> None:
    placed = place(ToyScorer(), TEMPLATE, "why", None, ROWS, PromptSpec(n_prompt=2))
    assert placed.ids.tolist() == [BOS, *bytes_of("Q: why\nAnswer: (")]
    assert placed.rows_at == len(placed.ids) - 2


def test_in_front_rows_go_between_bos_and_the_template() -> None:
    placed = place(ToyScorer(), TEMPLATE, "why", None, ROWS, PromptSpec(placement="front", n_prompt=2))
    assert placed.ids.tolist() == [BOS, 0, 0, *bytes_of("Q: why\nAnswer: (")]
    assert placed.rows_at == 1


def test_without_rows_the_input_is_the_text_in_its_template() -> None:
    placed = place(ToyScorer(), TEMPLATE, "why not", 4)  # its leading space counts
    assert placed.ids.tolist() == [BOS, *bytes_of("Q: why\nAnswer: (")]
    assert placed.rows.size == 0


@pytest.mark.parametrize("placement", ["front", "cue"])
def test_what_is_generated_has_the_likelihood_that_tuning_scores(placement: str) -> None:
    scorer, spec = ToyScorer(), PromptSpec(placement=placement, n_prompt=2, d=6)
    generation = Generation(scorer.generator, place(scorer, TEMPLATE, "why", None, ROWS, spec), max_tokens=5)
    tokens = [piece.token for piece in generation]
    assert len(tokens) == 5
    made = Objective(scorer, TEMPLATE, (), [("why", "x")], ObjectiveSpec(loss="nll"), spec)
    made._answers = [[np.array([token.id for token in tokens], dtype=np.int32)]]
    made._plan = made._compile(np.arange(1), made._tokens, keep_kv=False)
    assert made.losses(ROWS[None])[0] == pytest.approx(-np.mean([token.log_prob for token in tokens]), rel=1e-5)


def test_it_ends_at_max_tokens() -> None:
    scorer = ToyScorer()
    generation = Generation(scorer.generator, Placed(scorer.tokenize("a")), max_tokens=3)
    text_of(generation)
    assert (generation.n_tokens, generation.finish_reason, generation.n_prompt) == (3, "length", 2)


def test_it_ends_at_the_end_of_the_context() -> None:
    scorer = ToyScorer(n_ctx=10)
    generation = Generation(scorer.generator, Placed(scorer.tokenize("abc")), max_tokens=50)
    text_of(generation)
    assert (generation.n_tokens, generation.finish_reason) == (6, "length")


def test_it_ends_at_the_models_end_of_text_token(monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = ToyScorer()
    chosen = iter([*b"hi", END])
    monkeypatch.setattr(scorer, "logits_after", lambda *_: 9.0 * (np.arange(257) == next(chosen)))
    generation = Generation(scorer.generator, Placed(scorer.tokenize("a")))
    assert text_of(generation) == "hi"
    assert (generation.n_tokens, generation.finish_reason) == (2, "stop")


def test_it_ends_at_a_stop_string_of_two_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = ToyScorer()
    chosen = iter(b"one##two")
    monkeypatch.setattr(scorer, "logits_after", lambda *_: 9.0 * (np.arange(257) == next(chosen)))
    generation = Generation(scorer.generator, Placed(scorer.tokenize("a")), stop=("##",))
    assert text_of(generation) == "one"
    assert (generation.n_tokens, generation.finish_reason) == (5, "stop")


def test_held_back_text_comes_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = ToyScorer()
    chosen = iter(b"one#")
    monkeypatch.setattr(scorer, "logits_after", lambda *_: 9.0 * (np.arange(257) == next(chosen)))
    generation = Generation(scorer.generator, Placed(scorer.tokenize("a")), max_tokens=4, stop=("##",))
    assert [piece.text for piece in generation] == ["o", "n", "e", "", "#"]
    assert generation.finish_reason == "length"


def test_a_seed_gives_the_same_text_again() -> None:
    scorer = ToyScorer()

    def text(seed: int) -> str:
        how = Sampling(temperature=1.0, seed=seed)
        return text_of(Generation(scorer.generator, Placed(scorer.tokenize("a")), how, max_tokens=8))

    assert text(1) == text(1) != text(2)


def test_a_cancelled_text_raises() -> None:
    scorer = ToyScorer()
    generation = Generation(scorer.generator, Placed(scorer.tokenize("a")))
    next(generation)
    generation.cancel()
    with pytest.raises(ScoringInterrupted):
        next(generation)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -1.0),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", 2**31),
        ("top_k", -1),
    ],
)
def test_invalid_sampling_is_refused(field: str, value: float) -> None:
    with pytest.raises(InputError) as refused:
        Sampling(**{field: value})
    assert refused.value.field == field


def test_max_tokens_of_zero_is_refused() -> None:
    scorer = ToyScorer()
    with raises(InputError, field="max_tokens"):
        Generation(scorer.generator, Placed(scorer.tokenize("a")), max_tokens=0)


# --- places ----------------------------------------------------------------------------------------------------------


def test_a_text_frees_its_slot_at_its_end_on_an_error_and_when_closed() -> None:
    scorer = ToyScorer()
    generator, placed = scorer.generator, Placed(scorer.tokenize("a"))
    text_of(Generation(generator, placed, max_tokens=3))
    assert generator.n_open == 0
    with Generation(generator, placed) as left:
        next(left)
        assert generator.n_open == 1
    assert generator.n_open == 0
    assert list(left) == []
    left.close()
    left.cancel()
    failing = Generation(generator, placed)
    failing.cancel()
    with pytest.raises(ScoringInterrupted):
        next(failing)
    assert generator.n_open == 0
    assert list(failing) == []


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.5, seed=7), Sampling(1.5, seed=-7)])
def test_a_pause_between_slices_does_not_change_the_text(sampling: Sampling) -> None:
    scorer = ToyScorer()
    whole = Generation(scorer.generator, Placed(scorer.tokenize("a")), sampling, 3 * SLICE + 5)
    expected = [piece.token.id for piece in whole]
    paused = Generation(scorer.generator, Placed(scorer.tokenize("a")), sampling, 3 * SLICE + 5)
    found = []
    for piece in paused:
        found.append(piece.token.id)
        if len(found) % SLICE == 0:
            paused.pause()
            assert scorer.generator.n_open == 0
    assert found == expected
    assert (paused.n_tokens, paused.finish_reason) == (whole.n_tokens, whole.finish_reason)


def test_the_slices_of_a_sample_differ() -> None:
    scorer = ToyScorer()
    scorer.logits_after = lambda *_: np.zeros(257)
    sampled = Generation(scorer.generator, Placed(scorer.tokenize("a")), Sampling(1.0, seed=1), 2 * SLICE)
    ids = [piece.token.id for piece in sampled]
    assert ids[:SLICE] != ids[SLICE:]


def test_a_text_cancelled_while_paused_does_not_continue() -> None:
    scorer = ToyScorer()
    generation = Generation(scorer.generator, Placed(scorer.tokenize("a")))
    next(generation)
    generation.pause()
    generation.cancel()
    with pytest.raises(ScoringInterrupted):
        next(generation)
    assert scorer.generator.n_open == 0
