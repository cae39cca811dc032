"""Hidden states against transformers, for every architecture: in both placements, with and without logits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tiny_case import Case

LABELS = [259, 3, 411]


def layers_of(model: Any) -> list[Any]:
    """The decoder's layers, in any order: hooks run in the order of computation."""
    return [
        layer
        for name, layers in model.named_modules()
        if name.rpartition(".")[2] in ("layers", "h", "blocks")
        for layer in layers
    ]


def expected_states(case: Case, rows: NDArray[np.floating]) -> NDArray[np.float64]:
    """Outputs [n_layer, n_embd] of each layer at the last of the embedding ``rows`` [n, n_embd]."""
    found: list[NDArray[np.float64]] = []

    def keep(_module: Any, _given: Any, output: Any) -> None:
        output = output[0] if isinstance(output, tuple) else output
        found.append(output.reshape(-1, output.shape[-1])[-1].detach().numpy().astype(np.float64))

    hooks = [layer.register_forward_hook(keep) for layer in layers_of(case.reference.model)]
    import torch

    with torch.no_grad():
        case.reference.forward(rows)
    for hook in hooks:
        hook.remove()
    return np.stack(found)


@pytest.fixture(scope="module", params=["front", "cue"])
def placement(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_states_are_each_layers_output(case: Case, placement: str) -> None:
    texts, embeds = case.texts([5, 20, 31]), case.prompts(2, 3)
    layers = range(case.scorer.n_layer)
    plan = case.scorer.compile(texts, LABELS, placement, layers=layers)
    logits, states = plan.score_states(embeds)
    np.testing.assert_array_equal(logits, case.scorer.compile(texts, LABELS, placement).score(embeds))
    assert states.shape == (2, 3, len(layers), case.scorer.n_embd)
    for c, rows in enumerate(embeds):
        for t, text in enumerate(texts):
            own = case.reference.token_embeddings(text)
            joined = np.concatenate([rows, own] if placement == "front" else [own[: len(own) - len(rows)], rows])
            expected = expected_states(case, joined)
            error = np.abs(states[c, t] - expected).max(axis=1) / expected.std(axis=1)
            assert (error < 10 * case.model.tolerance).all(), error
