"""Compact plans and reports, which the receiver expands by replaying CMA-ES, since that depends only on ranks.

A plan holds a `ReplayWork` instead of a state of thousands of numbers: the device keeps the search and feeds it the
ranks that are new to it. A report holds a `RanksResult` instead of a mean: the coordinator repeats the device's search.

Replaying is exact with the same machine code; otherwise a last bit may differ. So a digest of the full message is sent
along, and if it does not match, the full message is sent. The digest is of float32 values, which rarely differ.
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
"""Codes by which a device requests more ranks or the state, or (older versions) does not know the compact form."""

_KEPT_SEARCHES = 4  # one per run


def short_plan(plan: RoundPlan, history: SearchHistory, known: int) -> RoundPlan:
    """Compact a plan of `PooledWork` for a device that knows the ranks before generation ``known``."""
    new = msgspec.structs.replace(history, ranks=history.ranks[(known - history.first) * history.popsize :])
    return msgspec.structs.replace(plan, work=ReplayWork(history=new, known=known, plan_digest=codec.digest(plan)))


class Replayer:
    """A device's copies of its runs' searches. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._searches: OrderedDict[str, tuple[bytes, CmaSearch]] = OrderedDict()

    def whole(self, plan: RoundPlan) -> RoundPlan:
        """Expand a compact plan; any other plan is returned as is.

        Raises:
            WireError: malformed ranks, or more bytes of them than the state has; a state that no message could hold.
            DeviceRefusedError: ``unknown-search``: this device lacks generations before `ReplayWork.known`, and needs
                all ranks; ``replay-differs``: replaying gives another state, and this device needs the state.
        """
        if not isinstance(plan.work, ReplayWork):
            return plan
        work = plan.work
        popsize = work.history.popsize
        _check_bounds(work, plan.prompt.d)
        ranks = _generations(work.history.ranks, popsize)
        with self._lock:
            search = self._search(plan, work, work.known + len(ranks))
            with np.errstate(all="ignore"):  # overflows are rejected below
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
                    f"replaying run {plan.run!r} gives a state outside the limits of a message: {error}"
                ) from error
            if digest != work.plan_digest:
                del self._searches[plan.run]
                raise DeviceRefusedError(
                    f"replaying run {plan.run!r} gives a different state here: send the state", "replay-differs"
                )
        return whole

    def _search(self, plan: RoundPlan, work: ReplayWork, wanted: int) -> CmaSearch:
        """The run's search at a generation from ``work.known`` to ``wanted``, kept or new."""
        origin = msgspec.structs.replace(work.history, ranks=b"")
        key = msgspec.msgpack.encode((origin, plan.prompt.d, plan.seed))
        kept = self._searches.get(plan.run)
        if kept is None or kept[0] != key or not work.known <= kept[1].generation <= wanted:
            if work.known != origin.first:
                raise DeviceRefusedError(
                    f"this device lacks the search of run {plan.run!r} before generation {work.known}: send all ranks",
                    "unknown-search",
                )
            search = CmaSearch(
                d=plan.prompt.d,
                sigma0=origin.sigma0,
                popsize=origin.popsize,
                seed=plan.seed,
                covariance=origin.covariance,
                step_size=origin.step_size,
                start=None if origin.start is None else origin.start.numpy(),
                first=origin.first,
            )
            kept = key, search
        self._searches[plan.run] = kept
        self._searches.move_to_end(plan.run)
        while len(self._searches) > _KEPT_SEARCHES:
            self._searches.popitem(last=False)
        return kept[1]


def may_shorten(work: object) -> bool:
    """Whether a report on ``work`` may be compact: repeating a search with a full covariance is too expensive."""
    return isinstance(work, LocalWork) and work.state.covariance is None


def short_report(report: RoundReport) -> RoundReport:
    """Compact a report to a `RanksResult` if it has ranks; else return it as is."""
    result = report.result
    if not isinstance(result, LocalResult) or not result.ranks:
        return report
    check = _check(result.mean.numpy(), result.sigma_squares)
    return msgspec.structs.replace(report, result=RanksResult(ranks=result.ranks, fitness=result.fitness, check=check))


def whole_report(report: RoundReport, plan: RoundPlan) -> RoundReport | None:
    """Expand a compact report by repeating the search of ``plan``; None if the result differs here.

    Any other report is returned as is. Raises `WireError` for malformed ranks.
    """
    result = report.result
    work = plan.work
    if not isinstance(result, RanksResult) or not isinstance(work, LocalWork):
        return report
    ranks = _generations(result.ranks, work.popsize)
    if len(ranks) != work.iterations:
        raise WireError(f"expected ranks of {work.iterations} generations, got {len(ranks)}", field="ranks")
    found: LocalSearch = local_search(work, local_seed(plan), lambda _latents, iteration: ranks[iteration])
    if _check(found.mean, found.sigma_squares) != result.check:
        return None
    return msgspec.structs.replace(report, result=found.with_fitness(result.fitness))


def _check_bounds(work: ReplayWork, d: int) -> None:
    """Check that a compact plan requires no more computation than a full one could. Raises `WireError`."""
    state_bytes = 12 * d if work.history.covariance == "diagonal" else 8 * d * d
    if state_bytes > codec.MAX_BODY_BYTES or len(work.history.ranks) > state_bytes:
        problem = f"{len(work.history.ranks)} ranks are too many for a search in {d} dimensions"
        raise WireError(f"{problem}: send the state", field="ranks")
    if not 1 / codec.MAX_NORM <= work.history.sigma0 <= codec.MAX_NORM:
        bounds = f"from {1 / codec.MAX_NORM:g} to {codec.MAX_NORM:g}"
        raise WireError(f"sigma0 must be {bounds}, got {work.history.sigma0:g}", field="sigma0")


def _generations(ranks: bytes, popsize: int) -> Floats:
    """Decode ranks [n, popsize]. Raises `WireError` unless each row is a permutation."""
    if len(ranks) % popsize:
        raise WireError(f"the number of ranks must be a multiple of {popsize}, got {len(ranks)}", field="ranks")
    rows = np.frombuffer(ranks, dtype=np.uint8).reshape(-1, popsize)
    if (np.sort(rows, axis=1) != np.arange(popsize)).any():
        raise WireError(f"ranks of a generation must be 0 to {popsize - 1}, each once", field="ranks")
    return rows.astype(np.float64)


def _check(mean: Floats, sigma_squares: float) -> str:
    values = np.append(mean, sigma_squares).astype("<f4")
    return hashlib.sha256(values.tobytes()).hexdigest()[:32]
