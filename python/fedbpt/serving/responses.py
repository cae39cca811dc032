"""OpenAI's responses as JSON values: complete, or as the chunks of a stream."""

from __future__ import annotations

import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from fedbpt.engine.text_generator import Token
from fedbpt.engine.text_stream import FinishReason, Piece

Json: TypeAlias = dict[str, Any]


class ApiResponse(ABC):
    """The response to one request.

    Args:
        name: the model's name.
        token_bytes: returns the bytes of a token.
        logprobs: whether to include log-probabilities.
    """

    object: str
    chunk_object: str
    prefix: str

    def __init__(self, name: str, token_bytes: Callable[[int], bytes], logprobs: bool) -> None:
        self._token_bytes = token_bytes
        self._logprobs = logprobs
        self._head = {"id": self.prefix + secrets.token_hex(12), "created": int(time.time()), "model": name}

    def whole(self, completions: Sequence[tuple[list[Piece], FinishReason | None]], usage: Json) -> Json:
        """The complete response, with all completions."""
        choices = [self.choice(index, *completion) for index, completion in enumerate(completions)]
        return {**self._head, "object": self.object, "choices": choices, "usage": usage}

    def chunk(self, *choices: Json, usage: Json | None = None) -> Json:
        """One event of a stream."""
        made = {**self._head, "object": self.chunk_object, "choices": list(choices)}
        return made if usage is None else {**made, "usage": usage}

    @abstractmethod
    def choice(self, index: int, pieces: list[Piece], reason: FinishReason | None) -> Json:
        """A complete completion."""

    @abstractmethod
    def opening(self, index: int) -> Json | None:
        """The first chunk of a streamed completion, before its pieces; None: there is none."""

    @abstractmethod
    def part(self, index: int, pieces: list[Piece], reason: FinishReason | None = None) -> Json:
        """Some pieces of a streamed completion, or with ``reason`` its end."""

    def has_event(self, piece: Piece) -> bool:
        """Whether a stream has an event for ``piece``."""
        return bool(piece.text) or (self._logprobs and piece.token is not None)

    def _text(self, token: int) -> str:
        return self._token_bytes(token).decode("utf-8", "replace")


class ChatResponse(ApiResponse):
    """The response to `ChatRequest`."""

    object = "chat.completion"
    chunk_object = "chat.completion.chunk"
    prefix = "chatcmpl-"

    def choice(self, index: int, pieces: list[Piece], reason: FinishReason | None) -> Json:
        message = {"role": "assistant", "content": _joined(pieces), "refusal": None}
        logprobs = self._logprobs_of(pieces)
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason}

    def opening(self, index: int) -> Json | None:
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def part(self, index: int, pieces: list[Piece], reason: FinishReason | None = None) -> Json:
        delta = {"content": _joined(pieces)} if pieces else {}
        logprobs = self._logprobs_of(pieces) if pieces else None
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs_of(self, pieces: list[Piece]) -> Json | None:
        if not self._logprobs:
            return None
        content = [self._entry(piece.token) for piece in pieces if piece.token is not None]
        return {"content": content, "refusal": None}

    def _entry(self, token: Token) -> Json:
        likeliest = [self._likelihood(*pair) for pair in token.likeliest]
        return {**self._likelihood(token.id, token.log_prob), "top_logprobs": likeliest}

    def _likelihood(self, token: int, log_prob: float) -> Json:
        return {"token": self._text(token), "logprob": log_prob, "bytes": list(self._token_bytes(token))}


class CompletionResponse(ApiResponse):
    """The response to `CompletionRequest`."""

    object = "text_completion"
    chunk_object = "text_completion"
    prefix = "cmpl-"

    def __init__(self, name: str, token_bytes: Callable[[int], bytes], logprobs: bool) -> None:
        super().__init__(name, token_bytes, logprobs)
        self._offsets: dict[int, int] = {}  # character offset of the next token, by completion

    def choice(self, index: int, pieces: list[Piece], reason: FinishReason | None) -> Json:
        logprobs = self._logprobs_of(index, pieces)
        return {"index": index, "text": _joined(pieces), "logprobs": logprobs, "finish_reason": reason}

    def opening(self, index: int) -> Json | None:
        del index
        return None

    def part(self, index: int, pieces: list[Piece], reason: FinishReason | None = None) -> Json:
        return self.choice(index, pieces, reason) if pieces else self.choice(index, [], reason) | {"logprobs": None}

    def _logprobs_of(self, index: int, pieces: list[Piece]) -> Json | None:
        if not self._logprobs:
            return None
        tokens = [piece.token for piece in pieces if piece.token is not None]
        texts = [self._text(token.id) for token in tokens]
        offsets = []
        for text in texts:
            offsets.append(self._offsets.get(index, 0))
            self._offsets[index] = offsets[-1] + len(text)
        return {
            "tokens": texts,
            "token_logprobs": [token.log_prob for token in tokens],
            "top_logprobs": [{self._text(id_): log_prob for id_, log_prob in token.likeliest} for token in tokens],
            "text_offset": offsets,
        }


def usage_of(n_prompt: int, n_tokens: int) -> Json:
    """OpenAI's ``usage`` object."""
    return {"prompt_tokens": n_prompt, "completion_tokens": n_tokens, "total_tokens": n_prompt + n_tokens}


def _joined(pieces: Sequence[Piece]) -> str:
    return "".join(piece.text for piece in pieces)
