"""Conversion of token ids and soft prompts to the arrays that the native engine takes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedbpt.argument_types import as_array
from fedbpt.errors import InputError


def token_ids(ids: ArrayLike, name: str) -> NDArray[np.int32]:
    """Convert ``ids`` to a 1-D int32 array; the engine checks them against the vocabulary.

    Raises `InputError`, with ``name`` as the argument's name, if they are not a flat sequence of integers.
    """
    array = as_array(ids, name)
    if array.ndim != 1:
        raise InputError(f"{name} must be a flat sequence of token ids, got shape {list(array.shape)}", field=name)
    if array.size == 0:
        return np.empty(0, dtype=np.int32)
    if array.dtype.kind not in "iu":
        raise InputError(f"{name} must be integers, got {array.dtype}", field=name)
    limits = np.iinfo(np.int32)
    if array.max() > limits.max or array.min() < limits.min:
        outside = int(array.max()) if array.max() > limits.max else int(array.min())
        raise InputError(f"{name} must be token ids of the vocabulary, got {outside}", field=name)
    return np.ascontiguousarray(array, dtype=np.int32)


def flat_continuations(given: Sequence[Sequence[ArrayLike]] | None, n_texts: int) -> list[NDArray[np.int32]]:
    """Flatten the continuations of all texts into one list, in the order of the texts.

    Raises `InputError` if the texts differ in their number of continuations.
    """
    if given is None:
        return []
    counts = {len(of_text) for of_text in given}
    if len(given) != n_texts or len(counts) != 1:
        raise InputError(
            f"each of the {n_texts} texts must have the same number of continuations", field="continuations"
        )
    return [token_ids(ids, f"continuation of text {i}") for i, of_text in enumerate(given) for ids in of_text]


def ragged(texts: Sequence[NDArray[np.int32]]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Pack N sequences into one flat array and N + 1 offsets."""
    offsets = np.zeros(len(texts) + 1, dtype=np.int64)
    np.cumsum([len(text) for text in texts], out=offsets[1:])
    return (np.concatenate(texts) if texts else np.empty(0, dtype=np.int32)), offsets


def prompt_rows(embeds: ArrayLike, n_embd: int) -> NDArray[np.float32]:
    """Convert soft prompts to float32 [n_candidates, n_prompt, n_embd]. Raises `InputError` for another shape."""
    given = as_array(embeds, "embeds")
    if given.dtype.kind not in "fiu":
        raise InputError(f"embeds must be real numbers, got {given.dtype}", field="embeds")
    with np.errstate(over="ignore"):  # values too large for float32 become infinity, which the engine rejects
        rows = np.ascontiguousarray(given, dtype=np.float32)
    if rows.ndim == 2:
        rows = rows[None]
    if rows.ndim != 3:
        raise InputError(
            f"embeds must have shape [n_candidates, n_prompt, n_embd] or [n_prompt, n_embd], got {list(rows.shape)}",
            field="embeds",
        )
    if rows.shape[2] != n_embd:
        raise InputError(
            f"the last axis of embeds must be this model's n_embd of {n_embd}, got {rows.shape[2]}", field="embeds"
        )
    return rows
