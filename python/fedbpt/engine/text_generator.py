"""The `Generator` protocol: a frozen language model that continues texts, token by token, under soft prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeGuard

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedbpt.argument_types import DataclassMeta, array_of, check_fields
from fedbpt.engine.scorer import Scorer
from fedbpt.errors import InputError, ScoringInterrupted

SEEDS = 2**32 - 1
"""Number of seeds: 0 … SEEDS − 1."""


@dataclass(frozen=True)
class Sampling(metaclass=DataclassMeta):
    """How the next token is chosen. ``temperature`` 0: always the likeliest token; the other fields are then unused.

    ``top_p``: sample from the smallest set of tokens with this total probability (nucleus sampling); ``top_k``: from
    the k likeliest, 0: all; ``seed`` None: a fresh seed for each text. ``grammar``: of the whole text, in llama.cpp's
    GBNF with rule ``root`` (`Generator.json_grammar`); empty: any text. Raises `InputError` for invalid values.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    grammar: str = ""

    def __post_init__(self) -> None:
        check_fields(self)
        if not 0 <= self.temperature < float("inf"):
            raise InputError(f"temperature must be finite and at least 0, got {self.temperature}", field="temperature")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p must be above 0 and at most 1, got {self.top_p}", field="top_p")
        if not 0 <= self.top_k < 2**31:
            raise InputError(f"top_k must be from 0 (all tokens) to 2^31 - 1, got {self.top_k}", field="top_k")


GREEDY = Sampling()
"""Always the likeliest token."""

OPENAI_SAMPLING = Sampling(temperature=1.0)
"""Defaults of OpenAI's API."""


@dataclass(frozen=True)
class Placed:
    """A model's input: token ids [n]; from ``rows_at`` on, ``rows`` [n_rows, n_embd] replace their embeddings.

    ``shifted``: first layer, number of layers, and whether later tokens count too; ``rows`` are then added to these
    layers' outputs at token ``rows_at``. ``n_said``: the last ids that were generated, which a grammar has behind it.
    """

    ids: NDArray[np.int32]
    rows: NDArray[np.float32] = field(default_factory=lambda: np.empty((0, 0), dtype=np.float32))
    rows_at: int = 0
    shifted: tuple[int, int, bool] | None = None
    n_said: int = 0


class Answer(NamedTuple):
    """A generated text, and its tokens [n]; what follows a stop string is only in the tokens."""

    text: str
    ids: NDArray[np.int32]


class Token(NamedTuple):
    """A chosen token, its log-probability (nats, before sampling), and (id, log-probability) of the likeliest."""

    id: int
    log_prob: float
    likeliest: tuple[tuple[int, float], ...] = ()


class TokenStream(Protocol):
    """A text that is being generated."""

    @property
    def n_reused(self) -> int:
        """Input tokens whose KV was reused."""
        ...

    def next(self, n_likeliest: int = 0) -> Token:
        """Choose the next token. Raises `ScoringInterrupted` after `cancel`."""
        ...

    def cancel(self) -> None:
        """Make `next` raise; callable from any thread, and takes effect within a running graph."""
        ...

    def close(self) -> None:
        """Free the slot of this text. Not to be called while `next` runs."""
        ...


class GeneratingPlan(Protocol):
    """A data set whose texts are continued many at a time; see `fedbpt.engine.native_scorer.NativePlan.generate`."""

    @property
    def n_tokens(self) -> int:
        """Forward tokens computed so far."""
        ...

    def generate(
        self,
        embeds: ArrayLike,
        indices: ArrayLike | None = None,
        sampling: Sampling = GREEDY,
        *,
        max_tokens: int = 64,
        stop: Sequence[str] = (),
    ) -> list[list[Answer]]: ...


class Generator(Protocol):
    """A model that generates text."""

    @property
    def n_ctx(self) -> int:
        """Maximum length of a text in tokens, input included."""
        ...

    @property
    def n_tokens(self) -> int:
        """Forward tokens computed so far."""
        ...

    @property
    def n_places(self) -> int:
        """Number of texts that can be open at a time."""
        ...

    def next_all(
        self, streams: Sequence[Any], n_likeliest: Sequence[int]
    ) -> list[Token | InputError | ScoringInterrupted]:
        """`TokenStream.next` of several streams of this generator, in one pass. An error of one is in its place."""
        ...

    def open(self, placed: Placed, sampling: Sampling) -> TokenStream:
        """Begin a text. Raises `InputError`: no tokens, rows that do not fit, more tokens than the context holds."""
        ...

    def piece(self, token: int) -> bytes:
        """UTF-8 bytes that a token adds to the text, possibly a part of a character; empty for special tokens."""
        ...

    def is_end(self, token: int) -> bool:
        """Whether the model ends its text with this token."""
        ...

    @property
    def recommended(self) -> Sampling:
        """Sampling that the model file recommends; `OPENAI_SAMPLING` for what it does not specify."""
        ...

    def json_grammar(self, schema: str) -> str:
        """The grammar (`Sampling`) of the JSON that a JSON schema, given as JSON, allows. Raises `InputError`."""
        ...

    def text_ids(self, text: str) -> NDArray[np.int32]:
        """Token ids [n] of a text to continue, with BOS first if the model was trained with it.

        Special tokens in the text are parsed as such; a text that begins with BOS gets no second one.
        """
        ...

    def chat_ids(self, messages: Sequence[tuple[str, str]]) -> NDArray[np.int32]:
        """Token ids [n] of (role, content) messages, up to the beginning of the assistant's reply.

        Raises `InputError` if the model has no chat template, or a message contains one of its special tokens.
        """
        ...


class TextModel(Scorer, Protocol):
    """A `Scorer` that also generates text."""

    @property
    def generator(self) -> Generator: ...


def generates(model: Scorer) -> TypeGuard[TextModel]:
    """Whether the scorer also generates text."""
    return hasattr(type(model), "generator")


def check_rows(rows: ArrayLike, n_embd: int) -> NDArray[np.float32]:
    """Convert rows to float32 [n_rows, n_embd]; an empty array may have any shape. Raises `InputError`."""
    given = np.ascontiguousarray(array_of(rows, np.float32, "rows"))
    if given.size == 0:
        return np.empty((0, n_embd), dtype=np.float32)
    if given.ndim != 2 or given.shape[1] != n_embd:
        raise InputError(f"rows must have shape [n_rows, {n_embd}], got {list(given.shape)}", field="rows")
    return given
