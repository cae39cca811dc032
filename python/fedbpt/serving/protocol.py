"""The supported part of OpenAI's requests: https://platform.openai.com/docs/api-reference

Unknown fields are ignored, as OpenAI's server does. Known fields that would change the result but are not supported
are rejected.
"""

from __future__ import annotations

from typing import Any

import msgspec

from fedbpt.engine.text_generator import Sampling
from fedbpt.errors import InputError
from fedbpt.serving.models import Settings

MAX_LIKELIEST = 20
MAX_STOPS = 16
MAX_PROMPTS = 256
DEFAULT_COMPLETION_TOKENS = 16


class ApiError(InputError):
    """A rejected request, as OpenAI's API reports it.

    Args:
        message: what is wrong, and what to do.
        param: the wrong field of the request.
        code: a stable code for programs.
        status: HTTP status.
        retry_after_s: when to retry, in seconds; 0: the same request will be rejected again.
    """

    def __init__(
        self,
        message: str,
        param: str | None = None,
        code: str | None = None,
        status: int = 400,
        retry_after_s: float = 0.0,
    ) -> None:
        super().__init__(message, field=param or "")
        self.param = param
        self.code = code
        self.status = status
        self.retry_after_s = retry_after_s


class StreamOptions(msgspec.Struct, frozen=True):
    include_usage: bool = False


class JsonSchema(msgspec.Struct, frozen=True):
    schema: dict[str, Any] = {}


class ResponseFormat(msgspec.Struct, frozen=True):
    """``json_object`` allows any JSON object, ``json_schema`` what its schema allows."""

    type: str = "text"
    json_schema: JsonSchema | None = None

    @property
    def schema(self) -> str:
        """The JSON schema of the reply, as JSON; empty: it is text. Raises `ApiError`."""
        if self.type == "text":
            return ""
        if self.type == "json_object":
            return '{"type": "object"}'
        if self.type != "json_schema" or self.json_schema is None:
            raise ApiError(
                "response_format must be of type text, json_object, or json_schema with a json_schema",
                "response_format",
            )
        return msgspec.json.encode(self.json_schema.schema).decode()


class Part(msgspec.Struct, frozen=True):
    """A part of a message's content."""

    type: str
    text: str = ""


class ChatMessage(msgspec.Struct, frozen=True):
    role: str
    content: str | list[Part] | None = None

    @property
    def text(self) -> str:
        """The content as text. Raises `ApiError` for images and other parts."""
        if self.content is None or isinstance(self.content, str):
            return self.content or ""
        others = [part.type for part in self.content if part.type != "text"]
        if others:
            raise ApiError(f"content of type {others[0]!r} is not supported: send only text", "messages")
        return "".join(part.text for part in self.content)


class BaseRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Fields that both kinds of request share."""

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
    response_format: ResponseFormat | None = None

    @property
    def wants_usage(self) -> bool:
        """Whether a stream should end with the number of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage

    def _settings(
        self, recommended: Sampling, max_tokens: int | None, n_likeliest: int, default_tokens: int | None = None
    ) -> Settings:
        """The request's settings. Raises `InputError` for unsupported values.

        Args:
            recommended: sampling if the request has no temperature.
            max_tokens: limit of generated tokens; None: the task's, else ``default_tokens``.
            n_likeliest: number of likeliest tokens to report for each.
            default_tokens: None: the context's.
        """
        if self.n not in (None, 1):
            raise ApiError("n must be 1: send another request for another completion", "n")
        unsupported = {
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "logit_bias": self.logit_bias,
        }
        for name, value in unsupported.items():
            if value:
                raise ApiError(f"{name} is not supported: omit it", name)
        stop = [self.stop] if isinstance(self.stop, str) else self.stop
        if stop and len(stop) > MAX_STOPS:
            raise ApiError(f"stop has {len(stop)} strings: give at most {MAX_STOPS}", "stop")
        if not 0 <= n_likeliest <= MAX_LIKELIEST:
            raise ApiError(f"{n_likeliest} log-probabilities per token requested: expected 0 to {MAX_LIKELIEST}")
        base = recommended if self.temperature is None else Sampling(self.temperature)
        top_p = base.top_p if self.top_p is None else self.top_p
        top_k = base.top_k if self.top_k is None else self.top_k
        schema = "" if self.response_format is None else self.response_format.schema
        sampling = Sampling(base.temperature, top_p, top_k, self.seed)
        return Settings(sampling, max_tokens, stop, n_likeliest, schema, default_tokens)


class ChatRequest(BaseRequest, frozen=True, kw_only=True):
    """``POST /v1/chat/completions``."""

    messages: list[ChatMessage]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[Any] | None = None

    def settings(self, recommended: Sampling) -> Settings:
        """The request's settings. Raises `InputError` for unsupported values."""
        if not self.messages:
            raise ApiError("messages is empty: send at least one", "messages")
        if self.tools:
            raise ApiError("tools are not supported: omit them", "tools")
        max_tokens = self.max_completion_tokens if self.max_tokens is None else self.max_tokens
        return self._settings(recommended, max_tokens, (self.top_logprobs or 0) if self.logprobs else 0)

    @property
    def wants_logprobs(self) -> bool:
        return bool(self.logprobs)


class CompletionRequest(BaseRequest, frozen=True, kw_only=True):
    """``POST /v1/completions``."""

    prompt: str | list[str | int | list[int]]
    logprobs: int | None = None
    echo: bool | None = None
    suffix: str | None = None
    best_of: int | None = None

    def settings(self, recommended: Sampling) -> Settings:
        """The request's settings. Raises `InputError` for unsupported values."""
        for name, value in (("echo", self.echo), ("suffix", self.suffix)):
            if value:
                raise ApiError(f"{name} is not supported: omit it", name)
        if self.best_of not in (None, 1):
            raise ApiError("best_of must be 1", "best_of")
        return self._settings(recommended, self.max_tokens, self.logprobs or 0, DEFAULT_COMPLETION_TOKENS)

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts to complete. Raises `ApiError` if there are none or too many."""
        if not self.prompt:
            raise ApiError("prompt is empty: send a text to continue", "prompt")
        if isinstance(self.prompt, str):
            return [self.prompt]
        tokens = [part for part in self.prompt if isinstance(part, int)]
        if not tokens:
            if len(self.prompt) > MAX_PROMPTS:
                raise ApiError(f"prompt has {len(self.prompt):,} texts: send at most {MAX_PROMPTS}", "prompt")
            return [part for part in self.prompt if not isinstance(part, int)]
        if len(tokens) < len(self.prompt):
            raise ApiError("prompt mixes texts and token ids: send either of them", "prompt")
        return [tokens]

    @property
    def wants_logprobs(self) -> bool:
        return self.logprobs is not None
