"""`Draft`: the devices that a round of the search asks, and how many, by a hash that devices check (`Draw`)."""

from __future__ import annotations

import math
from collections.abc import Iterable

from fedbpt.coordinator.devices.call_times import DRAWN
from fedbpt.coordinator.devices.members import Cohort
from fedbpt.protocol.draws import Draw
from fedbpt.protocol.seeding import generator
from fedbpt.runs.settings import RunSettings


class Draft:
    """The draft of ``round`` of ``run``.

    Attributes:
        size: number of devices asked at once.
        share: of the devices that a round draws: `DRAWN` for each one that it asks, 0 to 1.
    """

    def __init__(self, run: str, seed: int, round: int, size: int, n_devices: int) -> None:
        self._draw = Draw(run, seed, round)
        self.size = size
        self.share = min(DRAWN * size / n_devices, 1.0)

    def draws(self, device: str) -> bool:
        """Whether ``device`` is drawn."""
        return self._draw.value(device) < self.share

    def cohort(self, names: Iterable[str], wanted: int) -> Cohort:
        """The devices ``names`` by their values. ``wanted``: number of reports that end the round."""
        values = {name: self._draw.value(name) for name in names}
        order = tuple(sorted(values, key=lambda name: (values[name], name)))
        n_drawn = sum(value < self.share for value in values.values())
        return Cohort(order, self.size, wanted, n_drawn, lambda name: self._share_with(values[name]))

    def _share_with(self, value: float) -> float:
        """The share that a device of ``value`` is drawn from: twice as large, and so on, where too few are there."""
        share = self.share
        while share <= value:
            share *= 2
        return min(share, 1.0)


def draft_size(settings: RunSettings) -> int:
    """Number of devices that a round of the search asks."""
    return math.ceil(settings.per_round * (1 + settings.over_selection))


def permuted(settings: RunSettings, round: int, names: Iterable[str]) -> Cohort:
    """The draft of runs that were begun by a version without `Draw`: a random order."""
    order = generator(settings.seed, "draft", round).permutation(sorted(names))
    return Cohort(tuple(order.tolist()), draft_size(settings), settings.per_round)
