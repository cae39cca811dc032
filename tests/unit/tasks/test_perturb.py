"""Random token replacement for the perturbed objective."""

import numpy as np
import pytest

from fedbpt.errors import InputError
from fedbpt.tasks import perturb


def test_the_cue_never_changes_and_the_callers_array_neither():
    ids = np.arange(100, 200, dtype=np.int32)
    kept = ids.copy()
    changed = perturb(ids, 5, 1.0, 50, np.random.default_rng(1))
    np.testing.assert_array_equal(ids, kept)
    np.testing.assert_array_equal(changed[-5:], ids[-5:])
    assert changed.dtype == np.int32
    assert (changed[:-5] < 50).all()


def test_about_rate_of_the_tokens_are_replaced():
    ids = np.full(20_000, 7)
    changed = perturb(ids, 0, 0.5, 10**6, np.random.default_rng(2))
    assert 0.48 < np.mean(changed != 7) < 0.52


def test_rate_zero_and_a_tail_longer_than_the_text_change_nothing():
    rng = np.random.default_rng(3)
    np.testing.assert_array_equal(perturb([1, 2, 3], 0, 0.0, 9, rng), [1, 2, 3])
    np.testing.assert_array_equal(perturb([1, 2, 3], 8, 1.0, 9, rng), [1, 2, 3])


@pytest.mark.parametrize(
    ("ids", "tail", "rate", "vocabulary"),
    [([1], 0, 1.5, 9), ([1], 0, float("nan"), 9), ([1], -1, 0.5, 9), ([1], 0, 0.5, 0), ([[1]], 0, 0.5, 9)],
)
def test_bad_arguments_are_refused(ids, tail, rate, vocabulary):
    with pytest.raises(InputError):
        perturb(ids, tail, rate, vocabulary, np.random.default_rng(0))
