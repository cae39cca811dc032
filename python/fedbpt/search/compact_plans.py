"""Short forms of what crosses the wire: the other side makes the whole by replaying CMA-ES, which reads ranks alone.

Down, a `ReplayWork` instead of a state of thousands of numbers: the device keeps the search and tells it the ranks that
it has not heard of. Up, a `RanksResult` instead of a mean: the coordinator repeats the device's search.

Replaying is exact where the same machine code does it. Elsewhere a last bit may differ; so a digest of the whole goes
along, and where it does not fit, the whole is sent. A digest is of float32, which such a bit rarely reaches.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from typing import Final

import msgspec
import numpy as np

from fedbpt.errors import DeviceRefusedError, WireError
from fedbpt.protocol import codec
from fedbpt.protocol.rounds import (
    LocalResult,
    LocalWork,
    PooledWork,
    RanksResult,
    ReplayWork,
    RoundPlan,
    RoundReport,
    SearchHistory,
)
from fedbpt.search.cma_es import CmaSearch
from fedbpt.search.local_search import LocalSearch, local_search, local_seed
from fedbpt.search.population import Floats

REFUSALS: Final = frozenset({"unknown-search", "replay-differs", "malformed"})
"""Codes by which a device says that it needs more, or (older ones) that it does not know the short form."""

_KEPT_SEARCHES = 4  # one a run


def short_plan(plan: RoundPlan, history: SearchHistory, known: int) -> RoundPlan:
    """``plan``, whose work is a `PooledWork`, for a device that has been told the ranks before generation ``known``."""
    unheard = msgspec.structs.replace(history, ranks=history.ranks[(known - history.first) * history.popsize :])
    return msgspec.structs.replace(plan, work=ReplayWork(history=unheard, known=known, plan_digest=codec.digest(plan)))


class Replayer:
    """A device's copies of its runs' searches. Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._searches: OrderedDict[str, tuple[bytes, CmaSearch]] = OrderedDict()

    def whole(self, plan: RoundPlan) -> RoundPlan:
        """The plan that ``plan`` is short for; itself, where it is none.

        Raises:
            WireError: ranks that are none, or more than the state would take; a state that no message could hold.
            DeviceRefusedError: ``unknown-search``: the search is not here up to `ReplayWork.known`, all of its ranks
                are needed; ``replay-differs``: its state is another here, the state is needed.
        """
        if not isinstance(plan.work, ReplayWork):
            return plan
        work, popsize = plan.work, plan.work.history.popsize
        _check_bounds(work, plan.prompt.d)
        ranks = _generations(work.history.ranks, popsize)
        with self._lock:
            search = self._search(plan, work, work.known + len(ranks))
            with np.errstate(all="ignore"):  # what overflows is refused below
                for generation in ranks[search.generation - work.known :]:
                    search.tell(generation)
                state = PooledWork(state=search.state(), generation=search.generation, popsize=popsize)
            whole = msgspec.structs.replace(plan, work=state)
            try:
                codec.check(whole)
                digest = codec.digest(whole)
            except (WireError, msgspec.ValidationError) as error:
                del self._searches[plan.run]
                raise WireError(
                    f"replaying run {plan.run!r} gives a state that no message may hold: {error}"
                ) from error
            if digest != work.plan_digest:
                del self._searches[plan.run]
                raise DeviceRefusedError(
                    f"replaying run {plan.run!r} gives another state here: send the state", "replay-differs"
                )
        return whole

    def _search(self, plan: RoundPlan, work: ReplayWork, wanted: int) -> CmaSearch:
        """This run's search, not further than generation ``wanted`` and at ``work.known`` at least."""
        began = msgspec.structs.replace(work.history, ranks=b"")
        key = msgspec.msgpack.encode((began, plan.prompt.d, plan.seed))
        kept = self._searches.get(plan.run)
        if kept is None or kept[0] != key or not work.known <= kept[1].generation <= wanted:
            if work.known != began.first:
                raise DeviceRefusedError(
                    f"the search of run {plan.run!r} is not here up to generation {work.known}: send all of its ranks",
                    "unknown-search",
                )
            start = None if began.start is None else began.start.numpy()
            search = CmaSearch(
                plan.prompt.d, began.sigma0, began.popsize, plan.seed, began.covariance, began.step_size, start,
                began.first,
            )  # fmt: skip
            kept = key, search
        self._searches[plan.run] = kept
        self._searches.move_to_end(plan.run)
        while len(self._searches) > _KEPT_SEARCHES:
            self._searches.popitem(last=False)
        return kept[1]


def may_shorten(work: object) -> bool:
    """Whether a report on ``work`` may come short: not where repeating a search is dear, with a full covariance."""
    return isinstance(work, LocalWork) and work.state.covariance is None


def short_report(report: RoundReport) -> RoundReport:
    """``report`` with a `RanksResult`, where the ranks are known; else itself."""
    result = report.result
    if not isinstance(result, LocalResult) or not result.ranks:
        return report
    check = _check(result.mean.numpy(), result.sigma_squares)
    return msgspec.structs.replace(report, result=RanksResult(ranks=result.ranks, fitness=result.fitness, check=check))


def whole_report(report: RoundReport, plan: RoundPlan) -> RoundReport | None:
    """The report that ``report`` is short for, by repeating the search of ``plan``; None: it comes out otherwise here.

    Raises `WireError` for ranks that are none.
    """
    result, work = report.result, plan.work
    if not isinstance(result, RanksResult) or not isinstance(work, LocalWork):
        return report
    ranks = _generations(result.ranks, work.popsize)
    if len(ranks) != work.iterations:
        raise WireError(f"the report has ranks of {len(ranks)} generations, the plan asks for {work.iterations}")
    found: LocalSearch = local_search(work, local_seed(plan), lambda _latents, iteration: ranks[iteration])
    if _check(found.mean, found.sigma_squares) != result.check:
        return None
    return msgspec.structs.replace(report, result=found.with_fitness(result.fitness))


def _check_bounds(work: ReplayWork, d: int) -> None:
    """A short plan must not make a device compute what a whole one could not ask for."""
    state_bytes = 12 * d if work.history.covariance == "diagonal" else 8 * d * d
    if state_bytes > codec.MAX_BODY_BYTES or len(work.history.ranks) > state_bytes:
        raise WireError(f"{len(work.history.ranks)} ranks of a search in {d} dimensions: send the state")
    if not 1 / codec.MAX_NORM <= work.history.sigma0 <= codec.MAX_NORM:
        raise WireError(f"a search cannot begin with sigma0 = {work.history.sigma0:g}")


def _generations(ranks: bytes, popsize: int) -> Floats:
    """Ranks [n, popsize]; raises `WireError` unless each row is a permutation."""
    if len(ranks) % popsize:
        raise WireError(f"{len(ranks)} ranks are not of whole generations of {popsize}")
    rows = np.frombuffer(ranks, dtype=np.uint8).reshape(-1, popsize)
    if (np.sort(rows, axis=1) != np.arange(popsize)).any():
        raise WireError(f"ranks of a generation must be 0 to {popsize - 1}, each once")
    return rows.astype(np.float64)


def _check(mean: Floats, sigma_squares: float) -> str:
    values = np.append(mean, sigma_squares).astype("<f4")
    return hashlib.sha256(values.tobytes()).hexdigest()[:32]
