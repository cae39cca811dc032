"""What a fleet knows of each of its devices, whom it tells, and whom it asks."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, NamedTuple

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
        self.reason = "not asked yet"
        self.peak_rss_bytes = 0
        self.bytes_up_before = client.bytes_up
        self.bytes_down_before = client.bytes_down
        self.sent: set[tuple[str, int]] = set()

    def n_rows(self, request: EvaluateRequest) -> int:
        """How many rows of the kind that ``request`` is for it said to have."""
        if self.info is None:
            return 0
        return self.info.n_dev if request.split == "dev" else self.info.n_test

    def heard(self, info: DeviceInfo) -> None:
        self.info = info
        self.peak_rss_bytes = max(self.peak_rss_bytes, info.peak_rss_bytes)


class Listener(NamedTuple):
    """Whom the fleet tells what happens. All are called on the event loop."""

    lost: Callable[[str, int, str], None]
    back: Callable[[str, int], None]
    late: Callable[[RoundReport], None]
    progress: Callable[[str, RoundProgress], None]
    met: Callable[[str, DeviceInfo], None]


class Draft(NamedTuple):
    """Whom a round asks: the first ``asked`` live devices of ``order``; ``wanted`` reports end it."""

    order: tuple[str, ...]
    asked: int
    wanted: int


MAX_NAMED: Final = 5
"""Devices that a line names at most."""

INVITATIONS: Final = 3
"""How often a device may be given the same round: it may be restarted or drop out and come back."""


@dataclass
class OpenRound:
    """Where a round stands while the fleet runs it. ``budget_s``: when it ends without reports, and without fault."""

    number: int
    kind: str
    draft: Draft
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

    @property
    def limit_s(self) -> float:
        """Longest that it takes."""
        return min(self.deadline_s, self.budget_s)

    def may_ask(self, name: str) -> bool:
        """Whether a device that is live may be asked, again or at all."""
        return name not in self.barred and self.invited[name] < INVITATIONS


def describe_absent(members: Iterable[Member]) -> str:
    """`` (a: why; b: why)`` of those that are not live, the first `MAX_NAMED` of them; empty: all are."""
    # A reason that the device gave itself begins with its name already.
    reasons = [f"{m.name}: {m.reason.removeprefix(f'{m.name}: ')}" for m in members if m.state != "live"]
    more = [f"and {len(reasons) - MAX_NAMED} more"] if len(reasons) > MAX_NAMED else []
    return f" ({'; '.join(reasons[:MAX_NAMED] + more)})" if reasons else ""


def common_model(infos: Sequence[DeviceInfo]) -> DeviceInfo:
    """The info of a device with the model that all have. Raises `FederationError` where they have different ones."""
    by_model: dict[str, list[DeviceInfo]] = {}
    for info in infos:
        by_model.setdefault(info.model_fingerprint, []).append(info)
    if len(by_model) > 1:
        held = "; ".join(
            f"{', '.join(info.name for info in group)}: {group[0].model_name} ({fingerprint})"
            for fingerprint, group in by_model.items()
        )
        raise FederationError(f"the devices have different models, give all the same file: {held}")
    return infos[0]
