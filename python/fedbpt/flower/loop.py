"""`FlowerLoop`: the rounds of a run whose messages are sent and replies fetched by Flower's own loop."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final, TypeVar

import numpy as np
from flwr.app import Array, ArrayRecord, Message, MessageType, MetricRecord
from numpy.typing import NDArray

from fedbpt.coordinator.devices.members import common_model
from fedbpt.coordinator.ledger import RunLedger
from fedbpt.coordinator.reports.report_checks import check_evaluation, check_report
from fedbpt.coordinator.reports.vetting import vet
from fedbpt.coordinator.run_state import SELECTION
from fedbpt.coordinator.work_kinds import kind_of
from fedbpt.errors import ConfigError, DeviceError, QuorumError, WireError
from fedbpt.flower.client import MIN_TTL_S
from fedbpt.flower.records import packed, reply_of
from fedbpt.plain_text import MOST_TOLD, one_line
from fedbpt.protocol import specs
from fedbpt.protocol.membership import misfit
from fedbpt.protocol.rounds import DeviceInfo, EvaluateReport, EvaluateRequest, RoundPlan, RoundReport
from fedbpt.runs.events import RoundPurpose
from fedbpt.runs.result import NO_SCORE, Score
from fedbpt.runs.settings import RunSettings
from fedbpt.runs.store import RunStore
from fedbpt.tasks import Task

log = logging.getLogger(__name__)

LATENT: Final = "latent"
"""Key of the search's mean [d] in an `ArrayRecord`."""

M = TypeVar("M", bound=specs.Message)


