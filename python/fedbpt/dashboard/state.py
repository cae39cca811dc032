"""`RunState`: what a dashboard knows of one run, from its events and its store. Knows no page; safe from any thread.

Rounds, figures and bytes are read from the run store, so that a run coordinated elsewhere, and one that ended long ago,
look the same. Who is at work, who was lost just now, and who pauses is told by events, where there are any, and by a
`fedbpt.dashboard.pulse.Pulse`.
"""

from __future__ import annotations

import re
import threading
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any, Final

from fedbpt.coordinator.control import RunControl
from fedbpt.coordinator.estimate import spent_share
from fedbpt.coordinator.round_figures import ClosedRound, evaluations_in, numbers_of
from fedbpt.dashboard.views import DeviceStatus, DeviceView, Measured, Notice, Point, RunView, Stage, Status
from fedbpt.display.console import Spent, seconds_left
from fedbpt.protocol import codec
from fedbpt.protocol.messages import DeviceInfo
from fedbpt.runs.dev_figures import DevPoint, dev_points, stages_of
from fedbpt.runs.event_log import Line, Logged
from fedbpt.runs.intervals import wilson_interval
from fedbpt.runs.settings import (
    LINES,
    DeviceBack,
    DeviceLost,
    LateReport,
    Progressed,
    RoundClosed,
    RunFinished,
    RunResult,
    RunSettings,
    RunStarted,
    Score,
    Steered,
    TemplateSelected,
    perplexity,
)
from fedbpt.runs.store import RoundHistory, RunStore, StoredRun, Traffic

KEPT_NOTICES: Final = 50

_DOING: Final = {
    "selection": "choosing a template",
    "calibration": "calibrating",
    "probe": "fitting the baseline",
    "search": "tuning",
    "readout": "fitting the readout",
}


