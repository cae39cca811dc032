"""`LayerFit`: fits a `LayerReadout` over devices in three exchanges, by sums only.

1. Devices sum up the states of each reader, a template and a layer, for each fold of their rows
   (`fedbpt.engine.discriminant`). The pooled sums give each reader's classifier, and one without each fold.
2. Each device returns the losses of its rows under the classifiers that were fitted without their folds, for several
   λ and temperatures. A reader's weight follows from the best of its losses: exp(−(loss − lowest loss) / 0.1 nats), so
   that a reader that knows the task counts, whatever template and layer that is, and the others hardly.
3. Losses of mixtures: the weighted readers at several temperatures, plus the label words' log-probabilities at several
   scales. The best one is the readout.

The first fold only judges: no loss of its rows chooses a λ, temperature, weight or scale, and
`LayerFit.held_readout` is fitted without them, so that a run can compare on them what it might ship. (They still train
the classifiers that the other folds' losses are of, and count in the means of the label words' log-probabilities.)
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from fedbpt.aggregation.base import accepted, weighted_sum, weights_of
from fedbpt.aggregation.bounded import bounded, bounded_losses
from fedbpt.aggregation.cross_check import AGREES, agreement
from fedbpt.engine.discriminant import Discriminant, FoldSums, discriminants, pool, sketched_sums, sketching
from fedbpt.errors import InputError
from fedbpt.protocol import codec
from fedbpt.protocol.rounds import (
    N_FOLDS,
    CrossResult,
    CrossWork,
    FitPurpose,
    Reading,
    RoundReport,
    SketchResult,
    SketchWork,
    SumsResult,
    SumsWork,
    Work,
)
from fedbpt.protocol.specs import Array, LayerReadout, Template

Floats = NDArray[np.float64]

SHRINKAGES: Final = (0.6, 0.85, 0.95)
"""Values of λ that are tried."""

MANY_LABELS: Final = 20
"""With more labels one λ is tried: the classifiers that devices are sent grow with the labels."""

MANY_LABELS_SHRINKAGE: Final = 0.2
"""λ with so many labels: they have many rows together, from which the scatter within labels is well known."""

TEMPERATURES: Final = (0.03, 0.06, 0.1, 0.2, 0.35, 0.6, 1.0)
"""Factors of a classifier's logits that are tried: with few rows, LDA is far too sure."""

SOFTNESS: Final = 0.1
"""Nats of cross-validated loss by which a reader's weight falls to 1/e."""

SMALLEST_WEIGHT: Final = 0.03
"""Readers with less weight are left out."""

MIXTURE_TEMPERATURES: Final = (0.5, 0.7, 1.0, 1.4, 2.0)
WORD_SCALES: Final = (0.1, 0.2, 0.4, 0.7, 1.0)

JUDGES: Final = 0
"""The fold that chooses nothing."""

MAX_RANK: Final = 64
"""Most rows of a fold's factor that a device sends for a reader."""

MOST_COLUMNS_BYTES: Final = 11 * 2**20
"""Most bytes of the classifiers in one message, whose body has at most 16 MiB."""


