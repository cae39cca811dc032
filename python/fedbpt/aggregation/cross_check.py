"""Which devices' sums of hidden states mislead: others' rows are predicted worse with them than without.

The sums of `fedbpt.engine.discriminant` tell how a classifier does on a device's rows: their label means have known
logits, and their scatter the variance around them. So the coordinator cross-checks devices without asking them. The
error of a classifier on rows of label y is the share of the other labels z that it puts before y,

    mean over z of P(g_z > g_y),    g_y − g_z taken as normal, with the mean and the variance of the rows,

which needs no temperature. Labels that the classifier has not seen are left out of it.

A device misleads where both hold:

1. its labels contradict the others': classifiers fitted to the other devices put pairs of its rows, of two labels,
   the right way round far more often if each of its labels is exchanged for the one that its rows look most like. What
   all its rows have in common, such as a language or a register, cancels in such pairs (the error is one less the area
   under the ROC curve), and where labels differ in other ways than the others', no exchange helps much;
2. on other devices' rows of the labels that it has, classifiers fitted with its sums, each without one fold, are wrong
   more often than those fitted without them, so much that it matters.

More honest rows of a label make others' rows of it be read better, however the device's labels are skewed, so it fails
the second. Rows of another domain may make others' be read worse, but their labels do not contradict: they fail the
first. Where fewer than two others have its labels, nobody can tell, and it stays. ``docs/robustness.md`` has figures.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedbpt.engine.discriminant import SMOOTHING, Discriminant, FoldSums, Pooled, discriminants, pool
from fedbpt.protocol.seeding import generator

Floats = NDArray[np.float64]

FEWEST_DEVICES: Final = 3
"""With fewer there is no majority."""

CONTRADICTED: Final = 0.4
"""By how much the error on pairs of a device's rows must fall if its labels are exchanged for those they look like.

Of liars it fell by 0.43 to 0.78, of another task's rows with labels of this one by up to 0.38, mostly below 0.2."""

MOST_GROUPS: Final = 10
"""Most classifiers of a reader that judge devices by their own rows: more devices are left out together."""

SURE: Final = 1.0
"""Standard errors by which others' rows must be predicted worse."""

LEAST: Final = 0.003
"""Accuracy that others lose at least: devices that together cost them less stay."""

FEWEST_JUDGES: Final = 2
"""Devices with `KNOWN` rows of a label that judge it at least: one may have made them up."""

KNOWN: Final = 4
"""Rows of a label from which a classifier is taken to know it."""

SHRINKAGE: Final = 0.85
"""λ of the classifiers."""

AGREES: Final = 0.5
"""`agreement` below which losses contradict sums."""

_DRAWS: Final = 16  # of a normal distribution, for the expected losses

_LOGISTIC: Final = 1.702  # x·this is the logit of the normal distribution at x, up to 0.01


class DeviceSums(NamedTuple):
    """Sums of one device: ``sums`` [n_readers][n_folds], and the weight of one of its rows."""

    sums: Sequence[Sequence[FoldSums]]
    weight: float


def misleading(devices: Sequence[DeviceSums]) -> list[int]:
    """Places in ``devices`` of those that mislead; again without these, as one can hide another.

    At most a third of them is found, the worst first: where more disagree with the rest, it is not known who is right.
    """
    most = len(devices) // 3
    found: list[int] = []
    left = list(range(len(devices)))
    while len(left) >= FEWEST_DEVICES and len(found) < most:
        worst = [left[place] for place in _worst([devices[i] for i in left])]
        if not worst:
            break
        found += worst[: most - len(found)]
        left = [i for i in left if i not in found]
    return sorted(found)


def _worst(devices: Sequence[DeviceSums]) -> list[int]:
    """The places of the devices that mislead, the worst first."""
    readers = [_Reader([(each.sums[place], each.weight) for each in devices]) for place in range(len(devices[0].sums))]
    errors, pairs = (
        np.stack(each) for each in zip(*(reader.errors() for reader in readers), strict=True)
    )  # [n_readers, n_devices]
    # A reader that cannot tell the median device's labels apart tells nothing of the others.
    knows = np.maximum(0.5 - np.median(errors, axis=1), 0.0)
    if not knows.any():
        return []
    contradicted = knows @ pairs / knows.sum()
    counts = np.stack([np.sum([sums.counts for sums in each.sums[0]], axis=0) for each in devices])
    suspects = np.flatnonzero((contradicted >= CONTRADICTED) & (contradicted * np.sqrt(counts.sum(axis=1)) >= 1))
    costs = {}
    jury = np.flatnonzero(contradicted < CONTRADICTED)  # those that lie alike would praise each other
    if len(jury) < FEWEST_JUDGES:
        return []
    for suspect in suspects:
        shares = _judged(counts[jury], counts[suspect])
        if not shares.any():
            continue
        asked = [reader.made_worse_by(int(suspect), jury) for reader in np.array(readers)[knows > 0]]
        worse = np.tensordot(knows[knows > 0] / knows.sum(), np.stack([each for each, _ in asked]), 1)
        costs[int(suspect)] = _cost(worse, asked[0][1], shares)
    ranked = sorted((place for place in costs if costs[place] > 0), key=costs.__getitem__)
    n_stay = np.count_nonzero(np.cumsum([costs[place] for place in ranked]) < LEAST)
    return ranked[n_stay:][::-1]


