"""`fedbpt.aggregation.bounded`: no single device decides, and devices that differ honestly count as they are."""

from __future__ import annotations

import numpy as np
import pytest

from fedbpt.aggregation.base import weighted_sum
from fedbpt.aggregation.bounded import MOST_APART, bounded, bounded_losses, levelled

HONEST = np.array([[0.50, 0.60, 0.90], [0.55, 0.62, 0.85], [0.40, 0.52, 0.75], [0.61, 0.74, 1.10]])
EQUAL = np.full(5, 0.2)


def with_liar(losses: list[float]) -> np.ndarray:
    return np.vstack([HONEST, losses])


@pytest.mark.parametrize("lie", [[9e3, 0.0, 0.0], [9e3, 9e3, 0.0], [0.0, -1e3, 9e3]])
def test_a_device_that_praises_the_worst_option_does_not_choose_it(lie: list[float]) -> None:
    losses = with_liar(lie)
    assert weighted_sum(EQUAL, losses).argmin() != 0
    assert bounded_losses(losses, EQUAL).argmin() == 0


def test_what_a_liar_adds_is_at_most_its_share_of_the_bound() -> None:
    differences = HONEST - HONEST[:, :1]
    widest = np.ptp(differences, axis=0)
    for lie in ([0.0, 1e4, 1e4], [1e4, 0.0, 0.0]):
        found = bounded_losses(with_liar(lie), EQUAL)
        moved = (found - found[0]) - weighted_sum(np.full(4, 0.25), differences)
        assert (np.abs(moved) <= 0.2 * (1 + 2 * MOST_APART) * widest).all()


def test_devices_that_differ_count_nearly_as_they_are() -> None:
    """Two of five have other labels, and prefer another option by far."""
    losses = np.array([[0.3, 0.9], [0.3, 1.0], [0.4, 0.9], [1.5, 0.2], [1.4, 0.3]])
    np.testing.assert_allclose(bounded_losses(losses, EQUAL), losses.mean(axis=0), atol=0.05)


@pytest.mark.parametrize("k", [1, 2])
def test_without_a_majority_means_are_plain(k: int) -> None:
    losses = HONEST[:k] * 1e3
    shares = np.full(k, 1 / k)
    np.testing.assert_array_equal(bounded_losses(losses, shares), weighted_sum(shares, losses))
    np.testing.assert_array_equal(levelled(losses), losses - losses.mean(axis=1, keepdims=True))


def test_the_loudest_losses_are_levelled_and_the_others_left() -> None:
    rng = np.random.default_rng(0)
    losses = rng.standard_normal((6, 16)) + 3.0
    losses[5] = 1e3 * losses[5]
    found = levelled(losses)
    np.testing.assert_allclose(found[:5], (losses - losses.mean(axis=1, keepdims=True))[:5])
    norms = np.linalg.norm(found, axis=1)
    assert norms[5] == pytest.approx(1.5 * norms[:5].max())


def test_where_most_have_equal_losses_the_others_still_rank_candidates() -> None:
    losses = np.zeros((6, 4))
    losses[0] = [0.0, 1.0, 1.0, 1.0]
    assert levelled(losses)[0].argmin() == 0


def test_arrays_of_callers_are_not_changed() -> None:
    losses = with_liar([9e3, 0.0, 0.0])
    before = losses.copy()
    bounded(losses), bounded_losses(losses, EQUAL), levelled(losses)
    np.testing.assert_array_equal(losses, before)
