"""`Generation`: a text generated piece by piece. `place`: a text, its template and a tuned prompt as model input."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Final, Literal, NamedTuple, TypeAlias

import numpy as np
from msgspec import UNSET
from numpy.typing import NDArray

from fedbpt.argument_types import checked
from fedbpt.engine.pieces import TextPieces
from fedbpt.engine.text_generator import SEEDS, Generator, Placed, Sampling, TextModel, Token, TokenStream, check_rows
from fedbpt.errors import InputError, ScoringInterrupted
from fedbpt.protocol.seeding import derive_seed
from fedbpt.protocol.specs import PromptSpec, Template
from fedbpt.quantities import NaturalInt, PositiveInt
from fedbpt.tasks.task import bos_ids, render_ids

FinishReason: TypeAlias = Literal["stop", "length"]

SLICE: Final = 32
"""Interval in tokens at which a text may be paused."""


class Piece(NamedTuple):
    """Text that one token completed, possibly empty; ``token`` None: the text held back until the end."""

    text: str
    token: Token | None


class Generation:
    """A text being generated: iterate over its pieces. `cancel` ends it from any thread.

    A generator has a small number of slots. This text holds one until it ends, an error occurs, or `close` is called
    (by a ``with`` statement, for example); `pause` frees it until the next piece.

    Args:
        generator: of the model.
        placed: the model's input.
        sampling: how tokens are chosen.
        max_tokens: maximum number of tokens; None: up to the end of the context.
        stop: strings that end the text; they are not part of it.
        n_likeliest: number of likeliest tokens to report with each token.

    Raises:
        InputError: ``max_tokens`` < 1; as `Generator.open`.
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
        """Number of input tokens."""
        self.finish_reason: FinishReason | None = None
        """``stop``: the model ended its text, or a stop string was found; ``length``: ``max_tokens`` or context end."""
        room = generator.n_ctx - self.n_prompt
        self._max_tokens = room if max_tokens is None else min(max_tokens, room)
        self._generator = generator
        self._placed = placed
        self._sampling = sampling or Sampling()
        self._n_likeliest = n_likeliest
        self._text = TextPieces(stop)
        self._ids: list[int] = []
        self._slice = 0
        self._cancelled = False
        self._closed = False
        self._stream: TokenStream | None = self._open()
        self.n_reused = self._stream.n_reused
        """Input tokens whose KV was reused."""

    @property
    def n_tokens(self) -> int:
        """Tokens generated so far, without the one that ends the text."""
        return len(self._ids)

    @property
    def n_places(self) -> int:
        """Number of texts that its generator holds at a time."""
        return self._generator.n_places

    @property
    def n_ctx(self) -> int:
        """Length of its generator's context in tokens."""
        return self._generator.n_ctx

    def cancel(self) -> None:
        """Make the next piece raise `ScoringInterrupted`; callable from any thread."""
        self._cancelled = True
        stream = self._stream
        if stream is not None:
            stream.cancel()

    def pause(self) -> None:
        """Free the slot until the next piece is requested. Call it only after a multiple of `SLICE` tokens.

        Elsewhere, a pause would change the text that sampling with a seed gives.
        """
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def close(self) -> None:
        """Free the slot and end the iteration."""
        self._closed = True
        self.pause()

    def __enter__(self) -> Generation:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[Piece]:
        return self

    def __next__(self) -> Piece:
        (found,) = next_of_all([self])
        if isinstance(found, Exception):
            raise found
        if found is None:
            raise StopIteration
        return found

    @property
    def waits(self) -> bool:
        """Whether the next piece needs a token."""
        return not self._closed and self.n_tokens < self._max_tokens

    def _take(self, token: Token | None) -> Piece | None:
        """The piece of the next token, None: there is none; returns None at the end, if no text was held back."""
        if self._closed:
            return None
        if token is not None and not self._generator.is_end(token.id):
            self._ids.append(token.id)
            piece = Piece(self._text.add(self._generator.piece(token.id)), token)
            if self._text.stopped:
                self.finish_reason = "stop"
                self.close()
            return piece
        self.finish_reason = "length" if token is None else "stop"
        self.close()
        rest = self._text.end()
        return Piece(rest, None) if rest else None

    def _running(self) -> TokenStream:
        due = self.n_tokens // SLICE if self._is_repeatable else 0
        if due != self._slice:
            self.pause()
            self._slice = due
        if self._cancelled:
            raise ScoringInterrupted("text generation was cancelled")
        if self._stream is None:
            self._stream = self._open()
        return self._stream

    @property
    def _is_repeatable(self) -> bool:
        return self._sampling.temperature > 0 and self._sampling.seed is not None

    def _open(self) -> TokenStream:
        """Open a stream that continues the text so far. Each slice has its own seed, so that it can be reopened."""
        placed = self._placed
        sampling = self._sampling
        seed = sampling.seed
        if self._ids:
            ids = np.concatenate([placed.ids, np.array(self._ids, dtype=np.int32)])
            placed = replace(placed, ids=ids, n_said=len(self._ids))
        if self._slice and seed is not None:
            sampling = replace(sampling, seed=derive_seed(seed % SEEDS, "text", self._slice))
        return self._generator.open(placed, sampling)


