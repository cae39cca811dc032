"""What a `fedbpt.coordinator.devices.fleet.Fleet` keeps: its devices, its listener, and the round that is open."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, NamedTuple

import msgspec

from fedbpt.coordinator.clients.base import DeviceClient
from fedbpt.errors import DeviceFailedError, FederationError
from fedbpt.protocol.rounds import DeviceInfo, EvaluateRequest, RoundProgress, RoundReport, SearchHistory


class Member:
    """One device of the run."""

    def __init__(self, client: DeviceClient) -> None:
        self.client = client
        self.name = client.name
        self.info: DeviceInfo | None = None
        self.state: Literal["live", "lost", "late"] = "lost"
        self.reason = "not connected yet"
        self.peak_rss_bytes = 0
        self.bytes_up_before = client.bytes_up
        self.bytes_down_before = client.bytes_down
        self.sent: set[tuple[str, int]] = set()

    def n_rows(self, request: EvaluateRequest) -> int:
        """Rows of the request's split that the device said it has."""
        if self.info is None:
            return 0
        if request.split == "held":
            held = request.held
            return 0 if held is None else min(self.info.n_train, held.max_rows or self.info.n_train) // held.n_folds
        return self.info.n_dev if request.split == "dev" else self.info.n_test

    def update_info(self, info: DeviceInfo) -> None:
        self.info = info
        self.peak_rss_bytes = max(self.peak_rss_bytes, info.peak_rss_bytes)


class Listener(NamedTuple):
    """Callbacks of the fleet, called on the event loop. The arguments begin with the device, then the round."""

    lost: Callable[[str, int, str], None]
    back: Callable[[str, int], None]
    reported: Callable[[RoundReport], None]
    late: Callable[[RoundReport], None]
    progress: Callable[[str, RoundProgress], None]
    connected: Callable[[str, DeviceInfo], None]


class Cohort(NamedTuple):
    """The devices of a round: the first ``size`` live ones of ``order``; ``wanted`` reports end the round.

    Of a draft (``n_drawn`` is a number, also 0), only devices that wait for work are asked: of the first ``n_drawn`` as
    soon as they have called; of the others, if so many are not in reach.
    ``share``: of all devices, the part that a device is drawn from (`fedbpt.protocol.draws`); None: not drawn so.
    """

    order: tuple[str, ...]
    size: int
    wanted: int
    n_drawn: int | None = None
    share: Callable[[str], float | None] = lambda _name: None


MAX_NAMED_DEVICES: Final = 5
"""Most devices that a message names."""

MAX_ATTEMPTS: Final = 3
"""How often a device may be given the same round: it may be restarted, or drop out and come back."""


@dataclass
class OpenRound:
    """A round that the fleet runs. ``budget_s``: when it ends even without reports, and without an error.

    ``barred``: devices that may not try again; ``since``: when each device was invited last, loop time.
    ``may_fill``: whether drawn devices that are to call would fill the cohort; ``filled_at``: when, loop time. It never
    becomes later, so a round with a quorum stays open for at most the first of these times.
    """

    number: int
    kind: str
    cohort: Cohort
    needed: int
    deadline_s: float
    began: float
    budget_s: float = math.inf
    history: SearchHistory | None = None
    reports: dict[str, RoundReport] = field(default_factory=dict)
    invited: Counter[str] = field(default_factory=Counter)
    barred: set[str] = field(default_factory=set)
    failures: dict[str, DeviceFailedError] = field(default_factory=dict)
    working: dict[asyncio.Task[RoundReport], Member] = field(default_factory=dict)
    ended: list[asyncio.Task[RoundReport]] = field(default_factory=list)
    since: dict[str, float] = field(default_factory=dict)
    may_fill: bool = False
    filled_at: float = math.inf

    @property
    def n_missing(self) -> int:
        """Number of devices that are yet to be asked."""
        return max(self.cohort.size - len(self.reports) - len(self.working), 0)

    @property
    def limit_s(self) -> float:
        """Time limit, seconds."""
        return min(self.deadline_s, self.budget_s)

    def may_invite(self, name: str) -> bool:
        """Whether a live device may be given the round, again or for the first time."""
        return name not in self.barred and self.invited[name] < MAX_ATTEMPTS


def describe_absent(members: Iterable[Member]) -> str:
    """`` (a: why; b: why)`` of the first `MAX_NAMED_DEVICES` members that are not live; empty: all are."""
    # A reason that comes from the device begins with its name.
    reasons = [f"{m.name}: {m.reason.removeprefix(f'{m.name}: ')}" for m in members if m.state != "live"]
    more = [f"and {len(reasons) - MAX_NAMED_DEVICES} more"] if len(reasons) > MAX_NAMED_DEVICES else []
    return f" ({'; '.join(reasons[:MAX_NAMED_DEVICES] + more)})" if reasons else ""


def common_model(infos: Sequence[DeviceInfo]) -> DeviceInfo:
    """The info of any device, with the layers that all can read; `FederationError` if their models differ."""
    by_model: dict[str, list[DeviceInfo]] = {}
    for info in infos:
        by_model.setdefault(info.model_fingerprint, []).append(info)
    if len(by_model) > 1:
        held = "; ".join(
            f"{', '.join(info.name for info in group)}: {group[0].model_name} ({fingerprint})"
            for fingerprint, group in by_model.items()
        )
        raise FederationError(
            f"the devices have different models, give all the same file: {held}", field="model_fingerprint"
        )
    # A device of an earlier version reads no layers, and then no device of the run does.
    return msgspec.structs.replace(infos[0], n_layer=min(info.n_layer for info in infos))
