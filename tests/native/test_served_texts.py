"""Generation as in serving: pauses between slices, abandoned texts, control tokens, recommended sampling."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import gguf
import pytest
import tiny_gguf
from tiny_case import Case

import fedbpt
from fedbpt.engine.native_generator import NativeGenerator
from fedbpt.engine.text_generator import OPENAI_SAMPLING, Placed, Sampling
from fedbpt.engine.text_stream import SLICE, Generation
from fedbpt.errors import ScoringInterrupted


@pytest.fixture
def uncollected() -> Iterator[None]:
    """Disable the garbage collector, so that only reference counts free objects."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def new(case: Case) -> NativeGenerator:
    return NativeGenerator(case.scorer._engine, case.scorer._files)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.5, top_p=0.9, top_k=40, seed=3)])
@pytest.mark.parametrize("rows", [0, 3])
def test_texts_paused_for_each_other_are_those_generated_alone(repeatable: Case, sampling: Sampling, rows: int) -> None:
    n, generator = 2 * SLICE + 3, new(repeatable)
    texts = [Placed(repeatable.ids(9 + i, seed=i), repeatable.prompts(1, rows, seed=i)[0], 5) for i in range(6)]
    expected = [list(Generation(new(repeatable), text, sampling, n)) for text in texts]
    running = []
    for text in texts:  # more than there are slots
        running.append(Generation(generator, text, sampling, n))
        running[-1].pause()
    found: list[list[Any]] = [[] for _ in texts]
    for _ in range(0, n, SLICE):
        for pieces, generation in zip(found, running, strict=True):
            pieces += islice(generation, SLICE)
            generation.pause()
    for pieces, whole in zip(found, expected, strict=True):
        assert [piece.token.id for piece in pieces] == [piece.token.id for piece in whole]
        close = [abs(a.token.log_prob - b.token.log_prob) for a, b in zip(pieces, whole, strict=True)]
        assert max(close) <= (1e-4 if repeatable.model.weights == "f32" else 0.05)


@pytest.mark.usefixtures("uncollected")
def test_abandoned_texts_free_their_slots_at_once(llama: Case) -> None:
    generator, given = new(llama), Placed(llama.ids(9))
    for _ in range(8):
        with Generation(generator, given) as text:
            next(text)
    for _ in range(8):
        text = Generation(generator, given)
        next(text)
        del text
    errors = []
    for _ in range(8):
        text = Generation(generator, given)
        next(text)
        text.cancel()
        with pytest.raises(ScoringInterrupted) as caught:
            next(text)
        errors.append(caught.value)  # with its traceback
    held = [Generation(generator, given) for _ in range(4)]
    for text in held:
        assert len(list(islice(text, 5))) == 5


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_control_tokens_in_a_text_to_continue_are_parsed(case_of: Any, name: str) -> None:
    case = case_of(name)
    generator, vocabulary = new(case), tiny_gguf.vocabulary(case.model)
    bos, eos = (vocabulary.pieces[token] for token in (vocabulary.bos, vocabulary.eos))
    ids = generator.text_ids(f"a{eos}b").tolist()
    assert ids.count(vocabulary.eos) == 1
    assert vocabulary.eos not in case.scorer.tokenize(f"a{eos}b")
    first = [vocabulary.bos] if case.model.add_bos else []
    assert generator.text_ids("ab").tolist() == case.scorer.tokenize("ab").tolist()
    assert ids[: len(first)] == first
    named = generator.text_ids(f"{bos}a").tolist()
    assert (named[0], named.count(vocabulary.bos)) == (vocabulary.bos, 1)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({}, OPENAI_SAMPLING),
        ({"temp": 0.6, "top_p": 0.95, "top_k": 20}, Sampling(0.6, 0.95, 20)),
        ({"temp": 0.25}, Sampling(0.25)),
        ({"top_k": 64, "min_p": 0.05}, Sampling(1.0, 1.0, 64)),
        ({"temp": 0.0, "top_k": -1}, Sampling(0.0)),
        ({"temp": -1.0}, Sampling(0.0)),
        ({"temp": float("nan")}, None),
        ({"top_p": 7.0}, None),
        ({"temp": "warm"}, None),
    ],
)
def test_recommended_sampling_is_read_from_the_model_file(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    said: dict[str, float | str],
    expected: Sampling | None,
) -> None:
    add = tiny_gguf._add_hyperparameters

    def add_more(writer: gguf.GGUFWriter, model: tiny_gguf.TinyModel) -> None:
        add(writer, model)
        for name, value in said.items():
            key = f"general.sampling.{name}"
            kinds = {str: writer.add_string, int: writer.add_int32, float: writer.add_float32}
            kinds[type(value)](key, value)

    monkeypatch.setattr(tiny_gguf, "_add_hyperparameters", add_more)
    scorer = fedbpt.load_model(tiny_gguf.write(tmp_path / "m.gguf", tiny_gguf.SMALLEST), n_threads=1)
    with caplog.at_level(logging.WARNING):
        found = scorer.generator.recommended
    wanted = expected or OPENAI_SAMPLING
    assert [found.temperature, found.top_p] == pytest.approx([wanted.temperature, wanted.top_p], abs=1e-6)
    assert (found.top_k, found.seed) == (wanted.top_k, None)
    assert bool(caplog.records) == (expected is None)
