"""`RunReport`: quality under a budget, cost to a target, and what faults cost, of a stored run.

These are the three questions of EdgeFlowerTune (arXiv 2605.08636) about tuning on real devices.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

from fedbpt.coordinator.monitoring.round_figures import evaluations_in, numbers_of
from fedbpt.runs.dev_figures import dev_points
from fedbpt.runs.settings import stored_settings
from fedbpt.runs.store import RoundHistory, RunStore

BYTES_UP: Final = "bytes_up"
BYTES_DOWN: Final = "bytes_down"
"""Metrics of a round: bytes of message bodies from and to all devices since the start of the run."""

SHARES: Final = (0.1, 0.25, 0.5, 1.0)
"""Shares of what the run spent that are shown as budgets."""


class Spent(NamedTuple):
    """What a run had spent by the end of a round, over all devices. None: unknown.

    ``seconds`` are those of its rounds, ``device_seconds`` those that devices worked, from which ``joules`` follow.
    """

    evaluations: int
    tokens: int
    seconds: float
    device_seconds: float
    bytes_up: float | None
    bytes_down: float | None
    joules: float | None


class Measured(NamedTuple):
    """An evaluation on development rows: ``figure`` is accuracy (0 to 1) or, for target texts, perplexity."""

    round: int
    figure: float
    n: int
    spent: Spent


class Within(NamedTuple):
    """The best evaluation within a budget; None: there is none."""

    resource: str
    budget: float
    best: Measured | None


class Faults(NamedTuple):
    """What faults cost.

    Attributes:
        rounds: closed ones.
        expected: reports that all devices that were asked would have made.
        counted: reports that were used.
        late: reports that came after their round was closed.
        left_out_seconds: of rounds that were given up.
        lost: by device, how often it was lost, and the last reason.
    """

    rounds: int
    expected: int
    counted: int
    late: int
    left_out_seconds: float
    lost: Mapping[str, tuple[int, str]]


class RunReport(NamedTuple):
    """What a run reached, what it cost, and what faults cost.

    Attributes:
        run, task, model: names.
        generates: the figure is perplexity, lower is better.
        points: the evaluations on development rows.
        budgets: the best figure within shares of what the run spent of each resource.
        total: what the run spent.
        peak_rss_bytes: of the device that used most memory.
        target: the figure that was asked for; None: none was.
        reached: the first evaluation that reached it; None: none did.
        faults: what they cost.
    """

    run: str
    task: str
    model: str
    generates: bool
    points: tuple[Measured, ...]
    budgets: tuple[Within, ...]
    total: Spent
    peak_rss_bytes: int
    target: float | None
    reached: Measured | None
    faults: Faults


def report_of(store: RunStore, run: str, target: float | None = None, watts: float | None = None) -> RunReport:
    """The report of ``run``.

    Args:
        target: accuracy (0 to 1), or perplexity for target texts, whose cost is wanted.
        watts: power of a working device, for joules.

    Raises:
        StoreError: an unknown run.
    """
    found = store.get_run(run)
    settings = stored_settings(found.settings)
    rounds = list(store.rounds(run))  # first: a round that is closed meanwhile has no figures below
    history = store.history(run)
    by_round = {line.round: line.metrics for line in history}
    spent: dict[int, Spent] = {}
    power = None if settings.privacy is not None else watts  # private reports have no seconds
    evaluations, tokens, seconds, working = 0, 0, 0.0, 0.0
    counted = 0
    expected = 0
    n_all = len(store.devices(run))
    peak = max((each.peak_rss_bytes for each in store.traffic(run).values()), default=0)
    for stored in rounds:
        closed = numbers_of(stored)
        counted += len(closed.shares)
        evaluations += evaluations_in(closed, settings) if closed.purpose == "search" else 0
        tokens += sum(share.tokens for share in closed.shares)
        figures = by_round.get(stored.round, {})
        seconds += figures.get("seconds", 0.0) + figures.get("cut_seconds", 0.0)
        drafted = settings.per_round if closed.purpose == "search" else 0
        expected += min(drafted or n_all, n_all)
        peak = max(peak, *(report.peak_rss_bytes for report in stored.reports))
        working += sum(share.seconds for share in closed.shares)
        spent[stored.round] = Spent(
            evaluations,
            tokens,
            seconds,
            working,
            figures.get(BYTES_UP),
            figures.get(BYTES_DOWN),
            None if power is None else power * working,
        )
    nothing = Spent(0, 0, 0.0, 0.0, 0.0, 0.0, None if power is None else 0.0)
    generates = settings.objective.loss == "nll"
    points = tuple(
        Measured(point.round, point.figure, point.n, _spent_by(spent, point.round, nothing))
        for point in dev_points(by_round, generates)
    )
    total = _spent_by(spent, max(spent, default=-1), nothing)
    return RunReport(
        run=run,
        task=found.task,
        model=found.model_name,
        generates=generates,
        points=points,
        budgets=tuple(_budgets(points, total, generates)),
        total=total,
        peak_rss_bytes=peak,
        target=target,
        reached=None if target is None else next((p for p in points if _reaches(p, target, generates)), None),
        faults=_faults(history, len(spent), expected, counted),
    )


def _spent_by(spent: Mapping[int, Spent], round: int, nothing: Spent) -> Spent:
    before = [closed for closed in spent if closed <= round]
    return spent[max(before)] if before else nothing


def _reaches(point: Measured, target: float, generates: bool) -> bool:
    return point.figure <= target if generates else point.figure >= target


def _budgets(points: Sequence[Measured], total: Spent, generates: bool) -> list[Within]:
    sign = -1 if generates else 1
    found = []
    for resource in ("bytes_up", "seconds", "tokens", "joules"):
        whole = getattr(total, resource)
        for share in SHARES if whole else ():
            budget = share * whole
            able = [point for point in points if _within(getattr(point.spent, resource), budget)]
            found.append(Within(resource, budget, max(able, key=lambda point: sign * point.figure, default=None)))
    return found


def _given_up(metrics: Mapping[str, float]) -> float:
    return max(metrics.get("cut_seconds", 0.0) - metrics.get("look_seconds", 0.0), 0.0)


def _within(cost: float | None, budget: float) -> bool:
    return cost is not None and cost <= budget


def _faults(history: Sequence[RoundHistory], n_rounds: int, expected: int, counted: int) -> Faults:
    times: Counter[str] = Counter()
    reasons: dict[str, str] = {}
    for line in history:
        times.update(list(line.lost))
        reasons.update(line.lost)
    return Faults(
        rounds=n_rounds,
        expected=expected,
        counted=counted,
        late=sum(len(line.late) for line in history),
        left_out_seconds=sum(_given_up(line.metrics) for line in history),
        lost={name: (n, reasons[name]) for name, n in sorted(times.items())},
    )
