"""`Device`: does a round's work on its own rows: scores a population, searches locally, compares templates, fits."""

from __future__ import annotations

import hashlib
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, TypeAlias

import msgspec
import numpy as np
from msgspec import UNSET
from numpy.typing import NDArray

from fedbpt.argument_types import checked
from fedbpt.device.effort import Effort
from fedbpt.device.layer_work import LayerRows, any_rows, fitted_rows, held_rows, spread_folds
from fedbpt.device.privacy_limit import PrivacyLimit
from fedbpt.device.speed import Speed, measure_speed
from fedbpt.device.state import DeviceState
from fedbpt.engine.layers import shift_sizes
from fedbpt.engine.scorer import Scorer
from fedbpt.engine.text_generator import generates
from fedbpt.errors import DataError, InputError, ScoringInterrupted
from fedbpt.machine.memory import physical_memory
from fedbpt.metrics import metric_named
from fedbpt.objective.answers import ANSWERED_ROWS, AnswerObjective
from fedbpt.objective.layer_means import means_result, public_result
from fedbpt.objective.layer_sums import cross_result, sketch_result, sums_result
from fedbpt.objective.layer_view import LayerReader, LayerView, ViewKey
from fedbpt.objective.logistic import logistic_result, moments_result
from fedbpt.objective.losses import cross_entropy
from fedbpt.objective.mini_batches import (
    PlainLogits,
    mini_batch,
    parts_of,
    row_weights,
    under,
    weights_by_label,
)
from fedbpt.objective.objective import Cancelled, Objective, Progress
from fedbpt.objective.privacy import Releases, RowLosses, check_private
from fedbpt.objective.readout import fit_result
from fedbpt.protocol.codec import digest
from fedbpt.protocol.membership import misfit
from fedbpt.protocol.questions import Answer, Question
from fedbpt.protocol.rounds import (
    CrossWork,
    DeviceInfo,
    EvaluateReport,
    EvaluateRequest,
    FitResult,
    FitWork,
    KeysWork,
    LayersWork,
    LocalResult,
    LocalWork,
    MeansResult,
    MeansWork,
    MomentsWork,
    PooledResult,
    PooledWork,
    PublicWork,
    Result,
    RoundPlan,
    RoundReport,
    SecureWork,
    SelectResult,
    SelectWork,
    SharesWork,
    SketchWork,
    SumsWork,
)
from fedbpt.protocol.seeding import generator
from fedbpt.protocol.specs import (
    Array,
    Generation,
    LayerReadout,
    ObjectiveSpec,
    PromptSpec,
    Readout,
    Template,
    as_name,
)
from fedbpt.quantities import PositiveFloat
from fedbpt.search.local_search import local_search, local_seed
from fedbpt.search.population import sample_population
from fedbpt.secure import layout
from fedbpt.secure.membership import Membership, asked_of_all
from fedbpt.secure.sizes import ATTEMPTS, threshold_of
from fedbpt.side_by_side.on_device import answer_of
from fedbpt.tasks import Task
from fedbpt.tasks.rows import Row, batch_indices, spread, targets_of
from fedbpt.tasks.task import cue_ids, head_ids, label_word_ids, render_ids, target_ids
from fedbpt.version import VERSION

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from fedbpt.secure.party import Party


_MAX_OBJECTIVES = 4  # cached; train, dev and test rows under one template, and one to spare
_SHIFT_ROWS = 16  # rows whose states give the size of shifts
_MAX_PLAIN_LOGITS = 16  # cached; a few hundred numbers a row, for each other template of train and dev rows


_Judged: TypeAlias = tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.intp]]
"""Losses [k, n] of k latents on n rows, their sums [k], and the number of correct predictions [k]."""

_Judge: TypeAlias = Callable[[NDArray[np.intp], Progress, Cancelled], _Judged]


def _ignore(_done: int, _total: int) -> None:
    pass


