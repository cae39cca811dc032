"""A text put to a model, with a tuned prompt where tuning placed it, and what the model says to it piece by piece."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Final, Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fedbpt.argument_types import checked
from fedbpt.engine.pieces import TextPieces
from fedbpt.engine.text_generator import SEEDS, Generator, Placed, Sampling, TextModel, Token, TokenStream, check_rows
from fedbpt.errors import ScoringInterrupted
from fedbpt.protocol.seeding import derive_seed
from fedbpt.protocol.specs import PromptPlace, Template
from fedbpt.quantities import NaturalInt, PositiveInt
from fedbpt.tasks.task import bos_ids, render_ids

FinishReason: TypeAlias = Literal["stop", "length"]

SLICE: Final = 32
"""Tokens after which a text may be paused."""


class Piece(NamedTuple):
    """What one token added to the text, perhaps nothing yet; ``token`` None for what was held back to the end."""

    text: str
    token: Token | None


class Generation:
    """A text as it is generated: iterate over its pieces. `cancel` ends it from any thread.

    A generator goes on with few texts at a time. This one's place is given back at the end of the text, where it fails,
    and by `close`, which a context manager calls; until then it is held, except after `pause`.

    Args:
        generator: of the model.
        placed: what the model reads.
        sampling: how tokens are chosen.
        max_tokens: at most so many; None: as many as the context has room for.
        stop: strings that end the text, and are left out.
        n_likeliest: how many of the likeliest tokens to name beside each.

    Raises:
        InputError: ``max_tokens`` < 1; what `Generator.open` refuses.
    """

    @checked
    def __init__(
        self,
        generator: Generator,
        placed: Placed,
        sampling: Sampling | None = None,
        max_tokens: PositiveInt | None = None,
        stop: tuple[str, ...] = (),
        n_likeliest: NaturalInt = 0,
    ) -> None:
        self.n_prompt = len(placed.ids)
        """Tokens that the model reads."""
        self.finish_reason: FinishReason | None = None
        """``stop``: the model ended its text, or a stop string came; ``length``: there was no room for more."""
        room = generator.n_ctx - self.n_prompt
        self._most = room if max_tokens is None else min(max_tokens, room)
        self._generator, self._placed, self._sampling = generator, placed, sampling or Sampling()
        self._n_likeliest = n_likeliest
        self._text = TextPieces(stop)
        self._ids: list[int] = []
        self._slice = 0
        self._cancelled = self._closed = False
        self._stream: TokenStream | None = self._open()
        self.n_reused = self._stream.n_reused
        """Tokens of ``n_prompt`` whose KV was there already."""

    @property
    def n_tokens(self) -> int:
        """Tokens generated so far, without the one that ends the text."""
        return len(self._ids)

    def cancel(self) -> None:
        """From any thread: the next piece raises `ScoringInterrupted`."""
        self._cancelled = True
        stream = self._stream
        if stream is not None:
            stream.cancel()

    def pause(self) -> None:
        """Give the place back until the next piece is asked for. Call it after a multiple of `SLICE` tokens.

        In between, sampling with a seed would not give the text again that it gives without a pause.
        """
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def close(self) -> None:
        """Give the place back: no more pieces come."""
        self._closed = True
        self.pause()

    def __enter__(self) -> Generation:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[Piece]:
        return self

    def __next__(self) -> Piece:
        piece = None
        if not self._closed:
            try:
                piece = self._advance()
            except BaseException:
                self.close()
                raise
            if self.finish_reason is not None:
                self.close()
        if piece is None:
            raise StopIteration
        return piece

    def _advance(self) -> Piece | None:
        """The next piece; the last one may be missing."""
        if self.n_tokens < self._most:
            token = self._running().next(self._n_likeliest)
            if not self._generator.is_end(token.id):
                self._ids.append(token.id)
                piece = Piece(self._text.add(self._generator.piece(token.id)), token)
                if self._text.stopped:
                    self.finish_reason = "stop"
                return piece
            self.finish_reason = "stop"
        else:
            self.finish_reason = "length"
        rest = self._text.end()
        return Piece(rest, None) if rest else None

    def _running(self) -> TokenStream:
        due = self.n_tokens // SLICE if self._is_repeatable else 0
        if due != self._slice:
            self.pause()
            self._slice = due
        if self._stream is None:
            self._stream = self._open()
        if self._cancelled:
            raise ScoringInterrupted("the text was interrupted")
        return self._stream

    @property
    def _is_repeatable(self) -> bool:
        return self._sampling.temperature > 0 and self._sampling.seed is not None

    def _open(self) -> TokenStream:
        """Go on with what there is so far. Each slice has a seed of its own, so that it may begin anew."""
        placed, sampling, seed = self._placed, self._sampling, self._sampling.seed
        if self._ids:
            placed = replace(placed, ids=np.concatenate([placed.ids, np.array(self._ids, dtype=np.int32)]))
        if self._slice and seed is not None:
            sampling = replace(sampling, seed=derive_seed(seed % SEEDS, "text", self._slice))
        return self._generator.open(placed, sampling)


@checked
def place(
    model: TextModel,
    template: Template,
    text: str,
    max_text_tokens: PositiveInt | None = None,
    rows: NDArray[np.float32] | None = None,
    placement: PromptPlace = "cue",
) -> Placed:
    """A text in its template, with soft prompt ``rows`` [n_prompt, n_embd] where an `Objective` has them; None: none.

    ``max_text_tokens``: of the text alone; None: as many as the context has.

    Raises:
        InputError: an empty text, a cue shorter than the rows.
        TaskError: a template that does not work with this model.
    """
    ids = render_ids(model, template, text, max_text_tokens or model.generator.n_ctx)
    rows = check_rows([] if rows is None else rows, model.n_embd)
    if not len(rows):
        return Placed(ids)
    n_rows = len(rows)
    if placement == "cue":
        return Placed(ids, rows, len(ids) - n_rows)
    n_bos = 0 if placement == "first" else len(bos_ids(model))
    return Placed(np.concatenate([ids[:n_bos], np.zeros(n_rows, dtype=np.int32), ids[n_bos:]]), rows, n_bos)
