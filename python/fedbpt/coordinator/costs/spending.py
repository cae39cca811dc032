"""`Spending`: what a run has cost so far, what of it is charged to the budget, and the ε that it has spent."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from fedbpt.protocol.rounds import RoundReport
from fedbpt.runs.events import RoundPurpose
from fedbpt.runs.settings import RunSettings


class Spending:
    """Forward tokens of all devices by purpose, and seconds. The selection of the template is not charged."""

    def __init__(self) -> None:
        self.tokens_for: Counter[RoundPurpose] = Counter()
        self.seconds = 0.0
        self.charged_seconds = 0.0
        self._fewest_rows = 0  # of a device whose report counted; 0: no reports yet

    def add_reports(self, purpose: RoundPurpose, reports: Sequence[RoundReport]) -> None:
        """Count the reports of a closed round."""
        self.tokens_for[purpose] += sum(report.tokens for report in reports)
        fewest = min(report.n_texts for report in reports)
        self._fewest_rows = min(self._fewest_rows or fewest, fewest)

    def add_seconds(self, seconds: float, charged: bool) -> None:
        self.seconds += seconds
        self.charged_seconds += seconds * charged

    @property
    def tokens(self) -> int:
        return self.tokens_for.total()

    @property
    def charged_tokens(self) -> int:
        return self.tokens - self.tokens_for["selection"]

    def seconds_left(self, limit: float) -> float:
        """Seconds left of a budget of ``limit`` seconds; infinite for 0, which is no limit."""
        return limit - self.charged_seconds if limit else math.inf

    def tokens_per_second(self, n_devices: int) -> float:
        """Mean speed of one of ``n_devices`` devices; 0: nothing was charged yet."""
        return self.charged_tokens / self.charged_seconds / n_devices if self.charged_seconds else 0.0

    def reaches_limit(self, settings: RunSettings, searched: int, evaluations: int, reserve_s: float = 0.0) -> bool:
        """Whether a limit of the budget is reached, after ``searched`` rounds and ``evaluations`` of the search.

        ``reserve_s``: part of the budget in seconds that is kept for the readout.
        """
        return bool(
            (settings.rounds and searched >= settings.rounds)
            or (settings.evaluations and evaluations >= settings.evaluations)
            or (settings.tokens and self.charged_tokens >= settings.tokens)
            or (settings.seconds and self.seconds_left(settings.seconds) <= reserve_s)
        )

    def epsilon(self, settings: RunSettings, n_selected: int, searched: int, readouts: int) -> float | None:
        """ε spent on a row of the device with the fewest rows, which is taken to have reported in every round.

        None: the run is not private. ``n_selected``: templates scored by the selection (1 without one); ``searched``:
        closed rounds of the search; ``readouts``: noisy sums that were sent.
        """
        return settings.epsilon(n_selected, self._fewest_rows, searched, readouts)
