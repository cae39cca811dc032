"""Bytes that the fits of layer readouts cost a device, as `fedbpt.coordinator.costs.estimate` counts them."""

from __future__ import annotations

from typing import Final

from fedbpt.aggregation import logistic_fit
from fedbpt.aggregation.layer_fit import (
    MAX_RANK,
    MIXTURE_TEMPERATURES,
    SMALLEST_WEIGHT,
    TEMPERATURES,
    WORD_SCALES,
    shrinkages_for,
)
from fedbpt.aggregation.means_fit import N_PUBLIC
from fedbpt.coordinator.layer_reading import within_message
from fedbpt.engine.layers import reading_layers
from fedbpt.engine.noisy_means import COMPONENTS
from fedbpt.protocol.rounds import N_FOLDS, DeviceInfo
from fedbpt.secure.sizes import sketch_rank

EXCHANGES: Final = 3
"""Exchanges of a fit by sums: sums, each reader's losses, losses of mixtures."""

MEANS_EXCHANGES: Final = 2
"""Exchanges of a private readout: public texts, noisy sums."""

LOGISTIC_EXCHANGES: Final = logistic_fit.EXCHANGES
"""Most exchanges of a fit by gradients, after that of moments."""


def layer_bytes(
    n_labels: int,
    n_word_views: int,
    n_views: int,
    n_rows: int,
    info: DeviceInfo,
    n_readouts: int,
    secure: bool = False,
) -> tuple[int, int]:
    """Bytes (up, down) of the arrays in the exchanges of all fits.

    Args:
        n_labels: of the task.
        n_word_views: views of the probe in which the label words are scored; 0: states alone are read.
        n_views: views of the probe.
        n_rows: rows of the device that are fitted.
        info: the device's.
        n_readouts: fits with a prompt, beside that of the probe.
        secure: states are summed up in sketches.
    """
    layers, n_views = within_message(reading_layers(info.n_layer), n_views, n_labels, info.n_embd, secure)
    n_layers, n_word_views = len(layers), min(n_word_views, n_views)
    most_kept = int(1 / SMALLEST_WEIGHT)
    probe = n_views * n_layers
    up = down = 0
    fits = [(probe, probe, n_word_views)] + n_readouts * [(n_layers, n_layers + probe, 1)]
    for n_readers, n_mixed, n_words in fits:
        sums = _sketches(n_labels, n_readers, info.n_embd) if secure else _sums(n_labels, n_rows, info.n_embd)
        up += n_readers * sums + 4 * n_words * n_labels
        n_columns = n_readers * len(shrinkages_for(n_labels, n_readers, info.n_embd))
        n_scales = 1 + len(WORD_SCALES) * (n_words + (n_words > 1))
        tables = (
            (n_columns, n_columns * len(TEMPERATURES)),
            (
                min(n_mixed, most_kept),
                len(MIXTURE_TEMPERATURES) * n_scales,
            ),
        )
        for columns, n_mixtures in tables:
            up += 4 * n_mixtures * N_FOLDS
            down += N_FOLDS * columns * n_labels * (2 * info.n_embd + 4) + 4 * n_mixtures * (columns + n_words)
    return up, down


def means_bytes(n_labels: int, n_word_views: int, n_views: int, info: DeviceInfo) -> tuple[int, int]:
    """Bytes (up, down) of the arrays in both exchanges of a private readout."""
    layers, n_views = within_message(reading_layers(info.n_layer), n_views, n_labels, info.n_embd)
    n_dims = n_views * len(layers) * info.n_embd
    up = n_dims * (N_PUBLIC // 2 + 6) + 4 * n_word_views * n_labels * N_PUBLIC + 4 * n_labels * (COMPONENTS + 4)
    return up, n_dims * (4 + 2 * COMPONENTS) + 4 * n_word_views * n_labels


def logistic_bytes(
    n_labels: int, n_word_views: int, n_views: int, n_embd: int, judged: bool, n_readouts: int
) -> tuple[int, int]:
    """Bytes (up, down) of the arrays in the exchanges of the probe and ``n_readouts``, if all are needed."""
    n_points = 1 + judged
    scalars = 4 * (n_word_views + n_labels)
    moments = 8 * n_views * n_embd + 4 * n_word_views * (n_labels + 1)
    point = 2 * n_views * n_embd * n_labels + scalars
    up = moments + LOGISTIC_EXCHANGES * n_points * (point + 4)
    down = LOGISTIC_EXCHANGES * (n_points * point + 4 * n_views * n_embd + 4 * n_word_views * n_labels)
    return (1 + n_readouts) * up, (1 + n_readouts) * down


def _sketches(n_labels: int, n_readers: int, n_embd: int) -> int:
    """Bytes of a reader's sums in a secure run, 4 a number."""
    return 4 * N_FOLDS * n_embd * (n_labels + 1 + sketch_rank(n_readers, N_FOLDS, n_labels, n_embd))


def _sums(n_labels: int, n_rows: int, n_embd: int) -> int:
    """Bytes of a reader's sums."""
    fold = -(-n_rows // N_FOLDS)
    labels = min(n_labels, fold)
    rank = fold - labels
    n_sent = labels + min(rank, MAX_RANK, n_embd)
    rests = 4 * N_FOLDS if rank > MAX_RANK else 0
    return n_embd * (N_FOLDS * n_sent // 2 + 8 + rests)
