"""The Python API: `tune` and `evaluate` on one machine. The command line uses the same functions.

A run on one machine is a federation of one device in this process: the same rounds, the same search, the same results.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np

from fedbpt.argument_types import DataclassMeta, check_fields, checked
from fedbpt.coordinator.curves import curves_of
from fedbpt.coordinator.federation import Federation
from fedbpt.coordinator.one_machine import NAME, clients_of, digest_of_rows, run_alone, settings_alone
from fedbpt.device.device import Device
from fedbpt.display.notebook import live_display
from fedbpt.engine.scorer import Scorer
from fedbpt.errors import ConfigError, InputError, PromptError
from fedbpt.machine.interrupts import interruptible
from fedbpt.objective.mini_batches import parts_of, under
from fedbpt.objective.objective import Objective
from fedbpt.prompts.prompt import Prompt, short_fingerprint
from fedbpt.protocol.specs import LossName, ObjectiveSpec, PromptSpec, Template
from fedbpt.quantities import PositiveFloat, PositiveInt
from fedbpt.results import EvaluationResult, TuneResult
from fedbpt.runs.events import Event, RunStarted
from fedbpt.runs.result import RunResult, Split
from fedbpt.runs.settings import RunSettings
from fedbpt.runs.store import RunStore
from fedbpt.tasks import GivenTask, Row, Task, load, to_rows, word_notes

log = logging.getLogger(__name__)

POPSIZE: Final = 16
MOST_BETWEEN, EVALUATIONS = 10, 8
"""Generations between evaluations on development rows, at most; and how many evaluations there are to be."""


@dataclass(frozen=True)
class Budget(metaclass=DataclassMeta):
    """When tuning ends: at the first limit that is reached. None: no such limit; all None: 1,600 evaluations.

    Args:
        evaluations: candidates scored, each on one mini-batch per device.
        tokens: forward tokens, summed over devices.
        seconds: of calibration, search and readout; choosing the template comes before, evaluating beside and after.
            A generation that is not done when they are over, less the readout's share, is stopped and left out.
    """

    evaluations: PositiveInt | None = None
    tokens: PositiveInt | None = None
    seconds: PositiveFloat | None = None

    def __post_init__(self) -> None:
        check_fields(self)

    def limits(self) -> dict[str, Any]:
        """As fields of `RunSettings`."""
        given = {name: getattr(self, name) or 0 for name in ("evaluations", "tokens", "seconds")}
        return {"rounds": 0, **(given if any(given.values()) else {**given, "evaluations": 1600})}


@checked
@interruptible()
def tune(
    scorer: Scorer,
    task: GivenTask,
    train: Any,
    dev: Any = None,
    test: Any = None,
    *,
    budget: Budget | None = None,
    seed: int = 0,
    prompt: PromptSpec | None = None,
    objective: ObjectiveSpec | None = None,
    popsize: int = POPSIZE,
    method: str = "pooled",
    iterations: int = 8,
    evaluate_every: int | None = None,
    patience: int = 0,
    restarts: int = 0,
    balanced: bool = False,
    ensemble: int = 2,
    store: str | os.PathLike[str] | None = None,
    run: str = "tune",
    on_event: Callable[[Event], None] = lambda _event: None,
    show: bool | None = None,
) -> TuneResult:
    """Tune a soft prompt for ``task`` on this machine. Ctrl-C ends the search: the result is of what there is so far.

    Args:
        scorer, task: the model, from `load_model`; the task, or its name or file, as for `fedbpt.tasks.load`.
        train: rows to tune on, as `fedbpt.tasks.to_rows` takes them: pairs, dicts, a DataFrame, a Dataset, a file.
        dev: rows to watch the accuracy on; with ``patience`` they choose, too.
        test: rows that only report: for the result's figures and the model card's.
        budget: when to stop.
        seed: of everything random; the run's prompt seed unless ``prompt`` sets its own.
        prompt: place, length and size of the search space; None: the defaults, in the cue.
        objective: loss and mini-batch size.
        popsize, evaluate_every: candidates a generation, λ; generations between evaluations on ``dev``, None: at most
            10, and so few that there are eight evaluations.
        method, iterations: the aggregation (`fedbpt.aggregation.methods`), and the generations of its local searches.
        patience: so many of those without a lower loss end the search, and the best mean counts; 0: never.
        restarts: so often the search begins anew from the best mean when patience runs out, instead of ending.
        balanced: weigh the rows' losses so that every label counts alike, however many rows it has.
        ensemble: so many of the task's templates does the readout average over; 1: the selected one alone.
        store, run: the run database that keeps the run (None: none does), and the run's name there. Called again, it
            goes on where it was stopped; a finished run's result is returned.
        on_event, show: called for each `fedbpt.runs.settings` event; whether to show how it goes.

    Raises:
        InputError: an argument of another kind; a prompt that does not fit the model. Nothing was scored.
        DataError, TaskError, ConfigError: rows, templates or a budget that cannot work; a stored run of other rows.
        StoreError: of ``store``; another process is at this run.
        KeyboardInterrupt: Ctrl-C before the first round of the search is closed, or for the second time.
    """
    task = load(task)
    for note in word_notes(scorer, task):
        log.warning("%s", note)
    given = {"train": train, **{name: rows for name, rows in (("dev", dev), ("test", test)) if rows is not None}}
    found = {name: _rows(name, rows, task) for name, rows in given.items()}
    splits = [found.get(name, []) for name in ("train", "dev", "test")]
    options: dict[str, Any] = {
        "popsize": popsize,
        "method": method,
        "iterations": iterations,
        "patience": patience,
        "restarts": restarts,
        "balanced": balanced,
        "ensemble": ensemble,
    }
    every = evaluate_every if splits[1] else 0
    settings = settings_for(task, budget, seed, prompt, objective, every, **options)
    return _tune(scorer, task, splits, settings, store, run, on_event, show)


def _rows(name: str, given: Any, task: Task) -> list[Row]:
    """Of the argument ``name``, which an error names."""
    try:
        return to_rows(given, task)
    except InputError as error:
        raise type(error)(f"{name}: {error}", public=f"{name}: {error.public}") from error


def settings_for(
    task: Task,
    budget: Budget | None = None,
    seed: int = 0,
    prompt: PromptSpec | None = None,
    objective: ObjectiveSpec | None = None,
    evaluate_every: int | None = None,
    popsize: int = POPSIZE,
    **options: Any,
) -> RunSettings:
    """Of a run on this machine; arguments as for `tune`, ``options`` are other fields of `RunSettings`."""
    limits = (budget or Budget()).limits()
    if evaluate_every is None:
        generations = limits["evaluations"] // popsize or MOST_BETWEEN * EVALUATIONS
        evaluate_every = min(max(generations // EVALUATIONS, 1), MOST_BETWEEN)
    found = RunSettings(
        **limits,
        prompt=prompt or PromptSpec(seed=seed),
        objective=objective or ObjectiveSpec(max_text_tokens=task.max_text_tokens),
        seed=seed,
        popsize=popsize,
        evaluate_every=evaluate_every,
        **options,
    )
    return settings_alone(found)


def _tune(
    scorer: Scorer,
    task: Task,
    splits: Sequence[Sequence[Row]],
    settings: RunSettings,
    store: str | os.PathLike[str] | None,
    run: str,
    on_event: Callable[[Event], None],
    show: bool | None,
) -> TuneResult:
    with ExitStack() as stack:
        opened = stack.enter_context(RunStore(None if store is None else Path(store)))
        stack.enter_context(opened.held(run))
        tell = _told(stack.enter_context(live_display(show)), on_event)
        device = Device(NAME, scorer, *splits, task=task)
        device.check_fit(settings.for_labels(task.labels).objective, settings.prompt)
        client = stack.enter_context(clients_of(device))

        def begin(settings: RunSettings) -> Federation:
            search, rows = settings.aggregator(), digest_of_rows(*splits)
            return Federation([client()], task, settings, search, opened, run, tell, rows=rows)

        ended = run_alone(begin, settings)
        curves = curves_of(opened, run)
    return TuneResult(make_prompt(scorer, task, ended.result), ended.result, *curves, ended.interrupted)


def _told(*listeners: Callable[[Event], None]) -> Callable[[Event], None]:
    def tell(event: Event) -> None:
        for listener in listeners:
            listener(event)

    return tell


@checked
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
        **_figures(result),
    }


def require_model_of_run(scorer: Scorer, run: RunResult | RunStarted) -> None:
    """Raises `PromptError` where ``scorer`` is not the model of the run's devices: its prompt is made with that."""
    if scorer.fingerprint != run.model_fingerprint:
        raise PromptError(
            f"run {run.run!r} tunes {run.model_name} ({short_fingerprint(run.model_fingerprint)}), not {scorer.name} "
            f"({short_fingerprint(scorer.fingerprint)}): give the model that its devices have"
        )


