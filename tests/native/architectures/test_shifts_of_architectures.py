"""Shifts of layers' outputs against transformers, for every architecture."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from test_states_of_architectures import layers_of
from tiny_case import Case

LABELS = [259, 3, 411]
NONE = np.zeros((1, 0), np.float32)


def shifted_logits(case: Case, ids: NDArray[np.int32], rows: NDArray[np.float32], at: int) -> NDArray[np.float64]:
    """Logits [n, n_vocab] of ``ids``; row i of ``rows`` is added to the output of layer i at tokens from ``at`` on."""
    import torch

    number = -1

    def shift(_module: Any, _given: Any, output: Any) -> Any:
        nonlocal number
        number += 1
        states = output[0] if isinstance(output, tuple) else output
        moved = states.clone()
        moved.reshape(-1, states.shape[-1])[at:] += torch.tensor(rows[number], dtype=states.dtype)
        return (moved, *output[1:]) if isinstance(output, tuple) else moved

    hooks = [layer.register_forward_hook(shift) for layer in layers_of(case.reference.model)]
    try:
        with torch.no_grad():
            return np.asarray(case.reference.forward(case.reference.token_embeddings(ids)), dtype=np.float64)
    finally:
        for hook in hooks:
            hook.remove()


def shifts(case: Case, ids: NDArray[np.int32], n: int) -> NDArray[np.float32]:
    """Random rows [n, n_layer, n_embd] of a third of the size of the states of ``ids``."""
    size = case.scorer.compile([ids], [], layers=range(case.scorer.n_layer)).states()[0].std(axis=1, keepdims=True)
    drawn = np.random.default_rng(5).standard_normal((n, case.scorer.n_layer, case.scorer.n_embd))
    return (drawn * size / 3).astype(np.float32)


def close(case: Case, found: NDArray[np.float32], expected: NDArray[np.float64]) -> bool:
    return bool(np.abs(found - expected).max() < 20 * case.model.tolerance * expected.std())


def test_one_layer_is_shifted_at_the_last_token(case: Case) -> None:
    texts = case.texts([5, 20, 31])
    for layer in {0, case.scorer.n_layer - 1}:
        rows = shifts(case, texts[1], 2)
        found = case.scorer.score_with_soft_prompt(texts, rows[:, layer : layer + 1], LABELS, "layer", layer=layer)
        for c in range(2):
            alone = np.zeros_like(rows[c])
            alone[layer] = rows[c, layer]
            for t, text in enumerate(texts):
                assert close(case, found[c, t], shifted_logits(case, text, alone, len(text) - 1)[-1, LABELS])


def test_all_layers_are_shifted_from_the_last_token_on(case: Case) -> None:
    [text], [end] = case.texts([20]), case.texts([4], seed=3)
    rows = shifts(case, text, 2)
    plan = case.scorer.compile([text], None, "layers", continuations=[[end, end[:1]]])
    found = plan.score(rows)[:, 0]
    for c in range(2):
        logits = shifted_logits(case, np.concatenate([text, end]), rows[c], len(text) - 1)[len(text) - 1 :]
        logits -= logits.max(axis=1, keepdims=True)
        log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        expected = np.array([log_p[np.arange(4), end].sum(), log_p[0, end[0]]])
        np.testing.assert_allclose(found[c], expected, atol=40 * case.model.tolerance * logits.std())
