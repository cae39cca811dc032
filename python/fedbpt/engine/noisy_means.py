"""A classifier from one noisy sum over rows: each label's mean state, in a frame that public texts give.

Few rows cannot bear noise on a scatter matrix, but on means: a row contributes one vector of norm at most 1, so that
the sum over rows needs Gaussian noise once (`fedbpt.objective.privacy`), whatever is computed from it afterwards.

The frame is that of public texts (`fedbpt.tasks.public_texts`): states of all readers, side by side, are standardised
by their moments, projected on their first p principal components and whitened. With u a row's state there, over its
norm, s its label words' log-probabilities less their mean over labels and over public texts, clipped, and y its label,
the row contributes

    (a·e_y, b·u at y, h·s),    a : b : h = 0.3 : 1 : 0.25,    a² + b² + h² = 1

From the noisy sums, whose noise has a known variance, follow the labels' shares and means μ_k, and the mean m of all
rows. The shares, m, and in blocks of components the differences d_k = μ_k − m are shrunk by the signal that exceeds the
noise (positive-part James–Stein estimates). With v a component's variance within labels, noise included:

    logit_k = 0.25·((u − m)ᵀd_k − ½ d_kᵀd_k)/v + log share_k + 0.5·(s_k − mean of s_k)

Both factors and the shares a, b and h were chosen on training rows of three tasks (``docs/privacy.md``).
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedbpt.machine.linear_algebra import one_blas_thread

Floats = NDArray[np.float64]

_RAW: Final = np.array([0.3, 1.0, 0.25])
COUNT, STATE, WORDS = (_RAW / np.linalg.norm(_RAW)).tolist()
"""Norms that a row contributes at most: of its count, its state and its label words' scores."""

TEMPERATURE: Final = 0.25
"""Factor of the logits from states, whose components are not as independent as the model has it."""

WORD_SCALE: Final = 0.5
"""Factor of the label words' log-probabilities."""

BLOCK: Final = 16
"""Components that are shrunk alike."""

COMPONENTS: Final = 48
"""Number of components p."""

CAUTION: Final = 1.0
"""Standard errors by which a block's signal must exceed the noise's to count."""

FEWEST_COMPONENTS: Final = 32
"""The same where the noise on a label's mean state, of norm 1, has more variance than `MOST_VARIANCE`."""

MOST_VARIANCE: Final = 0.1

WORD_CLIPS: Final = 1e-3, 1e4
"""Smallest and largest norm at which label words' scores are clipped, nats."""

_SMALLEST_VARIANCE = 1e-3  # of a dimension, as a share of their mean
_FEWEST_SHARE = 0.25  # of a label, as a share of the mean share


class Frame(NamedTuple):
    """How a row's states and scores are read; public.

    Attributes:
        centre: of the states [n_dims], those of all readers side by side.
        projection: [n_dims, p].
        norm: median norm of public texts in the frame that others give.
        word_centres: mean log-probabilities of the label words [n_word_views, n_labels].
        word_clip: median norm of public texts' scores, at which rows' are clipped.
    """

    centre: Floats
    projection: Floats
    norm: float
    word_centres: Floats
    word_clip: float


class NoisySums(NamedTuple):
    """Sums over rows, with noise: of counts [n_labels], states [n_labels, p], scores [n_labels]; of norms at most 1."""

    counts: Floats
    states: Floats
    words: Floats


def n_components(noise: float, n_releases: int, n_rows: int, n_labels: int) -> int:
    """Number of components p that means of ``n_rows`` in all can bear; few with much noise.

    ``noise``: standard deviation of each of ``n_releases`` that are added up.
    """
    variance = n_releases * (noise * n_labels / (STATE * n_rows)) ** 2  # of a component of a label's mean
    return COMPONENTS if COMPONENTS * variance <= MOST_VARIANCE else FEWEST_COMPONENTS


@one_blas_thread
def public_frame(states: Floats, words: Floats, p: int) -> Frame:
    """The frame of public texts: states [n, n_dims], log-probabilities [n, n_word_views, n_labels].

    It has at most min(n, n_dims) − 1 components.
    """
    centre, projection = _components(states, p)
    _, of_half = _components(states[::2], p)
    others = (states[1::2] - states[::2].mean(axis=0)) @ of_half
    # The projection of a half has components of the same scale: each has variance 1 on the texts that gave it.
    norm = float(np.median(np.linalg.norm(others, axis=1)))
    word_centres = words.mean(axis=0)
    scores = np.linalg.norm(word_scores(words, word_centres), axis=1)
    largest = np.abs(projection).max(initial=1e-12)  # of any scale, as rows' norms are made 1: 1 suits half precision
    return Frame(
        centre,
        projection / largest,
        max(norm / largest, 1e-9),
        word_centres,
        float(np.clip(np.median(scores), *WORD_CLIPS)) if len(word_centres) else 1.0,
    )


