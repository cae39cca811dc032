"""The `Generator` that runs on the llama.cpp fork, on the weights of a `NativeScorer`."""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from fedbpt.argument_types import checked
from fedbpt.checking import utf8
from fedbpt.engine.json_schema import check_schema
from fedbpt.engine.text_generator import OPENAI_SAMPLING, SEEDS, Placed, Sampling, Token, check_rows
from fedbpt.engine.token_arrays import token_ids
from fedbpt.errors import InputError, ScoringInterrupted
from fedbpt.models import WatchedFiles
from fedbpt.quantities import TokenId

if TYPE_CHECKING:
    from fedbpt import _native

log = logging.getLogger(__name__)

MAX_GRAMMAR: Final = 2**18
"""Maximum length of a JSON schema's grammar in characters."""


class NativeGenerator:
    """Continues texts (`fedbpt.engine.text_generator.Generator`). Thread-safe: calls that compute are serialised.

    It has its own KV cache, created with the first text and grown as texts need. A new text reuses the KV of the
    longest prefix, soft prompt rows included, that it shares with an earlier text; for the last seven prompts used, the
    KV up to the end of their rows is kept. Valid only in the process that created it: after a fork, take a new one from
    the scorer.
    """

    def __init__(self, engine: _native.Engine, files: WatchedFiles) -> None:
        self._engine = engine
        self._files = files
        self._generator = engine.generator()
        self._process = os.getpid()

    @property
    def n_ctx(self) -> int:
        return int(self._engine.n_ctx_train)

    @property
    def n_tokens(self) -> int:
        return int(self._generator.n_tokens)

    @property
    def n_cells(self) -> int:
        """Current capacity of the KV cache, in tokens."""
        return int(self._generator.n_cells)

    @checked
    def open(self, placed: Placed, sampling: Sampling) -> NativeStream:
        """See `fedbpt.engine.text_generator.Generator.open`. At most `n_places` texts can be open at a time."""
        _check_process(self._process)
        ids = token_ids(placed.ids, "ids")
        rows = check_rows(placed.rows, self._engine.n_embd)
        for name, given in (("rows_at", placed.rows_at), ("n_said", placed.n_said)):
            if not 0 <= given <= len(ids):
                raise InputError(f"{name} must be from 0 to the text's {len(ids)} tokens, got {given}", field=name)
        seed = secrets.randbelow(SEEDS) if sampling.seed is None else sampling.seed % SEEDS
        how = (sampling.temperature, sampling.top_p, sampling.top_k, seed)
        grammar = utf8(sampling.grammar, "grammar")
        stream = self._generator.open(ids, rows, placed.rows_at, *how, placed.shifted, grammar, placed.n_said)
        return NativeStream(self._generator, stream, self._files)

    @property
    def n_places(self) -> int:
        return int(self._generator.n_places)

    def next_all(
        self, streams: Sequence[NativeStream], n_likeliest: Sequence[int]
    ) -> list[Token | InputError | ScoringInterrupted]:
        _check_process(self._process)
        with self._files.unchanged():
            found = self._generator.next_all([each.opened for each in streams], list(n_likeliest))
        return [_token(each) for each in found]

    @checked
    def piece(self, token: TokenId) -> bytes:
        return self._generator.piece(token)

    @checked
    def is_end(self, token: TokenId) -> bool:
        return self._generator.is_end(token)

    @cached_property
    def recommended(self) -> Sampling:
        """From ``general.sampling.temp``, ``.top_p`` and ``.top_k`` of the model file; other samplers are ignored."""
        stored = {key: self._engine.metadata(f"general.sampling.{key}") for key in ("temp", "top_p", "top_k")}
        found = {key: value.decode(errors="replace") for key, value in stored.items() if value is not None}
        try:
            # As in llama.cpp, a temperature below 0 means 0, and a top_k below 1 means all.
            temperature = max(float(found.get("temp", OPENAI_SAMPLING.temperature)), 0.0)
            top_p = float(found.get("top_p", 1.0))
            top_k = max(int(float(found.get("top_k", 0))), 0)
            return Sampling(temperature, top_p, top_k)
        except (ValueError, OverflowError) as error:
            log.warning("ignoring the model file's recommended sampling, which is invalid: %s", error)
            return OPENAI_SAMPLING

    @checked
    def json_grammar(self, schema: str) -> str:
        check_schema(schema)
        grammar = self._generator.json_grammar(utf8(schema, "schema"))
        if len(grammar) > MAX_GRAMMAR:
            raise InputError(f"the schema's grammar has {len(grammar):,} characters: use a simpler one", field="schema")
        return grammar

    def text_ids(self, text: str) -> NDArray[np.int32]:
        return self._generator.text_ids(utf8(text, "text"))

    @checked
    def chat_ids(self, messages: Sequence[tuple[str, str]]) -> NDArray[np.int32]:
        encoded = [(utf8(role, "a message's role"), utf8(content, "a message")) for role, content in messages]
        for role, content in encoded:
            if self._generator.has_special(role) or self._generator.has_special(content) or b"\0" in role + content:
                raise InputError("a message contains one of this model's control tokens: remove it", field="messages")
        return self._generator.chat_ids(encoded)


class NativeStream:
    """A text that is being generated (`fedbpt.engine.text_generator.TokenStream`)."""

    def __init__(self, generator: _native.Generator, stream: _native.Generator.Stream, files: WatchedFiles) -> None:
        self._generator = generator
        self._stream: _native.Generator.Stream | None = stream
        self._process = os.getpid()
        self._files = files
        self.n_reused = int(stream.n_reused)

    @property
    def opened(self) -> _native.Generator.Stream:
        """Raises `InputError` if it is closed. Do not bind it: an error's traceback would keep its slot taken."""
        if self._stream is None:
            raise InputError("this text was closed: open another one")
        return self._stream

    def next(self, n_likeliest: int = 0) -> Token:
        _check_process(self._process)
        with self._files.unchanged():
            token, log_prob, likeliest = self._generator.next(self.opened, n_likeliest)
        return Token(token, log_prob, tuple(likeliest))

    def cancel(self) -> None:
        stream = self._stream
        if stream is not None:
            stream.cancel()

    def close(self) -> None:
        self._stream = None  # dropping the last reference frees the engine's slot


def _token(
    found: tuple[int, float, list[tuple[int, float]]] | int,
) -> Token | InputError | ScoringInterrupted:
    """What `_native.Generator.next_all` found for one text."""
    if isinstance(found, tuple):
        return Token(found[0], found[1], tuple(found[2]))
    if found == -1:
        return ScoringInterrupted("the text was interrupted")
    if found == -2:
        return InputError("the model's logits are not finite: use a soft prompt with smaller numbers")
    if found == -4:
        return InputError("the model's context is full: generate fewer tokens")
    return InputError("no token of this model continues the text as its grammar demands: use another grammar")


def _check_process(created_in: int) -> None:
    if created_in != os.getpid():
        raise InputError("this generator or text was created before a fork: create it again from scorer.generator")
