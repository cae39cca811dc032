"""The Python API: `tune` and `evaluate` on one machine. The command line uses the same functions.

A run on one machine is a federation of one device in this process: the same rounds, the same search, the same results.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from fedbpt.aggregation import Aggregator, make_aggregator
from fedbpt.clients.in_process import InProcessClient
from fedbpt.errors import ConfigError, PromptError
from fedbpt.federation import Federation
from fedbpt.intervals import wilson_interval
from fedbpt.local import Device
from fedbpt.messages import LossName, ObjectiveSpec, PromptSpec, Template
from fedbpt.notebook import live_display
from fedbpt.objective import Objective
from fedbpt.prompt import Prompt, short_fingerprint
from fedbpt.results import EvaluationResult, TuneResult
from fedbpt.runs import (
    Evaluated,
    Event,
    RoundClosed,
    RunResult,
    RunSettings,
    RunStarted,
    Score,
    TemplateSelected,
)
from fedbpt.sampling import parts_of, under
from fedbpt.scorer import Scorer
from fedbpt.store import RunStore
from fedbpt.tasks import Task, to_rows, word_notes

log = logging.getLogger(__name__)

DEVICE = "this-machine"


@dataclass(frozen=True)
class Budget:
    """When tuning ends: at the first limit that is reached. None: no such limit; all None: 1,600 evaluations.

    Args:
        evaluations: candidates scored, each on one mini-batch per device.
        tokens: forward tokens, summed over devices.
        seconds: of tuning rounds; choosing the template comes before, evaluating after.
    """

    evaluations: int | None = None
    tokens: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        for name in ("evaluations", "tokens", "seconds"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"a budget of {value} {name} is nothing: give a positive number")

    def limits(self) -> dict[str, Any]:
        """As fields of `RunSettings`."""
        given = {name: getattr(self, name) or 0 for name in ("evaluations", "tokens", "seconds")}
        return {"rounds": 0, **(given if any(given.values()) else {**given, "evaluations": 1600})}


def tune(
    scorer: Scorer,
    task: Task,
    train: Any,
    dev: Any = None,
    *,
    budget: Budget | None = None,
    seed: int = 0,
    prompt: PromptSpec | None = None,
    objective: ObjectiveSpec | None = None,
    popsize: int = 16,
    evaluate_every: int = 10,
    patience: int = 0,
    restarts: int = 0,
    balanced: bool = False,
    ensemble: int = 2,
    on_event: Callable[[Event], None] = lambda _event: None,
    show: bool | None = None,
) -> TuneResult:
    """Tune a soft prompt for ``task`` on this machine.

    Args:
        scorer: the model, from `load_model`.
        task: from `fedbpt.tasks.load`; the training rows select one of its templates.
        train: rows to tune on: (text, label index or target text) pairs, a `datasets.Dataset` or a file.
        dev: rows to watch the accuracy on; with ``patience`` they choose, too.
        budget: when to stop.
        seed: of everything random; the run's prompt seed unless ``prompt`` sets its own.
        prompt: place, length and size of the search space; None: the defaults, in the cue.
        objective: loss and mini-batch size.
        popsize: candidates a generation, λ.
        evaluate_every: generations between evaluations on ``dev``.
        patience: so many of those without a lower loss end the search, and the best mean counts; 0: never.
        restarts: so often the search begins anew from the best mean when patience runs out, instead of ending.
        balanced: weigh the rows' losses so that every label counts alike, however many rows it has.
        ensemble: so many of the task's templates does the readout average over; 1: the selected one alone.
        on_event, show: called for each `fedbpt.runs` event; whether to show live how it goes, None: in a notebook.

    Raises:
        DataError, TaskError, ConfigError: rows, templates or a budget that cannot work.
    """
    for note in word_notes(scorer, task):
        log.warning("%s", note)
    dev_rows = [] if dev is None else to_rows(dev, task)
    settings = RunSettings(
        **(budget or Budget()).limits(),
        prompt=prompt or PromptSpec(seed=seed),
        objective=objective or ObjectiveSpec(max_text_tokens=task.max_text_tokens),
        popsize=popsize,
        seed=seed,
        quorum=1.0,
        deadline_s=7 * 86400.0,  # nobody waits for a device but its owner
        evaluate_every=evaluate_every if dev_rows else 0,
        patience=patience,
        restarts=restarts,
        balanced=balanced,
        ensemble=ensemble,
    )
    watch = _Curves(on_event)
    result = _run_alone(Device(DEVICE, scorer, to_rows(train, task), dev_rows, task=task), task, settings, watch, show)
    return TuneResult(make_prompt(scorer, task, result), result, tuple(watch.losses), tuple(watch.dev))


def _run_alone(device: Device, task: Task, settings: RunSettings, watch: _Curves, show: bool | None) -> RunResult:
    def tell(event: Event) -> None:
        display(event)
        watch(event)

    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="fedbpt-"))
        store = stack.enter_context(RunStore(Path(folder) / "runs.db"))
        display = stack.enter_context(live_display(show))
        clients = [InProcessClient(device)]
        return Federation(clients, task, settings, aggregator_for(settings), store, "tune", tell).run()


def aggregator_for(settings: RunSettings) -> Aggregator:
    """The aggregator that ``settings.method`` names, before its first round."""
    return make_aggregator(
        settings.method, settings.prompt, settings.popsize, settings.iterations, settings.seed, settings.robust,
        settings.byzantine,
    )  # fmt: skip


def make_prompt(scorer: Scorer, task: Task, result: RunResult) -> Prompt:
    """The prompt artefact of a run: its latent, as rows of this model's embeddings.

    Raises:
        PromptError: ``scorer`` is not the model that the run tuned.
    """
    require_model_of_run(scorer, result)
    spec, objective = result.settings.prompt, result.settings.objective
    # one row is enough: a prompt depends on the template and the model alone
    made = Objective(scorer, result.template, task.labels, [("x", 0 if task.labels else "x")], objective, spec)
    made.readout = result.readout
    tuned_on = msgspec.structs.replace(task, max_text_tokens=objective.max_text_tokens)
    return made.as_prompt(result.latent, tuned_on, (_history(result),), result.others)


def _history(result: RunResult) -> dict[str, Any]:
    """What a prompt remembers of its run, and its model card tells."""
    settings = result.settings
    privacy = {} if settings.privacy is None else msgspec.to_builtins(settings.privacy)
    return {
        "run": result.run,
        "method": settings.method,
        "seed": settings.seed,
        "rounds": result.rounds,
        "evaluations": result.evaluations,
        "tokens": result.tokens,
        "devices": len(result.devices),
        "digest": result.digest,
        **({} if settings.robust == "none" else {"robust": settings.robust, "byzantine": settings.byzantine}),
        **privacy,
        **({} if result.epsilon is None else {"epsilon": result.epsilon}),
        **_scores(result, result.zero_shot, "zero_shot"),
        **_scores(result, result.tuned, "tuned"),
    }


def require_model_of_run(scorer: Scorer, run: RunResult | RunStarted) -> None:
    """Raises `PromptError` where ``scorer`` is not the model of the run's devices: its prompt is made with that."""
    if scorer.fingerprint != run.model_fingerprint:
        raise PromptError(
            f"run {run.run!r} tunes {run.model_name} ({short_fingerprint(run.model_fingerprint)}), not {scorer.name} "
            f"({short_fingerprint(scorer.fingerprint)}): give the model that its devices have"
        )


