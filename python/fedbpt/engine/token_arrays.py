"""Token ids and soft prompts as the arrays that the engine takes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedbpt.argument_types import as_array
from fedbpt.errors import InputError


def token_ids(ids: ArrayLike, what: str) -> NDArray[np.int32]:
    """A 1-D int32 array of ``ids``, which ``what`` names in an error; the engine checks them against the vocabulary.

    Raises `InputError` for what is no flat sequence of integers.
    """
    array = as_array(ids, what)
    if array.ndim != 1:
        raise InputError(f"{what} must be a flat sequence of token ids, got shape {list(array.shape)}")
    if array.size == 0:
        return np.empty(0, dtype=np.int32)
    if array.dtype.kind not in "iu":
        raise InputError(f"{what} must be integers, got {array.dtype}")
    if array.max() > np.iinfo(np.int32).max or array.min() < np.iinfo(np.int32).min:
        raise InputError(f"{what} holds an id outside the vocabulary: {int(np.abs(array).max())}")
    return np.ascontiguousarray(array, dtype=np.int32)


def flat_continuations(given: Sequence[Sequence[ArrayLike]] | None, n_texts: int) -> list[NDArray[np.int32]]:
    """The continuations of all texts in one list: equally many for each text, the first text's first.

    Raises `InputError` where they are not equally many.
    """
    if given is None:
        return []
    counts = {len(of_text) for of_text in given}
    if len(given) != n_texts or len(counts) != 1:
        raise InputError(f"continuations must be equally many for each of the {n_texts} texts")
    return [token_ids(ids, f"continuation of text {i}") for i, of_text in enumerate(given) for ids in of_text]


def ragged(texts: Sequence[NDArray[np.int32]]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """N sequences as one flat array and N + 1 offsets."""
    offsets = np.zeros(len(texts) + 1, dtype=np.int64)
    np.cumsum([len(text) for text in texts], out=offsets[1:])
    return (np.concatenate(texts) if texts else np.empty(0, dtype=np.int32)), offsets


def prompt_rows(embeds: ArrayLike, n_embd: int) -> NDArray[np.float32]:
    """Soft prompts as float32 [n_candidates, n_prompt, n_embd]. Raises `InputError` for another shape."""
    given = as_array(embeds, "embeds")
    if given.dtype.kind not in "fiu":
        raise InputError(f"embeds must be real numbers, got {given.dtype}")
    with np.errstate(over="ignore"):  # too large for float32 becomes infinity, which the engine refuses
        rows = np.ascontiguousarray(given, dtype=np.float32)
    if rows.ndim == 2:
        rows = rows[None]
    if rows.ndim != 3:
        raise InputError(
            f"embeds must be [n_candidates, n_prompt, n_embd] or [n_prompt, n_embd], got shape {list(rows.shape)}"
        )
    if rows.shape[2] != n_embd:
        raise InputError(f"embeds has rows of {rows.shape[2]} numbers, but this model's n_embd is {n_embd}")
    return rows
