"""What a served model answers: the plain model goes on with texts, a tuned one answers by its prompt."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np

from fedbpt.engine.text_generator import Generator, Placed, Sampling, TextModel, Token
from fedbpt.engine.text_stream import FinishReason, Generation, Piece
from fedbpt.errors import InputError
from fedbpt.prompts.prompt import Prompt
from fedbpt.side_by_side.sides import SideBySide
from fedbpt.tasks import Task


class Answer(Protocol):
    """An answer as it comes, in pieces; `fedbpt.engine.text_stream.Generation` is one."""

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
    """How an answer is generated, as `Generation` takes it."""

    def __init__(
        self,
        sampling: Sampling,
        max_tokens: int | None = None,
        stop: Sequence[str] = (),
        n_likeliest: int = 0,
    ) -> None:
        if max_tokens is not None and max_tokens < 1:
            raise InputError(f"max_tokens must be at least 1, got {max_tokens}")
        self.sampling, self.max_tokens, self.stop, self.n_likeliest = sampling, max_tokens, tuple(stop), n_likeliest


class ServedModel(Protocol):
    """A model name. Both methods compute, and raise `InputError` for what cannot be answered.

    ``recommended``: how its texts are sampled where nobody says.
    """

    name: str
    created: int
    recommended: Sampling

    def chat(self, messages: Sequence[tuple[str, str]], settings: Settings) -> Answer:
        """The answer to (role, content) messages."""
        ...

    def complete(self, prompt: str | Sequence[int], settings: Settings) -> Answer:
        """What follows a text, or token ids. In a text for the plain model control tokens count as such."""
        ...

    def token_bytes(self, token: int) -> bytes:
        """Of the answer's tokens."""
        ...


class PlainModel:
    """The model as it is."""

    def __init__(self, name: str, model: TextModel) -> None:
        self.name = name
        self.created = int(time.time())
        self.recommended = model.generator.recommended
        self._model = model

    def chat(self, messages: Sequence[tuple[str, str]], settings: Settings) -> Answer:
        return _generation(self._model.generator, Placed(self._model.generator.chat_ids(messages)), settings)

    def complete(self, prompt: str | Sequence[int], settings: Settings) -> Answer:
        if isinstance(prompt, str):
            return _generation(self._model.generator, Placed(self._model.generator.text_ids(prompt)), settings)
        try:
            ids = np.asarray(prompt, dtype=np.int32)
        except OverflowError as error:
            raise InputError("the prompt holds a token id outside the vocabulary: tokenize with this model") from error
        return _generation(self._model.generator, Placed(ids), settings)

    def token_bytes(self, token: int) -> bytes:
        return self._model.generator.piece(token)


class TunedModel:
    """The model with a tuned prompt, which puts a text as tuning did; of a conversation, the last user's message."""

    def __init__(self, name: str, model: TextModel, pair: SideBySide) -> None:
        self.name = name
        self.created = int(time.time())
        self.recommended = model.generator.recommended
        self._model = model
        self._pair = pair

    def chat(self, messages: Sequence[tuple[str, str]], settings: Settings) -> Answer:
        said = [content for role, content in messages if role == "user"]
        if not said:
            raise InputError(f"{self.name} answers a user's message, and there is none")
        return self.complete(said[-1], settings)

    def complete(self, prompt: str | Sequence[int], settings: Settings) -> Answer:
        if not isinstance(prompt, str):
            raise InputError(f"{self.name} puts the prompt into its template: send text, not token ids")
        if self._pair.classifies:
            return _Label(self._pair, prompt, settings.n_likeliest)
        return self._pair.generation(
            prompt, "tuned", settings.sampling, settings.max_tokens, settings.stop, settings.n_likeliest
        )

    def token_bytes(self, token: int) -> bytes:
        if self._pair.classifies:
            return self._pair.labels[token].encode()
        return self._model.generator.piece(token)


class _Label:
    """The likeliest label's name, as an answer of one token: the label's number."""

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

    # It is answered already, and holds nothing.

    def cancel(self) -> None: ...

    def pause(self) -> None: ...

    def close(self) -> None: ...


def _generation(generator: Generator, placed: Placed, settings: Settings) -> Generation:
    return Generation(generator, placed, settings.sampling, settings.max_tokens, settings.stop, settings.n_likeliest)


def served_models(
    model: TextModel, prompts: Sequence[Prompt], tasks: Mapping[str, Task] | None = None
) -> dict[str, ServedModel]:
    """By name: the plain model under its own, then each prompt as ``MODEL+TASK``; a task's second is ``MODEL+TASK-2``.

    ``tasks``: by name, instead of the prompts' own.

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
