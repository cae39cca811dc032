"""`RunState`: what the dashboard knows of a run, from its events and its store. No user interface; thread-safe.

Rounds, figures and traffic are read from the run store, so that runs of other processes and finished runs look the
same. The current state of devices comes from events, if the run is in this process, and from a
`fedbpt.dashboard.heartbeat.Heartbeat`.
"""

from __future__ import annotations

import logging
import re
import threading
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from time import monotonic
from typing import Any, Final

from fedbpt.coordinator.control import RunControl
from fedbpt.coordinator.costs.spending import Spending
from fedbpt.coordinator.layer_reading import only_reads, reads_layers, states_alone
from fedbpt.coordinator.monitoring.course import Course
from fedbpt.coordinator.monitoring.round_figures import ClosedRound, evaluations_in, numbers_of
from fedbpt.dashboard.views import DeviceStatus, DeviceView, Measured, Notice, Point, RunView, Stage, Status
from fedbpt.errors import StoreError
from fedbpt.plain_text import one_line
from fedbpt.protocol import codec
from fedbpt.protocol.rounds import DeviceInfo
from fedbpt.runs.as_json import task_of_run
from fedbpt.runs.dev_figures import DEV_SECONDS, DevPoint, dev_points, stages_of
from fedbpt.runs.event_log import Line, Logged
from fedbpt.runs.events import (
    DeviceBack,
    DeviceLeftOut,
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
from fedbpt.runs.settings import RunSettings, stored_settings
from fedbpt.runs.store import RoundHistory, RunStore, StoredRun, Traffic
from fedbpt.tasks import Task

log = logging.getLogger(__name__)

MAX_NOTICES: Final = 50


class _Device:
    """The state of one device. ``lost``: why it does not take part; empty: it does."""

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
    """The state of a run: a `fedbpt.runs.event_log.Sink` for its events; `refresh` reads the store.

    Args:
        run: the run's name in the store.
        control: the run's control, if this process coordinates it and passes its events on; else None.
    """

    def __init__(self, run: str, control: RunControl | None = None) -> None:
        self.run = run
        self.is_local = control is not None
        self.version = 0
        """Number of changes."""
        self.problem = ""
        """The last error of `try_to_refresh` that is a bug."""
        self._control = control
        self._alarms = 0
        self._lock = threading.RLock()
        self._notices: deque[Notice] = deque(maxlen=MAX_NOTICES)
        self._status: Status = "waiting"
        self._steered: Steered | None = None
        self._created = ""
        self._reset()

    def _reset(self) -> None:
        self._stored: StoredRun | None = None
        self._settings = RunSettings()
        self._result: RunResult | None = None
        self._devices: dict[str, _Device] = {}
        self._losses: list[Point] = []
        self._metrics: dict[int, Mapping[str, float]] = {}
        self._last = -1
        self._noted_losses: set[tuple[int, str]] = set()  # (round, device) in the store
        self._spending = Spending()
        self._course = Course(self._spending)
        self._participations = 0
        self._counted_at = monotonic()
        self._reached: dict[int, int] = {}  # number of rounds of the search so far, by round
        self._stage: RunStage | None = None
        self._task: Task | None = None
        self._template = ""

    # --- from the run's events -----------------------------------------------------------------------------------

    def __call__(self, line: Line) -> str:
        with self._lock:
            self._handle(line)
            self.version += 1
        return ""

    def _handle(self, line: Line) -> None:
        match line.entry.event:
            case RunStarted() as event:
                self._settings = event.settings
                self._status = "running"
                for name in event.devices:
                    self._device(name).lost = "" if name in event.live else "no response yet"
                if event.resumed:
                    self._note(line, f"resumed after {event.searched} rounds")
            case StageBegan() as event:
                self._stage = event.stage
            case TemplateSelected() as event:
                self._template = event.template.pattern
            case Progressed() as event:
                device = self._device(event.device)
                device.progress = f"{event.done} of {event.total}" if event.total else ""
                device.paused = event.paused
            case RoundClosed():
                for device in self._devices.values():
                    device.progress = ""
            case DeviceLost() as event:
                self._device(event.device).lost = _without_name(event.device, event.reason)
                self._alarm(line, f"{event.device} is lost: {self._device(event.device).lost}")
            case DeviceBack() as event:
                self._device(event.device).lost = ""
                self._alarm(line, f"{event.device} is back", bad=False)
            case DeviceLeftOut() as event:
                self._device(event.device).lost = event.reason
                self._alarm(line, f"{event.device}: {event.reason}")
            case LateReport() as event:
                self._note(line, f"{event.device}: a report arrived late and is not used")
            case Steered() as event:
                before = self._steered or Steered(paused=False, deadline_s=self._settings.deadline_s)
                self._steered = event
                self._status = "paused" if event.paused else "running"
                if event.paused != before.paused:
                    self._note(line, "paused" if event.paused else "resumed", bad=False)
                if event.deadline_s != before.deadline_s:
                    self._note(line, f"round deadline changed to {event.deadline_s:g} s", bad=False)
            case RunFinished() as event:
                self._result = event.result
                self._status = "finished"
                self._settings = event.result.settings
            case Logged() as event:
                self._note(line, event.message)

    @property
    def urgent(self) -> tuple[object, ...]:
        """A value that changes at changes to show at once: a device came or went, or somebody controlled the run."""
        return self._alarms, self._status, self._control and self._control.wish

    def stopped(self) -> None:
        """Set that the run ended without finishing."""
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

    # --- from heartbeats -----------------------------------------------------------------------------------------

    def set_responding(self, name: str, responds: bool) -> None:
        """Set whether device ``name`` responds."""
        with self._lock:
            device = self._device(name)
            if device.silent == responds:
                device.silent = not responds
                self._alarms += 1
                self.version += 1

    def set_info(self, name: str, info: DeviceInfo) -> None:
        """Set what device ``name`` reports about itself."""
        with self._lock:
            device = self._device(name)
            if device.info != info:
                device.info = info
                device.paused = info.paused
                self.version += 1

    # --- from the store ------------------------------------------------------------------------------------------

    def refresh(self, store: RunStore) -> None:
        """Read what is new in the store. Raises `StoreError`."""
        stored = store.find_run(self.run)
        if stored is None:
            return
        with self._lock:
            if stored.created != self._created:  # a new run has the same name
                if self._created:
                    self._reset()
                self._created = stored.created
            known = self._stored
            since = max(self._last, 0)
        if stored == known and stored.status in ("finished", "stopped"):
            return
        # Read rounds before their metrics, so that none is missing. Read the last round again: it may have been
        # evaluated since.
        rounds = [numbers_of(closed) for closed in store.rounds(self.run, since)]
        history = store.history(self.run, since)
        devices = store.devices(self.run)
        traffic = store.traffic(self.run)
        with self._lock:
            self._apply(stored, history, rounds)
            for name, info in devices.items():
                device = self._device(name)
                device.traffic = traffic.get(name, Traffic(0, 0, 0))  # absent: the run was replaced between the reads
                device.info = device.info or info
            self.version += 1

    def _apply(self, stored: StoredRun, history: Sequence[RoundHistory], rounds: Iterable[ClosedRound]) -> None:
        if self._stored is None or stored.settings != self._stored.settings:
            self._settings = stored_settings(stored.settings)
        if stored.result is not None and (self._stored is None or self._stored.result != stored.result):
            self._result = codec.decode(stored.result, RunResult)
            self._template = self._result.template.pattern
        if self._stored is None or self._stored.definition != stored.definition:
            self._task = task_of_run(stored)
        self._stored = stored
        if not self.is_local:
            self._status = stored.status
        for line in history:
            cut_before = self._metrics.get(line.round, {}).get("cut_seconds", 0.0)
            cut_now = line.metrics.get("cut_seconds", 0.0)  # time of rounds that were cut off and dropped
            self._spending.add_seconds(cut_now - cut_before, charged=True)
            self._metrics[line.round] = line.metrics
            for name, value in line.metrics.items():
                figure, _, device = name.partition("/")
                if device and figure in ("dev_accuracy", "dev_perplexity"):
                    self._device(device).figures[line.round] = value
            if not self.is_local:
                self._update_losses(line)
        for closed in rounds:
            if closed.round > self._last:
                self._last = closed.round
                self._count(closed)
        if not self.is_local and stored.status == "finished" and self._result is not None:
            for summary in self._result.devices:
                if summary.tuned.n and self._device(summary.name).lost:
                    self._device(summary.name).lost = ""
                    self._notices.append(Notice(stored.updated, f"{summary.name} is back", False))
        for line in history:
            if DEV_SECONDS in line.metrics:
                self._course.evaluated(self._reached.get(line.round, 0), line.metrics[DEV_SECONDS])

    def _update_losses(self, line: RoundHistory) -> None:
        """Update which devices are lost or back, for a run of another process."""
        for name, reason in line.lost.items():
            if (line.round, name) not in self._noted_losses:
                self._noted_losses.add((line.round, name))
                short_reason = self._device(name).lost = _without_name(name, reason)
                self._notices.append(Notice(line.closed, f"{name} is lost: {short_reason}", True))
        for name in line.reported:
            if self._device(name).lost:
                self._notices.append(Notice(line.closed, f"{name} is back", False))
            self._device(name).lost = ""

    def _count(self, closed: ClosedRound) -> None:
        is_search = closed.purpose == "search"
        seconds = self._metrics.get(closed.round, {}).get("seconds", 0.0)
        tokens = sum(share.tokens for share in closed.shares)
        self._spending.add_seconds(seconds, closed.purpose != "selection")
        self._spending.tokens_for[closed.purpose] += tokens
        self._counted_at = monotonic()
        self._course.closed(closed.purpose, seconds, evaluations_in(closed, self._settings), tokens)
        searched = self._course.searched
        if is_search:
            self._participations += len(closed.shares)
            self._losses.append(Point(searched, closed.loss))
        self._reached[closed.round] = searched
        for share in closed.shares:
            device = self._device(share.device)
            device.tokens += share.tokens
            device.seconds += share.seconds
            if is_search:
                device.reports += 1
                if share.loss is not None:
                    device.losses.append(Point(searched, share.loss))
        if not self.is_local:
            self._stage = closed.purpose

    # --- what is shown -------------------------------------------------------------------------------------------

    def losses(self, since: int = 0) -> list[Point]:
        """Mean loss of each round of the search, in nats, from index ``since`` on."""
        with self._lock:
            return self._losses[since:]

    def dev_points(self) -> list[DevPoint]:
        """The evaluations on development rows; ``round`` counts rounds of the search."""
        with self._lock:
            found = dev_points(self._metrics, self.generates)
            return [point._replace(round=self._reached.get(point.round, 0)) for point in found]

    def device_losses(self, name: str) -> list[Point]:
        """Mean loss of device ``name`` in each round of the search in which it reported, in nats."""
        with self._lock:
            return list(self._device(name).losses)

    def device_figures(self, name: str) -> list[Point]:
        """Accuracy or perplexity of each evaluation on the development rows of device ``name``."""
        with self._lock:
            figures = sorted(self._device(name).figures.items())
            return [Point(self._reached.get(round, 0), value) for round, value in figures]

    def view(self) -> RunView:
        """The current state, without the curves."""
        with self._lock:
            stored = self._stored
            result = self._result
            limits = self._settings
            status = self._status
            finished = status == "finished"
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
                unscored=self._states_alone(),
                futile=self._status == "finished" and self._result is not None and self._result.futile,
                answers=self._answers(),
                not_better=self._status == "finished" and self._result is not None and self._result.is_not_better,
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
        """The stages of the run, in order."""
        limits = self._settings
        task = self._task
        reads_out = limits.objective.readout_words > 0
        if task is not None and only_reads(task.templates, limits, self._n_layer()):
            return ("probe", "evaluation")
        stages: dict[RunStage, bool] = {
            "selection": task is None or len(task.templates) > 1 or limits.balanced,
            "calibration": limits.calibrate,
            "probe": reads_out and (limits.baselines or self._reads_layers()),
            "search": True,
            "readout": reads_out,
            "evaluation": True,
        }
        return tuple(stage for stage, included in stages.items() if included)

    def _n_layer(self) -> int:
        return max((device.info.n_layer for device in self._devices.values() if device.info is not None), default=0)

    def _reads_layers(self) -> bool:
        return self._task is not None and reads_layers(self._task.templates, self._settings, self._n_layer())

    def _states_alone(self) -> bool:
        """Whether the label words are too long to be scored, so that only a readout is fitted."""
        if self._result is not None:
            return self._result.is_unscored
        return self._task is not None and states_alone(self._task.templates, self._settings, self._n_layer())

    def _answers(self) -> str:
        """What the model's own answers are worth without and with the prompt; empty: not measured."""
        scores = self._result.answer_scores() if self._result is not None and self._status == "finished" else {}
        if self._result is None or not {"zero_shot", "tuned"} <= set(scores):
            return ""
        before, after = scores["zero_shot"], scores["tuned"]
        metric = one_line(self._result.metric, 60)
        return f"{metric} of answers {before.mean:.2f} → {after.mean:.2f} on {after.n:,} test rows"

    def _eta(self) -> float | None:
        infos = [device.info for device in self._devices.values() if device.info is not None and not device.lost]
        templates = self._task.templates if self._task else ()
        left = self._course.seconds_left(self._settings, templates, infos)
        return None if left is None else max(left - (monotonic() - self._counted_at), 0.0)

    @property
    def generates(self) -> bool:
        """Whether the task generates texts, so that the figure is perplexity instead of accuracy."""
        if self._result is not None:
            return self._result.generates
        return self._settings.objective.loss == "nll"

    def _headline(self) -> dict[str, Any]:
        """The main figure of the current best prompt, on the same rows from start to end."""
        points = self.dev_points()
        result = self._result
        if points:
            last = points[-1]
            split = "dev"
            found = Measured(last.figure, last.n, self._interval(last.figure, last.n))
            zero_shot = last.zero_shot
        elif self._status == "finished" and result is not None and result.tuned.n:
            found = self._measured(result.tuned)
            split = "test"
            zero_shot = self._figure(result.zero_shot) if result.zero_shot.n else None
        else:
            return {
                "figure": None,
                "zero_shot": None,
                "zero_shot_interval": None,
                "n_rows": 0,
                "interval": None,
                "split": "dev",
            }
        return {
            "figure": found.value,
            "zero_shot": zero_shot,
            "zero_shot_interval": self._interval(zero_shot, found.n),
            "n_rows": found.n,
            "interval": found.interval,
            "split": split,
        }

    def _stages(self) -> tuple[Stage, ...]:
        """The result of each step, as the terminal prints it at the end; during a run, of the steps so far."""
        result = self._result if self._status == "finished" else None
        if result is not None and result.scores("dev"):
            dev = {name: self._measured(score) for name, score in result.scores("dev").items()}
        else:
            dev = self._stages_so_far()
        test = {} if result is None else {name: self._measured(score) for name, score in result.scores("test").items()}
        known = [name for name in VARIANTS if name in dev or name in test]
        if len(known) < 2:  # the run is of an earlier version
            return ()
        return tuple(Stage(VARIANTS[name], dev.get(name), test.get(name)) for name in known)

    def _stages_so_far(self) -> dict[str, Measured]:
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
        device = self._devices[name]
        info = device.info
        status, detail = self._device_status(device)
        figure = None
        interval = None
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
            return "silent", "no response"
        if device.paused:
            return "paused", device.paused
        return "live", device.progress


def _without_name(device: str, reason: str) -> str:
    """``reason`` without a leading name and address of ``device``."""
    return re.sub(rf"^{re.escape(device)}(: | (\(\S+\) )?)", "", reason)


def try_to_refresh(state: RunState, store: RunStore) -> None:
    """`RunState.refresh`. What prevents it is logged, and the page stays as it is: the next attempt may succeed."""
    try:
        state.refresh(store)
    except StoreError as error:
        log.warning("the dashboard cannot read run %s: %s", state.run, error)
    except Exception as error:
        if repr(error) != state.problem:  # once, not at every attempt
            state.problem = repr(error)
            log.exception("the dashboard cannot show run %s", state.run)
