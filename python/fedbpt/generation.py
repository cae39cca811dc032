"""A text put to a model, with a tuned prompt where tuning placed it, and what the model says to it piece by piece."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fedbpt.errors import InputError
from fedbpt.generator import Generator, Placed, Sampling, TextModel, Token
from fedbpt.messages import PromptPlace, Template
from fedbpt.pieces import TextPieces
from fedbpt.tasks.task import bos_ids, render_ids

FinishReason: TypeAlias = Literal["stop", "length"]


class Piece(NamedTuple):
    """What one token added to the text, perhaps nothing yet; ``token`` None for what was held back to the end."""

    text: str
    token: Token | None


class Generation:
    """A text as it is generated: iterate over its pieces. `cancel` ends it from any thread.

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

    def __init__(
        self,
        generator: Generator,
        placed: Placed,
        sampling: Sampling | None = None,
        max_tokens: int | None = None,
        stop: tuple[str, ...] = (),
        n_likeliest: int = 0,
    ) -> None:
        if max_tokens is not None and max_tokens < 1:
            raise InputError(f"max_tokens must be at least 1, got {max_tokens}")
        self._generator = generator
        self._stream = generator.open(placed, sampling or Sampling())
        self.n_prompt = len(placed.ids)
        """Tokens that the model reads."""
        self.n_tokens = 0
        """Tokens generated so far, without the one that ends the text."""
        self.finish_reason: FinishReason | None = None
        """``stop``: the model ended its text, or a stop string came; ``length``: there was no room for more."""
        room = generator.n_ctx - self.n_prompt
        self._most = room if max_tokens is None else min(max_tokens, room)
        self._n_likeliest = n_likeliest
        self._text = TextPieces(stop)
        self._pieces = self._generate()

    @property
    def n_reused(self) -> int:
        """Tokens of ``n_prompt`` whose KV was there already."""
        return self._stream.n_reused

    def cancel(self) -> None:
        """From any thread: the next piece raises `ScoringInterrupted`."""
        self._stream.cancel()

    def __iter__(self) -> Iterator[Piece]:
        return self

    def __next__(self) -> Piece:
        return next(self._pieces)

    def _generate(self) -> Iterator[Piece]:
        while self.n_tokens < self._most:
            token = self._stream.next(self._n_likeliest)
            if self._generator.is_end(token.id):
                self.finish_reason = "stop"
                break
            self.n_tokens += 1
            piece = self._text.add(self._generator.piece(token.id))
            if self._text.stopped:
                self.finish_reason = "stop"
                yield Piece(piece, token)
                return
            yield Piece(piece, token)
        self.finish_reason = self.finish_reason or "length"
        rest = self._text.end()
        if rest:
            yield Piece(rest, None)


def place(
    model: TextModel,
    template: Template,
    text: str,
    max_text_tokens: int | None = None,
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
    if rows is None or not len(rows):
        return Placed(ids)
    n_rows = len(rows)
    if placement == "cue":
        return Placed(ids, rows, len(ids) - n_rows)
    n_bos = 0 if placement == "first" else len(bos_ids(model))
    return Placed(np.concatenate([ids[:n_bos], np.zeros(n_rows, dtype=np.int32), ids[n_bos:]]), rows, n_bos)
