"""The readout: a linear correction of the label words' logits by the logits of random other words.

Label logits are s + (1, x)·V: s those of the label words, x those of random words at the same position, V of shape
[1 + n_words, n_labels]. With V = 0 they are the model's own; with only a bias (n_words 0) this is calibration. With as
many words as the hidden state has dimensions, x determines that state, and the readout is a linear probe (Alain &
Bengio 2016, arXiv 1610.01644); with fewer it is a probe of a random projection. Unlike a probe it starts from the label
words: the fit shrinks V towards 0, so that with few rows the model stays as it is.

Cross-entropy is convex in V, and a device's part is a mean over its rows: the pooled gradient of all devices is exact,
however skewed their data. `ReadoutFit` in ``aggregation`` minimises it in a few exchanges.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedbpt.errors import InputError
from fedbpt.machine.linear_algebra import product
from fedbpt.objective.losses import log_probabilities
from fedbpt.protocol.rounds import FitResult, FitWork
from fedbpt.protocol.seeding import generator
from fedbpt.protocol.specs import Array, Readout

Floats = NDArray[np.float64]


def word_ids(n_vocab: int, n_words: int, seed: int, label_ids: NDArray[np.int32]) -> NDArray[np.int32]:
    """Draw a run's random words [n_words], excluding label words; words repeat if the vocabulary is too small."""
    order = generator(seed, "readout").permutation(n_vocab).astype(np.int32)
    return np.resize(order[~np.isin(order, label_ids)], n_words)


def full_weights(readout: Readout | None, n_words: int, n_labels: int) -> Floats:
    """V [1 + n_words, n_labels] of ``readout``, padded with zero rows.

    Raises:
        InputError: a readout with another number of labels, or with more words.
    """
    full = np.zeros((1 + n_words, n_labels))
    if readout is not None:
        weights = readout.weights.numpy()
        if weights.ndim != 2 or weights.shape[1] != n_labels or not 1 <= len(weights) <= len(full):
            raise InputError(
                f"a readout's weights must have shape [1 + n_words, {n_labels}] with at most {n_words} words, "
                f"got {list(weights.shape)}",
                field="readout",
                limit=n_words,
            )
        full[: len(weights)] = weights
    return full


def read(logits: NDArray[np.floating], weights: Floats) -> Floats:
    """Label logits [..., n_labels] from logits [..., n_labels + n_words], the label words' first."""
    n_labels = weights.shape[1]
    values = np.asarray(logits, dtype=np.float64)
    label_logits: Floats = values[..., :n_labels] + weights[0]
    if weights[1:].any():
        label_logits = label_logits + product(values[..., n_labels:], weights[1:])
    return label_logits


def blocks(readout: Readout | None, n_words: int, n_labels: int) -> Floats:
    """V of all templates [n_templates, 1 + n_words, n_labels], the prompt's own first."""
    others = () if readout is None else readout.others
    return np.stack(
        [
            full_weights(readout, n_words, n_labels),
            *(full_weights(Readout(weights=weights), n_words, n_labels) for weights in others),
        ]
    )


def ensemble(logits: Sequence[NDArray[np.floating]], weights: Floats) -> Floats:
    """Label logits [..., n_labels] from all templates: their mean log-probabilities; for one template, its logits.

    A geometric mean of separately fitted experts (Hinton 2002, Neural Computation 14).

    Args:
        logits: for each template, as `read` takes them.
        weights: V of all templates [n_templates, 1 + n_words, n_labels].
    """
    found = [read(own, v) for own, v in zip(logits, weights, strict=True)]
    if len(found) == 1:
        return found[0]
    mean: Floats = np.mean([log_probabilities(one) for one in found], axis=0)
    return mean


def moments(words: Floats) -> Floats:
    """Moments [n_words + 1] of words' logits x [n, n_words]: the means of x, then the mean of ‖x‖²."""
    return np.append(words.mean(axis=0), (words**2).sum() / len(words))


def loss_and_gradient(
    logits: NDArray[np.floating],
    targets: NDArray[np.intp],
    weights: Floats,
    centre: Floats | None = None,
    row_weights: Floats | float = 1.0,
) -> tuple[float, Floats]:
    """Mean cross-entropy of n rows in nats, and its gradient [1 + n_words, n_labels] with respect to V.

    Args:
        logits: [n, at least n_labels + n_words]; the logits of further words are ignored.
        targets: label indices [n].
        weights: V [1 + n_words, n_labels].
        centre: subtracted from the words' logits [n_words] in the gradient, to reduce cancellation; None: zeros.
        row_weights: weights [n] of the rows' cross-entropies, or one for all.
    """
    n_labels = weights.shape[1]
    found = read(logits[:, : n_labels + len(weights) - 1], weights)
    found -= found.max(axis=1, keepdims=True)
    log_sum = np.log(np.exp(found).sum(axis=1))
    rows = np.arange(len(targets))
    scale = np.broadcast_to(row_weights, len(rows))
    loss = float((scale * (log_sum - found[rows, targets])).mean())
    residual = np.exp(found - log_sum[:, None])
    residual[rows, targets] -= 1
    residual *= scale[:, None]
    words = logits[:, n_labels : n_labels + len(weights) - 1] - (0.0 if centre is None else centre)
    features = np.concatenate([np.ones((len(rows), 1)), words], axis=1)
    return loss, product(features.T, residual) / len(rows)


def fit_result(
    work: FitWork,
    logits: NDArray[np.floating],
    targets: NDArray[np.intp],
    bias: Readout | None,
    n_labels: int,
    row_weights: Floats | float = 1.0,
) -> FitResult:
    """Compute a device's result of ``work`` from its rows' ``logits`` [n_templates, n, at least n_labels + n_words].

    Other arguments as for `loss_and_gradient`; ``bias`` corrects the first template's label words.
    Raises `InputError` if the shapes in ``work`` disagree.
    """
    n_templates, n_words = 1 + len(work.others), work.n_words
    used = logits[..., : n_labels + n_words].astype(np.float64)
    if work.readout is None:
        plain = full_weights(bias, 0, n_labels)
        loss, _ = loss_and_gradient(used[0], targets, plain, None, row_weights)
        of_words = np.stack([moments(own[:, n_labels:]) for own in used])
        return FitResult(purpose=work.purpose, loss=loss, means=Array.of(of_words, "<f4"))
    weights = blocks(work.readout, n_words, n_labels)
    if len(weights) != n_templates:
        raise InputError(
            f"the readout must have the work's {n_templates} templates, got {len(weights)}", field="readout"
        )
    centres = np.zeros(n_templates * n_words) if work.centre is None else work.centre.numpy()
    if centres.shape != (n_templates * n_words,):
        raise InputError(
            f"the centre must have shape [{n_templates * n_words}], got {list(centres.shape)}", field="centre"
        )
    found = [
        loss_and_gradient(own, targets, v, centre, row_weights)
        for own, v, centre in zip(used, weights, centres.reshape(n_templates, n_words), strict=True)
    ]
    gradients = np.stack([gradient for _, gradient in found])
    loss = float(np.mean([loss for loss, _ in found]))
    # float16, as this is the largest upload; centring keeps its rounding harmless. The largest float16 is 65504.
    packed = Array.of(gradients, "<f2" if np.abs(gradients).max() < 6e4 else "<f4")
    return FitResult(purpose=work.purpose, loss=loss, means=packed)