class FlowerLoop:
    """Template selection, calibration and search. No readout, because Flower does not tell which round is the last.

    Args:
        store: where rounds are committed.
        run: the run's name in it.
        task, settings: the run's.
        devices: node id and status by name. Devices with another task are logged and left out.

    Raises:
        QuorumError: too few devices can take part.
        ConfigError: settings that this loop does not support.
        Others as `RunLedger.open`.
    """

    def __init__(
        self,
        store: RunStore,
        run: str,
        task: Task,
        settings: RunSettings,
        devices: Mapping[str, tuple[int, DeviceInfo]],
    ) -> None:
        if settings.patience:
            raise ConfigError(
                "Flower's own loop cannot end a search early: set patience and restarts to 0, or call FedBPT.start",
                field="patience",
            )
        if settings.metric_share:
            raise ConfigError(
                "Flower's own loop searches on the likelihood of target texts alone: set metric_share to 0, or call "
                "FedBPT.start",
                field="metric_share",
            )
        if settings.reads_privately:
            raise ConfigError(
                "Flower's own loop fits no readout: for a private search set calibrate = false and "
                "objective.readout_words = 0, or call FedBPT.start",
                field="privacy",
            )
        if settings.prompt.shifts:
            raise ConfigError(
                "Flower's own loop has no exchange that measures shifts of layers: call FedBPT.start, or set placement "
                f"to 'cue' instead of {settings.prompt.placement!r}",
                field="placement",
            )
        self._ledger = RunLedger(store, run, task, settings, settings.aggregator())
        unfit = {name: found for name, (_, info) in devices.items() if (found := misfit(info, None, task.identity))}
        for name, found in unfit.items():
            log.warning("%s is left out: it %s", name, found.reason)
        self._nodes = {name: node for name, (node, _) in devices.items() if name not in unfit}
        self._infos = {name: devices[name][1] for name in self._nodes}
        self._needed = max(settings.quorum * len(devices), self._ledger.state.aggregator.min_reports, 1)
        if len(self._nodes) < self._needed:
            reasons = "; ".join(f"{name}: it {found.reason}" for name, found in unfit.items())
            raise QuorumError(
                f"{len(self._nodes)} of {len(devices)} devices can take part, {self._needed:g} are needed ({reasons})",
                limit=self._needed,
            )
        self._plans: dict[str, RoundPlan] = {}
        self._work_digest = ""
        self._request: EvaluateRequest | None = None
        self._started_at = 0.0
        self._returned: NDArray[np.float64] | None = None
        self._ledger.open(common_model(list(self._infos.values())), sorted(devices))
        if len(task.templates) == 1 and not settings.balanced:
            self._ledger.state.skip_selection()

    def _next(self) -> tuple[int, RoundPurpose]:
        state = self._ledger.state
        if state.closed < SELECTION:
            return SELECTION, "selection"
        calibrates = self._ledger.settings.calibrate and not state.fit("calibration").done
        return state.closed + 1, "calibration" if calibrates else "search"

    def plans(self, arrays: ArrayRecord) -> list[Message]:
        """The next round's plans as messages. Raises `ConfigError` if ``arrays`` are not those of the last `close`."""
        if self._returned is not None and not (arrays[LATENT].numpy() == self._returned).all():
            raise ConfigError(
                "a strategy around this one changed the arrays, which has no effect on the search: remove it; for"
                " differential privacy set settings.privacy",
                field="arrays",
            )
        round, purpose = self._next()
        work = self._ledger.planner.work(round, purpose)
        self._work_digest = kind_of(work).digest(work)
        self._started_at = time.monotonic()
        self._plans = {name: self._ledger.planner.plan(round, name, work) for name in self._nodes}
        return [self._message(name, plan, MessageType.TRAIN, str(round)) for name, plan in self._plans.items()]

    def close(self, replies: Iterable[Message]) -> tuple[ArrayRecord, MetricRecord]:
        """Commit the round. Returns the mean and the round's metrics. Raises `QuorumError`."""
        ledger = self._ledger
        reports = []
        for name, report in self._decoded(replies, RoundReport):
            try:
                check_report(report, self._plans[name], self._infos[name].n_train)
            except WireError as error:
                log.warning("%s: its report is rejected: %s", name, error)
            else:
                reports.append(report)
        self._require_quorum(reports)
        reports, refused = vet(ledger, reports[0].round, reports)
        for name, reason in refused.items():
            log.warning("%s: %s", name, reason)
        self._require_quorum(reports)
        reports.sort(key=lambda report: report.device)
        committed = ledger.commit(reports[0].round, self._work_digest, reports, time.monotonic() - self._started_at, {})
        figures = {"loss": committed.loss, "devices": len(reports), "evaluations": ledger.state.aggregator.evaluations}
        self._returned = ledger.state.mean
        return arrays_of(self._returned), MetricRecord({**figures, "tokens": ledger.spending.tokens})

    def _require_quorum(self, reports: Sequence[RoundReport]) -> None:
        if len(reports) < self._needed:
            raise QuorumError(
                f"{len(reports)} of {len(self._nodes)} devices reported, {self._needed:g} are needed; "
                "start the run again to resume it",
                limit=self._needed,
            )

    def evaluations(self) -> list[Message]:
        """Messages that ask devices with development rows to evaluate the mean on them."""
        state = self._ledger.state
        self._request = self._ledger.planner.request(
            {"tuned": (state.mean, state.readout("calibration"))},
            label_weights=state.label_weights,
            split="dev",
            max_rows=self._ledger.settings.dev_rows,
        )
        names = [name for name, info in self._infos.items() if info.n_dev]
        return [self._message(name, self._request, MessageType.EVALUATE, "") for name in names]

    def scored(self, replies: Iterable[Message]) -> MetricRecord | None:
        """The total score of the replies to `evaluations`; None if no device has such rows."""
        total = NO_SCORE
        for name, report in self._decoded(replies, EvaluateReport):
            try:
                request = self._request or self._ledger.planner.request({"tuned": (self._ledger.state.mean, None)})
                check_evaluation(report, request, self._infos[name].n_dev)
            except WireError as error:
                log.warning("%s: its evaluation is rejected: %s", name, error)
            else:
                total += Score.of(report, 0)
        return score_metrics(total) if total.n else None

    def _message(self, name: str, message: RoundPlan | EvaluateRequest, kind: str, group: str) -> Message:
        return Message(packed(message), self._nodes[name], kind, ttl=MIN_TTL_S, group_id=group)

    def _decoded(self, replies: Iterable[Message], kind: type[M]) -> Iterator[tuple[str, M]]:
        """Yield devices' names and decoded replies. Errors are logged."""
        names = {node: name for name, node in self._nodes.items()}
        for reply in replies:
            name = names.get(reply.metadata.src_node_id)
            if name is None or reply.has_error():
                reason = one_line(reply.error.reason, MOST_TOLD) if reply.has_error() else "not a node of this run"
                log.warning("%s: %s", name or f"node {reply.metadata.src_node_id}", reason)
                continue
            try:
                decoded = reply_of(reply.content, kind, name)
            except (DeviceError, WireError) as error:
                log.warning("%s", error)
            else:
                yield name, decoded


def arrays_of(mean: NDArray[np.float64]) -> ArrayRecord:
    """A latent [d] as Flower's arrays."""
    return ArrayRecord({LATENT: Array(mean)})


def score_metrics(score: Score) -> MetricRecord:
    """An evaluation as Flower's metrics."""
    return MetricRecord({"accuracy": score.accuracy, "loss": score.loss, "n": score.n})
