"""The original and the tuned model side by side: the reply of each to a text."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Literal, NamedTuple, TypeAlias

import msgspec
import numpy as np
from msgspec import UNSET
from numpy.typing import NDArray

from fedbpt.argument_types import checked
from fedbpt.engine.scorer import Scorer
from fedbpt.engine.text_generator import Sampling, generates
from fedbpt.engine.text_stream import Generation, place
from fedbpt.errors import ConfigError
from fedbpt.objective.layer_view import LayerReader
from fedbpt.objective.objective import Objective
from fedbpt.objective.readout import blocks, ensemble
from fedbpt.prompts.prompt import Prompt
from fedbpt.protocol.specs import Generation as Answering
from fedbpt.protocol.specs import LayerReadout, ObjectiveSpec, PromptSpec, Template
from fedbpt.quantities import NaturalInt, PositiveInt
from fedbpt.tasks import GivenTask, Task, load
from fedbpt.tasks.task import DEFAULT_MAX_TEXT_TOKENS, render_ids

Side: TypeAlias = Literal["original", "tuned"]

SIDES: tuple[Side, Side] = ("original", "tuned")
"""``original``: the model with the selected template; ``tuned``: with the prompt, its readout and templates."""


class Probabilities(NamedTuple):
    """Probabilities of the labels [n_labels] on each side."""

    original: tuple[float, ...]
    tuned: tuple[float, ...]


def answering_of(task: Task | None) -> Answering | None:
    """How the answers of ``task`` are generated; None: it does not say, or has labels."""
    return None if task is None or task.labels or task.generation is UNSET else task.generation


class SideBySide:
    """A model with and without a tuned prompt.

    Args:
        model: the model that the prompt was tuned for.
        prompt: the tuned prompt.
        task: sets how texts are truncated; None: the prompt's own. If that is unknown, texts are truncated to 128
            tokens to classify, and not truncated to generate.
        max_text_tokens: overrides the task's maximum length of texts, in tokens.

    Raises:
        PromptError: the prompt was made for another model.
        ConfigError: the prompt has other labels than the task.
    """

    @checked
    def __init__(
        self,
        model: Scorer,
        prompt: Prompt,
        task: GivenTask | None = None,
        *,
        max_text_tokens: PositiveInt | None = None,
    ) -> None:
        prompt.check(model)
        task = prompt.task if task is None else load(task)
        if task is not None and task.labels != prompt.labels:
            raise ConfigError(
                f"the prompt has labels {list(prompt.labels)}, but the task has {list(task.labels)}: use the task that"
                " the prompt was tuned for",
                field="task",
            )
        self.model = model
        self.name = model.name
        self.prompt = prompt
        self.labels = prompt.labels
        """Empty if the model generates texts."""
        self._task = task
        self.max_text_tokens = task.max_text_tokens if task is not None and max_text_tokens is None else max_text_tokens
        self.answering = answering_of(task)
        """How the task's answers are generated; None if the task does not say."""

    @property
    def classifies(self) -> bool:
        """Whether replies are labels (`classify`) rather than texts (`generate`)."""
        return bool(self.labels)

    @checked
    def classify(self, text: str) -> Probabilities:
        """Probabilities of the labels, as `fedbpt.evaluate` computes them. Raises `InputError` for an empty text."""
        return Probabilities(self.probabilities(text, "original"), self.probabilities(text, "tuned"))

    @checked
    def probabilities(self, text: str, side: Side) -> tuple[float, ...]:
        """One side of `classify`."""
        prompt = self.prompt
        n_words = len(prompt.word_ids)
        n_labels = len(self.labels)
        if side == "original":
            found = self._logits(text, prompt.template, PromptSpec(d=1), None)[:, :n_labels].astype(np.float64)
        elif prompt.layer_readout is not None:
            found = self._reader(prompt.layer_readout).logits([self._clip(text)])
        else:
            spec = msgspec.structs.replace(prompt.spec, d=1)
            raw = [self._logits(text, prompt.template, spec, prompt.rows)]
            raw += [self._logits(text, template, spec, None) for template in prompt.others]
            found = ensemble(raw, blocks(prompt.readout, n_words, n_labels))
        return tuple(float(p) for p in _softmax(found[0]))

    @checked
    def n_read(self, text: str) -> int:
        """Number of tokens that the tuned model reads to classify ``text``, over all of the prompt's templates."""
        limit = self.max_text_tokens or DEFAULT_MAX_TEXT_TOKENS
        clipped = self._clip(text)
        readout = self.prompt.layer_readout
        templates = (self.prompt.template, *(self.prompt.others if readout is None else readout.others))
        places = range(len(templates)) if readout is None else readout.places_read
        n_front = self.prompt.n_prompt if self.prompt.spec.in_front and 0 in places else 0
        return n_front + sum(len(render_ids(self.model, templates[place], clipped, limit)) for place in places)

    @checked
    def generate(
        self,
        text: str,
        sampling: Sampling | None = None,
        max_tokens: PositiveInt | None = None,
        stop: tuple[str, ...] | None = None,
    ) -> SidesInTurn:
        """Generate both replies, yielding a piece of each in turn; see `Generation`.

        ``max_tokens`` and ``stop`` None: as the task's answers are measured (its ``[generation]``), else up to the end
        of the context.

        Close the iterator if you do not read it to the end (`contextlib.closing`).

        Raises:
            InputError: the text is empty or longer than the context.
        """
        with ExitStack() as opened:
            running = {
                side: opened.enter_context(self.generation(text, side, sampling, max_tokens, stop)) for side in SIDES
            }
            return SidesInTurn(running, opened.pop_all())

    @checked
    def generation(
        self,
        text: str,
        side: Side,
        sampling: Sampling | None = None,
        max_tokens: PositiveInt | None = None,
        stop: tuple[str, ...] | None = None,
        n_likeliest: NaturalInt = 0,
    ) -> Generation:
        """One side of `generate`, as a `Generation` that can be cancelled and counts its tokens.

        The task's stop strings are left out where ``sampling`` has a grammar, which ends the text itself.
        """
        if not generates(self.model):
            raise ConfigError(f"{self.model.name} cannot generate text: use a model with a generator", field="model")
        prompt = self.prompt
        rows = prompt.rows if side == "tuned" else None
        placed = place(self.model, prompt.template, self._clip(text), self.max_text_tokens, rows, prompt.spec)
        if self.answering is not None:
            max_tokens = self.answering.max_tokens if max_tokens is None else max_tokens
            if stop is None and not (sampling and sampling.grammar):
                stop = self.answering.stop
        stop = stop or ()
        return Generation(self.model.generator, placed, sampling, max_tokens, stop, n_likeliest)

    def _reader(self, readout: LayerReadout) -> LayerReader:
        prompt = self.prompt
        limit = self.max_text_tokens or DEFAULT_MAX_TEXT_TOKENS
        return LayerReader(readout, self.model, prompt.template, self.labels, limit, prompt.rows, prompt.spec)

    def _logits(
        self, text: str, template: Template, where: PromptSpec, rows: NDArray[np.float32] | None
    ) -> NDArray[np.float32]:
        """Logits [1, n_labels + n_words] with the prompt ``rows``; None: without a prompt."""
        spec = ObjectiveSpec(max_text_tokens=self.max_text_tokens or DEFAULT_MAX_TEXT_TOKENS, readout_words=0)
        data = [(self._clip(text), 0)]
        words = self.prompt.word_ids
        objective = Objective(self.model, template, self.labels, data, spec, where, keep_kv=False, words=words)
        return objective.logits(objective.zero_shot_embeds() if rows is None else rows[None], [0])

    def _clip(self, text: str) -> str:
        return " ".join(text.split()) if self._task is None else self._task.clip(text)

    def __repr__(self) -> str:
        return f"SideBySide({self.model.name!r} and {self.prompt!r})"


class SidesInTurn(Iterator[tuple[Side, str]]):
    """Iterates over pieces of ``running`` generations in turn; closing it closes ``resources``."""

    def __init__(self, running: dict[Side, Generation], resources: ExitStack) -> None:
        self._queue = deque(running.items())
        self._resources = resources

    def __next__(self) -> tuple[Side, str]:
        try:
            while self._queue:
                side, generation = self._queue.popleft()
                piece = next(generation, None)
                if piece is not None:
                    self._queue.append((side, generation))
                    if piece.text:
                        return side, piece.text
        except BaseException:
            self.close()
            raise
        raise StopIteration

    def close(self) -> None:
        """Stop both generations."""
        self._queue.clear()
        self._resources.close()


def _softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    weights = np.exp(logits - logits.max())
    found: NDArray[np.float64] = weights / weights.sum()
    return found
