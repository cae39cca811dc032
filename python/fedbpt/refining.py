"""`refine`: tune a prompt further on a metric of the model's own answers, on this machine.

Experimental. A prompt that was tuned on target texts is moved to where its answers are measured better: by CMA-ES in a
few random directions, with the same texts for all candidates. Candidates whose answers are worth the same are ordered
by the likelihood of the target texts. A search on a metric alone likes to end with one answer to every text, so a new
prompt is only kept if its answers to training rows that the search never sees are worth more, and not much more alike.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from fedbpt.answering import compile_answers, generation_of
from fedbpt.api import Budget, named_rows
from fedbpt.argument_types import checked
from fedbpt.engine.text_generator import GREEDY, TextModel
from fedbpt.errors import ConfigError, DataError, PromptError, ScoringInterrupted
from fedbpt.machine.interrupts import interruptible
from fedbpt.metrics import Metric, filled, metric_named, rewards_of
from fedbpt.objective.objective import Objective
from fedbpt.prompts.prompt import Prompt
from fedbpt.protocol.seeding import generator
from fedbpt.protocol.specs import ObjectiveSpec
from fedbpt.quantities import PositiveInt
from fedbpt.search.cma_es import CmaUpdate
from fedbpt.search.population import sample_population
from fedbpt.search.projection import Projection, start_rows
from fedbpt.tasks import GivenTask, Row, cue_ids, load

log = logging.getLogger(__name__)

DIRECTIONS: Final = 40
"""Dimension of the search."""

REACH: Final = 0.5
"""Size of a first step, relative to the one that the prompt was tuned with."""

CHECK_EVERY: Final = 4
"""Generations between two measurements on held-back rows."""

HELD_ROWS: Final = 96
"""Maximum number of training rows held back; a quarter of them, if that is less."""

LEAST_DISTINCT: Final = 0.7
"""A prompt is refused whose share of distinct answers is below this share of that of the first prompt."""


@dataclass(frozen=True)
class RefineResult:
    """What `refine` found.

    Attributes:
        prompt: the best prompt; the given one, if none was better.
        before, after: mean value of the metric on the held-back training rows, which chose the prompt: for the figure
            that counts, measure other rows with `fedbpt.compare_answers`. −∞ where the metric failed on all of them.
        curve: (evaluations so far, mean value on the held-back rows) of each measurement.
        evaluations: number of candidates whose answers were measured.
        n_failed: answers that the metric failed on.
    """

    prompt: Prompt
    before: float
    after: float
    curve: tuple[tuple[int, float], ...]
    evaluations: int
    n_failed: int


@checked
@interruptible()
def refine(
    scorer: TextModel,
    task: GivenTask,
    train: Any,
    prompt: Prompt,
    *,
    metric: str | Metric | None = None,
    budget: Budget | None = None,
    popsize: Annotated[int, msgspec.Meta(ge=4, le=1000)] = 12,
    batch_size: PositiveInt = 16,
    seed: int = 0,
    on_measured: Callable[[int, float], None] = lambda _evaluations, _mean: None,
) -> RefineResult:
    """Move ``prompt`` to where the model's answers are worth more by a metric. Ctrl-C ends it with the best so far.

    Args:
        scorer: the model.
        task: a task of target texts, or its name or file.
        train: training rows, in any form that `fedbpt.tune` takes.
        prompt: tuned on target texts (`fedbpt.tune`), in the cue or in layers.
        metric: as for `fedbpt.compare_answers`.
        budget: when to stop: evaluations or seconds; None: 600 evaluations.
        popsize: candidates per generation, 4 to 1,000.
        batch_size: texts per generation.
        seed: of all randomness.
        on_measured: called with (evaluations so far, mean value) after each measurement on held-back rows.

    Raises:
        DataError: fewer than 16 training rows.
        ConfigError: a budget in tokens; a metric that does not exist.
        InputError, PromptError: a prompt in front, or of another model.
    """
    task = load(task)
    rows = named_rows("train", train, task)
    if len(rows) < 16:
        raise DataError(f"refining needs 16 training rows or more, got {len(rows)}: give more", field="train")
    limits = (budget or Budget(evaluations=600)).limits()
    if limits["tokens"]:
        raise ConfigError("refining has no budget in tokens: give evaluations or seconds", field="budget")
    if not moves(scorer, prompt):
        raise PromptError("this prompt does nothing: tune one on target texts first", field="prompt")
    measure = metric if callable(metric) else metric_named(metric or generation_of(task).metric)
    search = _Search(scorer, task, rows, prompt, measure, popsize, batch_size, seed)
    return search.run(limits["evaluations"], limits["seconds"], on_measured)


def moves(scorer: TextModel, prompt: Prompt) -> bool:
    """Whether a prompt differs from none: `fedbpt.tune` ships one that does not where held-out rows saw no gain."""
    start = start_rows(scorer, cue_ids(scorer, prompt.template), prompt.spec)
    return prompt.rows.shape != start.shape or bool((prompt.rows != start).any())


class _Search:
    def __init__(
        self,
        scorer: TextModel,
        task: Any,
        rows: Sequence[Row],
        prompt: Prompt,
        metric: Metric,
        popsize: int,
        batch_size: int,
        seed: int,
    ) -> None:
        self.prompt = prompt
        self.metric = metric
        self.settings = generation_of(task)
        self.seed = seed
        self.popsize = popsize
        order = generator(seed, "refine", "held").permutation(len(rows))
        n_held = min(len(rows) // 4, HELD_ROWS)
        self.held, self.free = order[:n_held], order[n_held:]
        self.batch_size = min(batch_size, len(self.free))
        self.rows = list(rows)
        self.plan = compile_answers(scorer, task, rows, prompt, prompt.template)
        spec = msgspec.structs.replace(prompt.spec, d=DIRECTIONS, alpha=prompt.spec.alpha * REACH, seed=seed)
        self.projection = Projection(spec, prompt.rows, scorer.embedding_std)
        likelihood = ObjectiveSpec(loss="nll", max_text_tokens=task.max_text_tokens, readout_words=0)
        place = msgspec.structs.replace(prompt.spec, d=1)
        self.likelihood = Objective(scorer, prompt.template, (), list(rows), likelihood, place)
        self.evaluations = 0
        self.n_failed = 0
        self.worst = 0.0

    def run(self, evaluations: int, seconds: float, on_measured: Callable[[int, float], None]) -> RefineResult:
        began = time.monotonic()
        update = CmaUpdate(DIRECTIONS, self.prompt.spec.sigma0, self.popsize, step_size="path")
        mean = update.mean
        before, distinct = self._measure_held(mean)
        best = (before, mean)
        curve = [(0, before)]
        number = 0
        try:
            while True:
                number += 1
                chosen = np.sort(
                    generator(self.seed, "refine", number).choice(self.free, self.batch_size, replace=False)
                )
                latents = sample_population(update.state(), self.popsize, self.seed, number)
                losses = self._losses(latents, chosen)
                if losses is not None:
                    update.update(latents, losses)
                spent = evaluations and self.evaluations + self.popsize > evaluations
                spent = spent or bool(seconds and time.monotonic() - began >= seconds)
                if number % CHECK_EVERY == 0 or spent:
                    value, own = self._measure_held(update.mean)
                    curve.append((self.evaluations, value))
                    on_measured(self.evaluations, value)
                    if value > best[0] and own >= LEAST_DISTINCT * distinct:
                        best = (value, update.mean)
                if spent:
                    break
        except (KeyboardInterrupt, ScoringInterrupted):
            log.info("refining was interrupted after %d evaluations", self.evaluations)
        after, latent = best
        found = self.prompt if after <= before else self._as_prompt(latent, before, after)
        return RefineResult(found, before, after, tuple(curve), self.evaluations, self.n_failed)

    def _losses(self, latents: NDArray[np.float64], chosen: NDArray[np.intp]) -> NDArray[np.float64] | None:
        """Ranks [k] of the candidates: by the answers, then by the targets' likelihood. None: all answers are equal."""
        embeds = self.projection.embeds(latents)
        rewards = self._rewards(embeds, chosen).mean(axis=1)
        self.evaluations += len(latents)
        if np.ptp(rewards) == 0:
            return None
        likelihood = self.likelihood.row_losses(embeds, chosen).mean(axis=1)
        ranks = np.empty(len(rewards))
        ranks[np.lexsort((likelihood, -rewards))] = np.arange(len(rewards))
        return ranks

    def _rewards(self, embeds: NDArray[np.float32], chosen: NDArray[np.intp]) -> NDArray[np.float64]:
        """The metric's values [k, n]."""
        found = self._answers(embeds, chosen)
        rows = [self.rows[i] for i in chosen]
        rewards = [rewards_of(self.metric, rows, own) for own in found]
        self.n_failed += sum(each.n_failed for each in rewards)
        return self._filled(np.stack([each.values for each in rewards]))

    def _filled(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Failures count as the worst value so far, of any candidate."""
        found = filled(np.append(values.ravel(), self.worst))
        self.worst = float(found.min())
        return found[:-1].reshape(values.shape)

    def _answers(self, embeds: NDArray[np.float32], chosen: NDArray[np.intp]) -> list[list[str]]:
        found = self.plan.generate(embeds, chosen, GREEDY, max_tokens=self.settings.max_tokens, stop=self.settings.stop)
        return [[answer.text.strip() for answer in own] for own in found]

    def _measure_held(self, latent: NDArray[np.float64]) -> tuple[float, float]:
        """Mean value on the held-back rows, and the share of distinct answers."""
        embeds = self.projection.embeds(latent[None])
        (own,) = self._answers(embeds, self.held)
        rewards = rewards_of(self.metric, [self.rows[i] for i in self.held], own)
        self.n_failed += rewards.n_failed
        if rewards.n_failed == len(own):
            return -math.inf, 0.0
        return float(self._filled(rewards.values).mean()), len(set(own)) / len(own)

    def _as_prompt(self, latent: NDArray[np.float64], before: float, after: float) -> Prompt:
        given = self.prompt
        step: dict[str, Any] = {
            "refined": True,
            "evaluations": self.evaluations,
            "before": before if math.isfinite(before) else None,  # JSON has no infinity
            "after": after,
            "seed": self.seed,
        }
        return given.with_rows(self.projection.embeds(latent[None])[0], (*given.history, step))
