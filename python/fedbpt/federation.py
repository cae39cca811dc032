"""`Federation`: a run from connecting to the result; the round loop (design: ``docs/federation.md``).

A round: each live device gets its plan, the reports that come before the deadline update the aggregator, and round
and reports are committed as one transaction. What follows is a function of the committed reports alone, so a run that
was stopped at any instant is resumed by replaying them, to the same digest.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import math
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Final, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from fedbpt import wire
from fedbpt.clients.base import DeviceClient
from fedbpt.errors import ConfigError, FederationError, QuorumError, StoreError
from fedbpt.fleet import Fleet, Listener
from fedbpt.messages import (
    Array,
    DeviceInfo,
    EvaluateReport,
    EvaluateRequest,
    LocalResult,
    Name,
    PooledResult,
    RoundPlan,
    RoundProgress,
    RoundReport,
    SelectResult,
    SelectWork,
    Template,
    Work,
)
from fedbpt.runs import (
    NO_SCORE,
    DeviceBack,
    DeviceLost,
    DeviceSummary,
    Evaluated,
    EventCallback,
    LateReport,
    Progressed,
    RoundClosed,
    RunFinished,
    RunResult,
    RunSettings,
    RunStarted,
    Score,
    TemplateSelected,
)
from fedbpt.store import RunStore, StoredRound, StoredRun, Traffic

log = logging.getLogger(__name__)

EVALUATION_DEADLINES: Final = 10
"""An evaluation, of many rows, may take as long as this many rounds' deadlines."""

SETTLE_S: Final = 5.0
"""How long the final evaluation waits for devices to be live again."""

SELECTION: Final = 0
"""The round in which the template is chosen; tuning begins with round 1."""


class Aggregator(Protocol):
    """What the round loop asks of `fedbpt.aggregation`. Deterministic: the same updates give the same digest."""

    @property
    def min_reports(self) -> int: ...

    @property
    def evaluations(self) -> int: ...

    @property
    def mean(self) -> NDArray[np.float64]: ...

    def work(self, round: int) -> Work: ...

    def update(self, reports: Sequence[RoundReport]) -> None: ...

    def digest(self) -> str: ...


class FederatedTask(Protocol):
    """What the round loop asks of a task (`fedbpt.tasks.Task`)."""

    @property
    def name(self) -> str: ...

    @property
    def labels(self) -> tuple[str, ...]: ...

    @property
    def templates(self) -> tuple[Template, ...]: ...


