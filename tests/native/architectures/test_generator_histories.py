"""A text's log-probabilities do not depend on earlier texts: random histories, all kinds of windows.

A history opens texts of many lengths with common prefixes, several at a time, and continues them in random order.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from tiny_case import Case

from fedbpt.engine.native_generator import NativeGenerator, NativeStream
from fedbpt.engine.text_generator import Placed, Sampling, Token

N_TEXTS = 24
N_STREAMS = 3
N_LIKELIEST = 20  # in a repetitive text, the first is almost certain
# nats: float32 models differ only by rounding, the others by rounding of activations in batches of other shapes
TOLERANCE = {"f32": 1e-3, "f16": 0.05, "q8_0": 0.15}
# float32 for mixtures, where rounding may select another expert, and for attention with ALiBi or sinks, which rounds
# by where its cells lie.
NO_WINDOW = [("llama (Llama 3)", "q8_0"), ("gpt2", "q8_0"), ("deepseek2 (V3)", "f32"), ("bloom", "f32")]
WINDOWS = [
    ("gemma2", "q8_0"),
    ("cohere2", "q8_0"),
    ("olmo2 (OLMo 3)", "q8_0"),
    ("cohere2moe", "f32"),
    ("gemma3", "f16"),
    ("gpt-oss", "f32"),
    ("mimo2", "f32"),
]


def new(case: Case) -> NativeGenerator:
    return NativeGenerator(case.scorer._engine, case.scorer._files)


class History:
    """Random texts of a seed: some new, some with a prefix of an earlier one."""

    def __init__(self, case: Case, seed: int) -> None:
        self.case = case
        self.random = np.random.default_rng(seed)
        self.texts: list[NDArray[np.int32]] = []

    def next(self) -> Placed:
        draw, n_max = self.random, 440
        ids = draw.integers(3, self.case.model.n_vocab, int(np.exp(draw.uniform(0, np.log(n_max)))), dtype=np.int32)
        if self.texts and draw.random() < 0.6:
            earlier = self.texts[draw.integers(len(self.texts))]
            shared = earlier[: draw.integers(1, len(earlier) + 1)]
            ids = np.concatenate([shared, ids])[:n_max]
        self.texts.append(ids)
        if len(ids) > 8 and draw.random() < 0.3:
            rows = self.case.prompts(1, 4, seed=int(draw.integers(3)))[0]
            return Placed(ids, rows, int(draw.integers(0, len(ids) - 4)))
        return Placed(ids)


def wrong(case: Case, seed: int) -> list[str]:
    """Texts of a history for which the generator's results differ from a new generator's."""
    history, generator, found = History(case, seed), new(case), []
    streams: list[tuple[Placed, NativeStream, list[Token]]] = []

    def close(place: int) -> None:
        given, _, tokens = streams.pop(place)
        fresh = new(case).open(given, Sampling())
        for i, token in enumerate(tokens):
            alone = fresh.next(N_LIKELIEST)
            expected = dict(alone.likeliest)
            off = max((abs(p - expected[id_]) for id_, p in token.likeliest if id_ in expected), default=np.inf)
            if off > TOLERANCE[case.weights]:
                found.append(f"token {i} after {len(given.ids)}: {off:.4f} nats off")
            if token.id != alone.id:  # two tokens equally likely up to rounding: the texts differ from here on
                break

    for _ in range(N_TEXTS):
        if len(streams) == N_STREAMS:
            close(int(history.random.integers(N_STREAMS)))
        given = history.next()
        streams.append((given, generator.open(given, Sampling()), []))
        for place in history.random.permutation(len(streams)):
            _, stream, tokens = streams[place]
            tokens += [stream.next(N_LIKELIEST) for _ in range(history.random.integers(1, 4))]
    while streams:
        close(0)
    return found


@pytest.mark.parametrize("seed", range(2, 5))
@pytest.mark.parametrize(("name", "weights"), [("llama", "q8_0"), ("gemma3", "q8_0")])
def test_texts_after_a_random_history_are_those_of_a_fresh_generator(
    case_of: Callable[..., Case], name: str, weights: str, seed: int
) -> None:
    assert wrong(case_of(name, weights), seed) == []


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_float32_texts_after_a_random_history_are_those_of_a_fresh_generator(
    case_of: Callable[..., Case], name: str
) -> None:
    assert wrong(case_of(name, "f32"), seed=3) == []


@pytest.mark.parametrize(("name", "weights"), NO_WINDOW + WINDOWS)
def test_texts_of_other_architectures_after_a_random_history_are_those_of_a_fresh_generator(
    architecture_case: Callable[..., Case], name: str, weights: str
) -> None:
    case = architecture_case(name, weights)
    assert [error for seed in (2, 3) for error in wrong(case, seed)] == []