def _judged(jury: Floats | NDArray[np.int64], claimed: Floats | NDArray[np.int64]) -> Floats:
    """The ``claimed`` rows [n_labels] of the labels that enough of the ``jury`` [n_jury, n_labels] have rows of.

    All 0 where these are less than half of those claimed: then nobody can tell.
    """
    judged = np.where((jury >= KNOWN).sum(axis=0) >= FEWEST_JUDGES, claimed, 0).astype(np.float64)
    return judged if 2 * judged.sum() >= claimed.sum() else np.zeros_like(judged)


def _cost(worse: Floats, rows: Floats, shares: Floats) -> float:
    """Accuracy that others lose, if rows are predicted worse by more than `SURE` standard errors over devices; else 0.

    Args:
        worse: rows more that are predicted wrong [n_devices, n_labels].
        rows: of which these are.
        shares: weights of the labels [n_labels], those that a suspect has and the others can judge.
    """
    n = len(worse)

    def change(kept: NDArray[np.intp]) -> float:
        totals = rows[kept].sum(axis=0)
        judged = np.where(totals > 0, shares, 0.0)
        rates = worse[kept].sum(axis=0) / np.where(totals > 0, totals, 1.0)
        return float(judged @ rates / max(judged.sum(), 1e-9))

    everybody = np.arange(n)
    found = change(everybody)
    error = np.sqrt((n - 1) * np.var([change(np.delete(everybody, i)) for i in everybody]))  # jackknife
    # Of K labels, the share of wrong predictions is up to K − 1 times the mean over the other labels.
    n_others = max(np.count_nonzero(rows.sum(axis=0)) - 1, 1)
    return n_others * found if found > SURE * error else 0.0


class _Reader:
    """The sums that all devices have of one reader: (sums of each fold, weight of a row) of each."""

    def __init__(self, devices: Sequence[tuple[Sequence[FoldSums], float]]) -> None:
        self._devices = devices
        self._folds = range(len(devices[0][0]))

    @cached_property
    def _fitted(self) -> list[Discriminant]:
        """The classifiers of all devices without each fold."""
        return [self._fit(fold, ())[0] for fold in self._folds]

    def errors(self) -> tuple[Floats, Floats]:
        """Errors on each device's own rows of classifiers without them, and `_contradiction`; both [n_devices].

        0: these know none of its labels.
        """
        n = len(self._devices)
        found, pairs = np.zeros(n), np.zeros(n)
        for group in range(min(n, MOST_GROUPS)):
            places = range(group, n, MOST_GROUPS)
            fitted, known = self._fit(None, places)
            for place in places:
                folds = self._devices[place][0]
                judged = [_errors(sums, fitted, known) for sums in folds]
                rows = sum(float(n.sum()) for _, n in judged)
                found[place] = sum(float(wrong.sum()) for wrong, _ in judged) / rows if rows else 0.0
                pairs[place] = _contradiction(pool([(sums, 1.0) for sums in folds]), fitted, known)
        return found, pairs

    def made_worse_by(self, suspect: int, jury: Sequence[int] | NDArray[np.intp]) -> tuple[Floats, Floats]:
        """How many rows more of each device of ``jury`` are predicted wrong with those of ``suspect``, and its rows.

        Both [n_jury, n_labels], of the labels that the others know, and weighted.
        """
        without = [self._fit(fold, (suspect,)) for fold in self._folds]
        shape = len(jury), len(self._devices[0][0][0].counts)
        worse, rows = np.zeros(shape), np.zeros(shape)
        for i, place in enumerate(jury):
            folds, weight = self._devices[place]
            for sums, with_it, (without_it, known) in zip(folds, self._fitted, without, strict=True):
                wrong, n = _errors(sums, with_it, known)
                worse[i] += weight * (wrong - _errors(sums, without_it, known)[0])
                rows[i] += weight * n
        return worse, rows

    def _fit(self, fold: int | None, left_out: Sequence[int]) -> tuple[Discriminant, NDArray[np.bool_]]:
        """The classifier without ``fold`` and devices, and the labels that it knows [n_labels]."""
        parts = [
            (sums, weight)
            for place, (folds, weight) in enumerate(self._devices)
            for f, sums in enumerate(folds)
            if f != fold and place not in left_out
        ]
        pooled = pool(parts)
        return discriminants(pooled, [SHRINKAGE], uniform=True)[0], pooled.counts >= KNOWN


