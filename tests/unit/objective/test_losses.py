"""Losses of label logits."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedbpt.errors import InputError
from fedbpt.objective.losses import balanced_weights, cross_entropy, hinge
from tests.support.raises import raises


def test_cross_entropy_by_hand() -> None:
    logits = [[[0.0, 0.0], [0.0, math.log(3)]]]
    np.testing.assert_allclose(cross_entropy(logits, [0, 1]), [[math.log(2), math.log(4 / 3)]])


def test_cross_entropy_of_huge_logits_is_finite() -> None:
    np.testing.assert_allclose(cross_entropy([[1e4, -1e4], [-1e4, 1e4]], [0, 0]), [0, 2e4])


def test_hinge_by_hand() -> None:
    logits = [[3.0, 0.0, 2.0], [0.0, 0.0, 9.0]]
    np.testing.assert_allclose(hinge(logits, [0, 2]), [1.0, 0.0])
    np.testing.assert_allclose(hinge(logits, [0, 2], margin=4.0), [1.0 + 3.0, 0.0])


@given(
    logits=st.lists(st.lists(st.floats(-50, 50), min_size=3, max_size=3), min_size=1, max_size=4),
    shift=st.floats(-100, 100),
)
def test_losses_ignore_a_common_shift_and_are_never_negative(logits: list[list[float]], shift: float) -> None:
    targets = [i % 3 for i in range(len(logits))]
    for loss in (cross_entropy, hinge):
        values = loss(logits, targets)
        assert (values >= -1e-9).all()
        np.testing.assert_allclose(values, loss(np.add(logits, shift), targets), atol=1e-9)


@pytest.mark.parametrize(("logits", "targets"), [([[1.0, 2.0]], [2]), ([[1.0, 2.0]], [-1]), ([[1.0, 2.0]], [0, 1])])
@pytest.mark.parametrize("loss", [cross_entropy, hinge])
def test_targets_that_do_not_fit_are_refused(loss: object, logits: list, targets: list) -> None:
    with raises(InputError, field="targets"):
        loss(logits, targets)


def test_balanced_weights_by_hand() -> None:
    np.testing.assert_allclose(balanced_weights([30, 10, 20]), [60 / 90, 60 / 30, 60 / 60])
    np.testing.assert_allclose(balanced_weights([30, 10, 0]), [40 / 60, 40 / 20, 1.0])


@given(counts=st.lists(st.integers(0, 500), min_size=1, max_size=20).filter(any))
def test_balanced_weights_give_labels_equal_totals_and_rows_a_mean_of_one(counts: list[int]) -> None:
    shares = balanced_weights(counts) * counts
    there = np.array(counts) > 0
    np.testing.assert_allclose(shares[there], sum(counts) / there.sum())
    assert shares.sum() == pytest.approx(sum(counts))


@pytest.mark.parametrize("counts", [[], [0, 0], [1, -1], [[1, 2]]])
def test_invalid_label_counts_are_refused(counts: list) -> None:
    with raises(InputError, field="counts"):
        balanced_weights(counts)
