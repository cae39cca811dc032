"""`RunMetrics`: the figures of a run for Prometheus, from its events."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping
from typing import Final, Literal

from fedbpt.net.prometheus import Family, Histogram, Sample
from fedbpt.runs.event_log import Line
from fedbpt.runs.events import (
    DeviceBack,
    DeviceLost,
    Evaluated,
    LateReport,
    RoundClosed,
    RoundPurpose,
    RunFinished,
    RunStarted,
    TemplateSelected,
)
from fedbpt.runs.store import Traffic

BOUNDS_S: Final = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0)


class RunMetrics:
    """A `fedbpt.runs.event_log.Sink` for one run. ``seconds``: of the rounds closed in earlier sessions."""

    def __init__(self, run: str, seconds: float = 0.0) -> None:
        self._labels = {"run": run}
        self._lock = threading.Lock()
        self._started: RunStarted | None = None
        self._closed: RoundClosed | None = None
        self._evaluated: Evaluated | None = None
        self._finished = False
        self._generates = False
        self._seconds = seconds
        self._rounds: dict[RoundPurpose, Histogram] = {}
        self._live: set[str] = set()
        self._lost: Counter[str] = Counter()
        self._late: Counter[str] = Counter()

    def __call__(self, line: Line) -> str:
        with self._lock:
            self._count(line)
        return ""

    def _count(self, line: Line) -> None:
        match line.entry.event:
            case RunStarted() as event:
                self._started = event
                self._live = set(event.live)
                self._seconds = self._seconds if event.resumed else 0.0  # a fresh run that replaces a stored one
            case TemplateSelected() as event:
                self._generates = not event.template.label_words
            case RoundClosed() as event:
                self._rounds.setdefault(event.purpose, Histogram(BOUNDS_S)).observe(event.seconds - self._seconds)
                self._closed = event
                self._seconds = event.seconds
            case Evaluated() as event:
                self._evaluated = event
            case DeviceLost(device=device):
                self._lost[device] += 1
                self._live.discard(device)
            case DeviceBack(device=device):
                self._live.add(device)
            case LateReport(device=device):
                self._late[device] += 1
            case RunFinished():
                self._finished = True

    def families(self, traffic: Mapping[str, Traffic]) -> list[Family]:
        """The metrics. ``traffic``: of each device, as of the last closed round."""
        with self._lock:
            return [*self._of_run(), *self._of_rounds(), *self._of_devices(traffic)]

    def _of_run(self) -> list[Family]:
        started = self._started
        info = {"model": started.model_name, "method": started.settings.method} if started else {}
        return [
            Family("run_info", "gauge", "The run that is coordinated here.", [Sample(1, {**self._labels, **info})]),
            self._one("run_finished", "gauge", "Whether it is finished.", int(self._finished)),
        ]

    def _of_rounds(self) -> list[Family]:
        closed = self._closed
        evaluated = self._evaluated
        rounds = [
            sample
            for purpose, times in self._rounds.items()
            for sample in times.samples(self._with("purpose", purpose))
        ]
        families = [Family("run_round_seconds", "histogram", "Seconds of the rounds closed since the start.", rounds)]
        if closed is not None:
            families += [
                self._one("run_round", "gauge", "Number of the last closed round.", closed.round),
                self._one("run_search_rounds", "gauge", "Closed rounds of the search.", closed.searched),
                self._one("run_loss", "gauge", "Mean loss of the last closed round, nats.", closed.loss),
                self._one("run_evaluations_total", "counter", "Candidates scored.", closed.evaluations),
                self._one("run_tokens_total", "counter", "Forward tokens of all devices.", closed.tokens),
                self._one("run_seconds_total", "counter", "Seconds of all closed rounds.", closed.seconds),
            ]
        if evaluated is not None:
            families.append(self._one("run_dev_loss", "gauge", "Mean loss on dev rows, nats.", evaluated.score.loss))
            if not self._generates:
                accuracy = evaluated.score.accuracy
                families.append(self._one("run_dev_accuracy", "gauge", "Accuracy on dev rows, 0 to 1.", accuracy))
        return families

    def _of_devices(self, traffic: Mapping[str, Traffic]) -> list[Family]:
        families = [
            self._by_device("run_bytes_up_total", "Bytes from a device.", {d: t.bytes_up for d, t in traffic.items()}),
            self._by_device(
                "run_bytes_down_total", "Bytes to a device.", {d: t.bytes_down for d, t in traffic.items()}
            ),
            self._by_device("run_device_losses_total", "How often a device was lost.", self._lost),
            self._by_device("run_late_reports_total", "Reports that came late and are not used.", self._late),
        ]
        if self._started is not None:
            counts = {"live": len(self._live), "lost": len(self._started.devices) - len(self._live)}
            samples = [Sample(count, self._with("state", state)) for state, count in counts.items()]
            families.append(Family("run_devices", "gauge", "Devices of the run by state.", samples))
        return families

    def _with(self, label: str, value: str) -> dict[str, str]:
        return {**self._labels, label: value}

    def _one(self, name: str, kind: Literal["counter", "gauge"], what: str, value: float) -> Family:
        return Family(name, kind, what, [Sample(value, self._labels)])

    def _by_device(self, name: str, what: str, counts: Mapping[str, int]) -> Family:
        samples = [Sample(count, self._with("device", device)) for device, count in sorted(counts.items())]
        return Family(name, "counter", what, samples)