def _scores(result: RunResult, score: Score, name: str) -> dict[str, Any]:
    if not score.n:
        return {}
    if result.generates:
        return {f"{name}_perplexity": score.perplexity, f"{name}_n": score.n}
    interval = list(wilson_interval(score.correct, score.n))
    return {f"{name}_accuracy": score.accuracy, f"{name}_interval": interval, f"{name}_n": score.n}


def evaluate(
    scorer: Scorer,
    task: Task,
    rows: Any,
    prompt: Prompt | None = None,
    *,
    template: Template | None = None,
) -> EvaluationResult:
    """Accuracy and loss (of target texts: perplexity) on ``rows``, of a tuned prompt or of the model as it is.

    Args:
        scorer: the model.
        task: the task; its name and labels must be the prompt's.
        rows: (text, label index) pairs, a `datasets.Dataset` or a file.
        prompt: None: zero-shot.
        template: how to put the texts to the model; None: the prompt's own, or the task's first.

    Raises:
        PromptError: the prompt was made for another model.
        TaskError, DataError: as in `tune`.
    """
    data = to_rows(rows, task)
    loss: LossName = "cross_entropy" if task.labels else "nll"
    spec = ObjectiveSpec(loss=loss, max_text_tokens=task.max_text_tokens, readout_words=0)
    if prompt is None:
        place = PromptSpec(d=1)
        objective = Objective(scorer, template or task.templates[0], task.labels, data, spec, place, keep_kv=False)
        found = objective.evaluate(objective.zero_shot_embeds())
    else:
        prompt.check(scorer)
        if prompt.labels != task.labels:
            raise ConfigError(f"the prompt is for labels {list(prompt.labels)}, the task has {list(task.labels)}")
        used = template or prompt.template
        place = msgspec.structs.replace(prompt.spec, d=1)
        objective = Objective(scorer, used, task.labels, data, spec, place, keep_kv=False, words=prompt.word_ids)
        objective.readout = prompt.readout
        others = [under(each, objective, data) for each in prompt.others]
        parts = []
        for part in parts_of(np.arange(len(data)), 1 + len(others)):
            logits = [other.logits(other.zero_shot_embeds(), part) for other in others]
            parts.append(objective.evaluate(prompt.rows[None], part, others=logits))
        return EvaluationResult(
            len(data), sum(part.correct[0] for part in parts), sum(part.loss_sums[0] for part in parts) / len(data),
            np.concatenate([part.predictions[0] for part in parts]),
        )  # fmt: skip
    return EvaluationResult(found.n, found.correct[0], found.loss_sums[0] / found.n, found.predictions[0])


class _Curves:
    """Listens to a run: (evaluations, mini-batch loss), and (evaluations, development accuracy or perplexity)."""

    def __init__(self, then: Callable[[Event], None]) -> None:
        self.losses: list[tuple[int, float]] = []
        self.dev: list[tuple[int, float]] = []
        self._then = then
        self._generates = False

    def __call__(self, event: Event) -> None:
        if isinstance(event, RoundClosed) and event.purpose == "search":
            self.losses.append((event.evaluations, event.loss))
        elif isinstance(event, Evaluated):
            figure = event.score.perplexity if self._generates else event.score.accuracy
            self.dev.append((self.losses[-1][0] if self.losses else 0, figure))
        elif isinstance(event, TemplateSelected):
            self.losses.clear()
            self._generates = not event.template.label_words
        self._then(event)