class Federation:
    """One run over ``clients``: select the template, tune, evaluate.

    Args:
        clients: the devices; their names must differ and stay the same when the run is resumed.
        task: name, labels, candidate templates.
        settings: budget, objective, patience.
        aggregator: fresh from the same settings; the run's stored rounds are replayed into it.
        store: where rounds are committed. A run of this name in it is resumed; a finished one is returned as it is.
        run: the run's name, letters, digits and ``._-``.
        on_event: called for each `fedbpt.runs` event, from the loop's thread.

    Raises:
        ConfigError: names that clash or cannot be used, too few devices for the method.
    """

    def __init__(
        self,
        clients: Sequence[DeviceClient],
        task: FederatedTask,
        settings: RunSettings,
        aggregator: Aggregator,
        store: RunStore,
        run: str,
        on_event: EventCallback = lambda _event: None,
    ) -> None:
        _check_names([run], "run")
        _check_names([client.name for client in clients], "device")
        self.run_name = run
        self.task = task
        self.settings = settings
        self._clients = {client.name: client for client in clients}
        self._needed = max(math.ceil(settings.quorum * len(clients)), aggregator.min_reports, 1)
        if self._needed > len(clients):
            raise ConfigError(f"{settings.method} needs reports of {self._needed} devices, the run has {len(clients)}")
        self._aggregator = aggregator
        self._store = store
        self._emit = on_event
        self._template: Template | None = None
        self._closed = -1  # the last closed round
        self._tokens = 0
        self._seconds = 0.0
        self._reports: dict[str, int] = dict.fromkeys(self._clients, 0)
        self._traffic: dict[str, Traffic] = {}
        self._stored = False
        self._fleet: Fleet | None = None

    def run(self) -> RunResult:
        """The whole run. Works inside a running event loop too (a notebook), from a thread of its own.

        Ctrl-C tells the devices to stop, and leaves a store from which the same call resumes.

        Raises:
            QuorumError: too few devices, at the start or in a round. FederationError: devices with different models,
            a stored run that does not fit. StoreError: the store cannot be written.
        """
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return asyncio.run(self.run_async())
        return _run_in_thread(self.run_async)

    async def run_async(self) -> RunResult:
        """`run`, for callers with a loop of their own. A federation runs once."""
        if self._fleet is not None:
            raise FederationError("a federation runs once: make another, with a fresh aggregator, to resume")
        stored = self._store.find_run(self.run_name)
        if stored is not None and (result := self._finished(stored)) is not None:
            self._emit(RunFinished(result=result))
            return result
        began = time.monotonic()
        self._fleet = fleet = Fleet(self._clients, self._listener())
        try:
            await self._connect(fleet, stored)
            await self._select(fleet)
            await self._tune(fleet)
            result = await self._finish(fleet, began)
        except BaseException:
            await self._stop(fleet)
            raise
        finally:
            await fleet.aclose()
        self._emit(RunFinished(result=result))
        return result

    # --- beginning and resuming ----------------------------------------------------------------------------------

    def _identity(self) -> str:
        first, *rest = self.task.templates
        texts = "\0".join([self.settings.identity(), self.task.name, *self.task.labels])
        digests = [wire.digest(template) for template in (first, *rest)]
        return wire.digest(Template(pattern=texts, label_words=tuple(digests)))

    def _finished(self, stored: StoredRun) -> RunResult | None:
        """The stored result, if the run ended with this very budget; refuses a run of other settings."""
        if stored.identity != self._identity():
            raise ConfigError(
                f"run {self.run_name!r} was begun with another task or settings: give this one another name"
            )
        if stored.result is None or stored.status != "finished":
            return None
        result = wire.decode(stored.result, RunResult)
        return result if result.settings == self.settings else None

    async def _connect(self, fleet: Fleet, stored: StoredRun | None) -> None:
        infos = await fleet.connect()
        if len(infos) < self._needed:
            raise QuorumError(
                f"{len(infos)} of {len(self._clients)} devices answer, {self._needed} are needed{fleet.missing()}"
            )
        model = _common_model(infos)
        if stored is None:
            self._store.create_run(
                self.run_name,
                task=self.task.name,
                model_fingerprint=model.model_fingerprint,
                model_name=model.model_name,
                identity=self._identity(),
                settings=wire.encode(self.settings),
                devices=list(self._clients),
            )
        elif stored.model_fingerprint != model.model_fingerprint:
            raise FederationError(
                f"run {self.run_name!r} was begun with {stored.model_name} ({stored.model_fingerprint}),"
                f" the devices have {model.model_name} ({model.model_fingerprint})"
            )
        self._stored = True
        self._store.add_devices(self.run_name, list(self._clients))
        self._store.set_status(self.run_name, "running")
        for member in fleet.members.values():
            if member.info is not None:
                self._store.record_device(self.run_name, member.name, member.info)
            else:
                self._store.record_loss(self.run_name, 0, member.name, member.reason)
        self._traffic = self._store.traffic(self.run_name)
        self._replay()
        fleet.round = self._closed + 1
        fleet.require_model(model.model_fingerprint)
        self._model = model
        self._emit(
            RunStarted(
                run=self.run_name,
                devices=tuple(self._clients),
                live=tuple(member.name for member in fleet.live),
                model_name=model.model_name,
                resumed=self._closed + 1,
                settings=self.settings,
            )
        )

    def _replay(self) -> None:
        for stored in self._store.rounds(self.run_name):
            self._replay_round(stored)
        for line in self._store.history(self.run_name):
            self._seconds += line.metrics.get("seconds", 0.0)

    def _replay_round(self, stored: StoredRound) -> None:
        work = SelectWork(templates=self.task.templates) if stored.round == SELECTION else None
        work_digest = wire.digest(work or self._aggregator.work(stored.round))
        self._apply(stored.round, stored.reports)
        if (work_digest, self._aggregator.digest()) != (stored.work_digest, stored.state_digest):
            raise StoreError(
                f"round {stored.round} of run {self.run_name!r} does not replay to the state it had:"
                " it was made with another version; begin a run of another name"
            )

    # --- rounds --------------------------------------------------------------------------------------------------

    async def _select(self, fleet: Fleet) -> None:
        templates = self.task.templates
        if self._closed < SELECTION and len(templates) > 1:
            await self._round(fleet, SELECTION, SelectWork(templates=templates))
        if len(templates) == 1:
            self._template = templates[0]
            self._closed = max(self._closed, SELECTION)
            self._emit(TemplateSelected(template=templates[0], index=0, losses=()))
        if self.settings.evaluate_every and "dev_accuracy" not in self._metrics(SELECTION):
            await self._evaluate_live(fleet, SELECTION)

    async def _tune(self, fleet: Fleet) -> None:
        every = self.settings.evaluate_every
        while not self._spent():
            round = self._closed + 1
            await self._round(fleet, round, self._aggregator.work(round))
            if every and round % every == 0:
                await self._evaluate_live(fleet, round)

    def _spent(self) -> bool:
        limits = self.settings
        return bool(
            (limits.rounds and self._closed >= limits.rounds)
            or (limits.evaluations and self._aggregator.evaluations >= limits.evaluations)
            or (limits.tokens and self._tokens >= limits.tokens)
            or (limits.seconds and self._seconds >= limits.seconds)
        )

    async def _round(self, fleet: Fleet, round: int, work: Work) -> None:
        began = time.monotonic()
        work_digest = wire.digest(work)
        reports = await fleet.run_round(
            round, lambda device: self._plan(round, device, work), self._needed, self.settings.deadline_s
        )
        self._apply(round, reports)
        seconds = time.monotonic() - began
        loss = _mean_loss(reports)
        self._store.commit_round(
            self.run_name,
            round,
            work_digest=work_digest,
            state_digest=self._aggregator.digest(),
            reports=reports,
            metrics={"loss": loss, "seconds": seconds, "tokens": float(sum(report.tokens for report in reports))},
            traffic=self._costs(fleet),
        )
        self._seconds += seconds
        costs = self._costs(fleet).values()
        reported = tuple(report.device for report in reports)
        self._emit(
            RoundClosed(
                round=round,
                reported=reported,
                missing=tuple(name for name in self._clients if name not in reported),
                loss=loss,
                evaluations=self._aggregator.evaluations,
                tokens=self._tokens,
                seconds=self._seconds,
                bytes_up=sum(cost.bytes_up for cost in costs),
                bytes_down=sum(cost.bytes_down for cost in costs),
            )
        )

    def _plan(self, round: int, device: str, work: Work) -> RoundPlan:
        return RoundPlan(
            run=self.run_name,
            round=round,
            device=device,
            seed=self.settings.seed,
            model_fingerprint=self._model.model_fingerprint,
            labels=self.task.labels,
            template=self._template or self.task.templates[0],
            prompt=self.settings.prompt,
            objective=self.settings.objective,
            work=work,
            deadline_s=self.settings.deadline_s,
        )

    def _apply(self, round: int, reports: Sequence[RoundReport]) -> None:
        """Let a closed round count; the one way in which state changes, live and on replay."""
        if round == SELECTION:
            losses = _template_losses(reports)
            index = int(np.argmin(losses))
            self._template = self.task.templates[index]
            self._emit(TemplateSelected(template=self._template, index=index, losses=tuple(losses.tolist())))
        else:
            self._aggregator.update(reports)
        self._closed = round
        for report in reports:
            self._tokens += report.tokens
            self._reports[report.device] = self._reports.get(report.device, 0) + 1

    # --- evaluation ----------------------------------------------------------------------------------------------

    def _request(self, latents: NDArray[np.float64], **what: Any) -> EvaluateRequest:
        return EvaluateRequest(
            model_fingerprint=self._model.model_fingerprint,
            labels=self.task.labels,
            template=self._template or self.task.templates[0],
            prompt=self.settings.prompt,
            objective=self.settings.objective,
            latents=Array.of(latents),
            **what,
        )

    async def _evaluate_live(self, fleet: Fleet, round: int) -> None:
        """The mean's accuracy on ``dev`` rows, for the eyes only; devices that do not answer are left out."""
        request = self._request(self._aggregator.mean[None], split="dev", max_rows=self.settings.dev_rows)
        reports = await fleet.evaluate(request, EVALUATION_DEADLINES * self.settings.deadline_s)
        if not reports:
            return
        score = sum((Score.of(report, 0) for report in reports.values()), NO_SCORE)
        figures = {"dev_accuracy": score.accuracy, "dev_loss": score.loss, "dev_n": float(score.n)}
        self._store.record_metrics(self.run_name, round, figures)
        self._emit(Evaluated(round=round, score=score, devices=tuple(reports)))

    async def _evaluate_final(self, fleet: Fleet) -> dict[str, EvaluateReport]:
        """Zero-shot and tuned, on the same ``test`` rows, of every device that is in reach."""
        mean = self._aggregator.mean
        request = self._request(np.stack([np.zeros_like(mean), mean]), max_rows=self.settings.test_rows)
        limit = EVALUATION_DEADLINES * self.settings.deadline_s
        await fleet.settle(min(SETTLE_S, self.settings.deadline_s))
        reports = await fleet.evaluate(request, limit)
        if not reports and not fleet.live:
            await fleet.settle(self.settings.deadline_s)
            reports = await fleet.evaluate(request, limit)
        has_rows = any(member.info and member.info.n_test for member in fleet.members.values())
        if not reports and has_rows:
            raise FederationError(
                f"tuned, but no device could evaluate the result{fleet.missing()}; start the same run again to resume it"
            )
        return reports

    # --- the end -------------------------------------------------------------------------------------------------

    async def _finish(self, fleet: Fleet, began: float) -> RunResult:
        reports = await self._evaluate_final(fleet)
        await fleet.cancel_rounds(self.run_name)
        costs = self._costs(fleet)
        devices = tuple(
            DeviceSummary(
                name=member.name,
                info=member.info,
                reports=self._reports[member.name],
                bytes_up=costs[member.name].bytes_up,
                bytes_down=costs[member.name].bytes_down,
                peak_rss_bytes=costs[member.name].peak_rss_bytes,
                zero_shot=Score.of(reports[member.name], 0) if member.name in reports else NO_SCORE,
                tuned=Score.of(reports[member.name], 1) if member.name in reports else NO_SCORE,
            )
            for member in fleet.members.values()
        )
        result = RunResult(
            run=self.run_name,
            task=self.task.name,
            settings=self.settings,
            model_fingerprint=self._model.model_fingerprint,
            model_name=self._model.model_name,
            template=self._template or self.task.templates[0],
            mean=Array.of(self._aggregator.mean),
            digest=self._aggregator.digest(),
            rounds=max(self._closed, 0),
            evaluations=self._aggregator.evaluations,
            tokens=self._tokens,
            seconds=self._seconds,
            total_seconds=time.monotonic() - began,
            zero_shot=sum((device.zero_shot for device in devices), NO_SCORE),
            tuned=sum((device.tuned for device in devices), NO_SCORE),
            devices=devices,
        )
        figures = {"test_accuracy_zero_shot": result.zero_shot.accuracy, "test_accuracy": result.tuned.accuracy}
        if result.tuned.n:
            self._store.record_metrics(self.run_name, self._closed, figures)
        self._store.set_status(self.run_name, "finished", wire.encode(result), costs)
        return result

    async def _stop(self, fleet: Fleet) -> None:
        """The run ends early: tell the devices, and leave a store to resume from."""
        await fleet.cancel_rounds(self.run_name)
        if not self._stored:
            return
        try:
            self._store.set_status(self.run_name, "stopped", traffic=self._costs(fleet))
        except StoreError as error:
            log.warning("%s", error)  # what ended the run is the error to show

    # --- inside --------------------------------------------------------------------------------------------------

    def _costs(self, fleet: Fleet) -> dict[str, Traffic]:
        costs = {}
        for name, member in fleet.members.items():
            before = self._traffic.get(name, Traffic(0, 0, 0))
            costs[name] = Traffic(
                before.bytes_up + member.client.bytes_up - member.bytes_up_before,
                before.bytes_down + member.client.bytes_down - member.bytes_down_before,
                max(before.peak_rss_bytes, member.peak_rss_bytes),
            )
        return costs

    def _metrics(self, round: int) -> dict[str, float]:
        return next((dict(line.metrics) for line in self._store.history(self.run_name) if line.round == round), {})

    def _listener(self) -> Listener:
        return Listener(
            lost=self._on_lost, back=self._on_back, late=self._on_late, progress=self._on_progress, met=self._on_met
        )

    def _on_lost(self, device: str, round: int, reason: str) -> None:
        self._emit(DeviceLost(device=device, round=round, reason=reason))
        if self._stored:
            self._store.record_loss(self.run_name, round, device, reason)

    def _on_back(self, device: str, round: int) -> None:
        self._emit(DeviceBack(device=device, round=round))

    def _on_late(self, report: RoundReport) -> None:
        self._store.record_late(self.run_name, report)
        self._emit(LateReport(device=report.device, round=report.round))

    def _on_progress(self, device: str, where: RoundProgress) -> None:
        self._emit(Progressed(device=device, round=where.round, done=where.done, total=where.total))

    def _on_met(self, device: str, info: DeviceInfo) -> None:
        if self._stored:
            self._store.record_device(self.run_name, device, info)


