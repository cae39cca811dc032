"""`RunState`: what a dashboard knows of one run, from its events and its store. Knows no page; safe from any thread.

Rounds, figures and bytes are read from the run store, so that a run coordinated elsewhere, and one that ended long ago,
look the same. Who is at work, who was lost just now, and who pauses is told by events, where there are any, and by a
`fedbpt.dashboard.pulse.Pulse`.
"""

from __future__ import annotations

import re
import threading
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from time import monotonic
from typing import Any, Final

from fedbpt.coordinator.control import RunControl
from fedbpt.coordinator.course import Course
from fedbpt.coordinator.round_figures import ClosedRound, evaluations_in, numbers_of
from fedbpt.coordinator.spending import Spending
from fedbpt.dashboard.views import DeviceStatus, DeviceView, Measured, Notice, Point, RunView, Stage, Status
from fedbpt.protocol import codec
from fedbpt.protocol.rounds import DeviceInfo
from fedbpt.runs.as_json import task_of_run
from fedbpt.runs.dev_figures import DEV_SECONDS, DevPoint, dev_points, stages_of
from fedbpt.runs.event_log import Line, Logged
from fedbpt.runs.events import (
    DeviceBack,
    DeviceLost,
    LateReport,
    Progressed,
    RoundClosed,
    RunFinished,
    RunStage,
    RunStarted,
    StageBegan,
    Steered,
    TemplateSelected,
)
from fedbpt.runs.intervals import Interval, wilson_interval
from fedbpt.runs.result import VARIANTS, RunResult, Score, perplexity
from fedbpt.runs.settings import RunSettings
from fedbpt.runs.store import RoundHistory, RunStore, StoredRun, Traffic
from fedbpt.tasks import Task

KEPT_NOTICES: Final = 50


class _Device:
    """What is known of one device. ``lost``: why it does not count; empty: it does."""

    def __init__(self) -> None:
        self.info: DeviceInfo | None = None
        self.traffic = Traffic(0, 0, 0)
        self.losses: list[Point] = []
        self.figures: dict[int, float] = {}
        self.reports = 0
        self.tokens = 0
        self.seconds = 0.0
        self.lost = ""
        self.paused = ""
        self.progress = ""
        self.silent = False


