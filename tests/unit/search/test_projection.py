"""The projection of latents to soft prompts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fedbpt.errors import ConfigError, InputError
from fedbpt.protocol.specs import PromptSpec, Shift
from fedbpt.search.projection import Projection

SPEC = PromptSpec(n_prompt=3, d=20, alpha=0.4, sigma0=0.5, seed=11)


def make(spec: PromptSpec = SPEC, n_embd: int = 16, embedding_std: float = 0.1) -> Projection:
    p0 = np.random.default_rng(0).standard_normal((spec.n_prompt, n_embd)).astype(np.float32)
    p0[0, :2] = [-0.0, 0.0]
    return Projection(spec, p0, embedding_std)


def test_z_zero_is_p0_to_the_bit_even_for_negative_zero() -> None:
    projection = make()
    embeds = projection.embeds(np.zeros((2, 20)))
    assert embeds.dtype == np.float32
    assert embeds.shape == (2, 3, 16)
    assert embeds[0].tobytes() == embeds[1].tobytes() == projection.p0.tobytes()


def test_the_entries_of_a_have_the_documented_spread() -> None:
    projection = make(PromptSpec(n_prompt=4, d=100, alpha=0.3, sigma0=0.5, seed=3), n_embd=256, embedding_std=0.13)
    columns = projection.embeds(np.eye(100)) - projection.p0
    expected = 0.3 * 0.13 / (np.sqrt(100) * 0.5)
    assert columns.std() == pytest.approx(expected, rel=0.01)
    assert abs(columns.mean()) < 5 * expected / np.sqrt(columns.size)
    assert projection.entry_stds == pytest.approx(expected)


def test_a_typical_latent_moves_the_prompt_by_alpha_embedding_stds() -> None:
    spec = PromptSpec(n_prompt=1, d=50, alpha=0.5, sigma0=2.0, seed=1)
    projection = make(spec, n_embd=512, embedding_std=0.1)
    z = 2.0 * np.random.default_rng(1).standard_normal((20, 50))
    assert (projection.embeds(z) - projection.p0).std() == pytest.approx(0.5 * 0.1, rel=0.1)


def test_a_candidate_does_not_depend_on_the_others_in_the_call() -> None:
    projection = make()
    z = np.random.default_rng(2).standard_normal((9, 20))
    together = projection.embeds(z)
    alone = np.concatenate([projection.embeds(row[None]) for row in z[::-1]])[::-1]
    assert np.array_equal(together, alone)


def test_the_map_is_affine() -> None:
    projection = make()
    a, b = np.random.default_rng(4).standard_normal((2, 20))
    moved = projection.embeds(np.stack([a, b, a + b])) - projection.p0
    np.testing.assert_allclose(moved[0] + moved[1], moved[2], atol=1e-6)


def test_same_seed_same_matrix_other_seed_other_matrix() -> None:
    z = np.ones((1, 20))
    other = PromptSpec(n_prompt=3, d=20, alpha=0.4, sigma0=0.5, seed=12)
    assert np.array_equal(make().embeds(z), make().embeds(z))
    assert not np.array_equal(make().embeds(z), make(other).embeds(z))


def test_the_callers_p0_is_copied() -> None:
    p0 = np.ones((3, 4), dtype=np.float32)
    projection = Projection(SPEC, p0, 0.1)
    p0[:] = 7
    assert (projection.embeds(np.zeros((1, 20))) == 1).all()


@pytest.mark.parametrize("z", [np.zeros(20), np.zeros((1, 19)), np.full((1, 20), np.nan), np.full((1, 20), np.inf)])
def test_bad_latents_are_refused(z: np.ndarray) -> None:
    with pytest.raises(InputError):
        make().embeds(z)


@pytest.mark.parametrize(
    ("p0", "std"),
    [(np.ones((2, 4)), 0.1), (np.ones(12), 0.1), (np.full((3, 4), np.nan), 0.1), (np.ones((3, 4)), 0.0)],
)
def test_a_bad_start_is_refused(p0: np.ndarray, std: float) -> None:
    with pytest.raises(InputError):
        Projection(SPEC, p0, std)


@pytest.mark.parametrize(
    ("placement", "layers", "sizes"),
    [
        ("layer", (), ()),
        ("layers", (0, 2), (1.0, 1.0)),
        ("layers", (0, 1), (1.0,)),
        ("layers", (1, 2), (1.0, 1.0)),
        ("layer", (0, 1), (1.0, 1.0)),
        ("cue", (1,), (1.0,)),
    ],
)
def test_a_shift_that_does_not_fit_its_placement_is_refused(
    placement: Any, layers: tuple[int, ...], sizes: tuple[float, ...]
) -> None:
    with pytest.raises(ConfigError, match="shift"):
        PromptSpec(placement=placement).shifting(Shift(layers=layers, sizes=sizes))