def _check_names(names: Sequence[str], what: str) -> None:
    for name in names:
        try:
            msgspec.convert(name, Name)
        except msgspec.ValidationError as error:
            raise ConfigError(f"{name!r} cannot name a {what}: use letters, digits and ._- (at most 128)") from error
        if list(names).count(name) > 1:
            raise ConfigError(f"two {what}s are named {name!r}: give each its own name")
    if not names:
        raise ConfigError(f"a run needs at least one {what}")


def _common_model(infos: Sequence[DeviceInfo]) -> DeviceInfo:
    by_model: dict[str, list[DeviceInfo]] = {}
    for info in infos:
        by_model.setdefault(info.model_fingerprint, []).append(info)
    if len(by_model) > 1:
        held = "; ".join(
            f"{', '.join(info.name for info in group)}: {group[0].model_name} ({fingerprint})"
            for fingerprint, group in by_model.items()
        )
        raise FederationError(f"the devices have different models, give all the same file: {held}")
    return infos[0]


def _template_losses(reports: Sequence[RoundReport]) -> NDArray[np.float64]:
    """Mean loss of each template over all devices' rows, nats [n_templates]."""
    sums = [report.result.loss_sums.numpy() for report in reports if isinstance(report.result, SelectResult)]
    mean: NDArray[np.float64] = np.sum(sums, axis=0) / sum(report.n_texts for report in reports)
    return mean


def _mean_loss(reports: Sequence[RoundReport]) -> float:
    total = 0.0
    for report in reports:
        match report.result:
            case PooledResult(losses=losses):
                value = float(losses.numpy().mean())
            case LocalResult(fitness=fitness):
                value = fitness
            case SelectResult(loss_sums=sums):
                value = float(sums.numpy().min()) / report.n_texts
        total += value * report.n_texts
    return total / sum(report.n_texts for report in reports)


def _run_in_thread(main: Callable[[], Coroutine[Any, Any, RunResult]]) -> RunResult:
    running: list[tuple[asyncio.AbstractEventLoop, asyncio.Task[Any] | None]] = []

    async def wrapped() -> RunResult:
        running.append((asyncio.get_running_loop(), asyncio.current_task()))
        return await main()

    with concurrent.futures.ThreadPoolExecutor(1, "fedbpt-federation") as pool:
        future = pool.submit(lambda: asyncio.run(wrapped()))
        try:
            return future.result()
        except KeyboardInterrupt:
            for loop, task in running:
                if task is not None:
                    loop.call_soon_threadsafe(task.cancel)
            concurrent.futures.wait([future])
            raise