class RunState:
    """The state of run ``run``. A `fedbpt.runs.event_log.Sink` for its events; `look` reads the store.

    ``version`` counts changes. ``control``: of the run that this process coordinates, whose events come here; None: it
    is coordinated elsewhere, or by nobody.
    """

    def __init__(self, run: str, control: RunControl | None = None) -> None:
        self.run = run
        self.here = control is not None
        self.version = 0
        self._control = control
        self._alarms = 0
        self._lock = threading.RLock()
        self._notices: deque[Notice] = deque(maxlen=KEPT_NOTICES)
        self._status: Status = "waiting"
        self._steered: Steered | None = None
        self._created = ""
        self._forget()

    def _forget(self) -> None:
        self._stored: StoredRun | None = None
        self._settings = RunSettings()
        self._result: RunResult | None = None
        self._devices: dict[str, _Device] = {}
        self._losses: list[Point] = []
        self._metrics: dict[int, Mapping[str, float]] = {}
        self._last = -1
        self._told: set[tuple[int, str]] = set()  # (round, device) of losses that the store has
        self._spending = Spending()
        self._course = Course(self._spending)
        self._participations = 0
        self._counted_at = monotonic()
        self._reached: dict[int, int] = {}  # rounds of the search, by round
        self._stage: RunStage | None = None
        self._task: Task | None = None
        self._template = ""

    # --- from the run's events -----------------------------------------------------------------------------------

    def __call__(self, line: Line) -> str:
        with self._lock:
            self._hear(line)
            self.version += 1
        return ""

    def _hear(self, line: Line) -> None:
        match line.entry.event:
            case RunStarted() as event:
                self._settings, self._status = event.settings, "running"
                for name in event.devices:
                    self._device(name).lost = "" if name in event.live else "no answer yet"
                if event.resumed:
                    self._note(line, f"resumed after {event.searched} rounds")
            case StageBegan() as event:
                self._stage = event.stage
            case TemplateSelected() as event:
                self._template = event.template.pattern
            case Progressed() as event:
                device = self._device(event.device)
                device.progress, device.paused = f"{event.done} of {event.total}" if event.total else "", event.paused
            case RoundClosed():
                for device in self._devices.values():
                    device.progress = ""
            case DeviceLost() as event:
                self._device(event.device).lost = _without_name(event.device, event.reason)
                self._alarm(line, f"{event.device} is lost: {self._device(event.device).lost}")
            case DeviceBack() as event:
                self._device(event.device).lost = ""
                self._alarm(line, f"{event.device} is back", bad=False)
            case LateReport() as event:
                self._note(line, f"{event.device}: a report came late and is not used")
            case Steered() as event:
                before = self._steered or Steered(paused=False, deadline_s=self._settings.deadline_s)
                self._steered, self._status = event, "paused" if event.paused else "running"
                if event.paused != before.paused:
                    self._note(line, "paused" if event.paused else "goes on", bad=False)
                if event.deadline_s != before.deadline_s:
                    self._note(line, f"a round may take {event.deadline_s:g} s", bad=False)
            case RunFinished() as event:
                self._result, self._status = event.result, "finished"
                self._settings = event.result.settings
            case Logged() as event:
                self._note(line, event.message)

    @property
    def urgent(self) -> tuple[object, ...]:
        """Changes when people should see at once that something has: a device came or went, somebody steers."""
        return self._alarms, self._status, self._control and self._control.wish

    def stopped(self) -> None:
        """The run ended before it was finished."""
        with self._lock:
            if self._status != "finished":
                self._status = "stopped"
            self.version += 1

    def _device(self, name: str) -> _Device:
        return self._devices.setdefault(name, _Device())

    def _note(self, line: Line, text: str, bad: bool = True) -> None:
        self._notices.append(Notice(line.entry.time, text, bad))

    def _alarm(self, line: Line, text: str, bad: bool = True) -> None:
        self._note(line, text, bad)
        self._alarms += 1

    # --- from devices themselves ---------------------------------------------------------------------------------

    def heard(self, name: str, answers: bool) -> None:
        """Whether ``name`` answers when it is asked for its pulse."""
        with self._lock:
            device = self._device(name)
            if device.silent == answers:
                device.silent = not answers
                self._alarms += 1
                self.version += 1

    def met(self, name: str, info: DeviceInfo) -> None:
        """What ``name`` says of itself."""
        with self._lock:
            device = self._device(name)
            if device.info != info:
                device.info, device.paused = info, info.paused
                self.version += 1

    # --- from the store ------------------------------------------------------------------------------------------

    def look(self, store: RunStore) -> None:
        """Take up what the store has that is new. Raises `StoreError`."""
        stored = store.find_run(self.run)
        if stored is None:
            return
        with self._lock:
            if stored.created != self._created:  # begun anew under the same name
                if self._created:
                    self._forget()
                self._created = stored.created
            known, since = self._stored, max(self._last, 0)
        if stored == known and stored.status in ("finished", "stopped"):
            return
        # Rounds before their figures, which are then there; the last one again: it may have been evaluated since.
        rounds = [numbers_of(closed) for closed in store.rounds(self.run, since)]
        history = store.history(self.run, since)
        devices, traffic = store.devices(self.run), store.traffic(self.run)
        with self._lock:
            self._take(stored, history, rounds)
            for name, info in devices.items():
                device = self._device(name)
                device.traffic = traffic[name]
                device.info = device.info or info
            self.version += 1

    def _take(self, stored: StoredRun, history: Sequence[RoundHistory], rounds: Iterable[ClosedRound]) -> None:
        if self._stored is None or stored.settings != self._stored.settings:
            self._settings = codec.decode(stored.settings, RunSettings)
        if stored.result is not None and (self._stored is None or self._stored.result != stored.result):
            self._result = codec.decode(stored.result, RunResult)
            self._template = self._result.template.pattern
        if self._stored is None or self._stored.definition != stored.definition:
            self._task = task_of_run(stored)
        self._stored = stored
        if not self.here:
            self._status = stored.status
        for line in history:
            cut = [metrics.get("cut_seconds", 0.0) for metrics in (line.metrics, self._metrics.get(line.round, {}))]
            self._spending.add_seconds(cut[0] - cut[1], charged=True)  # of rounds that were left out
            self._metrics[line.round] = line.metrics
            for name, value in line.metrics.items():
                figure, _, device = name.partition("/")
                if device and figure in ("dev_accuracy", "dev_perplexity"):
                    self._device(device).figures[line.round] = value
            if not self.here:
                self._follow(line)
        for closed in rounds:
            if closed.round > self._last:
                self._last = closed.round
                self._count(closed)
        if not self.here and stored.status == "finished" and self._result is not None:
            for summary in self._result.devices:
                if summary.tuned.n and self._device(summary.name).lost:
                    self._device(summary.name).lost = ""
                    self._notices.append(Notice(stored.updated, f"{summary.name} is back", False))
        for line in history:
            if DEV_SECONDS in line.metrics:
                self._course.evaluated(self._reached.get(line.round, 0), line.metrics[DEV_SECONDS])

    def _follow(self, line: RoundHistory) -> None:
        """Who was lost and who came back, of a run that is coordinated elsewhere."""
        for name, reason in line.lost.items():
            if (line.round, name) not in self._told:
                self._told.add((line.round, name))
                said = self._device(name).lost = _without_name(name, reason)
                self._notices.append(Notice(line.closed, f"{name} is lost: {said}", True))
        for name in line.reported:
            if self._device(name).lost:
                self._notices.append(Notice(line.closed, f"{name} is back", False))
            self._device(name).lost = ""

    def _count(self, closed: ClosedRound) -> None:
        searches, metrics = closed.purpose == "search", self._metrics.get(closed.round, {})
        seconds = metrics.get("seconds", 0.0)
        tokens = sum(share.tokens for share in closed.shares)
        self._spending.add_seconds(seconds, closed.purpose != "selection")
        self._spending.tokens_for[closed.purpose] += tokens
        self._counted_at = monotonic()
        self._course.closed(closed.purpose, seconds, evaluations_in(closed, self._settings), tokens)
        searched = self._course.searched
        if searches:
            self._participations += len(closed.shares)
            self._losses.append(Point(searched, closed.loss))
        self._reached[closed.round] = searched
        for share in closed.shares:
            device = self._device(share.device)
            device.tokens += share.tokens
            device.seconds += share.seconds
            if searches:
                device.reports += 1
                device.losses.append(Point(searched, share.loss))
        if not self.here:
            self._stage = closed.purpose

    # --- what is shown -------------------------------------------------------------------------------------------

    def losses(self, since: int = 0) -> list[Point]:
        """Mean loss of each round of the search, nats; from the ``since``th on."""
        with self._lock:
            return self._losses[since:]

    def dev_points(self) -> list[DevPoint]:
        """Each evaluation on development rows, all of the same rows; ``round`` counts those of the search."""
        with self._lock:
            found = dev_points(self._metrics, self.generates)
            return [point._replace(round=self._reached.get(point.round, 0)) for point in found]

    def device_losses(self, name: str) -> list[Point]:
        """Mean loss of each round of the search that device ``name`` reported in."""
        with self._lock:
            return list(self._device(name).losses)

    def device_figures(self, name: str) -> list[Point]:
        """Accuracy or perplexity of each evaluation on development rows of device ``name``."""
        with self._lock:
            figures = sorted(self._device(name).figures.items())
            return [Point(self._reached.get(round, 0), value) for round, value in figures]

    def view(self) -> RunView:
        """All but the curves."""
        with self._lock:
            stored, result, limits = self._stored, self._result, self._settings
            finished, status = self._status == "finished", self._status
            if status == "running" and self._control is not None and self._control.wish.paused:
                status = "pausing"
            headline = self._headline()
            epsilons = [found["epsilon"] for _, found in sorted(self._metrics.items()) if "epsilon" in found]
            devices = tuple(self._device_view(name) for name in sorted(self._devices))
            return RunView(
                run=self.run,
                task=stored.task if stored else "",
                model=stored.model_name if stored else "",
                model_fingerprint=stored.model_fingerprint if stored else "",
                method=limits.method,
                status=status,
                stage=None if status in ("finished", "stopped", "waiting") else self._stage,
                path=self._path(),
                labels=self._task.labels if self._task else (),
                generates=self.generates,
                **headline,
                stages=self._stages(),
                loss=self._losses[-1].value if self._losses else None,
                searched=self._course.searched,
                rounds_limit=limits.rounds,
                evaluations=self._course.evaluations,
                tokens=self._spending.tokens,
                seconds=self._spending.seconds,
                share=1.0 if finished else self._course.share(limits),
                eta_s=self._eta() if self._status == "running" else None,
                epsilon=(result.epsilon if finished and result else None) or next(reversed(epsilons), None),
                participations=self._participations,
                bytes_up=sum(device.bytes_up for device in devices),
                bytes_down=sum(device.bytes_down for device in devices),
                peak_rss_bytes=max((device.rss_bytes for device in devices), default=0),
                deadline_s=self._steered.deadline_s if self._steered else limits.deadline_s,
                template=self._template,
                devices=devices,
                notices=tuple(reversed(self._notices)),
            )

    def _path(self) -> tuple[RunStage, ...]:
        """The stages of the run."""
        limits, task = self._settings, self._task
        reads_out = limits.objective.readout_words > 0
        stages: dict[RunStage, bool] = {
            "selection": task is None or len(task.templates) > 1 or limits.balanced,
            "calibration": limits.calibrate,
            "probe": limits.baselines and reads_out,
            "search": True,
            "readout": reads_out,
            "evaluation": True,
        }
        return tuple(stage for stage, is_there in stages.items() if is_there)

    def _eta(self) -> float | None:
        infos = [device.info for device in self._devices.values() if device.info is not None and not device.lost]
        templates = self._task.templates if self._task else ()
        left = self._course.seconds_left(self._settings, templates, infos)
        return None if left is None else max(left - (monotonic() - self._counted_at), 0.0)

    @property
    def generates(self) -> bool:
        """Whether perplexity is the figure, not accuracy."""
        if self._result is not None:
            return self._result.generates
        return self._settings.objective.loss == "nll"

    def _headline(self) -> dict[str, Any]:
        """Of what would be shipped now, on the same rows from start to end."""
        points, result = self.dev_points(), self._result
        if points:
            last, split = points[-1], "dev"
            found = Measured(last.figure, last.n, self._interval(last.figure, last.n))
            zero_shot = last.zero_shot
        elif self._status == "finished" and result is not None and result.tuned.n:
            found, split, zero_shot = self._measured(result.tuned), "test", self._figure(result.zero_shot)
        else:
            return {
                "figure": None, "zero_shot": None, "zero_shot_interval": None, "n_rows": 0, "interval": None,
                "split": "dev",
            }  # fmt: skip
        return {
            "figure": found.value,
            "zero_shot": zero_shot,
            "zero_shot_interval": self._interval(zero_shot, found.n),
            "n_rows": found.n,
            "interval": found.interval,
            "split": split,
        }

    def _stages(self) -> tuple[Stage, ...]:
        """What each step gives, as the terminal says at the end; of a run under way as far as it has come."""
        result = self._result if self._status == "finished" else None
        if result is not None and result.scores("dev"):
            dev = {name: self._measured(score) for name, score in result.scores("dev").items()}
        else:
            dev = self._stages_now()
        test = {} if result is None else {n: self._measured(score) for n, score in result.scores("test").items()}
        known = [name for name in VARIANTS if name in dev or name in test]
        if len(known) < 2:  # of a version before: there is nothing to compare
            return ()
        return tuple(Stage(VARIANTS[name], dev.get(name), test.get(name)) for name in known)

    def _stages_now(self) -> dict[str, Measured]:
        evaluated = [round for round in sorted(self._metrics) if "dev_loss" in self._metrics[round]]
        if not evaluated:
            return {}
        metrics = self._metrics[evaluated[-1]]
        n = int(metrics.get("dev_n", 0))
        figures = stages_of(metrics, self.generates)
        return {name: Measured(value, n, self._interval(value, n)) for name, value in figures.items()}

    def _measured(self, score: Score) -> Measured:
        return Measured(self._figure(score), score.n, None if self.generates else score.interval)

    def _interval(self, figure: float | None, n: int) -> Interval | None:
        return None if self.generates or figure is None or not n else wilson_interval(round(figure * n), n)

    def _figure(self, score: Score) -> float:
        return perplexity(score.loss) if self.generates else score.accuracy

    def _device_view(self, name: str) -> DeviceView:
        device, info = self._devices[name], self._devices[name].info
        status, detail = self._device_status(device)
        figure, interval = None, None
        if device.figures:
            last = max(device.figures)
            figure = device.figures[last]
            interval = self._interval(figure, int(self._metrics[last].get(f"dev_n/{name}", 0)))
        elif self._status == "finished" and self._result is not None:
            for summary in self._result.devices:
                if summary.name == name and summary.tuned.n:
                    figure, _, interval = self._measured(summary.tuned)
        return DeviceView(
            name=name,
            status=status,
            detail=detail,
            tokens_per_second=device.tokens / device.seconds if device.seconds else None,
            rss_bytes=max(device.traffic.peak_rss_bytes, info.peak_rss_bytes if info else 0),
            celsius=info.celsius if info else None,
            battery=info.battery if info else None,
            bytes_up=device.traffic.bytes_up,
            bytes_down=device.traffic.bytes_down,
            reports=device.reports,
            loss=device.losses[-1].value if device.losses else None,
            figure=figure,
            interval=interval,
        )

    def _device_status(self, device: _Device) -> tuple[DeviceStatus, str]:
        if self._status in ("finished", "stopped"):
            return "done", ""
        if device.lost:
            return "lost" if device.info else "absent", device.lost
        if device.silent:
            return "silent", "no answer"
        if device.paused:
            return "paused", device.paused
        return "live", device.progress


def _without_name(device: str, reason: str) -> str:
    """``reason`` without the name and address of ``device``, with which it may begin."""
    return re.sub(rf"^{re.escape(device)}(: | (\(\S+\) )?)", "", reason)