def max_readers(n_labels: int, n_embd: int) -> int:
    """Readers whose classifiers, of one λ, fit into a message; at least 1."""
    return max(MOST_COLUMNS_BYTES // max(2 * N_FOLDS * n_embd * n_labels, 1), 1)


def shrinkages_for(n_labels: int, n_readers: int, n_embd: int) -> tuple[float, ...]:
    """The values of λ that are tried: one where there are many labels, or where more would not fit into a message."""
    if n_labels > MANY_LABELS:
        return (MANY_LABELS_SHRINKAGE,)
    return SHRINKAGES if n_readers * len(SHRINKAGES) <= max_readers(n_labels, n_embd) else SHRINKAGES[1:2]


class _Reader(NamedTuple):
    """A reader that a mixture may use.

    Attributes:
        view, layer: its places in the reading.
        loss: cross-validated, at the best λ and temperature, nats.
        factor: that temperature, a factor of its logits.
        whole: the classifier of all rows.
        folds: those without each fold.
    """

    view: int
    layer: int
    loss: float
    factor: float
    whole: Discriminant
    folds: tuple[Discriminant, ...]


class _Mixture(NamedTuple):
    """Weights of readers' logits [n_readers], and of the label words in the first views [n_word_views]."""

    coefficients: tuple[float, ...]
    word_scales: tuple[float, ...]


class LayerFit:
    """One fit, see `Fit`.

    Args:
        purpose: sent with the work; devices repeat it.
        reading: rows, templates and layers.
        n_labels: of the task.
        uniform: labels count equally, whatever their shares of the rows.
        base: a finished fit, which read the same layers without a prompt; its readers are mixed with those of
            ``reading``. None: there is none.
        template: of the plan; required with ``base``.
        sketched: rank of the sketches that devices send of their states' products, so that these can be added up before
            they are seen; 0: they send factors.
        seed: of the run, which the sketches' matrix is drawn from.
        bound: bound what one device decides, see `fedbpt.aggregation.bounded`; not of sketches, which are of all.
    """

    min_reports = 1

    def __init__(
        self,
        purpose: FitPurpose,
        reading: Reading,
        n_labels: int,
        uniform: bool = False,
        base: LayerFit | None = None,
        template: Template | None = None,
        sketched: int = 0,
        seed: int = 0,
        bound: bool = False,
    ) -> None:
        self.purpose: FitPurpose = purpose
        self.done = False
        self._reading = reading
        self._n_labels = n_labels
        self._uniform = uniform
        self._base = base
        self._bound = bound
        self._template = template
        self._tried: tuple[tuple[_Reader, ...], ...] = ()  # for each reader, its classifiers of each λ
        self._readers: tuple[_Reader, ...] = ()
        self._mixtures: tuple[_Mixture, ...] = ()
        self._checked: dict[str, SumsResult] = {}  # by device, until its losses have been compared with them
        self._centres: Floats = np.zeros((reading.n_word_views, n_labels))
        self._best = 0
        self.loss = float("inf")
        """Cross-validated loss of `readout` on the folds that chose it, nats."""
        self._seed = seed
        self._choosing_share: float | None = None  # of the rows that may choose; None: follows from their number
        self._work: Work = SumsWork(purpose=purpose, reading=reading, max_rank=MAX_RANK)
        if sketched:
            self._work = SketchWork(purpose=purpose, reading=reading, rank=sketched)
        self._digest = hashlib.sha256(repr((purpose, reading, n_labels, uniform)).encode())

    def __deepcopy__(self, memo: dict[int, object]) -> LayerFit:
        made = LayerFit.__new__(LayerFit)
        memo[id(self)] = made
        made.__dict__.update(self.__dict__)  # values are replaced, never changed, except for:
        made._digest = self._digest.copy()
        return made

    @property
    def reading(self) -> Reading:
        """What this fit reads."""
        return self._reading

    def work(self) -> Work:
        """What every device does in the next exchange."""
        return self._work

    def update(self, reports: Sequence[RoundReport]) -> None:
        """Close an exchange. Raises `InputError`, and changes nothing, for reports that do not fit."""
        if isinstance(self._work, SumsWork):
            self._take_sums(accepted(reports, SumsResult, self.min_reports))
        elif isinstance(self._work, SketchWork):
            self._take_sketches(accepted(reports, SketchResult, self.min_reports))
        elif not self._readers:
            self._choose_readers(self._mean_losses(reports))
        else:
            self._choose_mixture(self._mean_losses(reports))
        for report in sorted(reports, key=lambda report: report.device):
            self._digest.update(f"|{report.device}|{report.n_texts}|".encode() + codec.encode(report.result))

    def digest(self) -> str:
        """sha256 (hex) of everything that decides what comes next: all results so far."""
        return self._digest.hexdigest()

    @property
    def readout(self) -> LayerReadout:
        """The best mixture so far, fitted to all rows."""
        return self._readout([reader.whole for reader in self._readers])

    @property
    def held_readout(self) -> LayerReadout:
        """The same mixture, fitted without the fold that only judges."""
        return self._readout([reader.folds[JUDGES] for reader in self._readers])

    def contradicting(self, reports: Sequence[RoundReport]) -> list[str]:
        """The devices whose losses contradict their own sums, in the exchange that chooses the readers.

        None with ``uniform``, as losses are then weighted by label.
        """
        n_layers = len(self._reading.layers)
        columns = [(each.view * n_layers + each.layer, each.folds) for readers in self._tried for each in readers]
        found = []
        for report in reports:
            result = report.result
            if report.device in self._checked and isinstance(result, CrossResult):
                losses = result.loss_sums.numpy().sum(axis=1)
                if agreement(sums_of(self._checked[report.device]), columns, TEMPERATURES, losses) < AGREES:
                    found.append(report.device)
        return found

    # --- the exchanges -------------------------------------------------------------------------------------------

    def _take_sums(self, pairs: Sequence[tuple[RoundReport, SumsResult]]) -> None:
        self._check_shapes(pairs)
        self._checked = {report.device: result for report, result in pairs} if self._bound and not self._uniform else {}
        found = [(report.n_texts / max(sum(map(sum, result.counts)), 1), sums_of(result)) for report, result in pairs]
        means = [result.word_means.numpy().ravel() for _, result in pairs]
        self._classify(found, weights_of(pairs), means)

    def _take_sketches(self, pairs: Sequence[tuple[RoundReport, SketchResult]]) -> None:
        counts = np.sum([result.counts.numpy().sum(axis=1) for _, result in pairs], axis=0)
        self._choosing_share = float(1 - counts[JUDGES] / max(counts.sum(), 1e-9))
        found = [(1.0, _sketched_sums_of(result, self._seed)) for _, result in pairs]
        means = [result.word_means.numpy().ravel() for _, result in pairs]
        self._classify(found, weights_of(pairs), means)

    def _classify(
        self,
        found: Sequence[tuple[float, list[list[FoldSums]]]],
        shares: Floats,
        word_means: Sequence[Floats],
    ) -> None:
        """The classifiers of each reader, and their losses as the next work.

        ``found``: the sums of each device, and the weight of one of its rows.
        """
        reading = self._reading
        shrinkages = shrinkages_for(self._n_labels, reading.n_readers, reading.n_embd)
        tried = []
        for place in range(reading.n_readers):
            parts = [(fold, own, weight) for weight, sums in found for fold, own in enumerate(sums[place])]
            whole = discriminants(pool([(own, weight) for _, own, weight in parts]), shrinkages, self._uniform)
            without = [
                discriminants(pool([(own, weight) for f, own, weight in parts if f != fold]), shrinkages, self._uniform)
                for fold in range(reading.n_folds)
            ]
            view, layer = divmod(place, len(reading.layers))
            tried.append(
                tuple(
                    _Reader(view, layer, float("inf"), 1.0, whole[i], tuple(each[i] for each in without))
                    for i in range(len(shrinkages))
                )
            )
        if reading.n_word_views:
            centres = np.stack(word_means)
            centres = weighted_sum(shares, bounded(centres) if self._bound else centres)
            self._centres = centres.reshape(self._centres.shape)
        self._tried = tuple(tried)
        columns = [reader for readers in tried for reader in readers]
        coefficients = np.kron(np.eye(len(columns)), np.array(TEMPERATURES)[:, None])
        mixtures = [_Mixture(tuple(row), (0.0,) * reading.n_word_views) for row in coefficients.tolist()]
        self._work = self._cross_work(reading, columns, mixtures)

    def _check_shapes(self, pairs: Sequence[tuple[RoundReport, SumsResult]]) -> None:
        size = pairs[0][1].centres.shape[-1:]
        for report, result in pairs:
            for field, got, expected in sums_shapes(result, self._reading, self._n_labels, size):
                if got != expected:
                    raise InputError(
                        f"device {report.device} sent {field} of shape {list(got)}, expected {list(expected)}",
                        field=field,
                    )

    def _choose_readers(self, losses: Floats) -> None:
        """``losses`` [n_mixtures] of each reader by λ and temperature."""
        by_reader = losses.reshape(len(self._tried), -1, len(TEMPERATURES))
        chosen = []
        for readers, table in zip(self._tried, by_reader, strict=True):
            shrinkage, factor = np.unravel_index(int(table.argmin()), table.shape)
            chosen.append(readers[shrinkage]._replace(loss=float(table.min()), factor=TEMPERATURES[factor]))
        reading = self._reading
        if self._base is not None:
            reading, shifted = self._with_base(self._base)
            chosen += shifted
        weights = np.exp((min(reader.loss for reader in chosen) - np.array([r.loss for r in chosen])) / SOFTNESS)
        kept = weights / weights.sum() >= SMALLEST_WEIGHT
        weights = weights[kept] / weights[kept].sum()
        self._readers = tuple(reader for reader, keep in zip(chosen, kept, strict=True) if keep)
        self._reading = reading
        self._tried = ()
        self._checked = {}
        factors = [weight * reader.factor for weight, reader in zip(weights, self._readers, strict=True)]
        self._mixtures = tuple(
            _Mixture(tuple(temperature * factor for factor in factors), scales)
            for temperature in MIXTURE_TEMPERATURES
            for scales in _word_scales(reading.n_word_views)
        )
        self._best = MIXTURE_TEMPERATURES.index(1.0) * len(_word_scales(reading.n_word_views))
        self._work = self._cross_work(reading, self._readers, self._mixtures)

    def _choose_mixture(self, losses: Floats) -> None:
        self._best = int(losses.argmin())
        self.loss = float(losses.min())
        self.done = True

    def _with_base(self, base: LayerFit) -> tuple[Reading, list[_Reader]]:
        """The reading of both fits, and the readers of ``base`` in it: its templates come after the prompt's."""
        if self._template is None:
            raise InputError("a fit with a base needs the plan's template: pass it", field="template")
        templates = (self._template, *base._reading.templates)
        used = sorted({reader.view for reader in base._readers})
        reading = msgspec.structs.replace(self._reading, templates=tuple(templates[view] for view in used))
        return reading, [reader._replace(view=1 + used.index(reader.view)) for reader in base._readers]

    def _cross_work(self, reading: Reading, readers: Sequence[_Reader], mixtures: Sequence[_Mixture]) -> CrossWork:
        n_layers = len(reading.layers)
        folds = range(reading.n_folds)
        return CrossWork(
            purpose=self.purpose,
            reading=reading,
            readers=tuple(reader.view * n_layers + reader.layer for reader in readers),
            weights=Array.of(np.stack([[reader.folds[fold].weights for reader in readers] for fold in folds]), "<f2"),
            biases=Array.of(np.stack([[reader.folds[fold].bias for reader in readers] for fold in folds]), "<f4"),
            coefficients=Array.of(np.array([mixture.coefficients for mixture in mixtures]), "<f4"),
            word_scales=Array.of(np.array([mixture.word_scales for mixture in mixtures]), "<f4"),
            centres=Array.of(self._centres, "<f4"),
        )

    def _mean_losses(self, reports: Sequence[RoundReport]) -> Floats:
        """Mean loss [n_mixtures] of a row in the folds that may choose."""
        pairs = accepted(reports, CrossResult, self.min_reports)
        shape = self._work.coefficients.shape[0], self._reading.n_folds  # type: ignore[union-attr]
        for report, result in pairs:
            if result.loss_sums.shape != shape:
                raise InputError(
                    f"device {report.device} sent loss sums of shape {list(result.loss_sums.shape)}, expected "
                    f"{list(shape)}",
                    field="loss_sums",
                )
        sums = np.stack([result.loss_sums.numpy() for _, result in pairs])
        choosing = np.delete(sums, JUDGES, axis=2).sum(axis=2)
        if self._bound and self._choosing_share is None:
            rows = np.array([report.n_texts - report.n_texts // self._reading.n_folds for report, _ in pairs])
            return bounded_losses(choosing / rows[:, None], rows / rows.sum())
        n_rows: float = sum(report.n_texts - report.n_texts // self._reading.n_folds for report, _ in pairs)
        if self._choosing_share is not None:
            n_rows = self._choosing_share * sum(report.n_texts for report, _ in pairs)
        mean: Floats = choosing.sum(axis=0) / n_rows
        return mean

    def _readout(self, classifiers: Sequence[Discriminant]) -> LayerReadout:
        reading = self._reading
        size = classifiers[0].weights.shape[0]
        weights = np.zeros((reading.n_views, len(reading.layers), size, self._n_labels))
        bias = np.zeros(self._n_labels)
        mixture = self._mixtures[self._best]
        for reader, classifier, factor in zip(self._readers, classifiers, mixture.coefficients, strict=True):
            weights[reader.view, reader.layer] += factor * classifier.weights
            bias += factor * classifier.bias
        scales = np.zeros(reading.n_views)
        scales[: reading.n_word_views] = mixture.word_scales
        bias -= scales[: reading.n_word_views] @ self._centres
        used = [view for view in range(1, reading.n_views) if weights[view].any() or scales[view]]
        return LayerReadout(
            layers=reading.layers,
            weights=Array.of(weights[[0, *used]], "<f2"),
            word_scales=Array.of(scales[[0, *used]], "<f4"),
            bias=Array.of(bias, "<f4"),
            others=tuple(reading.templates[view - 1] for view in used),
        )

    def __repr__(self) -> str:
        stage = "done" if self.done else type(self._work).__name__
        return f"LayerFit({self.purpose}, {self._reading.n_readers} readers, {stage}, {self.loss:.4f} nats)"


def sums_shapes(
    result: SumsResult, reading: Reading, n_labels: int, size: tuple[int, ...]
) -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """Names, shapes and right shapes of the fields of ``result``, to be compared in order. ``size``: (n_embd,)."""
    n_folds, n_readers = reading.n_folds, reading.n_readers
    yield "counts", (len(result.counts),), (n_folds,)
    for fold in result.counts:
        yield "counts", (len(fold),), (n_labels,)
    yield "ranks", (len(result.ranks),), (n_folds,)
    n_cells = sum(count > 0 for fold in result.counts for count in fold)
    yield "centres", result.centres.shape, (n_readers, *size)
    for field, n, got in (("means", n_cells, result.means), ("factors", sum(result.ranks), result.factors)):
        yield field, got.shape, (n_readers, n, *size)
        yield field, got.scales.shape, (n_readers, *size)
        yield field, (len(got.data),), (got.n_bytes,)
    if math.prod(result.rests.shape):
        yield "rests", result.rests.shape, (n_readers, n_folds, *size)
    yield "word_means", result.word_means.shape, (reading.n_word_views, n_labels if reading.n_word_views else 0)


def sums_of(result: SumsResult) -> list[list[FoldSums]]:
    """The sums of each reader and fold."""
    counts = np.array(result.counts, dtype=np.int64)
    n_folds = len(counts)
    means = np.split(result.means.numpy() + result.centres.numpy()[:, None], _ends((counts > 0).sum(axis=1)), axis=1)
    factors = np.split(result.factors.numpy(), _ends(result.ranks), axis=1)
    rests = result.rests.numpy()
    if not rests.size:
        rests = np.zeros((result.centres.shape[0], n_folds, result.centres.shape[1]))
    return [
        [FoldSums(counts[f], means[f][place], factors[f][place], rests[place, f]) for f in range(n_folds)]
        for place in range(result.centres.shape[0])
    ]


def _sketched_sums_of(result: SketchResult, seed: int) -> list[list[FoldSums]]:
    """The sums of each reader and fold."""
    counts, sums, squares, sketches = (
        each.numpy() for each in (result.counts, result.sums, result.squares, result.sketches)
    )
    matrix = sketching(sketches.shape[2], sketches.shape[3], seed)
    folds = range(len(counts))
    return [
        [sketched_sums(counts[f], sums[place, f], squares[place, f], sketches[place, f], matrix) for f in folds]
        for place in range(len(sums))
    ]


def _ends(sizes: Sequence[int] | NDArray[np.intp]) -> NDArray[np.intp]:
    """Where each part ends, but the last."""
    return np.cumsum(sizes)[:-1]


def _word_scales(n_word_views: int) -> list[tuple[float, ...]]:
    """Scales of the label words that are tried: none, one view at a time, or the mean of all."""
    found = [(0.0,) * n_word_views]
    shares = [np.eye(n_word_views)[view] for view in range(n_word_views)]
    if n_word_views > 1:
        shares.append(np.full(n_word_views, 1 / n_word_views))
    found += [tuple((scale * share).tolist()) for share in shares for scale in WORD_SCALES]
    return found
