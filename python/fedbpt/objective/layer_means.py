"""What a device computes for a readout with privacy: states of public texts, and noisy sums of its rows' states."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedbpt.engine.noisy_means import Frame, NoisySums, clipped_sums
from fedbpt.errors import InputError
from fedbpt.machine.linear_algebra import one_blas_thread
from fedbpt.objective.layer_view import Views
from fedbpt.objective.privacy import Releases
from fedbpt.protocol.rounds import MeansResult, MeansWork, PublicResult, PublicWork
from fedbpt.protocol.specs import Array, Quantized

Floats = NDArray[np.float64]


def public_result(work: PublicWork, views: Views) -> PublicResult:
    """The result of ``work`` from ``views`` of its texts."""
    states = _side_by_side(views).reshape(len(views.states), work.reading.n_readers, -1)
    centres = states.mean(axis=0).astype(np.float32).astype(np.float64)
    return PublicResult(
        purpose=work.purpose,
        centres=Array.of(centres, "<f4"),
        states=Quantized.of(np.moveaxis(states - centres, 1, 0)),
        words=Array.of(views.words, "<f4"),
    )


@one_blas_thread
def means_result(
    work: MeansWork, views: Views, targets: NDArray[np.intp], n_labels: int, releases: Releases, devices: int = 1
) -> MeansResult:
    """The noisy sums of ``work``: label indices [n] of the rows of ``views``. Raises `InputError` for other shapes.

    ``devices``: see `Releases.noisy`.
    """
    n_readers, n_embd = work.reading.n_readers, views.states.shape[3]
    word_shape = (views.words.shape[1], n_labels if views.words.shape[1] else 0)
    projection = work.projection.numpy()
    for field, found, expected in (
        ("centre", work.centre.shape, (n_readers, n_embd)),
        ("projection", projection.shape, (n_readers, n_embd, *projection.shape[2:3])),
        ("word_centres", work.word_centres.shape, word_shape),
    ):
        if found != expected or len(projection.shape) != 3:
            raise InputError(f"{field} must have shape {list(expected)}, got {list(found)}", field=field)
    frame = Frame(
        centre=work.centre.numpy().ravel(),
        projection=projection.reshape(n_readers * n_embd, -1),
        norm=1.0,  # of no account: a row's is made 1
        word_centres=work.word_centres.numpy(),
        word_clip=work.word_clip,
    )
    exact = clipped_sums(_side_by_side(views), views.words, targets, frame, n_labels)
    noisy = NoisySums(*releases.noisy(*exact, devices=devices))
    return MeansResult(
        purpose=work.purpose,
        label_sums=Array.of(noisy.counts),
        state_sums=Array.of(noisy.states, "<f4"),
        word_sums=Array.of(noisy.words),
    )


def _side_by_side(views: Views) -> Floats:
    """States [n, n_readers · n_embd]."""
    return np.asarray(views.states.reshape(len(views.states), -1).astype(np.float64))