class _Device:
    """What is known of one device. ``lost``: why it does not count; empty: it does."""

    def __init__(self) -> None:
        self.info: DeviceInfo | None = None
        self.traffic = Traffic(0, 0, 0)
        self.losses: list[Point] = []
        self.figures: dict[int, float] = {}
        self.reports = 0
        self.tokens_per_second: float | None = None
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
        self._searched = self._evaluations = self._tokens = self._participations = 0
        self._seconds = 0.0
        self._before = Spent(0.0, 0.0)  # the search
        self._reached: dict[int, int] = {}  # rounds of the search, by round
        self._doing = ""
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
                self._settings, self._status, self._doing = event.settings, "running", "connecting"
                for name in event.devices:
                    self._device(name).lost = "" if name in event.live else "no answer yet"
                if event.resumed:
                    self._note(line, f"resumed after {event.resumed} rounds")
            case TemplateSelected() as event:
                self._template, self._doing = event.template.pattern, "tuning"
            case Progressed() as event:
                device = self._device(event.device)
                device.progress, device.paused = f"{event.done} of {event.total}" if event.total else "", event.paused
            case RoundClosed() as event:
                self._doing = _DOING[event.purpose]
                for device in self._devices.values():
                    device.progress = ""
            case DeviceLost() as event:
                self._device(event.device).lost = _without_name(event.device, event.reason)
                self._alarm(line, f"{event.device} is lost: {self._device(event.device).lost}")
            case DeviceBack() as event:
                self._device(event.device).lost = ""
                self._alarm(line, f"{event.device} is back", bad=False)
            case LateReport() as event:
                self._note(line, f"{event.device}: its report on round {event.round} came late and is not used")
            case Steered() as event:
                before = self._steered or Steered(paused=False, deadline_s=self._settings.deadline_s)
                self._steered, self._status = event, "paused" if event.paused else "running"
                if event.paused != before.paused:
                    self._note(line, "paused" if event.paused else "goes on", bad=False)
                if event.deadline_s != before.deadline_s:
                    self._note(line, f"a round may take {event.deadline_s:g} s", bad=False)
            case RunFinished() as event:
                self._result, self._status, self._doing = event.result, "finished", ""
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
                self._status, self._doing = "stopped", ""
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

    def _take(self, stored: StoredRun, history: Iterable[RoundHistory], rounds: Iterable[ClosedRound]) -> None:
        if self._stored is None or stored.settings != self._stored.settings:
            self._settings = codec.decode(stored.settings, RunSettings)
        if stored.result is not None and (self._stored is None or self._stored.result != stored.result):
            self._result = codec.decode(stored.result, RunResult)
            self._template = self._result.template.pattern
        self._stored = stored
        if not self.here:
            self._status = stored.status
        for line in history:
            self._metrics[line.round] = line.metrics
            for name, value in line.metrics.items():
                figure, _, device = name.partition("/")
                if device and figure in ("dev_accuracy", "dev_perplexity"):
                    self._device(device).figures[line.round] = value
            if not self.here:
                for name in line.reported:
                    self._device(name).lost = ""
                for name, reason in line.lost.items():
                    said = _without_name(name, reason)
                    self._device(name).lost = "" if name in line.reported else said
                    if (line.round, name) not in self._told:
                        self._told.add((line.round, name))
                        text = f"{name} was lost in round {line.round}: {said}"
                        self._notices.append(Notice(line.closed, text, name not in line.reported))
        for closed in rounds:
            if closed.round > self._last:
                self._last = closed.round
                self._count(closed)

    def _count(self, closed: ClosedRound) -> None:
        searches = closed.purpose == "search"
        self._seconds += self._metrics.get(closed.round, {}).get("seconds", 0.0)
        if searches:
            self._searched += 1
            self._evaluations += evaluations_in(closed, self._settings)
            self._participations += len(closed.shares)
            self._losses.append(Point(self._searched, closed.loss))
        self._reached[closed.round] = self._searched
        for share in closed.shares:
            device = self._device(share.device)
            device.reports += 1
            self._tokens += share.tokens
            if share.seconds > 0:
                device.tokens_per_second = share.tokens / share.seconds
            if searches:
                device.losses.append(Point(self._searched, share.loss))
        if not self._searched:
            self._before = self._spent()
        if not self.here:
            self._doing = _DOING[closed.purpose]

    def _spent(self) -> Spent:
        limits = self._settings
        share = spent_share(limits, self._searched, self._evaluations, self._tokens, self._seconds)
        return Spent(self._seconds, share)

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
            spent = self._spent()
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
                doing="" if status in ("finished", "stopped") else self._doing,
                generates=self.generates,
                **headline,
                stages=self._stages(),
                loss=self._losses[-1].value if self._losses else None,
                searched=self._searched,
                rounds_limit=limits.rounds,
                evaluations=self._evaluations,
                tokens=self._tokens,
                seconds=self._seconds,
                share=1.0 if finished else spent.share,
                eta_s=seconds_left(self._before, spent) if self._status == "running" else None,
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
            return {"figure": None, "zero_shot": None, "n_rows": 0, "interval": None, "split": "dev"}
        return {
            "figure": found.value,
            "zero_shot": zero_shot,
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
        known = [name for name in LINES if name in dev or name in test]
        if len(known) < 2:  # of a version before: there is nothing to compare
            return ()
        return tuple(Stage(LINES[name], dev.get(name), test.get(name)) for name in known)

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

    def _interval(self, figure: float, n: int) -> tuple[float, float] | None:
        return None if self.generates or not n else wilson_interval(round(figure * n), n)

    def _figure(self, score: Score) -> float:
        return perplexity(score.loss) if self.generates else score.accuracy

    def _device_view(self, name: str) -> DeviceView:
        device, info = self._devices[name], self._devices[name].info
        status, detail = self._device_status(device)
        figures = [value for _, value in sorted(device.figures.items())]
        figure, zero_shot = (figures[-1], figures[0]) if figures else (None, None)
        if not figures and self._status == "finished" and self._result is not None:
            for summary in self._result.devices:
                if summary.name == name and summary.tuned.n:
                    figure, zero_shot = self._figure(summary.tuned), self._figure(summary.zero_shot)
        return DeviceView(
            name=name,
            status=status,
            detail=detail,
            tokens_per_second=device.tokens_per_second or (info.tokens_per_second if info else None),
            rss_bytes=max(device.traffic.peak_rss_bytes, info.peak_rss_bytes if info else 0),
            celsius=info.celsius if info else None,
            battery=info.battery if info else None,
            bytes_up=device.traffic.bytes_up,
            bytes_down=device.traffic.bytes_down,
            reports=device.reports,
            loss=device.losses[-1].value if device.losses else None,
            figure=figure,
            zero_shot=zero_shot,
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
