"""Text generation by the toy model: every token is computed from the whole sequence before it."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedbpt.engine.text_generator import OPENAI_SAMPLING, SEEDS, Placed, Sampling, Token, check_rows
from fedbpt.errors import InputError, ScoringInterrupted

if TYPE_CHECKING:
    from tests.support.toy_scorer import ToyScorer

END = 0  # the byte that ends a text
PLACES = 4  # generated at the same time


class ToyGenerator:
    """`fedbpt.engine.text_generator.Generator` of a `ToyScorer`. ``opened``: texts so far; ``pace``: cleared to block.

    A text counts as open until it is closed; the engine also frees texts without references.
    """

    def __init__(self, scorer: ToyScorer) -> None:
        self._scorer = scorer
        self.n_tokens = 0
        self.opened: list[Placed] = []
        self.n_open = 0
        self.recommended = OPENAI_SAMPLING
        self.cancelled = threading.Event()
        self.pace = threading.Event()
        self.pace.set()

    @property
    def n_ctx(self) -> int:
        return self._scorer.n_ctx

    @property
    def n_places(self) -> int:
        return PLACES

    def next_all(
        self, streams: Sequence[ToyStream], n_likeliest: Sequence[int]
    ) -> list[Token | InputError | ScoringInterrupted]:
        found: list[Token | InputError | ScoringInterrupted] = []
        for stream, n in zip(streams, n_likeliest, strict=True):
            try:
                found.append(stream.next(n))
            except ScoringInterrupted as error:
                found.append(error)
        return found

    def open(self, placed: Placed, sampling: Sampling) -> ToyStream:
        check_rows(placed.rows, self._scorer.n_embd)
        if not len(placed.ids):
            raise InputError("the text is empty: give at least one token")
        if len(placed.ids) >= self.n_ctx:
            raise InputError(f"the text has {len(placed.ids)} tokens, the context is {self.n_ctx}: shorten the text")
        if self.n_open == PLACES:
            raise InputError(f"{PLACES} texts are being generated: wait for one to end")
        self.opened.append(placed)
        return ToyStream(self, self._scorer, placed, sampling)

    def piece(self, token: int) -> bytes:
        return bytes([token]) if token < 256 else b""

    def is_end(self, token: int) -> bool:
        return token == END

    def json_grammar(self, schema: str) -> str:
        if "impossible" in schema:
            raise InputError("the JSON schema has no grammar: use simpler keywords")
        return 'root ::= "{}"'

    def text_ids(self, text: str) -> NDArray[np.int32]:
        return self._scorer.tokenize(text)

    def chat_ids(self, messages: Sequence[tuple[str, str]]) -> NDArray[np.int32]:
        return self._scorer.tokenize("".join(f"{role}: {content}\n" for role, content in messages) + "assistant:")


class ToyStream:
    n_reused = 0

    def __init__(self, generator: ToyGenerator, scorer: ToyScorer, placed: Placed, sampling: Sampling) -> None:
        self._generator, self._scorer, self._placed = generator, scorer, placed
        self._ids = [int(token) for token in placed.ids]
        self._sampling = sampling
        self._random = np.random.default_rng(None if sampling.seed is None else sampling.seed % SEEDS)
        self._cancelled = self._closed = False
        generator.n_open += 1
        self._said = [*b"{}", END] if sampling.grammar else []  # of any grammar

    def next(self, n_likeliest: int = 0) -> Token:
        assert not self._closed
        self._generator.pace.wait()
        if self._cancelled:
            raise ScoringInterrupted("the text was interrupted")
        self._generator.n_tokens += 1
        logits = self._scorer.logits_after(self._ids, self._placed.rows, self._placed.rows_at)
        log_p = logits - logits.max()
        log_p -= np.log(np.exp(log_p).sum())
        order = np.argsort(-log_p, kind="stable")
        token = int(order[0])
        if self._said:
            token = self._said.pop(0)
        elif self._sampling.temperature > 0:
            p = np.exp(log_p / self._sampling.temperature)
            token = int(self._random.choice(len(p), p=p / p.sum()))
        self._ids.append(token)
        return Token(token, float(log_p[token]), tuple((int(i), float(log_p[i])) for i in order[:n_likeliest]))

    def cancel(self) -> None:
        self._cancelled = True
        self._generator.cancelled.set()

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._generator.n_open -= 1
