"""`Spending`: what a run has cost so far, and what of it is charged to the budget."""

from __future__ import annotations

import math
from collections import Counter

from fedbpt.runs.events import RoundPurpose


class Spending:
    """Forward tokens of all devices by what they were for, and seconds. Choosing the template is not charged."""

    def __init__(self) -> None:
        self.tokens_for: Counter[RoundPurpose] = Counter()
        self.seconds = 0.0
        self.charged_seconds = 0.0

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
        """Of a budget of ``limit`` seconds; infinite for 0, which is none."""
        return limit - self.charged_seconds if limit else math.inf

    def tokens_per_second(self, n_devices: int) -> float:
        """Of one device of ``n_devices``; 0: nothing was charged yet."""
        return self.charged_tokens / self.charged_seconds / n_devices if self.charged_seconds else 0.0
