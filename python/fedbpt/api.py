"""The Python API: `tune` and `evaluate` on one machine. The command line uses the same functions.

A run on one machine is a federation with one device in this process: the same rounds, search and results.
"""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import msgspec
import numpy as np
from msgspec import UNSET

from fedbpt.argument_types import DataclassMeta, check_fields, checked
from fedbpt.coordinator.federation import Federation
from fedbpt.coordinator.layer_reading import states_alone
from fedbpt.coordinator.monitoring.curves import curves_of
from fedbpt.coordinator.one_machine import NAME, clients_of, digest_of_rows, run_alone, settings_alone
from fedbpt.device.device import Device
from fedbpt.display.notebook import live_display
from fedbpt.engine.scorer import Scorer
from fedbpt.errors import ConfigError, InputError, PromptError
from fedbpt.machine.interrupts import interruptible
from fedbpt.objective.layer_view import LayerReader
from fedbpt.objective.losses import cross_entropy
from fedbpt.objective.mini_batches import parts_of, under
from fedbpt.objective.objective import Objective
from fedbpt.prompts.prompt import Prompt, short_fingerprint
from fedbpt.protocol.specs import LayerReadout, LossName, ObjectiveSpec, PromptSpec, Template
from fedbpt.quantities import PositiveFloat, PositiveInt
from fedbpt.results import EvaluationResult, TuneResult
from fedbpt.runs.events import Event, RunStarted
from fedbpt.runs.result import UNSCORED, RunResult, Split
from fedbpt.runs.settings import RunSettings
from fedbpt.runs.store import RunStore
from fedbpt.tasks import GivenTask, Row, Task, load, to_rows, word_notes
from fedbpt.tasks.rows import targets_of

log = logging.getLogger(__name__)

POPSIZE: Final = 16

N_EVALUATIONS: Final = 8
"""Default number of evaluations on development rows during the search."""

MAX_EVALUATE_EVERY: Final = 10
"""Maximum default number of generations between two evaluations on development rows."""


@dataclass(frozen=True)
class Budget(metaclass=DataclassMeta):
    """Limits of a run, which ends at the first that is reached. None: no limit; all None: 1,600 evaluations.

    Args:
        evaluations: number of candidates scored, each on one mini-batch per device.
        tokens: number of forward tokens, summed over devices.
        seconds: duration of calibration, search and readout, without template selection and evaluation. A generation
            still running at the end of the search's share is stopped and discarded.
    """

    evaluations: PositiveInt | None = None
    tokens: PositiveInt | None = None
    seconds: PositiveFloat | None = None

    def __post_init__(self) -> None:
        check_fields(self)

    def limits(self) -> dict[str, Any]:
        """The limits as fields of `RunSettings`."""
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
    stop_if_futile: bool = True,
    metric_share: float = 0.0,
    balanced: bool = False,
    ensemble: int = 2,
    readout: Literal["auto", "layers", "logistic", "words"] = "auto",
    store: str | os.PathLike[str] | None = None,
    run: str = "tune",
    on_event: Callable[[Event], None] = lambda _event: None,
    show: bool | None = None,
) -> TuneResult:
    """Tune a soft prompt for ``task`` on this machine. Ctrl-C ends the search and returns the best result so far.

    Args:
        scorer: the model, from `load_model`.
        task: a task, or its name or file, as for `fedbpt.tasks.load`.
        train: training rows in any form that `fedbpt.tasks.to_rows` takes: pairs, dicts, a DataFrame, a Dataset, a
            file.
        dev: rows for the accuracy during the run; with ``patience``, also to select the best mean.
        test: rows for the final figures of the result and the model card only.
        budget: when to stop.
        seed: seed of all randomness, and of the prompt unless ``prompt`` sets its own.
        prompt: placement, length and search-space dimension of the prompt; None: the defaults, in the cue.
        objective: loss and mini-batch size.
        popsize: number of candidates per generation, λ.
        method: the aggregation (`fedbpt.aggregation.methods`).
        iterations: number of generations of a local search, for methods with local searches.
        evaluate_every: number of generations between evaluations on ``dev``; None: at most 10, for about eight
            evaluations.
        patience: number of evaluations without a lower loss that end the search with the best mean; 0: no limit.
        restarts: maximum number of restarts, each from the best mean, when ``patience`` runs out.
        stop_if_futile: end the search after a quarter or half of its budget if held-back training rows show no gain
            over the readout without prompt.
        metric_share: for a task of target texts with a metric, share of the budget, its last part, that searches on the
            metric of the model's own answers, 0 to 1; the rest searches on the likelihood of the target texts.
        balanced: weight the rows' losses so that all labels count equally.
        readout: what the labels are read from: ``words``, the logits of random words; ``layers``, hidden states,
            where training rows held back from the search choose what the prompt ships; ``auto``: layers, unless the
            settings or a resumed run exclude them.
        ensemble: number of the task's templates over which the readout of words averages; 1: only the selected one.
        store: the run database; None: the run is not stored. The same call resumes a stopped run, and returns the
            result of a finished one.
        run: the run's name in ``store``.
        on_event: called for each event of `fedbpt.runs.events`.
        show: whether to show progress; None: show it.

    Raises:
        InputError: an invalid argument, or a prompt that does not fit the model; raised before anything is scored.
        DataError, TaskError, ConfigError: unusable rows, templates or budget; a stored run with other rows.
        StoreError: ``store`` is unusable, or another process is working on this run.
        KeyboardInterrupt: Ctrl-C before the first round of the search is closed, or a second Ctrl-C.
    """
    task = load(task)
    given = {"train": train, **{name: rows for name, rows in (("dev", dev), ("test", test)) if rows is not None}}
    found = {name: named_rows(name, rows, task) for name, rows in given.items()}
    splits = [found.get(name, []) for name in ("train", "dev", "test")]
    options: dict[str, Any] = {
        "popsize": popsize,
        "method": method,
        "iterations": iterations,
        "patience": patience,
        "restarts": restarts,
        "stop_if_futile": stop_if_futile,
        "metric_share": metric_share,
        "balanced": balanced,
        "ensemble": ensemble,
        "readout": readout,
    }
    every = evaluate_every if splits[1] else 0
    settings = settings_for(task, budget, seed, prompt, objective, every, **options)
    unscored = states_alone(task.templates, settings.for_labels(task.labels, task.generation), scorer.n_layer)
    for note in [UNSCORED] if unscored else word_notes(scorer, task):
        log.warning("%s", note)
    try:
        return _tune(scorer, task, splits, settings, store, run, on_event, show)
    finally:
        gc.collect()  # the run's device, in cycles with its routes, holds the model: the caller's name alone shall


