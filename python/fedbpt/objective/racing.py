"""Racing: a candidate that cannot reach the better half of its population any more stops early.

CMA-ES learns from the order of the better half; what the others lose exactly matters little. Losses are never negative,
so that a sum over some texts is a lower bound of the sum over all. With N texts, k candidates, a better half of μ:

1. All candidates are scored on the first ¾ of the texts, those that are likely to be hard first.
2. The μ leaders, those with the smallest sums, are scored on the rest. Let B be the largest of their totals.
3. Of the others, those with a sum above B are dropped, after ¾ and again after ⅞ of the texts; what remains is scored.

The error probability is zero: μ candidates have a total of B at most, so a candidate with a sum above B is none of the
best μ. The better half, its set and its order, is that of scoring everything. The order of the texts decides what is
saved and nothing else: hard texts first leave little of a loss unseen. At most (1 − μ/k)/4 of the work is saved.

Races began with Maron & Moore (NIPS 1994, Hoeffding's bound); Heidrich-Meisner & Igel (ICML 2009) brought them to
CMA-ES, with Bernstein's bound; Birattari et al. (GECCO 2002, F-race) used paired tests. Those draw texts at random and
may err. Prompts differ from each other by far less than texts do: a paired t-test with an error probability of 0.05
saved less here than the bound that cannot err (docs/algorithm.md).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray

from fedbpt.errors import InputError

Floats: TypeAlias = NDArray[np.float64]
Indices: TypeAlias = NDArray[np.intp]
Score: TypeAlias = Callable[[Indices, Indices], Floats]
"""Losses [c, n] of the candidates [c] on the texts [n], both ascending indices."""

MIN_TEXTS = 16
"""With fewer nobody is dropped: more calls on fewer texts would cost more than they save."""

_SLACK = 1e-9  # of B and of one nat: more than rounding can do to a sum


class Race(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """How k candidates came in.

    Args:
        losses: float64 [k], mean losses, as a search may be told them. For a candidate that was scored on all texts,
            the mean over them; for a dropped one an estimate, with the leaders' mean loss on each text that it
            has not seen, which is never below those of the better half.
        n_scored: int [k], on how many texts each was scored.
    """

    losses: Floats
    n_scored: Indices


def race(score: Score, difficulty: Callable[[], Floats], n_candidates: int, n_texts: int, *, n_better: int) -> Race:
    """Score candidates on texts and drop those that cannot be among the ``n_better`` best any more.

    Every candidate meets a text in the same block of texts, so that rounding by the company of other texts is common
    to all. No pair of a candidate and a text is asked for twice.

    Args:
        score: asked for a block of texts under the candidates still racing. Its losses must not be negative.
        difficulty: a guess [N] at how large a loss each text has; asked once, where anyone may be dropped.
        n_candidates: k.
        n_texts: N.
        n_better: μ.

    Raises:
        InputError: ``n_better`` outside 1…k.
    """
    if not 1 <= n_better <= n_candidates:
        raise InputError(f"n_better must lie in 1..{n_candidates}, the number of candidates, got {n_better}")
    order, cuts = np.arange(n_texts), list[int]()
    if n_texts >= MIN_TEXTS and n_better < n_candidates:
        order, cuts = np.argsort(-difficulty(), kind="stable"), [n_texts * 3 // 4, n_texts * 7 // 8]
    first, *later = (np.sort(block) for block in np.split(order, cuts))
    values = np.zeros((n_candidates, n_texts))
    n_scored = np.zeros(n_candidates, dtype=np.intp)

    def run(who: Indices, block: Indices) -> None:
        values[np.ix_(who, block)] = score(who, block)
        n_scored[who] += len(block)

    run(np.arange(n_candidates), first)
    by_sum = np.argsort(values.sum(axis=1), kind="stable")
    leaders, others = np.sort(by_sum[:n_better]), np.sort(by_sum[n_better:])
    for block in later:
        run(leaders, block)
    bound = values[leaders].sum(axis=1).max()
    for block in later:
        others = others[~(values[others].sum(axis=1) > bound + _SLACK * max(1.0, bound))]
        if len(others):
            run(others, block)
    for candidate, seen in enumerate(n_scored):
        unseen = order[seen:]
        values[candidate, unseen] = values[np.ix_(leaders, unseen)].mean(axis=0)
    return Race(losses=values.sum(axis=1) / n_texts, n_scored=n_scored)