def _figures(result: RunResult) -> dict[str, Any]:
    """Of test rows, or where there were none of development rows (``split``)."""
    split: Split = "test" if result.tuned.n else "dev"
    told: dict[str, Any] = {"split": split} if result.scores(split) else {}
    for name, score in result.scores(split).items():
        if result.generates:
            told |= {f"{name}_perplexity": score.perplexity, f"{name}_n": score.n}
        else:
            told |= {f"{name}_accuracy": score.accuracy, f"{name}_interval": list(score.interval), f"{name}_n": score.n}
    return told


@checked
@interruptible()
def evaluate(
    scorer: Scorer,
    task: GivenTask,
    rows: Any,
    prompt: Prompt | None = None,
    *,
    template: Template | None = None,
) -> EvaluationResult:
    """Accuracy and loss (of target texts: perplexity) on ``rows``, of a tuned prompt or of the model as it is.

    Args:
        scorer: the model.
        task: the task, or its name or file; its name and labels must be the prompt's.
        rows: as for `tune`.
        prompt: None: zero-shot.
        template: how to put the texts to the model; None: the prompt's own, or the task's first.

    Raises:
        PromptError: the prompt was made for another model.
        TaskError, DataError: as in `tune`.
    """
    task = load(task)
    data = _rows("rows", rows, task)
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
