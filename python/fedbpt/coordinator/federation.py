"""`Federation`: a run from connecting to the result; the round loop (design: ``docs/federation.md``).

In a round, each live device gets its plan, the reports that come before the deadline update the aggregator, and the
round is committed with its reports in one transaction. What follows depends on the committed reports only, so a run
that was stopped at any time is resumed by replaying them, to the same digest.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Final, ParamSpec, TypeVar

import numpy as np

from fedbpt.aggregation.base import Aggregator, devices_of
from fedbpt.coordinator.clients.base import DeviceClient
from fedbpt.coordinator.clients.mailbox import MailboxClient
from fedbpt.coordinator.control import RunControl, Wish
from fedbpt.coordinator.costs.estimate import readout_tokens
from fedbpt.coordinator.devices.call_times import MAX_AHEAD, CallTimes
from fedbpt.coordinator.devices.drafts import Draft, draft_size, permuted
from fedbpt.coordinator.devices.fleet import Fleet
from fedbpt.coordinator.devices.members import Cohort, common_model, describe_absent
from fedbpt.coordinator.devices.stragglers import Pace
from fedbpt.coordinator.layer_reading import LAST_LOOK, LOOK_ROUNDS, LOOKS, has_looks
from fedbpt.coordinator.ledger import RunLedger
from fedbpt.coordinator.live import LiveEvaluation
from fedbpt.coordinator.outcome import make_result
from fedbpt.coordinator.reports.vetting import leave_out, vet
from fedbpt.coordinator.run_listener import listener_for
from fedbpt.coordinator.run_state import FEWEST_JUDGES, SELECTION
from fedbpt.coordinator.work_kinds import kind_of
from fedbpt.errors import ConfigError, FederationError, QuorumError, StoreError
from fedbpt.net.event_loop import run_to_end
from fedbpt.objective.privacy import require_accountant
from fedbpt.protocol import codec
from fedbpt.protocol.names import check_names
from fedbpt.protocol.rounds import EvaluateReport, FitPurpose, RoundPlan, SecureWork
from fedbpt.runs.dev_figures import LOOK_GAIN, LOOKS_DONE
from fedbpt.runs.events import (
    DeviceLeftOut,
    EventCallback,
    RoundClosed,
    RoundPurpose,
    RunFinished,
    RunStarted,
    StageBegan,
    Steered,
    TemplateSelected,
)
from fedbpt.runs.result import RunResult, Variants
from fedbpt.runs.settings import RunSettings
from fedbpt.runs.store import RunStore, Traffic
from fedbpt.secure.sizes import FEWEST, threshold_of
from fedbpt.tasks import Task

if TYPE_CHECKING:
    from fedbpt.coordinator.devices.secure_sums import SecureSums

P = ParamSpec("P")
R = TypeVar("R")

log = logging.getLogger(__name__)

EVALUATION_DEADLINES: Final = 10
"""Time limit of the final evaluation, in deadlines of a round; a live evaluation has one."""

ANSWER_ROWS: Final = 100
"""Maximum number of test rows of a device that the result's answers are measured on: an answer takes a second or so."""

SETTLE_S: Final = 5.0
"""How long the final evaluation waits for late and lost devices."""

FIRST_ROUNDS_S: Final = 1.0
"""Shortest time limit of a round before the first generation is done, however small the budget in seconds is."""

PAUSE_POLL_S: Final = 0.1
"""Poll interval while the run is paused."""