def named_rows(name: str, given: Any, task: Task) -> list[Row]:
    """The rows of argument ``name``. Adds the name to errors."""
    try:
        return to_rows(given, task)
    except InputError as error:
        raise type(error)(
            f"{name}: {error}", public=f"{name}: {error.public}", field=error.field or name, limit=error.limit
        ) from error


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
    """Settings of a run on this machine. Arguments as for `tune`; ``options`` are other fields of `RunSettings`."""
    limits = (budget or Budget()).limits()
    if evaluate_every is None:
        generations = limits["evaluations"] // popsize or MAX_EVALUATE_EVERY * N_EVALUATIONS
        evaluate_every = min(max(generations // N_EVALUATIONS, 1), MAX_EVALUATE_EVERY)
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
        callback = _call_all(stack.enter_context(live_display(show)), on_event)
        device = Device(NAME, scorer, *splits, task=task)
        device.check_fit(settings.for_labels(task.labels, task.generation).objective, settings.prompt)
        client = stack.enter_context(clients_of(device))

        def begin(settings: RunSettings) -> Federation:
            aggregator = settings.aggregator()
            rows = digest_of_rows(*splits)
            return Federation([client()], task, settings, aggregator, opened, run, callback, rows=rows)

        ended = run_alone(begin, settings)
        curves = curves_of(opened, run)
    return TuneResult(make_prompt(scorer, task, ended.result), ended.result, *curves, ended.interrupted)


def _call_all(*callbacks: Callable[[Event], None]) -> Callable[[Event], None]:
    def call(event: Event) -> None:
        for callback in callbacks:
            callback(event)

    return call


@checked
def make_prompt(scorer: Scorer, task: Task, result: RunResult) -> Prompt:
    """Make the prompt of a run: its latent, projected to rows in the model's embedding space.

    Raises:
        PromptError: ``scorer`` is not the model that the run tuned.
    """
    require_model_of_run(scorer, result)
    spec = result.prompt
    if result.shipped and not result.latent.any():
        spec = msgspec.structs.replace(spec, placement="cue", n_prompt=1, shift=UNSET)  # z = 0 is exactly no prompt
    objective = result.settings.objective
    # Any row will do, because the prompt depends only on the template and the model.
    made = Objective(scorer, result.template, task.labels, [("x", 0 if task.labels else "x")], objective, spec)
    readout = result.readout
    tuned_on = msgspec.structs.replace(task, max_text_tokens=objective.max_text_tokens)
    if isinstance(readout, LayerReadout):
        return made.as_prompt(result.latent, tuned_on, (_history(result),), layer_readout=readout)
    made.readout = readout
    others = result.others if readout is not None and readout.others else ()
    return made.as_prompt(result.latent, tuned_on, (_history(result),), others)


def _history(result: RunResult) -> dict[str, Any]:
    """What a prompt and its model card record about the run."""
    settings = result.settings
    spec = settings.privacy
    privacy = {} if spec is None else msgspec.to_builtins(spec)
    if spec is not None and settings.reads_privately:  # nothing else was sent
        privacy = {"readout_noise": spec.noise_of_readout, "delta": spec.delta}
    return {
        "run": result.run,
        "method": settings.method,
        "seed": settings.seed,
        "rounds": result.rounds,
        "evaluations": result.evaluations,
        "tokens": result.tokens,
        "devices": len(result.devices),
        "digest": result.digest,
        **({"shipped": result.shipped} if result.shipped else {}),
        **({} if settings.robust == "none" else {"robust": settings.robust, "byzantine": settings.byzantine}),
        **privacy,
        **({} if result.epsilon is None else {"epsilon": result.epsilon}),
        **_figures(result),
    }


def require_model_of_run(scorer: Scorer, run: RunResult | RunStarted) -> None:
    """Raise `PromptError` if ``scorer`` is not the model of the run's devices, which its prompt needs."""
    if scorer.fingerprint != run.model_fingerprint:
        raise PromptError(
            f"run {run.run!r} tunes {run.model_name} ({short_fingerprint(run.model_fingerprint)}), not {scorer.name} "
            f"({short_fingerprint(scorer.fingerprint)}): use the model that its devices have",
            field="model",
        )


def _figures(result: RunResult) -> dict[str, Any]:
    """Figures on test rows or, if there are none, on development rows (``split``)."""
    split: Split = "test" if result.tuned.n else "dev"
    figures: dict[str, Any] = {"split": split} if result.scores(split) else {}
    for name, score in result.scores(split).items():
        if result.generates:
            figures[f"{name}_perplexity"] = score.perplexity
        else:
            figures[f"{name}_accuracy"] = score.accuracy
            figures[f"{name}_interval"] = list(score.interval)
        figures[f"{name}_n"] = score.n
    for name, answered in result.answer_scores().items():
        figures["metric"] = result.metric
        figures[f"{name}_reward"] = answered.mean
        figures[f"{name}_answers"] = answered.n
    return figures


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
    """Measure accuracy and loss (for target texts, perplexity) on ``rows``, with a tuned prompt or without one.

    Args:
        scorer: the model.
        task: a task, or its name or file; must have the prompt's labels.
        rows: in any form that `tune` takes.
        prompt: the tuned prompt; None: zero-shot.
        template: how to present texts to the model; None: the prompt's own, or the task's first.

    Raises:
        PromptError: the prompt was made for another model.
        ConfigError: the prompt has other labels than the task.
        TaskError, DataError: as in `tune`.
    """
    task = load(task)
    data = named_rows("rows", rows, task)
    loss: LossName = "cross_entropy" if task.labels else "nll"
    spec = ObjectiveSpec(loss=loss, max_text_tokens=task.max_text_tokens, readout_words=0)
    if prompt is None:
        place = PromptSpec(d=1)
        objective = Objective(scorer, template or task.templates[0], task.labels, data, spec, place, keep_kv=False)
        found = objective.evaluate(objective.zero_shot_embeds())
    else:
        prompt.check(scorer)
        if prompt.labels != task.labels:
            raise ConfigError(
                f"the prompt has labels {list(prompt.labels)}, but the task has {list(task.labels)}: use the task that"
                " the prompt was tuned for",
                field="task",
            )
        used = template or prompt.template
        if prompt.layer_readout is not None:
            return _evaluate_layers(scorer, prompt, prompt.layer_readout, used, data, task.max_text_tokens)
        place = msgspec.structs.replace(prompt.spec, d=1)
        objective = Objective(scorer, used, task.labels, data, spec, place, keep_kv=False, words=prompt.word_ids)
        objective.readout = prompt.readout
        others = [under(each, objective, data) for each in prompt.others]
        parts = []
        for part in parts_of(np.arange(len(data)), 1 + len(others), scorer):
            logits = [other.logits(other.zero_shot_embeds(), part) for other in others]
            parts.append(objective.evaluate(prompt.rows[None], part, others=logits))
        return EvaluationResult(
            n=len(data),
            correct=sum(part.correct[0] for part in parts),
            loss=sum(part.loss_sums[0] for part in parts) / len(data),
            predictions=np.concatenate([part.predictions[0] for part in parts]),
        )
    return EvaluationResult(found.n, found.correct[0], found.loss_sums[0] / found.n, found.predictions[0])


def _evaluate_layers(
    scorer: Scorer, prompt: Prompt, readout: LayerReadout, template: Template, data: list[Row], max_text_tokens: int
) -> EvaluationResult:
    reader = LayerReader(readout, scorer, template, prompt.labels, max_text_tokens, prompt.rows, prompt.spec)
    targets = targets_of(data, prompt.labels)
    texts = [text for text, _ in data]
    parts = parts_of(np.arange(len(data)), 2, scorer)
    logits = np.concatenate([reader.logits([texts[row] for row in part]) for part in parts])
    found = logits.argmax(axis=1)
    loss = float(cross_entropy(logits, targets).mean())
    return EvaluationResult(n=len(data), correct=int((found == targets).sum()), loss=loss, predictions=found)
