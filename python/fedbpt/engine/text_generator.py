"""The `Generator` protocol: a frozen language model that goes on with texts, token by token, under soft prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, TypeGuard

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedbpt.argument_types import DataclassMeta, array_of, check_fields
from fedbpt.engine.scorer import Scorer
from fedbpt.errors import InputError

SEEDS = 2**32 - 1
"""Seeds are 0 … SEEDS − 1."""


@dataclass(frozen=True)
class Sampling(metaclass=DataclassMeta):
    """How the next token is chosen. ``temperature`` 0: the most likely one, whatever the rest says.

    ``top_p``: only from the likeliest tokens that have so much probability together; ``top_k``: from so many, 0: all.
    ``seed`` None: another one each time. Raises `InputError` for what makes no sense.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if not 0 <= self.temperature < float("inf"):
            raise InputError(f"temperature must be a number from 0 on, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if not 0 <= self.top_k < 2**31:
            raise InputError(f"top_k must be a number of tokens, or 0 for all, got {self.top_k}")


OPENAIS = Sampling(temperature=1.0)
"""How OpenAI's API samples where nothing else is said."""


@dataclass(frozen=True)
class Placed:
    """What a model reads: token ids [n], those from ``rows_at`` on embedded as ``rows`` [n_rows, n_embd] instead."""

    ids: NDArray[np.int32]
    rows: NDArray[np.float32] = field(default_factory=lambda: np.empty((0, 0), dtype=np.float32))
    rows_at: int = 0


class Token(NamedTuple):
    """A token that was chosen, its log-probability in nats before any sampling, and those of the likeliest there."""

    id: int
    log_prob: float
    likeliest: tuple[tuple[int, float], ...] = ()


class TokenStream(Protocol):
    """A text that is being generated."""

    @property
    def n_reused(self) -> int:
        """Tokens of what was given that did not have to be computed again."""
        ...

    def next(self, n_likeliest: int = 0) -> Token:
        """Choose the next token. Raises `ScoringInterrupted` after `cancel`."""
        ...

    def cancel(self) -> None:
        """End it, from any thread: `next` raises, within a graph where it is computing."""
        ...

    def close(self) -> None:
        """Give back its place among the texts that are being generated. Not while `next` computes."""
        ...


class Generator(Protocol):
    """What generation asks of a model."""

    @property
    def n_ctx(self) -> int:
        """The longest text, in tokens, with what was given."""
        ...

    @property
    def n_tokens(self) -> int:
        """Forward tokens computed so far."""
        ...

    def open(self, placed: Placed, sampling: Sampling) -> TokenStream:
        """Begin a text. Raises `InputError`: no tokens, rows that do not fit, more tokens than the context has."""
        ...

    def piece(self, token: int) -> bytes:
        """What a token adds to the text, perhaps a part of a character; nothing for special tokens."""
        ...

    def is_end(self, token: int) -> bool:
        """Whether the model ends its text with this token."""
        ...

    @property
    def recommended(self) -> Sampling:
        """How the model's maker recommends to sample, as far as the model file says; else `OPENAIS`."""
        ...

    def text_ids(self, text: str) -> NDArray[np.int32]:
        """Token ids [n] of a text to go on with, BOS first where the model was trained with it.

        What names a special token is that token, BOS too: then there is no other one.
        """
        ...

    def chat_ids(self, messages: Sequence[tuple[str, str]]) -> NDArray[np.int32]:
        """Token ids [n] of (role, content) messages, up to where the assistant's answer begins.

        Raises `InputError` where the model has no chat template, or a content names one of its special tokens.
        """
        ...


class TextModel(Scorer, Protocol):
    """A `Scorer` that generates, too."""

    @property
    def generator(self) -> Generator: ...


def generates(model: Scorer) -> TypeGuard[TextModel]:
    """Whether the scorer is one that generates, too."""
    return hasattr(type(model), "generator")


def check_rows(rows: ArrayLike, n_embd: int) -> NDArray[np.float32]:
    """Rows as float32 [n_rows, n_embd]; none at all may have any shape. Raises `InputError`."""
    given = np.ascontiguousarray(array_of(rows, np.float32, "rows"))
    if given.size == 0:
        return np.empty((0, n_embd), dtype=np.float32)
    if given.ndim != 2 or given.shape[1] != n_embd:
        raise InputError(f"rows must be [n_rows, {n_embd}], got {list(given.shape)}")
    return given