def next_of_all(generations: Sequence[Generation]) -> list[Piece | Exception | None]:
    """The next piece of each text of one generator, computed in one pass. None: it has ended.

    An exception is what iterating over this text alone would raise.
    """
    found: dict[int, Piece | Exception | None] = {}
    running: dict[int, TokenStream] = {}
    for i, generation in enumerate(generations):
        try:
            if generation.waits:
                running[i] = generation._running()
            else:
                found[i] = generation._take(None)
        except Exception as error:  # noqa: BLE001 - it is this text's alone
            found[i] = error
    for i, token in zip(running, _tokens(generations, running), strict=True):
        found[i] = token if isinstance(token, Exception) else generations[i]._take(token)
    for i, result in found.items():
        if isinstance(result, Exception):
            generations[i].close()
    return [found[i] for i in range(len(generations))]


def _tokens(generations: Sequence[Generation], running: Mapping[int, TokenStream]) -> Sequence[Token | Exception]:
    """The next token of each of ``running``, or what it raised."""
    try:
        if len(running) > 1:
            counts = [generations[i]._n_likeliest for i in running]
            return generations[next(iter(running))]._generator.next_all(list(running.values()), counts)
        return [stream.next(generations[i]._n_likeliest) for i, stream in running.items()]
    except Exception as error:  # noqa: BLE001 - each text would raise it
        return [error] * len(running)
    except BaseException:
        for i in running:
            generations[i].close()
        raise


@checked
def place(
    model: TextModel,
    template: Template,
    text: str,
    max_text_tokens: PositiveInt | None = None,
    rows: NDArray[np.float32] | None = None,
    prompt: PromptSpec | None = None,
) -> Placed:
    """Render a text in its template, with soft prompt ``rows`` [n_prompt, n_embd] where ``prompt`` has them.

    ``max_text_tokens``: limit for the text without its template; None: the context size. ``rows`` None: no soft prompt.

    Raises:
        InputError: an empty text, a cue shorter than the rows.
        TaskError: a template that does not work with this model.
    """
    ids = render_ids(model, template, text, max_text_tokens or model.generator.n_ctx)
    rows = check_rows([] if rows is None else rows, model.n_embd)
    if prompt is None or not len(rows):
        return Placed(ids)
    n_rows = len(rows)
    if prompt.placement == "cue" and n_rows > len(ids):
        raise InputError(
            f"{n_rows} rows are more than the {len(ids)} tokens of the text and its template: use a longer text",
            field="rows",
            limit=len(ids),
        )
    if prompt.shift is not UNSET:
        layers = prompt.shift.layers
        return Placed(ids, rows, len(ids) - 1, (layers[0], len(layers), prompt.placement == "layers"))
    if prompt.placement == "cue":
        return Placed(ids, rows, len(ids) - n_rows)
    n_bos = 0 if prompt.placement == "first" else len(bos_ids(model))
    return Placed(np.concatenate([ids[:n_bos], np.zeros(n_rows, dtype=np.int32), ids[n_bos:]]), rows, n_bos)
