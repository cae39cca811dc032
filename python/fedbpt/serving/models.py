"""Served models: the plain model continues texts, a tuned one replies with its prompt."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np

from fedbpt.engine.text_generator import GREEDY, Generator, Placed, Sampling, TextModel, Token
from fedbpt.engine.text_stream import FinishReason, Generation, Piece
from fedbpt.errors import InputError
from fedbpt.prompts.prompt import Prompt
from fedbpt.side_by_side.sides import SideBySide
from fedbpt.tasks import Task


class Completion(Protocol):
    """A text that is being generated, as an iterator of pieces, such as `fedbpt.engine.text_stream.Generation`."""

    @property
    def n_prompt(self) -> int: ...

    @property
    def n_tokens(self) -> int: ...

    @property
    def finish_reason(self) -> FinishReason | None: ...

    def __next__(self) -> Piece: ...

    def __iter__(self) -> Iterator[Piece]: ...

    def cancel(self) -> None: ...

    def pause(self) -> None: ...

    def close(self) -> None: ...


class Settings:
    """Settings of a completion, as for `SideBySide.generate`. Raises `InputError` if ``max_tokens`` is below 1.

    ``schema``: JSON schema that the text follows, as JSON; empty: any text. ``default_tokens``: where ``max_tokens`` is
    None and the model's task says no length; None: up to the end of the context.
    """

    def __init__(
        self,
        sampling: Sampling,
        max_tokens: int | None = None,
        stop: Sequence[str] | None = None,
        n_likeliest: int = 0,
        schema: str = "",
        default_tokens: int | None = None,
    ) -> None:
        if max_tokens is not None and max_tokens < 1:
            raise InputError(f"max_tokens must be at least 1, got {max_tokens}", field="max_tokens", limit=1)
        self.sampling = sampling
        self.schema = schema
        self.max_tokens = max_tokens
        self.default_tokens = default_tokens
        self.stop = None if stop is None else tuple(stop)
        self.n_likeliest = n_likeliest

    def sampling_with(self, generator: Generator) -> Sampling:
        """How tokens are chosen. Raises `InputError` for a schema that has no grammar."""
        if self.schema and not self.sampling.grammar:  # once for all prompts of the request
            try:
                self.sampling = replace(self.sampling, grammar=generator.json_grammar(self.schema))
            except InputError as error:
                raise InputError(str(error), field="response_format") from error
        return self.sampling


class ServedModel(Protocol):
    """A model under one name. `chat` and `complete` compute, and raise `InputError` for unusable input.

    Attributes:
        created: Unix time in seconds.
        recommended: sampling of requests that do not set a temperature.
    """

    name: str
    created: int
    recommended: Sampling

    def chat(self, messages: Sequence[tuple[str, str]], settings: Settings) -> Completion:
        """Reply to (role, content) messages."""
        ...

    def complete(self, prompt: str | Sequence[int], settings: Settings) -> Completion:
        """Continue a text or token ids. The plain model parses control tokens in a text."""
        ...

    def token_bytes(self, token: int) -> bytes:
        """The bytes of a token of a completion."""
        ...


class PlainModel:
    """The model without a tuned prompt."""

    def __init__(self, name: str, model: TextModel) -> None:
        self.name = name
        self.created = int(time.time())
        self.recommended = model.generator.recommended
        self._model = model

    def chat(self, messages: Sequence[tuple[str, str]], settings: Settings) -> Completion:
        return _generation(self._model.generator, Placed(self._model.generator.chat_ids(messages)), settings)

    def complete(self, prompt: str | Sequence[int], settings: Settings) -> Completion:
        if isinstance(prompt, str):
            return _generation(self._model.generator, Placed(self._model.generator.text_ids(prompt)), settings)
        try:
            ids = np.asarray(prompt, dtype=np.int32)
        except OverflowError as error:
            raise InputError(
                "the prompt has a token id outside the vocabulary: tokenize with this model", field="prompt"
            ) from error
        return _generation(self._model.generator, Placed(ids), settings)

    def token_bytes(self, token: int) -> bytes:
        return self._model.generator.piece(token)


class TunedModel:
    """The model with a tuned prompt and its template. Of a conversation, it uses only the last user message."""

    def __init__(self, name: str, model: TextModel, pair: SideBySide) -> None:
        self.name = name
        self.created = int(time.time())
        self.recommended = model.generator.recommended if pair.answering is None else GREEDY  # as it is measured
        self._model = model
        self._pair = pair

    def chat(self, messages: Sequence[tuple[str, str]], settings: Settings) -> Completion:
        texts = [content for role, content in messages if role == "user"]
        if not texts:
            raise InputError(f"{self.name} replies to a user message: send one with role 'user'", field="messages")
        return self.complete(texts[-1], settings)

    def complete(self, prompt: str | Sequence[int], settings: Settings) -> Completion:
        if not isinstance(prompt, str):
            raise InputError(f"{self.name} puts the prompt into its template: send text, not token ids", field="prompt")
        if self._pair.classifies and settings.schema:
            raise InputError(f"{self.name} replies with a label: omit response_format", field="response_format")
        if self._pair.classifies:
            return _LabelCompletion(self._pair, prompt, settings.n_likeliest)
        sampling = settings.sampling_with(self._model.generator)
        length = settings.max_tokens
        if length is None and self._pair.answering is None:
            length = settings.default_tokens
        return self._pair.generation(prompt, "tuned", sampling, length, settings.stop, settings.n_likeliest)

    def token_bytes(self, token: int) -> bytes:
        if self._pair.classifies:
            return self._pair.labels[token].encode()
        return self._model.generator.piece(token)


class _LabelCompletion:
    """The likeliest label's name, as a completion of one token whose id is the label's index."""

    n_tokens = 1
    finish_reason: FinishReason | None = "stop"

    def __init__(self, pair: SideBySide, text: str, n_likeliest: int) -> None:
        probabilities = pair.probabilities(text, "tuned")
        order = sorted(range(len(probabilities)), key=lambda i: -probabilities[i])
        logs = [(i, math.log(max(probabilities[i], 1e-300))) for i in order]
        self._pieces = iter([Piece(pair.labels[order[0]], Token(*logs[0], tuple(logs[:n_likeliest])))])
        self.n_prompt = pair.n_read(text)

    def __iter__(self) -> Iterator[Piece]:
        return self._pieces

    def __next__(self) -> Piece:
        return next(self._pieces)

    # Computed by the constructor: nothing to cancel or free.

    def cancel(self) -> None: ...

    def pause(self) -> None: ...

    def close(self) -> None: ...


def _generation(generator: Generator, placed: Placed, settings: Settings) -> Generation:
    return Generation(
        generator,
        placed,
        settings.sampling_with(generator),
        settings.default_tokens if settings.max_tokens is None else settings.max_tokens,
        settings.stop or (),
        settings.n_likeliest,
    )


def served_models(
    model: TextModel, prompts: Sequence[Prompt], tasks: Mapping[str, Task] | None = None
) -> dict[str, ServedModel]:
    """The plain model and each of ``prompts``, by name: ``MODEL``, ``MODEL+TASK``, and ``MODEL+TASK-2`` for a second.

    Args:
        model: the model of all prompts.
        prompts: tuned prompts.
        tasks: by name, to replace the prompts' own.

    Raises:
        PromptError, ConfigError: as `SideBySide`.
    """
    served: dict[str, ServedModel] = {model.name: PlainModel(model.name, model)}
    for prompt in prompts:
        first = f"{model.name}+{prompt.task_name}"
        more = (f"{first}-{number}" for number in range(2, len(prompts) + 2))
        name = first if first not in served else next(name for name in more if name not in served)
        served[name] = TunedModel(name, model, SideBySide(model, prompt, (tasks or {}).get(prompt.task_name)))
    return served
