"""A device's part of a round: score a shared population, search on its own rows, or compare templates."""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from fedbpt.argument_types import checked
from fedbpt.device.effort import Effort
from fedbpt.device.speed import Speed, measure_speed
from fedbpt.device.state import DeviceState
from fedbpt.engine.scorer import Scorer
from fedbpt.errors import DataError, InputError
from fedbpt.machine.memory import physical_memory
from fedbpt.objective.mini_batches import PlainLogits, mini_batch, parts_of, row_weights, under
from fedbpt.objective.objective import Cancelled, Objective, Progress
from fedbpt.objective.privacy import Releases, RowLosses, check_private
from fedbpt.objective.readout import fit_result
from fedbpt.protocol.codec import digest
from fedbpt.protocol.membership import misfit
from fedbpt.protocol.questions import Answer, Question
from fedbpt.protocol.rounds import (
    DeviceInfo,
    EvaluateReport,
    EvaluateRequest,
    FitResult,
    FitWork,
    LocalResult,
    LocalWork,
    PooledResult,
    PooledWork,
    Result,
    RoundPlan,
    RoundReport,
    SelectResult,
    SelectWork,
)
from fedbpt.protocol.seeding import generator
from fedbpt.protocol.specs import Array, ObjectiveSpec, PromptSpec, Readout, Template, as_name
from fedbpt.search.local_search import local_search, local_seed
from fedbpt.search.population import sample_population
from fedbpt.side_by_side.on_device import answer_of
from fedbpt.tasks import Task
from fedbpt.tasks.rows import Row, batch_indices
from fedbpt.version import VERSION

_KEPT_OBJECTIVES = 4  # encoded rows are small; train, dev and test under one template, and one to spare
_KEPT_PLAIN = 16  # a few hundred numbers a row; each other template of train and dev rows


