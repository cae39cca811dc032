"""OpenAI's requests, as far as they are served: https://platform.openai.com/docs/api-reference

Fields that are not here are ignored, as OpenAI's own server ignores what it does not know; what would change an answer
and cannot be served is refused.
"""

from __future__ import annotations

from typing import Any

import msgspec

from fedbpt.engine.text_generator import Sampling
from fedbpt.errors import InputError
from fedbpt.serving.answers import Settings

MAX_LIKELIEST = 20
MAX_STOPS = 16
MAX_PROMPTS = 256
DEFAULT_COMPLETION_TOKENS = 16


class ApiError(InputError):
    """What is refused in OpenAI's own terms: an HTTP status, the field at fault, a code for programs.

    ``retry_after_s``: when to come again; 0: the same request will be refused again.
    """

    def __init__(
        self,
        message: str,
        param: str | None = None,
        code: str | None = None,
        status: int = 400,
        retry_after_s: float = 0.0,
    ) -> None:
        super().__init__(message)
        self.param, self.code, self.status, self.retry_after_s = param, code, status, retry_after_s


class StreamOptions(msgspec.Struct, frozen=True):
    include_usage: bool = False


class ResponseFormat(msgspec.Struct, frozen=True):
    type: str = "text"


class Part(msgspec.Struct, frozen=True):
    """Of a message's content."""

    type: str
    text: str = ""


class ChatMessage(msgspec.Struct, frozen=True):
    role: str
    content: str | list[Part] | None = None

    @property
    def text(self) -> str:
        """Its content. Raises `ApiError` for pictures and the like."""
        if self.content is None or isinstance(self.content, str):
            return self.content or ""
        others = [part.type for part in self.content if part.type != "text"]
        if others:
            raise ApiError(f"a message's content holds {others[0]!r}: this model reads text alone", "messages")
        return "".join(part.text for part in self.content)


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """What both kinds of request have."""

    model: str
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    max_tokens: int | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None

    @property
    def wants_usage(self) -> bool:
        """Whether a stream is to end with how many tokens there were."""
        return self.stream_options is not None and self.stream_options.include_usage

    def settings(self, recommended: Sampling, max_tokens: int | None, n_likeliest: int) -> Settings:
        """``recommended``: how to sample where no temperature is given. Raises `InputError` for what is not served."""
        if self.n not in (None, 1):
            raise ApiError("n must be 1: ask again for another answer", "n")
        unserved = {
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "logit_bias": self.logit_bias,
        }
        for name, value in unserved.items():
            if value:
                raise ApiError(f"{name} is not served: leave it out", name)
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(stop) > MAX_STOPS:
            raise ApiError(f"stop has {len(stop)} strings: give {MAX_STOPS} at most", "stop")
        if not 0 <= n_likeliest <= MAX_LIKELIEST:
            raise ApiError(f"at most {MAX_LIKELIEST} log-probabilities are given for a token, not {n_likeliest}")
        base = recommended if self.temperature is None else Sampling(self.temperature)
        top_p = base.top_p if self.top_p is None else self.top_p
        top_k = base.top_k if self.top_k is None else self.top_k
        return Settings(Sampling(base.temperature, top_p, top_k, self.seed), max_tokens, stop, n_likeliest)


class ChatRequest(Asked, frozen=True, kw_only=True):
    """``POST /v1/chat/completions``."""

    messages: list[ChatMessage]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[Any] | None = None
    response_format: ResponseFormat | None = None

    def how(self, recommended: Sampling) -> Settings:
        """Raises `InputError` for what is not served."""
        if not self.messages:
            raise ApiError("messages is empty: send at least one", "messages")
        if self.tools:
            raise ApiError("tools are not served: leave them out", "tools")
        if self.response_format is not None and self.response_format.type != "text":
            raise ApiError("response_format is not served: leave it out", "response_format")
        most = self.max_completion_tokens if self.max_tokens is None else self.max_tokens
        return self.settings(recommended, most, (self.top_logprobs or 0) if self.logprobs else 0)

    @property
    def wants_logprobs(self) -> bool:
        return bool(self.logprobs)


class CompletionRequest(Asked, frozen=True, kw_only=True):
    """``POST /v1/completions``."""

    prompt: str | list[str | int | list[int]]
    logprobs: int | None = None
    echo: bool | None = None
    suffix: str | None = None
    best_of: int | None = None

    def how(self, recommended: Sampling) -> Settings:
        """Raises `InputError` for what is not served."""
        for name, value in (("echo", self.echo), ("suffix", self.suffix)):
            if value:
                raise ApiError(f"{name} is not served: leave it out", name)
        if self.best_of not in (None, 1):
            raise ApiError("best_of must be 1", "best_of")
        most = DEFAULT_COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens
        return self.settings(recommended, most, self.logprobs or 0)

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each to be completed. Raises `ApiError` where there are none, or too many."""
        if not self.prompt:
            raise ApiError("prompt is empty: give a text to go on with", "prompt")
        if isinstance(self.prompt, str):
            return [self.prompt]
        tokens = [part for part in self.prompt if isinstance(part, int)]
        if not tokens:
            if len(self.prompt) > MAX_PROMPTS:
                raise ApiError(f"prompt holds {len(self.prompt):,} texts: send {MAX_PROMPTS} at most", "prompt")
            return [part for part in self.prompt if not isinstance(part, int)]
        if len(tokens) < len(self.prompt):
            raise ApiError("prompt is a text, token ids, or a list of either", "prompt")
        return [tokens]

    @property
    def wants_logprobs(self) -> bool:
        return self.logprobs is not None
