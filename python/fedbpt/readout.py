"""The readout: a linear correction of the label words' logits by the logits of random other words.

Label logits are s + (1, x)·V: s of the label words, x of random words at the same position, V [1 + n_words, n_labels].
With V = 0 they are the model's own. A bias alone (n_words 0) is calibration. With as many words as the hidden state has
dimensions, x determines that state, and the readout is a linear probe (Alain & Bengio 2016, arXiv 1610.01644); with
fewer it is one on a random projection. What is ours is that it starts from the label words: the fit draws V towards 0,
so that few rows leave the model as it is.

Cross-entropy is convex in V, and a device's part is a mean over its rows: the gradient of all devices together is
exact, however skewed they are. `ReadoutFit` in ``aggregation`` minimises it by a few exchanges.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedbpt.errors import InputError
from fedbpt.messages import Readout
from fedbpt.seeding import generator

Floats = NDArray[np.float64]


def word_ids(n_vocab: int, n_words: int, seed: int, label_ids: NDArray[np.int32]) -> NDArray[np.int32]:
    """The random words [n_words] of a run, no label word among them; a smaller vocabulary repeats its own."""
    order = generator(seed, "readout").permutation(n_vocab).astype(np.int32)
    return np.resize(order[~np.isin(order, label_ids)], n_words)


def full_weights(readout: Readout | None, n_words: int, n_labels: int) -> Floats:
    """V [1 + n_words, n_labels], rows that ``readout`` does not have being 0.

    Raises:
        InputError: a readout of other labels or with more words.
    """
    full = np.zeros((1 + n_words, n_labels))
    if readout is not None:
        weights = readout.weights.numpy()
        if weights.ndim != 2 or weights.shape[1] != n_labels or not 1 <= len(weights) <= len(full):
            raise InputError(
                f"a readout's weights must have shape [1 + n_words, {n_labels}] with at most {n_words} words, "
                f"got {list(weights.shape)}"
            )
        full[: len(weights)] = weights
    return full


def read(logits: NDArray[np.floating], weights: Floats) -> Floats:
    """Label logits [..., n_labels] of logits [..., n_labels + n_words], the label words' first."""
    n_labels = weights.shape[1]
    values = np.asarray(logits, dtype=np.float64)
    label_logits: Floats = values[..., :n_labels] + weights[0]
    if weights[1:].any():
        label_logits = label_logits + values[..., n_labels:] @ weights[1:]
    return label_logits


def moments(words: Floats) -> Floats:
    """[n_words + 1] of words' logits x [n, n_words]: the means of x, and last of ‖x‖²."""
    return np.append(words.mean(axis=0), (words**2).sum() / len(words))


def loss_and_gradient(
    logits: NDArray[np.floating],
    targets: NDArray[np.intp],
    weights: Floats,
    centre: Floats | None = None,
    row_weights: Floats | float = 1.0,
) -> tuple[float, Floats]:
    """The mean over n rows of the cross-entropy, nats, and its gradient [1 + n_words, n_labels] by V.

    Args:
        logits: [n, n_labels + n_words].
        targets: label indices [n].
        weights: V [1 + n_words, n_labels]; words beyond are left out.
        centre: [n_words] to take from the words' logits in the gradient, so that little cancels in it; None: zeros.
        row_weights: [n], of the rows' cross-entropies, or one for all.
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
    return loss, features.T @ residual / len(rows)