class Device:
    """A model, and rows that never leave the device. Synchronous and not thread-safe: one call at a time.

    Args:
        name: the device's name.
        scorer: its model.
        train_rows: (text, label index) pairs, or (text, target text) pairs, to tune on.
        dev_rows: held-out rows on which decisions are based; may be empty.
        test_rows: held-out rows that are only reported on; may be empty.
        task: the task that the rows were read for; plans for another task are refused.
        state: the state kept from earlier rounds; None: a new one.
        membership: how it takes part in secure aggregation; None: when a run asks for it.
        max_epsilon: most ε, at δ 1e-5, that its training rows are spent on in all runs that ``state`` knows together;
            work beyond it, and work without noise, is refused. None: no limit.
        keep: called with the state before noisy results of rows are returned; if it raises, they are not.

    Raises:
        DataError: there are no training rows.
        ConfigError, MissingExtraError: the task's metric is not allowed, or a library is missing.
    """

    @checked
    def __init__(
        self,
        name: str,
        scorer: Scorer,
        train_rows: Sequence[Row],
        dev_rows: Sequence[Row] = (),
        test_rows: Sequence[Row] = (),
        *,
        task: Task,
        state: DeviceState | None = None,
        membership: Membership | None = None,
        max_epsilon: PositiveFloat | None = None,
        keep: Callable[[DeviceState], object] | None = None,
    ) -> None:
        if not train_rows:
            raise DataError(f"device {name} has no training rows: give it at least one", field="train_rows")
        self.name = name
        self.scorer = scorer
        self._rows = {"train": tuple(train_rows), "dev": tuple(dev_rows), "test": tuple(test_rows)}
        self._task = task
        self._speed = Speed(0.0, {}, None)
        self._objectives: OrderedDict[bytes, Objective] = OrderedDict()
        self._answerer: tuple[bytes, AnswerObjective] | None = None
        self._plain_logits: OrderedDict[bytes, PlainLogits] = OrderedDict()
        self._layer_rows = LayerRows(scorer, self._rows["train"], task.labels)
        self.state = state or DeviceState()
        self._keep = keep
        self._membership = membership or Membership()
        knows_peers = self._membership.trusted is not None
        self._limit = PrivacyLimit(max_epsilon, len(train_rows), self.state, knows_peers)
        self._is_limited = max_epsilon is not None
        self._hides_rows = self._is_limited
        generation = task.generation
        self._metric = None if generation is UNSET else metric_named(generation.metric)
        self._knows_reach = generation is UNSET

    def check_fit(self, objective: ObjectiveSpec, prompt: PromptSpec) -> None:
        """Raise `InputError` if the prompt, the templates or the longest rows do not fit the model. Scores nothing."""
        for rows in filter(None, self._rows.values()):
            longest = max(rows, key=lambda row: len(row[0]) + (len(row[1]) if isinstance(row[1], str) else 0))
            for template in self._task.templates:
                Objective(self.scorer, template, self._task.labels, [longest], objective, prompt, keep_kv=False)
                if objective.generation is UNSET:
                    continue
                n = len(render_ids(self.scorer, template, longest[0], objective.max_text_tokens))
                if n + objective.generation.max_tokens > self.scorer.n_ctx_train:
                    raise InputError(
                        f"a text of {n} tokens (template included) and an answer of {objective.generation.max_tokens} "
                        f"exceed the model's context of {self.scorer.n_ctx_train}: use a smaller max_text_tokens or "
                        "max_tokens",
                        field="max_text_tokens",
                        limit=self.scorer.n_ctx_train,
                    )

    @property
    def epsilon_spent(self) -> float:
        """ε of what its state has sent with noise. Raises `MissingExtraError` without the accountant's library."""
        return self._limit.spent

    def measure_speed(self) -> float:
        """Measure the model on a training row, for `info` until the first round; returns forward tokens per second."""
        self._speed = measure_speed(self.scorer, self._task, self._rows["train"][0][0])
        self.state.tokens_per_second = self._speed.tokens_per_second
        return self._speed.tokens_per_second

    def info(self) -> DeviceInfo:
        """The device's description. ``tokens_per_second``: of the last round, or of `measure_speed` before any."""
        memory = self.scorer.memory()
        return DeviceInfo(
            name=self.name,
            version=VERSION,
            model_fingerprint=self.scorer.fingerprint,
            model_name=as_name(self.scorer.name),
            backend=as_name(self.scorer.backend),
            n_train=len(self._rows["train"]),
            n_dev=len(self._rows["dev"]),
            n_test=len(self._rows["test"]),
            ram_bytes=physical_memory(),
            rss_bytes=int(memory.get("rss", 0)),
            peak_rss_bytes=int(memory.get("peak_rss", 0)),
            tokens_per_second=self.state.tokens_per_second,
            shares_beginnings=self.scorer.shares_beginnings,
            n_layer=self.scorer.n_layer,
            n_embd=self.scorer.n_embd,
            task=self._task.identity,
            word_tokens=self._speed.word_tokens,
            word_tokens_per_second=self._speed.word_tokens_per_second,
        )

    def run(
        self,
        plan: RoundPlan,
        progress: Progress = lambda _done, _total: None,
        cancelled: Cancelled = lambda: False,
    ) -> RoundReport:
        """Do a round's work. The same plan gives the same result, bit for bit, whatever ran before.

        Args:
            plan: the work.
            progress: called with (steps done, total steps).
            cancelled: called between scoring calls; returning True stops the work. It may block: a paused device
                waits there.

        Raises:
            InputError: the plan is for another model or task, or is inconsistent (`TaskError`, `DataError`).
            ScoringInterrupted: the work was cancelled.
        """
        self._check_fits(plan)
        began = time.monotonic()
        paused_s = 0.0

        def timed_cancelled() -> bool:
            nonlocal paused_s
            since = time.monotonic()
            stop = cancelled()
            paused_s += time.monotonic() - since
            return stop

        effort = Effort()
        work = plan.work
        result: Result
        check_private(plan)
        if self._is_limited:
            self._limit.check(plan, self._question(plan))
        self._hides_rows = self._is_limited or plan.privacy is not None
        if self._hides_rows:
            self._check_room(plan)
        if isinstance(work, SelectWork):
            result, n_texts = self._select(plan, work, effort, progress, timed_cancelled)
        elif isinstance(work, PooledWork):
            result, n_texts = self._pooled(plan, work, effort, progress, timed_cancelled)
        elif isinstance(work, FitWork):
            result, n_texts = self._fit(plan, work, effort, progress, timed_cancelled)
        elif isinstance(work, PublicWork):
            views = self._layer_rows.read_public(plan, work, effort, progress, timed_cancelled)
            result, n_texts = public_result(work, views), len(self._rows["train"])
        elif isinstance(work, MeansWork):
            result, n_texts = self._release_means(plan, work, effort, progress, timed_cancelled)
        elif isinstance(work, LayersWork):
            result, n_texts = self._fit_layers(plan, work, effort, progress, timed_cancelled)
        elif isinstance(work, SecureWork):
            result, n_texts = self._keep_secret(plan, work), 1
        elif isinstance(work, LocalWork):
            result, n_texts = self._local(plan, work, effort, progress, timed_cancelled)
        else:
            raise InputError("the plan is compact, expected a whole one (fedbpt.search.compact_plans)", field="work")
        if plan.secure is not UNSET:
            vector = layout.of_result(result, n_texts, plan.secure)
            result = layout.as_masked(self._party.mask(plan.secure, asked_of_all(plan), vector, plan.device))
        seconds = time.monotonic() - began
        if plan.privacy is not None:
            seconds = 0.0  # would reveal which rows were sampled, as the tokens would
        elif seconds > paused_s and effort.tokens:
            self.state.tokens_per_second = effort.tokens / (seconds - paused_s)
        report = RoundReport(
            run=plan.run,
            round=plan.round,
            device=plan.device,
            plan_digest=digest(plan),
            result=result,
            n_texts=n_texts,
            evaluations=effort.evaluations,
            tokens=effort.tokens,
            seconds=seconds,
            peak_rss_bytes=int(self.scorer.memory().get("peak_rss", 0)),
        )
        self._count_release(plan)  # last: what was refused or cancelled has sent nothing
        return report

    def _question(self, plan: RoundPlan) -> str:
        """Everything that determines the result of ``plan``: a resumed run may have another deadline.

        With other rows, or another rounding, the same noise would show how the results differ.
        """
        return f"{digest(msgspec.structs.replace(plan, deadline_s=1.0))}|{self._basis}"

    @cached_property
    def _basis(self) -> str:
        made_by = (VERSION, self.scorer.backend, getattr(self.scorer, "n_threads", None))
        rows = [(text, target if isinstance(target, str) else int(target)) for text, target in self._rows["train"]]
        return hashlib.sha256(repr((made_by, rows)).encode()).hexdigest()

    def _count_release(self, plan: RoundPlan) -> None:
        """Count what the report on ``plan`` tells of rows."""
        if isinstance(plan.work, MeansWork):
            sent = self.state.released.get(plan.run, ())
            self.state.released[plan.run] = tuple(dict.fromkeys((*sent, self._question(plan))))
        if isinstance(plan.work, PublicWork | SecureWork):
            return
        had_told = self.state.told_exactly
        if plan.privacy is None:
            self.state.told_exactly = True
        else:
            self._limit.record(plan, self._question(plan))
        if self._keep is not None and (plan.privacy is not None or not had_told):
            self._keep(self.state)

    def _check_room(self, plan: RoundPlan) -> None:
        """Raise `InputError` if a longest text might not fit: whether a row does would tell of it."""
        work, limit = plan.work, plan.objective.max_text_tokens
        if not isinstance(work, SelectWork | PooledWork | LocalWork):
            return
        words = 0 if plan.labels else limit
        rows = plan.prompt.n_prompt if plan.prompt.in_front else 0
        for template in work.templates if isinstance(work, SelectWork) else (plan.template,):
            if plan.labels:
                words = max(map(len, label_word_ids(self.scorer, template, plan.labels)))
            around = len(head_ids(self.scorer, template)) + len(cue_ids(self.scorer, template)) + rows + words
            if around + limit > self.scorer.n_ctx_train:
                raise InputError(
                    f"max_text_tokens {limit} leaves no room in the model's context of {self.scorer.n_ctx_train} for "
                    f"the {around} tokens around a text: use {max(self.scorer.n_ctx_train - around, 1)} or fewer",
                    field="max_text_tokens",
                    limit=self.scorer.n_ctx_train,
                )

    @contextmanager
    def _hiding(self) -> Iterator[None]:
        """Errors about rows without what they say of them, in private runs."""
        try:
            yield
        except InputError as error:
            if not self._hides_rows:
                raise
            reason = "this device's rows do not fit what is asked of them; its log says why"
            raise InputError(str(error), public=reason, field="rows") from error

    def interrupt(self) -> None:
        """Stop the current scoring call from another thread; its work raises `ScoringInterrupted`."""
        self.scorer.interrupt()

    def answer(self, question: Question, said: Callable[[Answer], None], cancelled: Cancelled) -> Answer:
        """Reply to a person's question; see `answer_of`."""
        return answer_of(self.scorer, question, said, cancelled)

    @cached_property
    def _party(self) -> Party:
        from fedbpt.secure.party import Party  # here: it needs the extra

        return Party(self._membership.identity, self._membership.trusted)

    def _keep_secret(self, plan: RoundPlan, work: SecureWork) -> Result:
        if isinstance(work, KeysWork):
            return self._party.keys(plan.device, work)
        if isinstance(work, SharesWork):
            return self._party.shares(work)
        return self._party.unmask(work)

    def evaluate(
        self,
        request: EvaluateRequest,
        progress: Progress = lambda _done, _total: None,
        cancelled: Cancelled = lambda: False,
    ) -> EvaluateReport:
        """Evaluate latents on held-out rows. Raises as `run` does."""
        report = self._evaluate(request, progress, cancelled)
        if request.secure is UNSET:
            return report
        vector = layout.of_evaluation(report, request.secure)
        masked = layout.as_masked(self._party.mask(request.secure, asked_of_all(request), vector))
        return EvaluateReport(n=1, correct=(), loss_sums=(), seconds=report.seconds, masked=masked)

    def _evaluate(
        self,
        request: EvaluateRequest,
        progress: Progress = lambda _done, _total: None,
        cancelled: Cancelled = lambda: False,
    ) -> EvaluateReport:
        self._check_fits(request)
        self._limit.check_evaluation(request)
        self._hides_rows = self._is_limited
        if request.split == "held" and not self.state.told_exactly:
            self.state.told_exactly = True
            if self._keep is not None:
                self._keep(self.state)
        latents = request.latents.numpy()
        if latents.ndim != 2 or len(latents) == 0:
            raise InputError(
                f"latents must have shape [k, {request.prompt.d}] with k of 1 or more, got {list(latents.shape)}",
                field="latents",
            )
        began = time.monotonic()
        k = len(latents)
        for field in ("readouts", "layer_readouts"):
            given = len(getattr(request, field))
            if given not in (0, k):
                raise InputError(f"{given} {field} for {k} latents: give one per latent, or none", field=field)
        if request.generation is not UNSET:
            return self._evaluate_answers(request, request.generation, latents, progress, cancelled)
        layered = {i: each for i, each in enumerate(request.layer_readouts) if each is not None}
        plain = np.array([i for i in range(k) if i not in layered], dtype=np.intp)
        rows = self._asked_rows(request)
        correct = np.zeros(k, dtype=np.intp)
        losses = np.zeros((k, len(rows)))
        sums = np.zeros(k)  # part by part, as `fedbpt.evaluate` has them, to the last bit
        judges: list[tuple[NDArray[np.intp], _Judge]] = []
        if len(plain):
            readouts = [request.readouts[i] for i in plain] if request.readouts else []
            judges.append((plain, self._by_words(request, latents[plain], readouts)))
        if layered:
            which = np.array(list(layered), dtype=np.intp)
            judges.append((which, self._by_layers(request, latents[which], list(layered.values()))))
        # One after the other on the same few rows, so that their texts are computed once.
        parts = parts_of(rows, 1 + len(request.others) + len(layered), self.scorer)
        for number, part in enumerate(parts):
            done = number * len(parts[0])
            for which, judge in judges:
                found, total, right = judge(part, progress if len(parts) == 1 else _ignore, cancelled)
                losses[which, done : done + len(part)] = found
                sums[which] += total
                correct[which] += right
            progress(done + len(part), len(rows))
        squares = ((losses - losses[0]) ** 2).sum(axis=1).tolist() if request.split == "held" else ()
        return EvaluateReport(
            n=len(rows),
            correct=tuple(correct.tolist()),
            loss_sums=tuple(sums.tolist()),
            seconds=time.monotonic() - began,
            difference_squares=tuple(squares),
        )

    def _evaluate_answers(
        self,
        request: EvaluateRequest,
        generation: Generation,
        latents: NDArray[np.float64],
        progress: Progress,
        cancelled: Cancelled,
    ) -> EvaluateReport:
        """The metric's values of the model's own answers, as losses."""
        began = time.monotonic()
        rows = self._asked_rows(request)
        data = self._rows["train" if request.split == "held" else request.split]
        answering = self._answering(request, generation, [data[i] for i in rows], keep_kv=False)
        likelihood = self._objective("train", request.template, (), request.objective, request.prompt)
        once, which = np.unique(latents, axis=0, return_inverse=True)
        found = answering.measure(likelihood.embeds(once), None, progress, cancelled)
        which = which.ravel()  # numpy 2.0 gives it a second axis
        losses = 1.0 - found.rewards[which]
        squares = ((losses - losses[0]) ** 2).sum(axis=1).tolist() if request.split == "held" else ()
        return EvaluateReport(
            n=len(rows),
            correct=tuple((losses == 0.0).sum(axis=1).tolist()),
            loss_sums=tuple(losses.sum(axis=1).tolist()),
            seconds=time.monotonic() - began,
            difference_squares=tuple(squares),
            n_failed=tuple(found.n_failed[which].tolist()),
            n_distinct=tuple(found.n_distinct[which].tolist()),
        )

    def _answering(
        self, asked: RoundPlan | EvaluateRequest, generation: Generation, rows: Sequence[Row], keep_kv: bool = True
    ) -> AnswerObjective:
        metric = self._metric
        if metric is None or generation != self._task.generation:  # only what the owner's own task names is run
            raise InputError(
                f"device {self.name} measures answers otherwise than the run (generation of task "
                f"{self._task.name!r}): start it with the run's task file",
                field="generation",
            )
        limit = asked.objective.max_text_tokens
        if not self._knows_reach:
            self._knows_reach = True
            self._warn_of_unreachable(generation, asked.template)
        return AnswerObjective(self.scorer, asked.template, rows, limit, asked.prompt, generation, metric, keep_kv)

    def _warn_of_unreachable(self, generation: Generation, template: Template) -> None:
        """Log how many target texts no answer can equal: their gain would never be seen."""
        targets = [str(target).strip() for _, target in self._rows["train"]]
        most = generation.max_tokens
        cut = sum(any(each in target for each in generation.stop) for target in targets)
        long = sum(len(target_ids(self.scorer, template, target, most + 1)) > most for target in targets if target)
        for n, why in ((cut, "contain one of its stop strings"), (long, f"are longer than {most} tokens")):
            if n:
                log.warning(
                    "%d of %d target texts %s, so that no answer can equal them: change stop, max_tokens or metric in "
                    "the task's [generation]",
                    n,
                    len(targets),
                    why,
                )

    def _asked_rows(self, request: EvaluateRequest) -> NDArray[np.intp]:
        """The rows of the split that ``request`` asks for, ascending."""
        if request.split == "held":
            rows = held_rows(self._layer_rows.targets, request.held)
        else:
            rows = np.arange(len(self._rows[request.split]))
        if not len(rows):
            raise DataError(f"device {self.name} has no {request.split} rows: start it with some", field=request.split)
        return rows[spread(len(rows), request.max_rows or len(rows))]

    def _by_words(
        self, request: EvaluateRequest, latents: NDArray[np.float64], readouts: Sequence[Readout | None]
    ) -> _Judge:
        """Judges ``latents`` by the label words' scores."""
        split = "train" if request.split == "held" else request.split
        objective = self._objective(
            split,
            request.template,
            request.labels,
            request.objective,
            request.prompt,
            keep_kv=request.split != "test",  # dev rows are evaluated many times, test rows once
        )
        weights = row_weights(objective, request)
        rows = self._asked_rows(request)
        others = [self._plain(objective, request, template, rows) for template in request.others]

        def judge(part: NDArray[np.intp], progress: Progress, cancelled: Cancelled) -> _Judged:
            logits = [other.of(part, cancelled) for other in others]
            losses = np.zeros((len(latents), len(part)))
            sums = np.zeros(len(latents))
            correct = np.zeros(len(latents), dtype=np.intp)
            for which, embeds in objective.prompts(latents):
                own = [readouts[i] for i in which] if len(readouts) else ()
                found = objective.evaluate(embeds, part, progress, cancelled, own, logits, weights)
                losses[which], sums[which], correct[which] = found.losses, found.loss_sums, found.correct
            return losses, sums, correct

        return judge

    def _by_layers(
        self, request: EvaluateRequest, latents: NDArray[np.float64], readouts: Sequence[LayerReadout]
    ) -> _Judge:
        """Judges ``latents`` by hidden states."""
        data = self._rows["train" if request.split == "held" else request.split]
        readers = [self._reader(request, *pair) for pair in zip(latents, readouts, strict=True)]
        of_labels = weights_by_label(request)

        def judge(part: NDArray[np.intp], _progress: Progress, cancelled: Cancelled) -> _Judged:
            if cancelled():
                raise ScoringInterrupted("the evaluation was cancelled")
            targets = targets_of([data[row] for row in part], request.labels)
            texts = [data[row][0] for row in part]
            known: dict[ViewKey, tuple[NDArray[np.float32], NDArray[np.float64]]] = {}
            logits = [reader.logits(texts, known) for reader in readers]
            losses = np.stack([cross_entropy(each, targets) for each in logits]) * of_labels[targets]
            correct = np.array([(each.argmax(axis=1) == targets).sum() for each in logits])
            return losses, losses.sum(axis=1), correct

        return judge

    def _reader(self, request: EvaluateRequest, latent: NDArray[np.float64], readout: LayerReadout) -> LayerReader:
        embeds = None
        if latent.any():
            made = self._objective("train", request.template, request.labels, request.objective, request.prompt)
            embeds = made.embeds(latent[None])[0]
        limit = request.objective.max_text_tokens
        return LayerReader(readout, self.scorer, request.template, request.labels, limit, embeds, request.prompt)

    def _select(
        self, plan: RoundPlan, work: SelectWork, effort: Effort, progress: Progress, cancelled: Cancelled
    ) -> tuple[SelectResult, int]:
        if not work.templates:
            raise InputError("there are no templates to select from: give at least one", field="templates")
        if plan.privacy is not None:
            return self._select_privately(plan, work, effort, cancelled)
        labels = np.array([label for _, label in self._rows["train"]])
        chosen = batch_indices(len(labels), work.max_rows, generator(plan.seed, "select", plan.device))
        parts = [chosen]
        if work.by_label:
            parts = [chosen[labels[chosen] == label] for label in range(len(plan.labels))]
        sums = np.zeros((len(work.templates), len(parts)))
        correct = np.zeros(len(work.templates), dtype=int)
        done = 0
        objectives = self._zero_shot_objectives(plan, work)
        for place, part in enumerate(parts):
            for rows in parts_of(part, len(objectives), self.scorer):
                for number, objective in enumerate(objectives):
                    with effort.of(objective):
                        losses, right = objective.row_results(objective.zero_shot_embeds(), rows, cancelled)
                    sums[number, place] += losses.sum()
                    correct[number] += right.sum()
                done += len(rows)
                if not work.by_label:  # the time between steps would tell how many rows each label has
                    progress(done, len(chosen))
        effort.evaluations += len(objectives) * len(parts)
        n_correct = tuple(correct.tolist()) if plan.labels else ()
        sizes = self._shift_sizes(plan, work, chosen, effort) if plan.prompt.shifts else UNSET
        if work.by_label:
            counts = tuple(np.bincount(labels, minlength=len(plan.labels)).tolist())
            found = SelectResult(loss_sums=Array.of(sums), correct=n_correct, label_counts=counts, sizes=sizes)
            return found, len(chosen)
        found = SelectResult(loss_sums=Array.of(sums[:, 0]), correct=n_correct, sizes=sizes)
        answered = chosen[spread(len(chosen), ANSWERED_ROWS)]
        return self._with_rewards(found, plan, work, answered, effort, cancelled), len(chosen)

    def _with_rewards(
        self,
        found: SelectResult,
        plan: RoundPlan,
        work: SelectWork,
        chosen: NDArray[np.intp],
        effort: Effort,
        cancelled: Cancelled,
    ) -> SelectResult:
        """``found`` with what the model's own answers are worth, where the plan asks and this device can tell."""
        how = plan.objective.generation
        if how is UNSET or not self._measures(how):
            return found
        nothing = np.zeros((1, 0, self.scorer.n_embd), np.float32)
        sums = []
        try:
            for template in work.templates:
                asked = msgspec.structs.replace(plan, template=template, prompt=PromptSpec())
                answering = self._answering(asked, how, [self._rows["train"][i] for i in chosen], keep_kv=False)
                sums.append(answering.measure(nothing, None, _ignore, cancelled).rewards.sum())
                effort.tokens += answering.n_tokens
        except InputError as error:  # a text and its answer are too long for the context, for example
            log.warning("no answers select the template here: %s", error)
            return found
        return msgspec.structs.replace(found, reward_sums=Array.of(np.array(sums)), n_answered=len(chosen))

    def _measures(self, generation: Generation) -> bool:
        """Whether this device can measure answers as ``generation`` says."""
        return self._metric is not None and generation == self._task.generation and generates(self.scorer)

    def _shift_sizes(self, plan: RoundPlan, work: SelectWork, chosen: NDArray[np.intp], effort: Effort) -> Array:
        """Sizes [n_templates, n_layer] of shifts under each template, from a few rows."""
        texts = [self._rows["train"][row][0] for row in chosen[:_SHIFT_ROWS]]
        limit = plan.objective.max_text_tokens
        layers = tuple(range(self.scorer.n_layer))
        sizes = []
        for template in work.templates:
            view = LayerView(self.scorer, template, (), limit, layers)
            sizes.append(shift_sizes(view.read(texts)[0], plan.prompt.placement))
            effort.tokens += view.tokens
        return Array.of(np.stack(sizes), "<f4")

    def _select_privately(
        self, plan: RoundPlan, work: SelectWork, effort: Effort, cancelled: Cancelled
    ) -> tuple[SelectResult, int]:
        objectives = self._zero_shot_objectives(plan, work)

        def losses(sample: NDArray[np.intp]) -> NDArray[np.float64]:
            found = [
                [objective.row_losses(objective.zero_shot_embeds(), rows, cancelled)[0] for objective in objectives]
                for rows in parts_of(sample, len(objectives), self.scorer)
            ]
            return np.concatenate(found, axis=1)

        n_rows = len(self._rows["train"])
        mean = self._release(plan, 0, len(work.templates), work.max_rows, losses, effort)
        return SelectResult(loss_sums=Array.of(n_rows * mean)), n_rows

    def _zero_shot_objectives(self, plan: RoundPlan, work: SelectWork) -> list[Objective]:
        likelihood = msgspec.structs.replace(plan.objective, generation=UNSET)
        return [
            self._objective("train", template, plan.labels, likelihood, plan.prompt, keep_kv=False)
            for template in work.templates
        ]

    def _pooled(
        self, plan: RoundPlan, work: PooledWork, effort: Effort, progress: Progress, cancelled: Cancelled
    ) -> tuple[PooledResult, int]:
        objective = self._train_objective(plan)
        latents = sample_population(work.state, work.popsize, plan.seed, work.generation)
        if plan.privacy is not None:
            noisy = self._private_losses(plan, 0, objective, latents, effort, cancelled)
            return PooledResult(losses=Array.of(noisy, "<f4")), len(objective)
        path = (plan.device, work.generation)
        held = held_rows(objective.targets, plan.held)
        chosen, weights = mini_batch(objective, row_weights(objective, plan), plan.texts, plan, path, held)
        noise = generator(plan.seed, "perturb", *path)
        with effort.of(objective):
            losses = objective.losses(objective.embeds(latents), chosen, noise, progress, cancelled, weights)
        # The mini-batch's mean stands for all rows of the device: a smaller weight would favour small devices.
        return PooledResult(losses=Array.of(losses, "<f4")), len(objective)

    def _fit(
        self, plan: RoundPlan, work: FitWork, effort: Effort, progress: Progress, cancelled: Cancelled
    ) -> tuple[FitResult, int]:
        objective = self._train_objective(plan)
        if work.n_words > len(objective.word_ids):
            raise InputError(
                f"a readout of {work.n_words} words: expected at most {len(objective.word_ids)}",
                field="n_words",
                limit=len(objective.word_ids),
            )
        chosen = batch_indices(len(objective), work.max_rows, generator(plan.seed, "fit", plan.device))
        what = (plan.template, plan.labels, plan.objective, plan.prompt, work.latent, work.others)
        key = msgspec.msgpack.encode((*what, plan.seed, plan.device, work.max_rows))
        if self.state.fitted is None or self.state.fitted_to != key:  # the prompt is the same in all exchanges of a fit
            [(_, embeds)] = objective.prompts(work.latent.numpy()[None])
            others = [self._plain(objective, plan, template, chosen) for template in work.others]
            logits: list[list[NDArray[np.float32]]] = [[] for _ in range(1 + len(others))]
            parts = parts_of(chosen, len(logits), self.scorer)
            for number, part in enumerate(parts):
                with effort.of(objective):
                    logits[0].append(objective.logits(embeds, part, cancelled))
                for other, found in zip(others, logits[1:], strict=True):
                    with effort.of(other.objective):
                        found.append(other.of(part, cancelled))
                progress(number + 1, len(parts) + 1)
            self.state.fitted_to = key
            self.state.fitted = np.stack([np.concatenate(each) for each in logits])
        rows = row_weights(objective, plan)[chosen]
        result = fit_result(
            work, self.state.fitted, objective.targets[chosen], objective.readout, len(plan.labels), rows
        )
        progress(1, 1)
        return result, len(chosen)

    def _fit_layers(
        self, plan: RoundPlan, work: LayersWork, effort: Effort, progress: Progress, cancelled: Cancelled
    ) -> tuple[Result, int]:
        reading = work.reading
        targets = self._layer_rows.targets
        chosen, folds = fitted_rows(targets, reading.max_rows, reading.n_folds, plan.seed)
        folds = spread_folds(folds, reading.n_folds, plan.seed, plan.device)
        views = self._layer_rows.read(
            plan, reading, chosen, lambda: self._train_objective(plan), effort, progress, cancelled
        )
        found: Result
        weights = weights_by_label(plan)[targets[chosen]]
        if isinstance(work, SumsWork):
            found = sums_result(work, views, targets[chosen], folds, len(plan.labels))
        elif isinstance(work, CrossWork):
            found = cross_result(work, views, targets[chosen], folds, weights)
        elif isinstance(work, SketchWork):
            found = sketch_result(work, views, targets[chosen], folds, len(plan.labels), plan.seed)
        elif isinstance(work, MomentsWork):
            found = moments_result(work, views, targets[chosen], len(plan.labels))
        else:
            found = logistic_result(work, views, targets[chosen], folds, weights)
        return found, len(chosen)

    def _local(
        self, plan: RoundPlan, work: LocalWork, effort: Effort, progress: Progress, cancelled: Cancelled
    ) -> tuple[LocalResult, int]:
        objective = self._train_objective(plan)
        n_rows = len(objective)
        steps = work.iterations + 1
        held = held_rows(objective.targets, plan.held)
        weights = row_weights(objective, plan)
        weights = weights / weights.mean()  # else a device that only has frequent labels would look fittest

        def losses(latents: NDArray[np.float64], iteration: int) -> NDArray[np.float64]:
            if plan.privacy is not None:
                return self._private_losses(plan, iteration, objective, latents, effort, cancelled)
            last = iteration == work.iterations
            path = (plan.device, plan.round, iteration)
            size = 0 if last else plan.texts
            chosen, of_rows = mini_batch(objective, weights, size, plan, path, held)
            noise = generator(plan.seed, "perturb", *path)
            values = objective.losses(objective.embeds(latents), chosen, noise, None, cancelled, of_rows)
            progress(iteration + 1, steps)
            return values

        if plan.privacy is not None:  # the mean follows from the noisy losses; its fitness is not released
            return local_search(work, local_seed(plan), losses).with_fitness(0.0), n_rows
        with effort.of(objective):
            found = local_search(work, local_seed(plan), losses)
            fitness = float(losses(found.mean[None], work.iterations)[0])  # F(m_k) on all of the device's rows
        return found.with_fitness(fitness), n_rows

    def _private_losses(
        self,
        plan: RoundPlan,
        part: int,
        objective: Objective,
        latents: NDArray[np.float64],
        effort: Effort,
        cancelled: Cancelled,
    ) -> NDArray[np.float64]:
        """Noisy mean losses [k] of ``latents``, less their mean."""
        embeds = objective.embeds(latents)

        def losses(sample: NDArray[np.intp]) -> NDArray[np.float64]:
            return objective.row_losses(embeds, sample, cancelled)

        return self._release(plan, part, len(latents), plan.objective.batch_size, losses, effort)

    def _release(
        self, plan: RoundPlan, part: int, k: int, size: int, losses: RowLosses, effort: Effort
    ) -> NDArray[np.float64]:
        releases, _ = self._releases(plan)
        n_rows = len(self._rows["train"])
        effort.evaluations += k
        effort.tokens += k * min(size or n_rows, n_rows)  # of the expected sample size, not the actual one
        return releases.mean(part, k, n_rows, size, losses)

    def _releases(self, plan: RoundPlan) -> tuple[Releases, str]:
        """What makes the noise of the plan's result, and the question that it depends on."""
        if plan.privacy is None:
            raise InputError("the plan has no privacy: set clip and noise_multiplier", field="privacy")
        question = self._question(plan)
        return Releases(plan.privacy, self.state.key, question), question

    def _release_means(
        self, plan: RoundPlan, work: MeansWork, effort: Effort, progress: Progress, cancelled: Cancelled
    ) -> tuple[MeansResult, int]:
        """Noisy sums of the rows' states, once a run. Raises `InputError` for other ones in the same run.

        Masked, each device adds a part of the noise, anew each time that a sum is tried.
        """
        releases, question = self._releases(plan)
        sent = self.state.released.get(plan.run, ())
        if question not in sent and len(sent) >= (ATTEMPTS if plan.secure else 1):
            tries = f"; a secure sum is tried again at most {ATTEMPTS} times in all" if plan.secure else ""
            raise InputError(
                f"device {self.name} has sent noisy sums of its rows for run {plan.run!r} already (before its rows, "
                f"version or processor were others, if this is the same question), and others would spend ε once "
                f"more{tries}: give the run another name if that is meant",
                field="privacy",
            )
        reading = work.reading
        if reading.latent.numpy().any():
            raise InputError("noisy sums are of states without a prompt: expected a latent of zeros", field="latent")
        n_rows = len(self._rows["train"])
        chosen = any_rows(n_rows, reading.max_rows, plan.seed)
        spent = Effort()  # the actual tokens would reveal how long the rows are
        with self._hiding():
            views = self._layer_rows.read(
                plan, reading, chosen, lambda: self._train_objective(plan), spent, progress, cancelled
            )
        effort.evaluations += reading.n_views
        effort.tokens += reading.n_views * len(chosen)
        devices = threshold_of(len(plan.secure.peers)) if plan.secure else 1
        result = means_result(work, views, self._layer_rows.targets[chosen], len(plan.labels), releases, devices)
        return result, len(chosen)

    def _train_objective(self, plan: RoundPlan) -> Objective:
        generation = plan.objective.generation
        likelihood = msgspec.structs.replace(plan.objective, generation=UNSET)
        objective = self._objective("train", plan.template, plan.labels, likelihood, plan.prompt)
        if generation is UNSET:
            self._answerer = None
        else:
            key = msgspec.msgpack.encode((plan.template, plan.objective, plan.prompt))
            if self._answerer is None or self._answerer[0] != key:
                self._answerer = key, self._answering(plan, generation, self._rows["train"])
            objective = objective.answered_by(self._answerer[1])
        bias = np.array(plan.label_bias)
        return objective.read_by(Readout(weights=Array.of(bias[None])) if len(bias) else None)

    def _plain(
        self, like: Objective, asked: RoundPlan | EvaluateRequest, template: Template, rows: NDArray[np.intp]
    ) -> PlainLogits:
        """The logits of ``rows`` under another template without a prompt, cached for repeated requests."""
        split = asked.split if isinstance(asked, EvaluateRequest) else "train"
        what = (split, template, asked.template, asked.labels, asked.objective, asked.prompt, rows.tobytes())
        key = hashlib.sha256(msgspec.msgpack.encode(what)).digest()
        if key not in self._plain_logits:
            made = PlainLogits(under(template, like, self._rows[split]))
            if split == "test":  # requested only once
                return made
            self._plain_logits[key] = made
        self._plain_logits.move_to_end(key)
        while len(self._plain_logits) > _MAX_PLAIN_LOGITS:
            self._plain_logits.popitem(last=False)
        return self._plain_logits[key]

    def _objective(
        self,
        split: str,
        template: Template,
        labels: tuple[str, ...],
        objective: ObjectiveSpec,
        prompt: PromptSpec,
        keep_kv: bool = True,
    ) -> Objective:
        """The objective on the encoded rows, cached: encoding a data set takes longer than scoring a generation."""
        key = msgspec.msgpack.encode((split, template, labels, objective, prompt, keep_kv))
        if key in self._objectives:
            self._objectives.move_to_end(key)
            return self._objectives[key]
        with self._hiding():
            created = Objective(self.scorer, template, labels, self._rows[split], objective, prompt, keep_kv)
        self._objectives[key] = created
        while len(self._objectives) > _MAX_OBJECTIVES:
            self._objectives.popitem(last=False)
        return created

    @property
    def identity(self) -> bytes:
        """The public key by which other devices know this one in secure runs."""
        return self._party.identity

    def _check_fits(self, asked: RoundPlan | EvaluateRequest) -> None:
        tells_nothing = isinstance(asked, RoundPlan) and isinstance(asked.work, SecureWork | PublicWork)
        if self._membership.only and asked.secure is UNSET and not tells_nothing:
            raise InputError(
                f"device {self.name} only adds to sums: set secure = true in the run's settings, or start the device "
                "without --secure",
                field="secure",
            )
        if found := misfit(self.info(), asked.model_fingerprint, asked.task):
            raise InputError(f"device {self.name} {found.reason}")
