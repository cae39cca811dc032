"""The original and the tuned model side by side: what each says to a text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple, TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray

from fedbpt.errors import ConfigError
from fedbpt.generation import Generation, place
from fedbpt.generator import Sampling, generates
from fedbpt.messages import ObjectiveSpec, PromptSpec, Template
from fedbpt.objective import Objective
from fedbpt.prompt import Prompt
from fedbpt.readout import blocks, ensemble
from fedbpt.scorer import Scorer
from fedbpt.tasks import Task
from fedbpt.tasks.task import DEFAULT_MAX_TEXT_TOKENS

Side: TypeAlias = Literal["original", "tuned"]

SIDES: tuple[Side, Side] = ("original", "tuned")
"""``original``: the model as it is, with the best template; ``tuned``: with the prompt, its readout and templates."""


class Probabilities(NamedTuple):
    """Of each label [n_labels], on each side."""

    original: tuple[float, ...]
    tuned: tuple[float, ...]


class SideBySide:
    """A model with and without a tuned prompt.

    Args:
        model: what the prompt was tuned for.
        prompt: the tuned prompt.
        task: the prompt's; says how texts are cut. None: at 128 tokens to classify, not at all to generate.
        max_text_tokens: where they are cut instead; None: as ``task`` says.

    Raises:
        PromptError: the prompt was made for another model.
        ConfigError: the prompt is for other labels than the task's.
    """

    def __init__(
        self, model: Scorer, prompt: Prompt, task: Task | None = None, *, max_text_tokens: int | None = None
    ) -> None:
        prompt.check(model)
        if task is not None and task.labels != prompt.labels:
            raise ConfigError(f"the prompt is for labels {list(prompt.labels)}, the task has {list(task.labels)}")
        self.model = model
        self.name = model.name
        self.prompt = prompt
        self.labels = prompt.labels
        """Empty where the model generates."""
        self._task = task
        self.max_text_tokens = task.max_text_tokens if task is not None and max_text_tokens is None else max_text_tokens

    @property
    def classifies(self) -> bool:
        """Whether answers are labels (`classify`); else they are texts (`generate`)."""
        return bool(self.labels)

    def classify(self, text: str) -> Probabilities:
        """Probabilities of the labels, which `fedbpt.evaluate` judges by. Raises `InputError` for an empty text."""
        return Probabilities(self.probabilities(text, "original"), self.probabilities(text, "tuned"))

    def probabilities(self, text: str, side: Side) -> tuple[float, ...]:
        """One side of `classify`."""
        prompt, n_words, n_labels = self.prompt, len(self.prompt.word_ids), len(self.labels)
        if side == "original":
            found = self._logits(text, prompt.template, PromptSpec(d=1), None)[:, :n_labels].astype(np.float64)
        else:
            spec = msgspec.structs.replace(prompt.spec, d=1)
            raw = [self._logits(text, prompt.template, spec, prompt.rows)]
            raw += [self._logits(text, template, spec, None) for template in prompt.others]
            found = ensemble(raw, blocks(prompt.readout, n_words, n_labels))
        return tuple(float(p) for p in _softmax(found[0]))

    def generate(
        self, text: str, sampling: Sampling | None = None, max_tokens: int | None = None, stop: tuple[str, ...] = ()
    ) -> Iterator[tuple[Side, str]]:
        """Both sides' answers, a piece of the one and a piece of the other in turn; see `Generation`.

        Raises:
            InputError: an empty text, or one that is longer than the context.
        """
        running = {side: self.generation(text, side, sampling, max_tokens, stop) for side in SIDES}
        return _in_turn(running)

    def generation(
        self,
        text: str,
        side: Side,
        sampling: Sampling | None = None,
        max_tokens: int | None = None,
        stop: tuple[str, ...] = (),
        n_likeliest: int = 0,
    ) -> Generation:
        """One side of `generate`, to be cancelled, or asked what it took."""
        if not generates(self.model):
            raise ConfigError(f"{self.model.name} cannot generate text")
        prompt, rows = self.prompt, self.prompt.rows if side == "tuned" else None
        placed = place(self.model, prompt.template, self._clip(text), self.max_text_tokens, rows, prompt.spec.placement)
        return Generation(self.model.generator, placed, sampling, max_tokens, stop, n_likeliest)

    def _logits(
        self, text: str, template: Template, where: PromptSpec, rows: NDArray[np.float32] | None
    ) -> NDArray[np.float32]:
        """[1, n_labels + n_words]; without ``rows``, of the model as it is."""
        spec = ObjectiveSpec(max_text_tokens=self.max_text_tokens or DEFAULT_MAX_TEXT_TOKENS, readout_words=0)
        one, words = [(self._clip(text), 0)], self.prompt.word_ids
        objective = Objective(self.model, template, self.labels, one, spec, where, keep_kv=False, words=words)
        return objective.logits(objective.zero_shot_embeds() if rows is None else rows[None], [0])

    def _clip(self, text: str) -> str:
        return " ".join(text.split()) if self._task is None else self._task.clip(text)

    def __repr__(self) -> str:
        return f"SideBySide({self.model.name!r} and {self.prompt!r})"


def _in_turn(running: dict[Side, Generation]) -> Iterator[tuple[Side, str]]:
    while running:
        for side, generation in list(running.items()):
            piece = next(generation, None)
            if piece is None:
                del running[side]
            elif piece.text:
                yield side, piece.text


def _softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    weights = np.exp(logits - logits.max())
    found: NDArray[np.float64] = weights / weights.sum()
    return found
