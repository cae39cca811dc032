"""Which layers of a model are read, and how their states are normalized."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedbpt.errors import InputError
from fedbpt.protocol.specs import Placement, PromptPlace


def default_layers(n_layer: int) -> tuple[int, ...]:
    """The layer at three quarters of the depth, and the last: the best layer differs from task to task."""
    return tuple(sorted({3 * n_layer // 4, n_layer - 1}))


def reading_layers(n_layer: int) -> tuple[int, ...]:
    """The layers that a readout chooses from: at 0.6 and 0.75 of the depth, and the last."""
    return tuple(sorted({3 * n_layer // 5, 3 * n_layer // 4, n_layer - 1}))


def logistic_layer(n_layer: int) -> int:
    """The layer that a logistic regression reads, at 0.75 of the depth: others beside it gained nothing."""
    return min(3 * n_layer // 4, n_layer - 1)


def middle_layer(n_layer: int) -> int:
    """The layer that placement ``layer`` shifts: a shift before the middle reaches the most of a model's knowledge."""
    return max(n_layer // 2 - 1, 0)


def shift_sizes(states: NDArray[np.floating], placement: PromptPlace) -> NDArray[np.float64]:
    """Sizes [n_layer] of shifts at α = 1, from ``states`` [n, n_layer, n_embd] at the cue's last token.

    ``layer``: 1.6 of the states' spread, estimated by their median, as a few numbers are far larger than the rest.
    ``layers``: 0.2 of their root mean square, as every layer is shifted. With the default α of 0.5 these are the sizes
    that were tuned for.
    """
    values = states.astype(np.float64)
    if placement == "layer":
        return np.asarray(1.6 * 1.4826 * np.median(np.abs(values), axis=(0, 2)))
    return np.asarray(0.2 * np.median(np.sqrt((values**2).mean(axis=2)), axis=0))


def check_layers(layers: Sequence[int], n_layer: int) -> tuple[int, ...]:
    """``layers`` as plain ints. Raises `InputError` unless they ascend within 0 … ``n_layer`` − 1."""
    numbers = tuple(int(layer) for layer in layers)
    for layer in numbers:
        if not 0 <= layer < n_layer:
            raise InputError(f"layers must be within 0 and {n_layer - 1}, got {layer}", field="layers")
    if sorted(set(numbers)) != list(numbers):
        raise InputError(f"layers must ascend, got {list(numbers)}", field="layers")
    return numbers


def shifted_layers(placement: Placement, layer: int | None, n_layer: int) -> tuple[int, int, bool] | None:
    """First layer, number of layers, and whether later tokens are shifted too; None: rows replace embeddings.

    Raises `InputError` for ``layer`` without placement ``layer`` or the reverse, or no such layer.
    """
    if (placement == "layer") != (layer is not None):
        raise InputError(
            f"placement {placement!r} does not fit layer {layer}: give a layer for placement 'layer' and no other",
            field="layer",
        )
    if placement == "layers":
        return 0, n_layer, True
    if layer is None:
        return None
    if not 0 <= layer < n_layer:
        raise InputError(f"layer must be within 0 and {n_layer - 1}, got {layer}", field="layer", limit=n_layer - 1)
    return layer, 1, False


def normalized(states: NDArray[np.floating]) -> NDArray[np.float64]:
    """States [..., n_embd] over their root mean square, as the next layer's norm reads them."""
    values = states.astype(np.float64)
    rms = np.sqrt((values**2).mean(axis=-1, keepdims=True))
    return np.asarray(values / np.maximum(rms, 1e-12))