def _components(states: Floats, p: int) -> tuple[Floats, Floats]:
    centre = states.mean(axis=0)
    variance = states.var(axis=0)
    scale = 1.0 / np.sqrt(variance + _SMALLEST_VARIANCE * variance.mean() + 1e-12)
    _, values, vectors = np.linalg.svd((states - centre) * scale, full_matrices=False)
    p = max(min(p, len(states) - 1, states.shape[1] - 1), 1)
    spread = np.maximum(values[:p], 1e-6 * values[0] + 1e-12) / np.sqrt(len(states))
    return centre, scale[:, None] * vectors[:p].T / spread


def word_scores(words: Floats, centres: Floats) -> Floats:
    """Scores s [n, n_labels] of log-probabilities [n, n_word_views, n_labels]; zeros without a view."""
    if not words.shape[1]:
        return np.zeros((len(words), words.shape[2]))
    found = (words - centres).mean(axis=1)
    return np.asarray(found - found.mean(axis=1, keepdims=True))


def clipped_sums(states: Floats, words: Floats, targets: NDArray[np.intp], frame: Frame, n_labels: int) -> NoisySums:
    """Sum of what each row contributes, without noise yet: arguments as for `public_frame`, and labels [n].

    What is not finite of a row contributes 0: it would show in the sum through any noise.
    """
    with np.errstate(all="ignore"):  # a warning, too, would tell of a row
        u = (states - frame.centre) @ frame.projection
        u /= np.maximum(np.linalg.norm(u, axis=1, keepdims=True), 1e-12)
        scores = word_scores(words, frame.word_centres) / frame.word_clip
        scores /= np.maximum(np.linalg.norm(scores, axis=1, keepdims=True), 1.0)
    u, scores = _finite_rows(u), _finite_rows(scores)
    one_hot = (targets == np.arange(n_labels)[:, None]).astype(np.float64)
    of_words = WORDS * scores.sum(axis=0) if words.shape[1] else np.zeros(n_labels)
    return NoisySums(COUNT * one_hot.sum(axis=1), STATE * (one_hot @ u), of_words)


def _finite_rows(values: Floats) -> Floats:
    """``values`` [n, m] with zeros in each row that is not finite."""
    return np.where(np.isfinite(values).all(axis=1, keepdims=True), values, 0.0)


class MeansClassifier(NamedTuple):
    """Logits: (x − centre)·weights + bias + Σ_v word_scale·(log-probabilities − their centres) over n_word_views.

    ``weights`` [n_dims, n_labels]; ``bias`` [n_labels], with all centres folded in.
    """

    weights: Floats
    word_scale: float
    bias: Floats


@one_blas_thread
def classifier(sums: NoisySums, frame: Frame, noise: float, n_rows: int) -> MeansClassifier:
    """The classifier from sums over ``n_rows``, whose noise has standard deviation ``noise``, each number's."""
    n_labels, p = sums.states.shape
    counts = _label_counts(sums.counts / COUNT, noise / COUNT, n_rows)
    noise_of_state = noise / STATE
    mean = sums.states.sum(axis=0) / STATE / n_rows
    apart = sums.states / STATE / counts[:, None] - mean
    noise_of_mean = p * n_labels * (noise_of_state / n_rows) ** 2
    of_mean = max(float(mean @ mean) - noise_of_mean, 0.0)
    mean *= of_mean / (of_mean + noise_of_mean + 1e-12)
    variance = (noise_of_state / counts) ** 2 * (1 - 1 / n_labels)  # of a component of ``apart``, by noise
    left = np.zeros(p)  # mean variance of noise that remains in each component
    for block in np.array_split(np.arange(p), max(p // BLOCK, 1)):
        chance = variance.mean() * np.sqrt(2 / (len(block) * max(n_labels - 1, 1)))  # a standard error of no signal's
        signal = max(float(((apart[:, block] ** 2).mean(axis=1) - variance).mean()) - CAUTION * chance, 0.0)
        kept = signal / (signal + variance + 1e-12)
        apart[:, block] *= kept[:, None]
        left[block] = (kept * variance).mean()
    within = max(1.0 - of_mean - float((apart**2).sum(axis=1).mean()), 0.2) / p + left.mean()
    slope = TEMPERATURE / within * apart.T  # of u, [p, n_labels]
    bias = -mean @ slope - 0.5 * TEMPERATURE / within * (apart**2).sum(axis=1) + np.log(counts / n_rows)
    weights = frame.projection @ slope / frame.norm
    bias -= frame.centre @ weights
    word_scale = 0.0
    n_views = len(frame.word_centres)
    if n_views:
        word_scale = WORD_SCALE / n_views
        means = frame.word_clip * sums.words / WORDS / n_rows
        bias -= WORD_SCALE * (frame.word_centres.mean(axis=0) + means - means.mean())
    return MeansClassifier(weights, word_scale, bias - bias.mean())


def _label_counts(noisy: Floats, noise: float, n_rows: int) -> Floats:
    """Counts of labels [n_labels], shrunk to equal ones as far as noise could have made the difference."""
    equal = n_rows / len(noisy)
    signal = max(float(((noisy - equal) ** 2).mean()) - noise**2, 0.0)
    counts = equal + (noisy - equal) * (signal / (signal + noise**2 + 1e-12))
    counts = np.maximum(counts, _FEWEST_SHARE * equal)
    return np.asarray(counts * (n_rows / counts.sum()))