def _errors(sums: FoldSums, fitted: Discriminant, known: NDArray[np.bool_]) -> tuple[Floats, Floats]:
    """Rows of each label times their error, and rows, of the labels that are ``known``; all [n_labels]."""
    wrong, rows = np.zeros(len(known)), np.zeros(len(known))
    present = np.flatnonzero(sums.counts)
    freedom = max(float(sums.counts.sum()) - len(present), 1.0)
    logits = sums.means @ fitted.weights + fitted.bias
    scatter = sums.factor @ fitted.weights
    for place, label in enumerate(present):
        others = known.copy()
        others[label] = False
        if not known[label] or not others.any():
            continue
        apart = fitted.weights[:, [label]] - fitted.weights[:, others]
        variance = ((scatter[:, [label]] - scatter[:, others]) ** 2).sum(axis=0) + sums.rest @ apart**2
        margins = (logits[place, label] - logits[place, others]) / np.sqrt(variance / freedom + 1e-12)
        rows[label] = sums.counts[label]
        wrong[label] = rows[label] * np.mean(1 / (1 + np.exp(np.clip(_LOGISTIC * margins, -50, 50))))
    return wrong, rows


def _contradiction(own: Pooled, fitted: Discriminant, known: NDArray[np.bool_]) -> float:
    """By how much the error of ``fitted`` on pairs of rows falls, if labels are exchanged for those they look like.

    Of two ``known`` labels each; 0: there are no such pairs.
    """
    present = np.flatnonzero((own.counts > 0) & known)
    first, second = np.triu_indices(len(present), 1)
    if not len(first):
        return 0.0
    means = own.means[present]
    logits = means @ fitted.weights[:, present]
    alike = (logits - logits.mean(axis=0)).argmax(axis=1)
    freedom = max(float(own.counts.sum()) - np.count_nonzero(own.counts), 1.0)
    counts = own.counts[present]
    shares = np.minimum(counts[first], counts[second])  # pairs weigh by the rows of the rarer label

    def error(taken_for: NDArray[np.intp]) -> float:
        apart = fitted.weights[:, present[taken_for[first]]] - fitted.weights[:, present[taken_for[second]]]
        variance = ((own.factor @ apart) ** 2).sum(axis=0) + own.rest @ apart**2
        margins = ((means[first] - means[second]) * apart.T).sum(axis=1) / np.sqrt(2 * variance / freedom + 1e-12)
        wrong = 1 / (1 + np.exp(np.clip(_LOGISTIC * margins, -50, 50)))
        return float(shares @ wrong / shares.sum())

    return error(np.arange(len(present))) - error(alike)


# --- losses against sums ---------------------------------------------------------------------------------------------


def agreement(
    sums: Sequence[Sequence[FoldSums]],
    classifiers: Sequence[tuple[int, Sequence[Discriminant]]],
    temperatures: Sequence[float],
    losses: Floats,
) -> float:
    """Rank correlation of a device's ``losses`` with those that its own ``sums`` let expect, −1 to 1.

    Losses are expected as if its rows were normal with the sums' means and scatter. That is crude, but what a
    classifier does on rows and on their like differs far less than what good and bad classifiers do: honest devices had
    0.92 or more, whatever their rows and labels, and ones with inverted losses −0.95 or less.

    Args:
        sums: of each reader and fold.
        classifiers: the reader of each, and those that were fitted without each fold.
        temperatures: factors of their logits.
        losses: summed over rows, of each classifier at each temperature, flat.
    """
    expected = np.zeros((len(classifiers), len(temperatures)))
    draws = generator(0, "expected").standard_normal((_DRAWS, max(len(own.factor) for own in sums[0])))
    factors = np.array(temperatures)[:, None, None]
    for place, (reader, fitted) in enumerate(classifiers):
        for own, found in zip(sums[reader], fitted, strict=True):
            present = np.flatnonzero(own.counts)
            freedom = max(float(own.counts.sum()) - len(present), 1.0)
            means = own.means @ found.weights + found.bias
            noise = draws[:, : len(own.factor)] @ (own.factor @ found.weights) / np.sqrt(freedom)
            for mean, label in zip(means, present, strict=True):
                logits = (mean + noise) * factors
                logits -= logits.max(axis=2, keepdims=True)
                targets = (1 - SMOOTHING) * logits[..., label] + SMOOTHING * logits.mean(axis=2)
                rows = np.log(np.exp(logits).sum(axis=2)) - targets
                expected[place] += own.counts[label] * rows.mean(axis=1)
    return float(np.corrcoef(_ranks(expected.ravel()), _ranks(losses))[0, 1])


def _ranks(values: Floats) -> NDArray[np.intp]:
    return np.argsort(np.argsort(values, kind="stable"), kind="stable")