class Device:
    """A model and the rows that never leave it. Synchronous and not thread-safe: one call at a time.

    Args:
        name: what the device calls itself.
        scorer: its model.
        train_rows: (text, label index) pairs that it tunes on.
        dev_rows, test_rows: rows that choose, and that only report; may be empty.
        task: what the rows were read for; plans for another one are refused.
        state: what it remembers of earlier rounds; None: nothing.

    Raises:
        DataError: no training rows.
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
    ) -> None:
        if not train_rows:
            raise DataError(f"device {name} has no training rows: give it at least one")
        self.name = name
        self.scorer = scorer
        self._rows = {"train": tuple(train_rows), "dev": tuple(dev_rows), "test": tuple(test_rows)}
        self._task, self._speed = task, Speed(0.0, {}, None)
        self._objectives: OrderedDict[bytes, Objective] = OrderedDict()
        self._plain_logits: OrderedDict[bytes, PlainLogits] = OrderedDict()
        self.state = state or DeviceState()

    def check_fit(self, objective: ObjectiveSpec, prompt: PromptSpec) -> None:
        """Raises `InputError` where prompt, templates and the longest rows do not go with the model. Scores nothing."""
        for rows in filter(None, self._rows.values()):
            longest = max(rows, key=lambda row: len(row[0]) + (len(row[1]) if isinstance(row[1], str) else 0))
            for template in self._task.templates:
                Objective(self.scorer, template, self._task.labels, [longest], objective, prompt, keep_kv=False)

    def measure_speed(self) -> float:
        """Forward tokens per second on a text, as `info` says until a round has shown better; and what words cost."""
        self._speed = measure_speed(self.scorer, self._task, self._rows["train"][0][0])
        self.state.tokens_per_second = self._speed.tokens_per_second
        return self._speed.tokens_per_second

    def info(self) -> DeviceInfo:
        """What the device says of itself; ``tokens_per_second``: its last round's, or `measure_speed`'s before any."""
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
            plan: what to do.
            progress: called with (steps done, steps in all).
            cancelled: asked between scoring calls.

        Raises:
            InputError: a plan for another model or task, or one that makes no sense (`TaskError`, `DataError`).
            ScoringInterrupted: cancelled.
        """
        self._check_fits(plan)
        began, waited = time.monotonic(), 0.0

        def asked() -> bool:  # may take long: a paused device waits there
            nonlocal waited
            since = time.monotonic()
            stop = cancelled()
            waited += time.monotonic() - since
            return stop

        counter = Effort()
        work = plan.work
        result: Result
        check_private(plan)
        if isinstance(work, SelectWork):
            result, n_texts = self._select(plan, work, counter, progress, asked)
        elif isinstance(work, PooledWork):
            result, n_texts = self._pooled(plan, work, counter, progress, asked)
        elif isinstance(work, FitWork):
            result, n_texts = self._fit(plan, work, counter, progress, asked)
        elif isinstance(work, LocalWork):
            result, n_texts = self._local(plan, work, counter, progress, asked)
        else:
            raise InputError("the plan is a short one: make it whole first (fedbpt.search.compact_plans)")
        seconds = time.monotonic() - began
        if plan.privacy is not None:
            seconds = 0.0  # as the tokens, it would tell which rows were in the sample
        elif seconds > waited and counter.tokens:
            self.state.tokens_per_second = counter.tokens / (seconds - waited)
        return RoundReport(
            run=plan.run,
            round=plan.round,
            device=plan.device,
            plan_digest=digest(plan),
            result=result,
            n_texts=n_texts,
            evaluations=counter.evaluations,
            tokens=counter.tokens,
            seconds=seconds,
            peak_rss_bytes=int(self.scorer.memory().get("peak_rss", 0)),
        )

    def interrupt(self) -> None:
        """Stop the scoring call in flight, from another thread; its work raises `ScoringInterrupted`."""
        self.scorer.interrupt()

    def answer(self, question: Question, said: Callable[[Answer], None], cancelled: Cancelled) -> Answer:
        """What a person asks; see `answer_of`."""
        return answer_of(self.scorer, question, said, cancelled)

    def evaluate(
        self,
        request: EvaluateRequest,
        progress: Progress = lambda _done, _total: None,
        cancelled: Cancelled = lambda: False,
    ) -> EvaluateReport:
        """Count what each latent gets right on held-back rows. Raises as `run` does."""
        self._check_fits(request)
        latents = request.latents.numpy()
        if latents.ndim != 2 or len(latents) == 0:
            raise InputError(f"latents must have shape [k, {request.prompt.d}] with k of 1 or more")
        if not self._rows[request.split]:
            raise DataError(f"device {self.name} has no {request.split} rows")
        began = time.monotonic()
        objective = self._objective(
            request.split, request.template, request.labels, request.objective, request.prompt,
            keep_kv=request.split == "dev",  # looked at again and again; test rows once
        )  # fmt: skip
        n = min(request.max_rows or len(objective), len(objective))
        weights = row_weights(objective, request)
        if request.readouts and len(request.readouts) != len(latents):
            raise InputError(f"{len(request.readouts)} readouts for {len(latents)} latents: give one each, or none")
        others = [self._plain(objective, request, template, np.arange(n)) for template in request.others]
        correct, loss_sums = [0] * len(latents), [0.0] * len(latents)
        for part in parts_of(np.arange(n), 1 + len(others)):
            logits = [other.of(part, cancelled) for other in others]
            for which, embeds in objective.prompts(latents):
                readouts = [request.readouts[i] for i in which] if request.readouts else ()
                report = None if others else progress
                found = objective.evaluate(embeds, part, report, cancelled, readouts, logits, weights)
                for i, right, loss in zip(which, found.correct, found.loss_sums, strict=True):
                    correct[i], loss_sums[i] = correct[i] + right, loss_sums[i] + loss
            if others:
                progress(int(part[-1]) + 1, n)
        return EvaluateReport(n=n, correct=tuple(correct), loss_sums=tuple(loss_sums), seconds=time.monotonic() - began)

    def _select(
        self, plan: RoundPlan, work: SelectWork, counter: Effort, progress: Progress, cancelled: Cancelled
    ) -> tuple[SelectResult, int]:
        if not work.templates:
            raise InputError("there are no templates to select from")
        if plan.privacy is not None:
            return self._select_privately(plan, work, counter, cancelled)
        labels = np.array([label for _, label in self._rows["train"]])
        chosen = batch_indices(len(labels), work.max_rows, generator(plan.seed, "select", plan.device))
        parts = [chosen]
        if work.by_label:
            parts = [chosen[labels[chosen] == label] for label in range(len(plan.labels))]
        sums, correct, done = np.zeros((len(work.templates), len(parts))), np.zeros(len(work.templates), dtype=int), 0
        made = self._zero_shot_objectives(plan, work)
        for place, part in enumerate(parts):
            for rows in parts_of(part, len(made)):
                for number, objective in enumerate(made):
                    with counter.of(objective):
                        losses, right = objective.row_results(objective.zero_shot_embeds(), rows, cancelled)
                    sums[number, place] += losses.sum()
                    correct[number] += right.sum()
                done += len(rows)
                progress(done, len(chosen))
        counter.evaluations += len(made) * sum(len(part) > 0 for part in parts)
        rights = tuple(correct.tolist()) if plan.labels else ()
        if not work.by_label:
            return SelectResult(loss_sums=Array.of(sums[:, 0]), correct=rights), len(chosen)
        counts = np.bincount(labels, minlength=len(plan.labels)).tolist()
        return SelectResult(loss_sums=Array.of(sums), correct=rights, label_counts=tuple(counts)), len(chosen)

    def _select_privately(
        self, plan: RoundPlan, work: SelectWork, counter: Effort, cancelled: Cancelled
    ) -> tuple[SelectResult, int]:
        made = self._zero_shot_objectives(plan, work)

        def losses(sample: NDArray[np.intp]) -> NDArray[np.float64]:
            found = [
                [objective.row_losses(objective.zero_shot_embeds(), rows, cancelled)[0] for objective in made]
                for rows in parts_of(sample, len(made))
            ]
            return np.concatenate(found, axis=1)

        n_rows = len(self._rows["train"])
        mean = self._release(plan, 0, len(work.templates), work.max_rows, losses, counter)
        return SelectResult(loss_sums=Array.of(n_rows * mean)), n_rows

    def _zero_shot_objectives(self, plan: RoundPlan, work: SelectWork) -> list[Objective]:
        return [
            self._objective("train", template, plan.labels, plan.objective, plan.prompt, keep_kv=False)
            for template in work.templates
        ]

    def _pooled(
        self, plan: RoundPlan, work: PooledWork, counter: Effort, progress: Progress, cancelled: Cancelled
    ) -> tuple[PooledResult, int]:
        objective = self._train_objective(plan)
        latents = sample_population(work.state, work.popsize, plan.seed, work.generation)
        if plan.privacy is not None:
            noisy = self._private_losses(plan, 0, objective, latents, counter, cancelled)
            return PooledResult(losses=Array.of(noisy, "<f4")), len(objective)
        path = (plan.device, work.generation)
        chosen, weights = mini_batch(objective, row_weights(objective, plan), plan.texts, plan, path)
        noise = generator(plan.seed, "perturb", *path)
        with counter.of(objective):
            losses = objective.losses(objective.embeds(latents), chosen, noise, progress, cancelled, weights)
        # the mini-batch's mean stands for all of the device's rows: weighing it by less would favour small devices
        return PooledResult(losses=Array.of(losses, "<f4")), len(objective)

    def _fit(
        self, plan: RoundPlan, work: FitWork, counter: Effort, progress: Progress, cancelled: Cancelled
    ) -> tuple[FitResult, int]:
        objective = self._train_objective(plan)
        if work.n_words > len(objective.word_ids):
            raise InputError(f"a readout of {work.n_words} words: the objective has {len(objective.word_ids)}")
        chosen = batch_indices(len(objective), work.max_rows, generator(plan.seed, "fit", plan.device))
        what = (plan.template, plan.labels, plan.objective, plan.prompt, work.latent, work.others)
        key = msgspec.msgpack.encode((*what, plan.seed, plan.device, work.max_rows))
        if self.state.fitted is None or self.state.fitted_to != key:  # a fit's prompt stands still
            [(_, embeds)] = objective.prompts(work.latent.numpy()[None])
            others = [self._plain(objective, plan, template, chosen) for template in work.others]
            logits: list[list[NDArray[np.float32]]] = [[] for _ in range(1 + len(others))]
            parts = parts_of(chosen, len(logits))
            for number, part in enumerate(parts):
                with counter.of(objective):
                    logits[0].append(objective.logits(embeds, part, cancelled))
                for other, found in zip(others, logits[1:], strict=True):
                    with counter.of(other.objective):
                        found.append(other.of(part, cancelled))
                progress(number + 1, len(parts) + 1)
            self.state.fitted_to, self.state.fitted = key, np.stack([np.concatenate(each) for each in logits])
        rows = row_weights(objective, plan)[chosen]
        result = fit_result(
            work, self.state.fitted, objective.targets[chosen], objective.readout, len(plan.labels), rows
        )
        progress(1, 1)
        return result, len(chosen)

    def _local(
        self, plan: RoundPlan, work: LocalWork, counter: Effort, progress: Progress, cancelled: Cancelled
    ) -> tuple[LocalResult, int]:
        objective = self._train_objective(plan)
        everything = len(objective)
        steps = work.iterations + 1
        weights = row_weights(objective, plan)
        weights = weights / weights.mean()  # else a device with frequent labels alone would look fittest

        def losses(latents: NDArray[np.float64], iteration: int) -> NDArray[np.float64]:
            if plan.privacy is not None:
                return self._private_losses(plan, iteration, objective, latents, counter, cancelled)
            last = iteration == work.iterations
            path = (plan.device, plan.round, iteration)
            size = 0 if last else plan.texts
            chosen, of_rows = mini_batch(objective, weights, size, plan, path)
            noise = generator(plan.seed, "perturb", *path)
            values = objective.losses(objective.embeds(latents), chosen, noise, None, cancelled, of_rows)
            progress(iteration + 1, steps)
            return values

        if plan.privacy is not None:  # the mean follows from the noisy losses; its own is not released
            return local_search(work, local_seed(plan), losses).with_fitness(0.0), everything
        with counter.of(objective):
            found = local_search(work, local_seed(plan), losses)
            fitness = float(losses(found.mean[None], work.iterations)[0])  # F(m_k) on all of the device's rows
        return found.with_fitness(fitness), everything

    def _private_losses(
        self, plan: RoundPlan, part: int, objective: Objective, latents: NDArray[np.float64], counter: Effort,
        cancelled: Cancelled,
    ) -> NDArray[np.float64]:  # fmt: skip
        """Noisy mean losses [k] of ``latents``, each candidate's less the mean of all."""
        embeds = objective.embeds(latents)
        return self._release(
            plan, part, len(latents), plan.objective.batch_size,
            lambda sample: objective.row_losses(embeds, sample, cancelled), counter,
        )  # fmt: skip

    def _release(
        self, plan: RoundPlan, part: int, k: int, size: int, losses: RowLosses, counter: Effort
    ) -> NDArray[np.float64]:
        if plan.privacy is None:
            raise InputError("a release needs clip and noise: the plan has no privacy")
        question = digest(msgspec.structs.replace(plan, deadline_s=1.0))  # a run may be resumed with another deadline
        n_rows = len(self._rows["train"])
        counter.evaluations += k
        counter.tokens += k * min(size or n_rows, n_rows)  # as expected, not as sampled
        return Releases(plan.privacy, self.state.key, question).mean(part, k, n_rows, size, losses)

    def _train_objective(self, plan: RoundPlan) -> Objective:
        objective = self._objective("train", plan.template, plan.labels, plan.objective, plan.prompt)
        bias = np.array(plan.label_bias)
        return objective.read_by(Readout(weights=Array.of(bias[None])) if len(bias) else None)

    def _plain(
        self, like: Objective, asked: RoundPlan | EvaluateRequest, template: Template, rows: NDArray[np.intp]
    ) -> PlainLogits:
        """The logits of ``rows`` under another template, without a prompt: kept, for they are asked for again."""
        split = asked.split if isinstance(asked, EvaluateRequest) else "train"
        what = (split, template, asked.template, asked.labels, asked.objective, asked.prompt, rows.tobytes())
        key = hashlib.sha256(msgspec.msgpack.encode(what)).digest()
        if key not in self._plain_logits:
            made = PlainLogits(under(template, like, self._rows[split]))
            if split == "test":  # asked for once
                return made
            self._plain_logits[key] = made
        self._plain_logits.move_to_end(key)
        while len(self._plain_logits) > _KEPT_PLAIN:
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
        """Encoded rows, kept from call to call: encoding a data set takes longer than a generation."""
        key = msgspec.msgpack.encode((split, template, labels, objective, prompt, keep_kv))
        if key in self._objectives:
            self._objectives.move_to_end(key)
            return self._objectives[key]
        made = Objective(self.scorer, template, labels, self._rows[split], objective, prompt, keep_kv)
        self._objectives[key] = made
        while len(self._objectives) > _KEPT_OBJECTIVES:
            self._objectives.popitem(last=False)
        return made

    def _check_fits(self, asked: RoundPlan | EvaluateRequest) -> None:
        if found := misfit(self.info(), asked.model_fingerprint, asked.task):
            raise InputError(f"device {self.name} {found.reason}")