class Federation:
    """One run over ``clients``: select the template, tune, evaluate.

    Args:
        clients: the devices; their names must differ, and stay the same when the run is resumed.
        task: name, labels, candidate templates.
        settings: budget, objective, patience.
        aggregator: fresh from the same settings; the run's stored rounds are replayed into it.
        store: where rounds are committed. A run of this name in it is resumed; the result of a finished one is
            returned.
        run: name of the run: letters, digits and ``._-``.
        on_event: called for each `fedbpt.runs.events.Event`, from the loop's thread.
        fresh: do not resume a stored run of this name, and replace it as soon as this one has closed a round.
        control: pauses, resumes and stops the run, and changes its deadline; None: nothing does.
        rows: digest of all rows, where the coordinator has them: a stored run of other rows is refused.

    Raises:
        ConfigError: duplicate or invalid names, too few devices for the method.
        MissingExtraError: a private run without the accountant's library, or a secure one without that of keys.
    """

    def __init__(
        self,
        clients: Sequence[DeviceClient],
        task: Task,
        settings: RunSettings,
        aggregator: Aggregator,
        store: RunStore,
        run: str,
        on_event: EventCallback = lambda _event: None,
        control: RunControl | None = None,
        fresh: bool = False,
        rows: str = "",
    ) -> None:
        check_names([run], "run")
        if settings.privacy is not None:
            require_accountant()
        if settings.secure:
            from fedbpt.coordinator.devices import secure_sums  # noqa: F401 - to miss its extra before the run begins
        check_names([client.name for client in clients], "device")
        self.run_name = run
        self.task = task
        settings = settings.for_labels(task.labels, task.generation)
        self._clients = {client.name: client for client in clients}
        self._min_reports = max(aggregator.min_reports, 1)
        devices_per_round = min(len(clients), settings.per_round or len(clients))
        if self._min_reports > devices_per_round:
            raise ConfigError(
                f"method {settings.method!r} needs the reports of {self._min_reports} devices, but a round has"
                f" {devices_per_round}: add devices, or change per_round or robust",
                field="per_round",
                limit=self._min_reports,
            )
        if settings.secure and len(clients) < FEWEST:
            raise ConfigError(
                f"secure = true needs {FEWEST} devices, of which nobody sees one's results, got {len(clients)}: add "
                "devices, or set secure = false",
                field="secure",
                limit=FEWEST,
            )
        self._store = store
        self._emit = on_event
        self._control = control or RunControl()
        self._fresh = fresh
        self._wish = Wish()
        self._ledger = RunLedger(store, run, task, settings, aggregator, rows)
        self._needed = self._quorum_of(len(clients))
        self._fleet: Fleet | None = None
        self._sums: Fleet | SecureSums
        self._live: LiveEvaluation | None = None
        self._call_times = CallTimes(frozenset(), lambda: 0.0)

    def run(self) -> RunResult:
        """Run to the end. Inside a running event loop (a notebook) too, in a thread of its own.

        Ctrl-C stops the devices, and leaves a store from which the same call resumes the run.

        Raises:
            QuorumError: too few devices, at the start or in a round.
            FederationError: devices with different models; a stored run with another model.
            ConfigError: a stored run with another task, other settings or other rows.
            StoreError: the store cannot be written, or another process runs the run.
            RunStopped: by ``control``.
        """
        return run_to_end(self.run_async)

    @property
    def settings(self) -> RunSettings:
        """The run's settings; those given, until a stored run is resumed (`RunSettings.continuing`)."""
        return self._ledger.settings

    @property
    def searched(self) -> int:
        """Closed rounds of the search."""
        return self._ledger.state.searched

    async def run_async(self) -> RunResult:
        """`run`, for callers with an event loop. Can be called once."""
        if self._fleet is not None:
            raise FederationError("this federation has run already: make another, with a fresh aggregator, to resume")
        with self._store.held(self.run_name):
            return await self._run_held()

    async def _run_held(self) -> RunResult:
        self._store.restore(self.run_name)  # a fresh run that was killed before its first round
        if not self._fresh:
            result = self._ledger.finished()
            if result is not None:
                self._emit(RunFinished(result=result))
                return result
        began = time.monotonic()
        self._fleet = fleet = Fleet(
            self._clients, self.task.identity, listener_for(self._ledger, self._emit), Pace(self.settings.stragglers)
        )
        self._sums = self._secured(fleet) if self.settings.secure else fleet
        calling = [client for client in self._clients.values() if isinstance(client, MailboxClient)]
        names = frozenset(client.name for client in calling)
        offices = {client.office for client in calling}
        self._call_times = CallTimes(
            names,
            lambda: self._deadline_s() / 2,  # which the operator may change
            lambda: fleet.is_short,
            n_calling=lambda: sum(office.n_devices for office in offices),
        )
        for office in offices:
            office.pace(self.run_name, self._call_times)
        try:
            result = await self._control.unless_stopped(self._session(fleet, began))
        except BaseException:
            await self._stop(fleet)
            raise
        finally:
            for office in offices:
                office.pace(self.run_name, None)
            await fleet.aclose()
        self._emit(RunFinished(result=result))
        return result

    async def _session(self, fleet: Fleet, began: float) -> RunResult:
        await self._connect(fleet)
        self._live = LiveEvaluation(self._ledger, fleet, self._sums, self._deadline_s)
        await self._select(fleet)
        if self._ledger.state.only_reads:
            await self._fit(fleet, "probe")
        else:
            await self._tune(fleet)
            self._call_times.ask_all()
            if self.settings.objective.readout_words and self._ledger.spending.seconds_left(self.settings.seconds) > 0:
                await self._fit(fleet, "readout")
        await self._choose(fleet)
        self._emit(StageBegan(stage="evaluation"))
        await self._evaluate_live(self._ledger.state.closed, final=True)
        return await self._finish(fleet, began)

    # --- beginning and resuming ----------------------------------------------------------------------------------

    async def _connect(self, fleet: Fleet) -> None:
        infos = await fleet.connect()
        if len(infos) < self._needed:
            with_task = " with the run's task" if any(map(fleet.unfit, fleet.members.values())) else ""
            raise QuorumError(
                f"{len(infos)} of {len(self._clients)} devices answer{with_task}, {self._needed} are needed"
                f"{describe_absent(fleet.members.values())}",
                limit=self._needed,
            )
        model = common_model(infos)
        ledger = self._ledger
        if self._fresh:
            self._store.set_aside(self.run_name)
        ledger.open(model, list(self._clients))
        next_round = ledger.state.closed + 1
        fleet.round = next_round
        members = fleet.members.values()
        self._store.record_devices(self.run_name, {m.name: m.info for m in members if m.info is not None})
        self._store.record_losses(self.run_name, next_round, {m.name: m.reason for m in members if m.state == "lost"})
        ledger.require_no_lost_sum()
        self._emit(
            RunStarted(
                run=self.run_name,
                devices=tuple(self._clients),
                live=tuple(member.name for member in fleet.live),
                model_name=model.model_name,
                model_fingerprint=model.model_fingerprint,
                resumed=next_round,
                settings=self.settings,
                searched=ledger.state.searched,
            )
        )
        fleet.require_model(model.model_fingerprint)
        if self.settings.reads_privately and not ledger.state.reads_layers:
            raise FederationError(
                f"a private readout reads layers, which {model.model_name} does not show, or a device of an older "
                "version: use another model, or set calibrate = false and objective.readout_words = 0",
                field="readout_words",
            )
        self._model = model

    def _secured(self, fleet: Fleet) -> SecureSums:
        from fedbpt.coordinator.devices.secure_sums import SecureSums  # here: it needs the extra

        ledger = self._ledger

        def control_plan(device: str, work: SecureWork) -> RoundPlan:
            return ledger.planner.plan(0, device, work)

        return SecureSums(fleet, control_plan, self.settings.row_cap, ledger.record_release)

    # --- rounds --------------------------------------------------------------------------------------------------

    async def _select(self, fleet: Fleet) -> None:
        ledger = self._ledger
        state = self._ledger.state
        one = len(self.task.templates) == 1
        if state.only_reads or (one and not self.settings.balanced and not self.settings.prompt.shifts):
            state.skip_selection()
        elif state.closed < SELECTION:
            self._emit(StageBegan(stage="selection"))
            await self._round(fleet, SELECTION, "selection")
        self._emit(
            TemplateSelected(
                template=state.template,
                index=state.template_index,
                losses=state.template_losses,
                candidates=state.candidates,
            )
        )
        if "dev_loss" not in ledger.metrics(SELECTION):
            await self._evaluate_live(SELECTION)

    async def _tune(self, fleet: Fleet) -> None:
        ledger = self._ledger
        state = self._ledger.state
        every = self.settings.evaluate_every
        if self.settings.calibrate:
            await self._fit(fleet, "calibration")
        if state.reads_layers or (self.settings.baselines and self.settings.objective.readout_words):
            await self._fit(fleet, "probe")
        if state.reads_layers and not state.searched and "dev_loss" not in ledger.metrics(state.closed):
            await self._evaluate_live(state.closed, judges=False)
        if self.settings.metric_share:
            await self._check_answers(fleet)
        self._emit(StageBegan(stage="search"))
        while True:
            # The last mean is evaluated with its final readout; before that only if it has to be judged.
            is_spent = ledger.is_spent(self._readout_s(fleet))
            is_due = every and state.searched % every == 0 and (self.settings.patience or not is_spent)
            if is_due and state.searched > state.judged:
                await self._evaluate_live(state.closed)
            if self._look_is_due():
                await self._look(fleet)
            if ledger.is_spent(self._readout_s(fleet)) or not await self._round(fleet, state.closed + 1, "search"):
                break
        if not state.searched:
            log.warning("run %s: the budget was spent before the first generation was done", self.run_name)

    def _look_is_due(self) -> bool:
        state = self._ledger.state
        can = has_looks(self.task.templates, self.settings, state.n_layer)
        share = self._ledger.course.share(self.settings)
        return can and state.searched >= LOOK_ROUNDS and share <= LAST_LOOK and self._looks_at(share) > state.looks

    @staticmethod
    def _looks_at(share: float) -> int:
        """Number of interim looks that are due when this share of the budget is spent."""
        return sum(share >= due for due in LOOKS)

    async def _look(self, fleet: Fleet) -> None:
        """End the search if it gains nothing: most of its budget is then saved."""
        state = self._ledger.state
        if self._live is None or self._ledger.is_spent(self._readout_s(fleet)):
            return
        looks = self._looks_at(self._ledger.course.share(self.settings))
        began = time.monotonic()
        self._call_times.ask_all()
        gain = await self._live.look()
        self._ledger.leave_out(state.closed, time.monotonic() - began, "look_seconds")
        if gain is None:  # another try would be no better
            state.looks = looks
            return
        self._store.record_metrics(self.run_name, state.closed, {LOOK_GAIN: gain, LOOKS_DONE: looks})
        state.look(gain, looks)
        if state.futile_at is not None:
            log.info("run %s: held-out rows show no gain from the prompt: the search ends", self.run_name)

    async def _fit(self, fleet: Fleet, purpose: FitPurpose) -> None:
        state = self._ledger.state
        if not state.fit(purpose).done:
            self._emit(StageBegan(stage=purpose))
        while not state.fit(purpose).done:
            if not await self._round(fleet, state.closed + 1, purpose):
                state.abandon_fits()
                return

    async def _choose(self, fleet: Fleet) -> None:
        """Choose what is shipped by training rows that neither the search nor any readout has seen."""
        state = self._ledger.state
        lines = state.held_lines()
        if not lines:
            state.choose_unjudged()
            return
        reports: list[EvaluateReport] = []
        answers: list[EvaluateReport] = []
        if len(lines) > 1:
            if state.judges_answers:
                answers = await self._judge_answers(fleet, lines)
            request = self._ledger.planner.request(lines, label_weights=state.label_weights, split="held")
            found = await self._sums.evaluate(request, self._deadline_s())
            reports = list(state.trusted(found).values())
        if self.task.labels:
            state.choose(list(lines), reports)
        else:
            state.choose_texts(reports, answers)
        log.info("run %s: held-out training rows chose %r", self.run_name, state.shipped)

    async def _judge_answers(self, fleet: Fleet, lines: Variants) -> list[EvaluateReport]:
        """Reports of the metric of answers to held rows; empty: likelihood is to judge alone."""
        request = self._ledger.planner.request(lines, split="held", max_rows=ANSWER_ROWS, answers=True)
        found = self._ledger.state.trusted(
            await self._sums.evaluate(request, EVALUATION_DEADLINES * self._deadline_s())
        )
        reports = [report for report in found.values() if min(report.n_failed or (0,)) < report.n]
        if sum(report.n for report in reports) < FEWEST_JUDGES:
            why = "the metric failed on all answers" if found and not reports else "too few answers were measured"
            log.warning("run %s: %s: likelihood judges the prompt", self.run_name, why)
            await fleet.settle(min(SETTLE_S, self.settings.deadline_s))  # some may have been too late
            return []
        if all(len({*report.loss_sums}) == 1 and not any(report.difference_squares) for report in reports):
            log.warning(
                "run %s: with and without the prompt, all answers to held-out rows are worth the same by the metric, "
                "which shows no gain; more rows, or another metric, max_tokens or stop may",
                self.run_name,
            )
        return reports

    async def _check_answers(self, fleet: Fleet) -> None:
        """Raise `FederationError` if too few devices can measure answers, before the search is half done."""
        nothing = np.zeros(self.settings.prompt.d)
        planner = self._ledger.planner
        request = planner.request({"zero_shot": (nothing, None)}, split="held", max_rows=1, answers=True)
        asked = [member for member in fleet.live if member.n_rows(request)]
        reports = await self._sums.evaluate(request, self._deadline_s())
        if asked and len(reports) < min(self._needed, len(asked)):
            raise FederationError(
                f"{len(asked) - len(reports)} of {len(asked)} devices cannot measure answers, which metric_share needs "
                "(the log says why): start them with the run's task file, or set metric_share = 0",
                field="metric_share",
            )

    def _quorum_of(self, n_devices: int) -> int:
        return max(math.ceil(self.settings.quorum * n_devices), self._min_reports)

    def _cohort(self, round: int, purpose: RoundPurpose) -> Cohort | None:
        """The devices of a round, of the search drawn anew for each round; None: all devices."""
        wanted = self.settings.per_round
        trusted = sorted(self._clients.keys() - self._ledger.state.left_out)
        if purpose != "search" or not 0 < wanted < len(trusted):
            self._call_times.ask_all()
            n = len(trusted)
            return None if n == len(self._clients) else Cohort(tuple(trusted), n, n)
        if self.settings.draft == "permutation":
            return permuted(self.settings, round, trusted)
        drafts = [self._draft(round + ahead) for ahead in range(MAX_AHEAD + 1)]
        self._call_times.opened(lambda ahead, device: drafts[ahead].draws(device))
        return drafts[0].cohort(trusted, wanted)

    def _draft(self, round: int) -> Draft:
        size = draft_size(self.settings)
        return Draft(self.run_name, self.settings.seed, round, size, len(self._clients))

    def _deadline_s(self) -> float:
        return self._wish.deadline_s or self.settings.deadline_s

    async def _apply_control(self) -> None:
        """Apply what `RunControl` was told since the last round; wait while it is paused or about to be stopped."""
        while True:
            wish = self._control.wish
            if wish != self._wish:
                self._wish = wish
                self._emit(Steered(paused=wish.paused, deadline_s=wish.deadline_s or self.settings.deadline_s))
            if not wish.paused and not self._control.stopped:
                return
            await asyncio.sleep(PAUSE_POLL_S)

    def _readout_s(self, fleet: Fleet) -> float:
        """Expected seconds of the readout's fit at the pace so far, which a budget in seconds includes."""
        if not self.settings.seconds:
            return 0.0
        spending = self._ledger.spending
        rate = spending.tokens_per_second(max(len(self._ledger.state.n_reports), 1))
        if not rate:
            return 0.0
        infos = [member.info for member in fleet.members.values() if member.info and not fleet.unfit(member)]
        calibrated = spending.tokens_for["calibration"]
        return readout_tokens(self.settings, self.task.templates, infos, calibrated) / rate

    def _seconds_left(self, fleet: Fleet, purpose: RoundPurpose) -> float:
        """Time after which the budget ends a round, which is then left out; infinite for selection and readout.

        And where nothing but a readout is made.
        """
        if purpose in ("selection", "readout") or self._ledger.state.only_reads:
            return math.inf
        left = self._ledger.spending.seconds_left(self.settings.seconds) - self._readout_s(fleet)
        return left if self._ledger.state.searched else max(left, FIRST_ROUNDS_S)

    async def _round(self, fleet: Fleet, round: int, purpose: RoundPurpose) -> bool:
        """Run and commit one round; returns False if the budget in seconds ended it."""
        await self._apply_control()
        began = time.monotonic()
        ledger = self._ledger
        state = self._ledger.state
        planner = self._ledger.planner
        share = self.settings.metric_share
        planner.by_metric = share > 0 and ledger.course.share(self.settings) >= 1 - share
        work = planner.work(round, purpose)
        work_digest = kind_of(work).digest(work)  # now: a commit changes the state that the work refers to
        cohort = self._cohort(round, purpose)
        needed = self._needed if cohort is None else self._quorum_of(cohort.wanted)
        deadline_s = self._deadline_s()
        reports = await self._sums.run_round(
            round,
            lambda device: planner.plan(round, device, work),
            needed,
            deadline_s,
            "answers" if planner.by_metric and purpose == "search" else purpose,
            cohort,
            state.aggregator.history() if purpose == "search" else None,
            self._seconds_left(fleet, purpose),
        )
        if not reports:
            log.info("run %s: the budget ended within round %d (%s): it is left out", self.run_name, round, purpose)
            ledger.leave_out(round, time.monotonic() - began)
            return False
        fit = None if purpose == "selection" or purpose == "search" else state.fits.get(purpose)
        # Both take a fraction of a second a device, in which other devices are to be answered. A secure round has one
        # report, of which nothing may keep the ε from being counted with it.
        in_thread = _at_once if self.settings.secure else asyncio.to_thread
        reports, misled = await in_thread(leave_out, self.settings, fit, reports)
        try:
            reports, refused = await in_thread(vet, ledger, round, reports)
            fleet.refuse(refused)
            reported = tuple(name for report in reports for name in devices_of(report))
            fleet.require_quorum(len(reported) + len(misled), needed, deadline_s)
        except FederationError as error:
            log.warning("%s", error)
            ledger.require_no_lost_sum()
            raise
        asked = self._clients if cohort is None else sorted(fleet.asked)
        counted = set(reported)
        costs = self._costs(fleet, self._clients if cohort is None else fleet.asked)
        committed = ledger.commit(round, work_digest, reports, time.monotonic() - began, costs, misled)
        for name, reason in misled.items():
            self._emit(DeviceLeftOut(device=name, round=round, reason=reason))
        self._emit(
            RoundClosed(
                round=round,
                purpose=purpose,
                searched=state.searched,
                reported=reported,
                missing=tuple(name for name in asked if name not in counted),
                loss=committed.loss,
                evaluations=state.aggregator.evaluations,
                tokens=ledger.spending.tokens,
                seconds=ledger.spending.seconds,
                bytes_up=ledger.bytes_up,
                bytes_down=ledger.bytes_down,
                epsilon=committed.epsilon,
                share=ledger.course.share(self.settings),
                eta_s=ledger.course.seconds_left(self.settings, self.task.templates, fleet.infos),
            )
        )
        return True

    # --- evaluation ----------------------------------------------------------------------------------------------

    async def _evaluate_live(self, round: int, final: bool = False, judges: bool = True) -> None:
        """Measure on ``dev`` rows what would be shipped now; devices that do not answer are left out."""
        if self._live is not None and self.settings.evaluate_every:
            self._call_times.ask_all()
            event = await self._live.measure(round, final, judges)
            if event is not None:
                self._emit(event)

    async def _evaluate_final(self, fleet: Fleet) -> dict[str, EvaluateReport]:
        """Reports of all variants on the same ``test`` rows, of every device in reach that is not left out."""
        state = self._ledger.state
        request = self._ledger.planner.request(state.variants(), max_rows=self.settings.test_rows)
        limit = EVALUATION_DEADLINES * self.settings.deadline_s
        await fleet.settle(min(SETTLE_S, self.settings.deadline_s))
        reports = state.trusted(await self._sums.evaluate(request, limit))
        if not reports and all(member.name in state.left_out for member in fleet.live):
            await fleet.settle(self.settings.deadline_s, state.left_out)
            reports = state.trusted(await self._sums.evaluate(request, limit))
        able = [
            member for member in fleet.members.values() if not fleet.unfit(member) and member.name not in state.left_out
        ]
        has_rows = any(member.info and member.info.n_test for member in able)
        if self.settings.secure:  # a sum needs more devices than may have rows
            n_able = sum(bool(member.info and member.info.n_test) for member in able)
            has_rows = n_able >= max(threshold_of(len(self._clients)), FEWEST)
        if not reports and has_rows:
            raise FederationError(
                f"tuned, but no device could evaluate the result{describe_absent(fleet.members.values())};"
                " start the same run again to resume it"
            )
        return reports

    async def _evaluate_answers(self) -> dict[str, EvaluateReport]:
        """Reports of the metric of the variants' own answers, on the first ``test`` rows of the same devices."""
        most = min(self.settings.test_rows or ANSWER_ROWS, ANSWER_ROWS)
        request = self._ledger.planner.request(self._ledger.state.variants(), max_rows=most, answers=True)
        return self._ledger.state.trusted(
            await self._sums.evaluate(request, EVALUATION_DEADLINES * self.settings.deadline_s)
        )

    # --- the end -------------------------------------------------------------------------------------------------

    async def _finish(self, fleet: Fleet, began: float) -> RunResult:
        reports = await self._evaluate_final(fleet)
        answers = await self._evaluate_answers() if self._ledger.state.judges_answers else {}
        await fleet.cancel_rounds()
        costs = self._costs(fleet, self._clients)
        result = make_result(
            self._ledger,
            self.settings,
            self._model,
            fleet.members.values(),
            costs,
            reports,
            answers,
            self._live.scores if self._live else {},
            time.monotonic() - began,
        )
        if result.tuned.n:
            figure = "perplexity" if result.generates else "accuracy"
            figures = {f"test_{figure}": getattr(result.tuned, figure)}
            if result.zero_shot.n:
                figures[f"test_{figure}_zero_shot"] = getattr(result.zero_shot, figure)
            self._store.record_metrics(self.run_name, self._ledger.state.closed, figures)
        self._store.set_status(self.run_name, "finished", codec.encode(result), costs)
        return result

    async def _stop(self, fleet: Fleet) -> None:
        """End the run early: stop the devices, and leave a store to resume from."""
        await fleet.cancel_rounds()
        try:
            if self._ledger.is_open:
                self._store.set_status(self.run_name, "stopped", traffic=self._costs(fleet, self._clients))
            self._store.restore(self.run_name)
        except StoreError as error:
            log.warning("%s", error)  # the error that ended the run is the one to raise

    def _costs(self, fleet: Fleet, names: Iterable[str]) -> dict[str, Traffic]:
        costs = {}
        for member in map(fleet.members.__getitem__, names):
            before = self._ledger.traffic_before.get(member.name, Traffic(0, 0, 0))
            costs[member.name] = Traffic(
                before.bytes_up + member.client.bytes_up - member.bytes_up_before,
                before.bytes_down + member.client.bytes_down - member.bytes_down_before,
                max(before.peak_rss_bytes, member.peak_rss_bytes),
            )
        return costs


async def _at_once(function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
    """As `asyncio.to_thread`, but without a moment in which the run could be stopped."""
    return function(*args, **kwargs)
