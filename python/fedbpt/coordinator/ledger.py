"""`RunLedger`: where a run stands, as a function of its committed rounds; writes them and reads them again."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fedbpt.aggregation.base import Aggregator
from fedbpt.aggregation.readout import ReadoutFit
from fedbpt.coordinator.course import Course
from fedbpt.coordinator.report_checks import (
    cap_reports,
    label_weights,
    mean_loss,
    purpose_of,
    template_losses,
    template_scores,
)
from fedbpt.coordinator.spending import Spending
from fedbpt.coordinator.stragglers import TextPace
from fedbpt.errors import ConfigError, FederationError, StoreError
from fedbpt.protocol import codec
from fedbpt.protocol.rounds import (
    DeviceInfo,
    EvaluateRequest,
    FitPurpose,
    FitResult,
    LocalWork,
    PooledWork,
    RoundPlan,
    RoundReport,
    SelectWork,
    Work,
)
from fedbpt.protocol.specs import Array, Readout, Template
from fedbpt.runs.dev_figures import DEV_SECONDS, judged_loss
from fedbpt.runs.events import RoundPurpose
from fedbpt.runs.result import RunResult, TemplateScore, Variants, variants
from fedbpt.runs.settings import RunSettings
from fedbpt.runs.store import RunStore, StoredRound, StoredRun, Traffic
from fedbpt.tasks import Task

SELECTION: Final = 0
"""The round in which the template is chosen; calibration and search begin with round 1."""


class RunLedger:
    """The state of one run. ``aggregator`` must be fresh; `open` replays the stored rounds into it."""

    def __init__(
        self, store: RunStore, run: str, task: Task, settings: RunSettings, aggregator: Aggregator, rows: str = ""
    ) -> None:
        self.store = store
        self.run = run
        self.task = task
        self.settings = settings
        self.aggregator = aggregator
        self._rows = rows
        self.is_open = False
        self.closed = -1  # the last closed round
        self.searched = 0  # rounds of the search
        self.judged = 0  # rounds of the search when its mean was last evaluated on dev rows
        self._best: tuple[float, NDArray[np.float64]] | None = None  # of those: the lowest loss, and its mean
        self._no_better = 0  # evaluations since that, or since the last restart
        self._restarts = 0
        self.fits: dict[FitPurpose, ReadoutFit] = {}
        self.spending = Spending()
        self.course = Course(self.spending)
        self.reports: dict[str, int] = {}
        self.template_losses: tuple[float, ...] = ()
        self.candidates: tuple[TemplateScore, ...] = ()
        self.label_weights: tuple[float, ...] = ()  # of a row's loss; empty: ones
        self._pace = TextPace()
        self.traffic_before: dict[str, Traffic] = {}
        self._selected = 0
        self.spent_epsilon: float | None = None  # when the last round closed
        self._fewest_rows = 0  # of a device whose report counted; 0: none yet

    @property
    def template(self) -> Template:
        """The selected template; before the selection, the first."""
        return self.task.templates[self._selected]

    @property
    def template_index(self) -> int:
        return self._selected

    def twin(self) -> RunLedger:
        """Another ledger in the same state, to try what `apply` leads to."""
        shared = {id(each): each for each in (self.store, self.task, self.settings)}
        return copy.deepcopy(self, shared)

    def _require_fit(self, stored: StoredRun) -> None:
        if not is_of(stored, self.settings, self.task):
            raise ConfigError(f"run {self.run!r} was begun with another task or settings: give this one another name")
        if self._rows != stored.rows:
            raise ConfigError(f"run {self.run!r} was begun with other rows: give this one another name, or --fresh")

    def finished(self) -> RunResult | None:
        """The stored result, if the run ended with this very budget; refuses a run of other settings."""
        stored = self.store.find_run(self.run)
        if stored is None:
            return None
        self._require_fit(stored)
        if stored.result is None or stored.status != "finished":
            return None
        result = codec.decode(stored.result, RunResult)
        return result if result.settings == self.settings else None

    def open(self, model: DeviceInfo, devices: Sequence[str]) -> None:
        """Begin the run in the store, or resume it. ``model``: a device that has the model that all have.

        Raises:
            ConfigError: the stored run is of another task or other settings. FederationError: of another model.
        """
        self._model = model
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
            self._require_fit(stored)
            if stored.model_fingerprint != model.model_fingerprint:
                raise FederationError(
                    f"run {self.run!r} was begun with {stored.model_name} ({stored.model_fingerprint}),"
                    f" the devices have {model.model_name} ({model.model_fingerprint})"
                )
            self.store.record_settings(self.run, codec.encode(self.settings), identity_of(self.settings, self.task))
        self.store.record_task(self.run, codec.encode(self.task), self._rows)
        self.store.add_devices(self.run, devices)
        self.store.set_status(self.run, "running")
        self.is_open = True
        self.traffic_before = self.store.traffic(self.run)
        self.replay()

    def replay(self) -> int:
        """Take up the stored rounds; returns how many. Raises `StoreError` at the first whose digests differ."""
        n_rounds = 0
        history = {line.round: line.metrics for line in self.store.history(self.run)}
        if DEV_SECONDS in history.get(SELECTION, {}):  # also where there was nothing to select
            self.course.evaluated(0, history[SELECTION][DEV_SECONDS])
        for stored in self.store.rounds(self.run):
            scored = self.aggregator.evaluations
            self._replay_round(stored)
            n_rounds += 1
            metrics = history.get(stored.round, {})
            self._follow(stored.reports, metrics.get("seconds", 0.0), scored)
            if stored.round > SELECTION and DEV_SECONDS in metrics:
                self.course.evaluated(self.searched, metrics[DEV_SECONDS])
            if stored.round > SELECTION and (loss := judged_loss(metrics)) is not None:
                self.judge(loss)
        for round, metrics in history.items():
            self._took(round, metrics.get("seconds", 0.0) + metrics.get("cut_seconds", 0.0))
        return n_rounds

    def _replay_round(self, stored: StoredRound) -> None:
        failure = StoreError(
            f"round {stored.round} of run {self.run!r} does not replay to the state it had: it was made with another"
            " version, or changed since; begin a run of another name"
        )
        try:
            purpose = purpose_of(stored.reports)
            work_digest = codec.digest(self.work(stored.round, purpose))
            if purpose == "readout" and work_digest != stored.work_digest:
                # fitted to the prompt that counted with another patience: it cost what it cost, and is fitted anew
                self.fits.pop(purpose)
                self._count(stored.round, stored.reports)
                return
            self.apply(stored.round, stored.reports)
        except (ValueError, LookupError) as error:  # reports that do not fit the work, or none
            raise failure from error
        if (work_digest, self._digest()) != (stored.work_digest, stored.state_digest):
            raise failure

    def work(self, round: int, purpose: RoundPurpose) -> Work:
        """What the devices do in ``round``."""
        if purpose == "selection":
            templates = self.task.templates
            # with one template, only the label counts are wanted
            max_rows = self.settings.select_rows if len(templates) > 1 else 1
            return SelectWork(templates=templates, max_rows=max_rows, by_label=self.settings.balanced)
        if purpose == "search":
            return self.aggregator.work(round)
        return self.fit(purpose).work()

    def fit(self, purpose: FitPurpose) -> ReadoutFit:
        """The fit for ``purpose``, as far as it has come; the readout's begins anew once the search goes on."""
        if purpose not in self.fits:
            mean = self.mean
            self.fits[purpose] = self.new_fit(purpose, mean if purpose == "readout" else np.zeros_like(mean))
        return self.fits[purpose]

    def new_fit(self, purpose: FitPurpose, latent: NDArray[np.float64]) -> ReadoutFit:
        """A fit for the prompt of ``latent`` [d], before its first exchange. It is no part of the run's state."""
        others = self.others if purpose == "readout" else ()
        n_words = self.settings.objective.readout_words // (1 + len(others))
        return ReadoutFit(
            purpose,
            latent,
            0 if purpose == "calibration" else n_words,
            len(self.task.labels),
            self._bias(),
            self.settings.fit_rows,
            others,
            self.settings.robust,
            self.settings.byzantine,
        )

    @property
    def others(self) -> tuple[Template, ...]:
        """The templates that the readout averages the selected one's with: the next best by the selection's loss."""
        if not self.settings.objective.readout_words:
            return ()
        ranked = np.argsort(self.template_losses, kind="stable")  # none where there was nothing to select
        return tuple(self.task.templates[i] for i in ranked[1 : self.settings.ensemble])

    def _bias(self) -> NDArray[np.float64] | None:
        fit = self.fits.get("calibration")
        return None if fit is None else fit.readout.weights.numpy()[0]

    def readout(self, purpose: FitPurpose) -> Readout | None:
        """What the fit for ``purpose`` found; None: there was none."""
        return self.fits[purpose].readout if purpose in self.fits else None

    def skip_selection(self) -> None:
        """There is one template: nothing to select."""
        self.closed = max(self.closed, SELECTION)

    def spent(self, reserve_s: float = 0.0) -> bool:
        """Whether a limit of the budget is reached; choosing the template is not charged.

        ``reserve_s``: of the budget in seconds, what is for the readout.
        """
        limits, spent = self.settings, self.spending
        return bool(
            (limits.rounds and self.searched >= limits.rounds)
            or (limits.evaluations and self.aggregator.evaluations >= limits.evaluations)
            or (limits.tokens and spent.charged_tokens >= limits.tokens)
            or (limits.seconds and spent.seconds_left(limits.seconds) <= reserve_s)
            or (limits.patience and self._no_better >= limits.patience)
        )

    def leave_out(self, round: int, seconds: float) -> None:
        """A round that the budget ended before enough devices had reported: it costs its time, and changes nothing."""
        before = self.metrics(round).get("cut_seconds", 0.0)
        self.store.record_metrics(self.run, round, {"cut_seconds": before + seconds})
        self._took(round, seconds)

    def judge(self, loss: float) -> bool:
        """The search's mean now has ``loss`` on dev rows, nats; whether that is the lowest so far."""
        self.judged = self.searched
        better = self._best is None or loss < self._best[0]
        if better:
            self._best, self._no_better = (loss, self.aggregator.mean), 0
        else:
            self._no_better += 1
        if self._no_better >= self.settings.patience and self._restarts < self.settings.restarts:
            self._restarts, self._no_better = self._restarts + 1, 0
            self.aggregator.restart(self.mean)
        return better

    @property
    def mean(self) -> NDArray[np.float64]:
        """The latent [d] that counts: the search's, or where dev rows may choose, the best of those judged by them."""
        return self._best[1] if self.settings.patience and self._best is not None else self.aggregator.mean

    def plan(self, round: int, device: str, work: Work) -> RoundPlan:
        """What ``device`` is asked in ``round``."""
        return RoundPlan(
            run=self.run,
            round=round,
            device=device,
            seed=self.settings.seed,
            model_fingerprint=self._model.model_fingerprint,
            task=self.task.identity,
            labels=self.task.labels,
            template=self.template,
            prompt=self.settings.prompt,
            objective=self.settings.objective,
            work=work,
            batch_size=self._batch_size(device, work),
            deadline_s=self.settings.deadline_s,
            label_bias=() if (bias := self._bias()) is None else tuple(bias.tolist()),
            label_weights=self.label_weights,
            privacy=self.settings.privacy,
        )

    def _batch_size(self, device: str, work: Work) -> int | None:
        usual = self.settings.objective.batch_size
        if not (self.settings.even_rounds and usual and isinstance(work, PooledWork | LocalWork)):
            return None
        return self._pace.batch_size(device, usual)

    def epsilon(self) -> float | None:
        """ε spent by the closed rounds on a row of the device that has the fewest; None: the run is not private.

        Every device is taken to have answered in each of them.
        """
        selected = len(self.task.templates) if self.closed >= SELECTION else 1
        return self.settings.epsilon(selected, self._fewest_rows, self.searched)

    def commit(
        self,
        round: int,
        work_digest: str,
        reports: Sequence[RoundReport],
        seconds: float,
        traffic: Mapping[str, Traffic],
    ) -> float:
        """Let a round count and write it, in one transaction; returns its mean loss, nats."""
        scored = self.aggregator.evaluations
        self.apply(round, reports)
        loss = mean_loss(cap_reports(reports, self.settings.row_cap))
        tokens = sum(report.tokens for report in reports)
        spent = self.spent_epsilon = self.epsilon()
        self.store.commit_round(
            self.run,
            round,
            work_digest=work_digest,
            state_digest=self._digest(),
            reports=reports,
            metrics={
                "loss": loss,
                "seconds": seconds,
                "tokens": float(tokens),
                **({} if spent is None else {"epsilon": spent}),
            },
            traffic=traffic,
        )
        self._took(round, seconds)
        self._follow(reports, seconds, scored)
        return loss

    def _follow(self, reports: Sequence[RoundReport], seconds: float, scored: int) -> None:
        """``scored``: candidates before the round that has these reports."""
        tokens = sum(report.tokens for report in reports)
        self.course.closed(purpose_of(reports), seconds, self.aggregator.evaluations - scored, tokens)

    def _took(self, round: int, seconds: float) -> None:
        self.spending.add_seconds(seconds, charged=round != SELECTION)

    def apply(self, round: int, reports: Sequence[RoundReport]) -> None:
        """The one way in which state changes, live and on replay."""
        cap = self.settings.row_cap
        counted = cap_reports(reports, cap)
        if round == SELECTION:
            self.label_weights = label_weights(reports, cap)
            losses = template_losses(counted, self.label_weights, self.settings.robust != "none")
            self._selected = int(np.argmin(losses))
            self.template_losses = tuple(losses.tolist())
            scores = template_scores(reports, self.template_losses) if len(self.task.templates) > 1 else ()
            self.candidates = tuple(
                TemplateScore(template=template, score=score)
                for template, score in zip(self.task.templates, scores, strict=False)
            )
        elif isinstance(result := reports[0].result, FitResult):
            self.fit(result.purpose).update(counted)
        else:
            self.aggregator.update(counted)
            self.searched += 1
            for report in reports:
                self._pace.took(report.device, report.seconds, report.n_texts)
            self.fits.pop("readout", None)
        self._count(round, reports)

    def _count(self, round: int, reports: Sequence[RoundReport]) -> None:
        self.closed = round
        fewest = min(report.n_texts for report in reports)
        self._fewest_rows = min(self._fewest_rows or fewest, fewest)
        self.spending.tokens_for[purpose_of(reports)] += sum(report.tokens for report in reports)
        for report in reports:
            self.reports[report.device] = self.reports.get(report.device, 0) + 1

    def variants(self) -> Variants:
        """What is evaluated in the end."""
        return variants(self.mean, {purpose: fit.readout for purpose, fit in self.fits.items()})

    def _digest(self) -> str:
        """sha256 of everything that decides what comes next."""
        fits = [f"|{purpose}|{fit.digest()}" for purpose, fit in self.fits.items()]
        weights = [f"|{weight.hex()}" for weight in self.label_weights]
        return hashlib.sha256("".join([self.aggregator.digest(), *fits, *weights]).encode()).hexdigest()

    def request(self, latents: NDArray[np.float64], **what: Any) -> EvaluateRequest:
        """To evaluate ``latents`` [k, d]; ``what``: ``readouts``, ``split``, ``max_rows``."""
        return EvaluateRequest(
            model_fingerprint=self._model.model_fingerprint,
            task=self.task.identity,
            labels=self.task.labels,
            template=self.template,
            prompt=self.settings.prompt,
            objective=self.settings.objective,
            latents=Array.of(latents),
            others=self.others if any(readout and readout.others for readout in what.get("readouts", ())) else (),
            **what,
        )

    def metrics(self, round: int) -> dict[str, float]:
        """The figures kept of ``round``."""
        return next((dict(line.metrics) for line in self.store.history(self.run) if line.round == round), {})


def identity_of(settings: RunSettings, task: Task, reads: bool = True) -> str:
    """Digest of what a run must have in common with a stored one to resume it.

    ``reads``: how the task reads rows is a part of it; versions before did not store that.
    """
    texts = "\0".join([settings.identity(), task.name, *task.labels])
    digests = [*map(codec.digest, task.templates), *([task.identity.reading] if reads else ())]
    return codec.digest(Template(pattern=texts, label_words=tuple(digests)))


def is_of(run: StoredRun, settings: RunSettings, task: Task) -> bool:
    """Whether a stored run is of these settings and this task; versions before are taken to read rows as it does."""
    return run.identity in (identity_of(settings, task), identity_of(settings, task, reads=False))
