"""`RunLedger`: the closed rounds of a run, written to the store and replayed from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import msgspec

from fedbpt.aggregation.base import Aggregator
from fedbpt.aggregation.means_fit import MeansFit
from fedbpt.coordinator.costs.spending import Spending
from fedbpt.coordinator.monitoring.course import Course
from fedbpt.coordinator.monitoring.run_report import BYTES_DOWN, BYTES_UP
from fedbpt.coordinator.planner import Planner
from fedbpt.coordinator.reports.round_reports import cap_reports, mean_loss, purpose_of
from fedbpt.coordinator.run_state import SELECTION, RunState
from fedbpt.coordinator.work_kinds import kind_of
from fedbpt.errors import ConfigError, FederationError, StoreError
from fedbpt.protocol import codec
from fedbpt.protocol.rounds import DeviceInfo, RoundReport
from fedbpt.protocol.specs import Template
from fedbpt.runs.as_json import task_of_run
from fedbpt.runs.dev_figures import DEV_SECONDS, LOOK_GAIN, LOOKS_DONE, judged_loss
from fedbpt.runs.result import RunResult
from fedbpt.runs.settings import RunSettings, stored_settings
from fedbpt.runs.store import RunStore, StoredRound, StoredRun, Traffic, left_out_in
from fedbpt.tasks import Task

NOISY_SUMS: Final = "noisy_sums"
"""Metric of a round of which noisy sums of rows have come, closed or not: 1."""


class Committed(NamedTuple):
    """A committed round. ``loss``: of its reports, mean, nats; ``epsilon``: spent so far, None: not private."""

    loss: float
    epsilon: float | None


class RunLedger:
    """The state of one run, and its copy in the store.

    Args:
        aggregator: fresh; `open` replays the stored rounds into it.
        rows: digest of all rows, where the coordinator has them.

    Attributes:
        state: what the closed rounds lead to.
        planner: makes the next work from it.
        spending, course: cost and progress.
        is_open: `open` was called.
        traffic_before: bytes of earlier sessions, by device.
        bytes_up, bytes_down: of all devices and sessions, up to the last closed round.
    """

    def __init__(
        self, store: RunStore, run: str, task: Task, settings: RunSettings, aggregator: Aggregator, rows: str = ""
    ) -> None:
        self.store = store
        self.run = run
        self.task = task
        self.settings = settings
        self.state = RunState(task, settings, aggregator)
        self.planner = Planner(run, self.state)
        self.spending = Spending()
        self.course = Course(self.spending)
        self.is_open = False
        self.traffic_before: dict[str, Traffic] = {}
        self.bytes_up = 0
        self.bytes_down = 0
        self._traffic: dict[str, Traffic] = {}
        self._rows = rows
        self._released: set[int] = set()  # rounds of which noisy sums have come

    # --- opening -------------------------------------------------------------------------------------------------

    def _continue(self, stored: StoredRun) -> None:
        """Take ``stored`` for the run to go on with. Raises `ConfigError` if it is another one."""
        self.settings = self.state.settings = self.settings.continuing(stored_settings(stored.settings))
        if not is_of(stored, self.settings, self.task):
            changed = _changes(stored_settings(stored.settings), self.settings)
            what = f"other settings ({', '.join(changed[:3])})" if changed else "another task"
            raise ConfigError(
                f"run {self.run!r} was begun with {what}: give this run another name, or --fresh", field="run"
            )
        if self._rows != stored.rows:
            raise ConfigError(
                f"run {self.run!r} was begun with other rows (--data, --dev or --test): give this run another name, or "
                "--fresh",
                field="rows",
            )

    def finished(self) -> RunResult | None:
        """The stored result, if the run ended with the same budget. Raises `ConfigError` as `open` does."""
        stored = self.store.find_run(self.run)
        if stored is None:
            return None
        self._continue(stored)
        if stored.result is None or stored.status != "finished":
            return None
        result = codec.decode(stored.result, RunResult)
        # What it reads and draws is the same, as `_continue` made sure; earlier versions did not store it.
        mine = self.settings
        settings = msgspec.structs.replace(
            result.settings, readout=mine.readout, draft=mine.draft, check_devices=mine.check_devices
        )
        known = task_of_run(stored)
        same = known is None or known.generation == self.task.generation  # it may have judged the prompt
        return result if settings == self.settings and same else None

    def open(self, model: DeviceInfo, devices: Sequence[str]) -> None:
        """Begin the run in the store, or resume it. ``model``: the info of a device with the run's model.

        Raises:
            ConfigError: the stored run has another task, other settings or other rows.
            FederationError: it has another model.
        """
        self.planner.model_fingerprint = model.model_fingerprint
        self.state.n_layer = model.n_layer
        self.state.n_embd = model.n_embd
        stored = self.store.find_run(self.run)
        if stored is None:
            self.store.create_run(
                self.run,
                task=self.task.name,
                model_fingerprint=model.model_fingerprint,
                model_name=model.model_name,
                identity=identity_of(self.settings, self.task),
                settings=codec.encode(self.settings),
                devices=devices,
            )
        else:
            self._continue(stored)
            if stored.model_fingerprint != model.model_fingerprint:
                raise FederationError(
                    f"run {self.run!r} was begun with {stored.model_name} ({stored.model_fingerprint}), but the devices"
                    f" have {model.model_name} ({model.model_fingerprint}): give this run another name",
                    field="model_fingerprint",
                )
            identity = identity_of(self.settings, self.task)
            self.store.record_settings(self.run, codec.encode(self.settings), identity)
        self.store.record_task(self.run, codec.encode(self.task), self._rows)
        self.store.add_devices(self.run, devices)
        self.store.set_status(self.run, "running")
        self.is_open = True
        self.traffic_before = self.store.traffic(self.run)
        self._add_traffic(self.traffic_before)
        self.replay()

    # --- replaying -----------------------------------------------------------------------------------------------

    def replay_stored(self) -> int:
        """`replay` without `open`, of a run of the model that the store knows."""
        infos = self.store.devices(self.run).values()
        self.state.n_layer = min((info.n_layer for info in infos if info is not None), default=0)
        self.state.n_embd = max((info.n_embd for info in infos if info is not None), default=0)
        return self.replay()

    def replay(self) -> int:
        """Apply the stored rounds; returns how many. Raises `StoreError` at the first whose digests differ."""
        n_rounds = 0
        history = {line.round: line.metrics for line in self.store.history(self.run)}
        if DEV_SECONDS in history.get(SELECTION, {}):  # also where there was nothing to select
            self.course.evaluated(0, history[SELECTION][DEV_SECONDS])
        for stored in self.store.rounds(self.run):
            metrics = history.get(stored.round, {})
            scored = self.state.aggregator.evaluations
            self.state.left_out.update(left_out_in(metrics))
            self._replay_round(stored)
            self._count(stored.reports, metrics.get("seconds", 0.0), scored)
            n_rounds += 1
            if stored.round > SELECTION:
                self._replay_evaluation(metrics)
        for round, metrics in history.items():
            if NOISY_SUMS in metrics:
                self._released.add(round)
            self._add_seconds(round, metrics.get("seconds", 0.0) + metrics.get("cut_seconds", 0.0))
        return n_rounds

    def _replay_evaluation(self, metrics: Mapping[str, float]) -> None:
        if DEV_SECONDS in metrics:
            self.course.evaluated(self.state.searched, metrics[DEV_SECONDS])
        loss = judged_loss(metrics)
        if loss is not None:
            self.state.judge(loss)
        if LOOK_GAIN in metrics:
            self.state.look(metrics[LOOK_GAIN], int(metrics[LOOKS_DONE]))

    def _replay_round(self, stored: StoredRound) -> None:
        failure = StoreError(
            f"round {stored.round} of run {self.run!r} does not replay to its stored digests: another version made it,"
            " or the store was changed; begin a run with another name",
            field="round",
        )
        state = self.state
        try:
            purpose = purpose_of(stored.reports)
            state.abandon_fits(keep=purpose)
            work = self.planner.work(stored.round, purpose)
            work_digest = kind_of(work).digest(work)
            if purpose == "readout" and work_digest != stored.work_digest:
                # It was fitted to the mean that another ``patience`` chose: only its cost counts.
                state.discard_readout(stored.round, stored.reports)
                return
            state.apply(stored.round, stored.reports)
        except (ValueError, LookupError) as error:  # reports that do not fit the work, or no reports
            raise failure from error
        if (work_digest, state.digest()) != (stored.work_digest, stored.state_digest):
            raise failure

    # --- committing ----------------------------------------------------------------------------------------------

    def commit(
        self,
        round: int,
        work_digest: str,
        reports: Sequence[RoundReport],
        seconds: float,
        traffic: Mapping[str, Traffic],
        left_out: Mapping[str, str] | None = None,
    ) -> Committed:
        """Apply a round and write it, in one transaction.

        Args:
            round, work_digest, reports, seconds: see `fedbpt.runs.store.RunStore.commit_round`.
            traffic: of the devices for which it may have changed.
            left_out: devices that are not asked any more, and why.
        """
        scored = self.state.aggregator.evaluations
        self.state.left_out.update(left_out or ())
        self.state.apply(round, reports)
        self._count(reports, seconds, scored)
        loss = mean_loss(cap_reports(reports, self.settings.row_cap))
        epsilon = self.epsilon()
        metrics = {"loss": loss, "seconds": seconds, "tokens": float(sum(report.tokens for report in reports))}
        if traffic:
            self._add_traffic(traffic)
            metrics[BYTES_UP] = float(self.bytes_up)
            metrics[BYTES_DOWN] = float(self.bytes_down)
        if epsilon is not None:
            metrics["epsilon"] = epsilon
        self.store.commit_round(
            self.run,
            round,
            work_digest=work_digest,
            state_digest=self.state.digest(),
            reports=reports,
            metrics=metrics,
            traffic=traffic,
            left_out=left_out,
        )
        self._add_seconds(round, seconds)
        return Committed(loss, epsilon)

    def leave_out(self, round: int, seconds: float, of: str = "") -> None:
        """Record the time of a round that the budget ended before enough devices had reported, or of a look.

        ``of``: another metric to which the time is added, too.
        """
        before = self.metrics(round)
        names = ["cut_seconds", *([of] if of else [])]
        self.store.record_metrics(self.run, round, {name: before.get(name, 0.0) + seconds for name in names})
        self._add_seconds(round, seconds)

    def record_release(self, round: int) -> None:
        """Count the noisy sums of ``round``, which have come, before they are checked: ε is spent whether they fit."""
        if round in self._released:
            return
        self._released.add(round)
        epsilon = self.epsilon()
        spent = {} if epsilon is None else {"epsilon": epsilon}
        self.store.record_metrics(self.run, round, {NOISY_SUMS: 1.0, **spent})

    def require_no_lost_sum(self) -> None:
        """Raise `FederationError` if the sum of a secure private run was seen, but its round is not closed.

        Devices would add other noise to another one, and ε would be spent again.
        """
        lost = [round for round in self._released if round > self.state.closed]
        if self.settings.secure and lost:
            raise FederationError(
                f"the noisy sum of round {lost[0]} of run {self.run!r} was seen, and the round failed or was stopped; "
                "its ε is spent: give the run another name, which asks for another sum and spends as much again",
                field="run",
            )

    def _count(self, reports: Sequence[RoundReport], seconds: float, scored: int) -> None:
        """Count a round that was applied. ``scored``: candidates before it."""
        purpose = purpose_of(reports)
        if purpose == "search":
            self.planner.learn_pace(reports)
        self.spending.add_reports(purpose, reports)
        tokens = sum(report.tokens for report in reports)
        self.course.closed(purpose, seconds, self.state.aggregator.evaluations - scored, tokens)

    def _add_traffic(self, traffic: Mapping[str, Traffic]) -> None:
        for device, each in traffic.items():
            before = self._traffic.get(device, Traffic(0, 0, 0))
            self.bytes_up += each.bytes_up - before.bytes_up
            self.bytes_down += each.bytes_down - before.bytes_down
            self._traffic[device] = each

    def _add_seconds(self, round: int, seconds: float) -> None:
        self.spending.add_seconds(seconds, charged=round != SELECTION)

    # --- readings ------------------------------------------------------------------------------------------------

    def is_spent(self, reserve_s: float = 0.0) -> bool:
        """Whether the search ends: a limit of the budget is reached, its patience ran out, or it is futile.

        ``reserve_s``: part of the budget in seconds that is kept for the readout.
        """
        state = self.state
        evaluations = state.aggregator.evaluations
        futile = state.futile_at is not None and self.settings.stop_if_futile
        return (
            futile
            or state.out_of_patience
            or self.spending.reaches_limit(self.settings, state.searched, evaluations, reserve_s)
        )

    @property
    def is_futile(self) -> bool:
        """Whether an interim look has ended the search."""
        return self.settings.stop_if_futile and self.state.futile_at == self.state.searched

    def epsilon(self) -> float | None:
        """ε spent by the closed rounds and by noisy sums that have come, see `Spending.epsilon`."""
        n_selected = len(self.task.templates) if self.state.closed >= SELECTION else 1
        readouts = sum(isinstance(fit, MeansFit) and fit.done for fit in self.state.fits.values())
        readouts = max(readouts, len(self._released))
        return self.spending.epsilon(self.settings, n_selected, self.state.searched, readouts)

    def metrics(self, round: int) -> dict[str, float]:
        """The stored figures of ``round``."""
        return next((dict(line.metrics) for line in self.store.history(self.run) if line.round == round), {})


def has_result(store: RunStore, run: str, task: Task, settings: RunSettings) -> bool:
    """Whether ``store`` has the result of ``run`` with ``settings``, which is not so with a larger budget.

    Raises:
        ConfigError: the stored run has another task or other settings, or these do not fit the task.
    """
    fitting = settings.for_labels(task.labels, task.generation)
    return RunLedger(store, run, task, fitting, fitting.aggregator()).finished() is not None


def identity_of(settings: RunSettings, task: Task, reads: bool = True) -> str:
    """Digest of what a run must have in common with a stored one to resume it.

    ``reads``: include how the task reads rows, which older versions did not store.
    """
    texts = "\0".join([settings.identity(), task.name, *task.labels])
    digests = [*map(codec.digest, task.templates), *([task.identity.reading] if reads else ())]
    return codec.digest(Template(pattern=texts, label_words=tuple(digests)))


def _changes(before: RunSettings, now: RunSettings) -> list[str]:
    """What must be equal to resume a run and is not: ``seed 0, now 5``."""
    old, new = _flat(msgspec.to_builtins(before.fixed())), _flat(msgspec.to_builtins(now.fixed()))
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return [f"{name} {old.get(name, 'unset')}, now {new.get(name, 'unset')}" for name in names]


def _flat(value: dict[str, Any], path: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, each in value.items():
        found |= _flat(each, f"{path}{name}.") if isinstance(each, dict) else {f"{path}{name}": each}
    return found


def is_of(run: StoredRun, settings: RunSettings, task: Task) -> bool:
    """Whether a stored run has these settings and this task; an older version's is taken to read rows as it does."""
    return run.identity in (identity_of(settings, task), identity_of(settings, task, reads=False))
