"""The original and the tuned model side by side: what each says to a text."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Literal, NamedTuple, TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray

from fedbpt.argument_types import checked
from fedbpt.engine.scorer import Scorer
from fedbpt.engine.text_generator import Sampling, generates
from fedbpt.engine.text_stream import Generation, place
from fedbpt.errors import ConfigError
from fedbpt.objective.objective import Objective
from fedbpt.objective.readout import blocks, ensemble
from fedbpt.prompts.prompt import Prompt
from fedbpt.protocol.specs import ObjectiveSpec, PromptSpec, Template
from fedbpt.quantities import NaturalInt, PositiveInt
from fedbpt.tasks import GivenTask, load
from fedbpt.tasks.task import DEFAULT_MAX_TEXT_TOKENS, render_ids

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
        task: says how texts are cut; None: the prompt's own. Where that is not known, texts are cut at 128 tokens to
            classify, not at all to generate.
        max_text_tokens: where they are cut instead; None: as ``task`` says.

    Raises:
        PromptError: the prompt was made for another model.
        ConfigError: the prompt is for other labels than the task's.
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

    @checked
    def classify(self, text: str) -> Probabilities:
        """Probabilities of the labels, which `fedbpt.evaluate` judges by. Raises `InputError` for an empty text."""
        return Probabilities(self.probabilities(text, "original"), self.probabilities(text, "tuned"))

    @checked
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

    @checked
    def n_read(self, text: str) -> int:
        """Tokens that the tuned model reads to classify ``text``: cut, in each of the prompt's templates."""
        limit, clipped = self.max_text_tokens or DEFAULT_MAX_TEXT_TOKENS, self._clip(text)
        templates = (self.prompt.template, *self.prompt.others)
        n_front = 0 if self.prompt.spec.placement == "cue" else self.prompt.n_prompt
        return n_front + sum(len(render_ids(self.model, template, clipped, limit)) for template in templates)

    @checked
    def generate(
        self,
        text: str,
        sampling: Sampling | None = None,
        max_tokens: PositiveInt | None = None,
        stop: tuple[str, ...] = (),
    ) -> SidesInTurn:
        """Both sides' answers, a piece of the one and a piece of the other in turn; see `Generation`.

        Who does not read them to the end closes the iterator (`contextlib.closing`).

        Raises:
            InputError: an empty text, or one that is longer than the context.
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
        stop: tuple[str, ...] = (),
        n_likeliest: NaturalInt = 0,
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


class SidesInTurn(Iterator[tuple[Side, str]]):
    """Pieces of texts that are ``running``, by turns; ``opened`` ends them."""

    def __init__(self, running: dict[Side, Generation], opened: ExitStack) -> None:
        self._turns = deque(running.items())
        self._opened = opened

    def __next__(self) -> tuple[Side, str]:
        try:
            while self._turns:
                side, generation = self._turns.popleft()
                piece = next(generation, None)
                if piece is not None:
                    self._turns.append((side, generation))
                    if piece.text:
                        return side, piece.text
        except BaseException:
            self.close()
            raise
        raise StopIteration

    def close(self) -> None:
        """No more pieces come."""
        self._turns.clear()
        self._opened.close()


def _softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    weights = np.exp(logits - logits.max())
    found: NDArray[np.float64] = weights / weights.sum()
    return found
