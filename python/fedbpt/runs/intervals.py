"""Confidence intervals of proportions."""

from __future__ import annotations

import math
from typing import Final, TypeAlias

Interval: TypeAlias = tuple[float, float]
"""Lower and upper bound."""

Z_95: Final = 1.959963984540054
"""Two-sided 95 % quantile of the standard normal distribution."""


def wilson_interval(correct: int, n: int) -> Interval:
    """95 % score interval of a proportion (E. B. Wilson, J. Am. Stat. Assoc. 22, 1927); (0, 1) for n = 0."""
    if n == 0:
        return 0.0, 1.0
    share = correct / n
    z2 = Z_95**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z_95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def beats_chance(correct: int, n: int, n_labels: int) -> bool:
    """Whether the 95 % interval of an accuracy is above that of guessing among ``n_labels``."""
    return wilson_interval(correct, n)[0] > 1 / n_labels
