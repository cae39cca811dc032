"""Linear discriminant analysis from sums of devices and folds equals that of all rows in one place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray

from fedbpt.engine.discriminant import (
    Discriminant,
    FoldSums,
    Pooled,
    _solver,
    assign_folds,
    discriminants,
    fold_sums,
    pool,
    sketched_sums,
    sketching,
)

Floats = NDArray[np.float64]

LABELS, FOLDS, ALL = 3, 4, 10**6


class Rows(NamedTuple):
    """States [n, E] and label indices [n]."""

    states: Floats
    targets: NDArray[np.intp]

    def of(self, which: NDArray[np.bool_]) -> Rows:
        return Rows(self.states[which], self.targets[which])


def rows(n: int = 90, size: int = 8, seed: int = 0, n_labels: int = LABELS) -> Rows:
    """Dimensions have different means and scales, and go together."""
    rng = np.random.default_rng(seed)
    targets = rng.choice(n_labels, n, p=np.arange(1, n_labels + 1) / np.arange(1, n_labels + 1).sum())
    mixed = (rng.standard_normal((n, size)) + rng.standard_normal((n_labels, size))[targets]) @ (
        rng.standard_normal((size, size)) + np.eye(size)
    )
    return Rows(mixed * rng.uniform(0.2, 3, size) + rng.standard_normal(size), targets)


def three_devices(whole: Rows) -> list[Rows]:
    """Of one label, of two, and of some rows of all."""
    rng = np.random.default_rng(1)
    device = np.where(rng.random(len(whole.targets)) < 0.3, 2, whole.targets > 0)
    return [whole.of(device == number) for number in range(3)]


def parts(devices: Sequence[Rows], max_rank: int = ALL, n_labels: int = LABELS) -> list[FoldSums]:
    """The sums of each fold of each device."""
    found = []
    for number, device in enumerate(devices):
        folds = assign_folds(device.targets, FOLDS, np.random.default_rng(number))
        found += [fold_sums(*device.of(folds == fold), n_labels, max_rank) for fold in range(FOLDS)]
    return found


def pooled(sums: Sequence[FoldSums]) -> Pooled:
    return pool([(each, 1.0) for each in sums])


def direct(whole: Rows, shrinkage: float, weights: Floats | None = None, uniform: bool = False) -> Discriminant:
    """The formula of the module's docstring, by all rows, with the inverse of a matrix.

    ``weights`` [n]: how often each row counts.
    """
    states, targets = whole
    often = np.ones(len(targets)) if weights is None else weights
    total = often.sum()
    centre = (often[:, None] * states).sum(axis=0) / total
    variance = (often[:, None] * (states - centre) ** 2).sum(axis=0) / total
    spread = np.sqrt(variance + 1e-4 * variance.mean())
    standard = (states - centre) / spread
    counts = np.array([often[targets == label].sum() for label in range(LABELS)])
    means = np.stack([np.average(standard[targets == k], axis=0, weights=often[targets == k]) for k in range(LABELS)])
    residuals = standard - means[targets]
    within = (often[:, None] * residuals).T @ residuals / (total - LABELS)
    size = len(within)
    shrunk = (1 - shrinkage) * within + shrinkage * np.trace(within) / size * np.eye(size)
    solved = np.linalg.inv(shrunk) @ means.T
    prior = np.zeros(LABELS) if uniform else np.log(counts + 0.5)
    bias = prior - prior.max() - 0.5 * np.diag(means @ solved)
    return Discriminant(solved / spread[:, None], bias - centre @ (solved / spread[:, None]))


def equal(one: Discriminant, other: Discriminant, tolerance: float = 1e-7) -> None:
    np.testing.assert_allclose(one.weights, other.weights, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(one.bias, other.bias, rtol=tolerance, atol=tolerance)


# --- all rows in one place -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("size", [8, 200])
@pytest.mark.parametrize("seed", range(3))
def test_skewed_devices_and_folds_give_the_classifier_of_all_rows(seed: int, size: int, uniform: bool) -> None:
    whole = rows(size=size, seed=seed)
    shrinkages = (0.2, 0.6, 0.95)
    found = discriminants(pooled(parts(three_devices(whole))), shrinkages, uniform)
    for shrinkage, each in zip(shrinkages, found, strict=True):
        equal(each, direct(whole, shrinkage, uniform=uniform))


def test_leaving_out_a_fold_gives_the_classifier_of_the_other_rows() -> None:
    devices = three_devices(rows())
    kept, others = [], []
    for number, device in enumerate(devices):
        folds = assign_folds(device.targets, FOLDS, np.random.default_rng(number))
        kept += [fold_sums(*device.of(folds == fold), LABELS, ALL) for fold in (0, 1, 3)]
        others.append(device.of(folds != 2))
    together = Rows(*(np.concatenate(each) for each in zip(*others, strict=True)))
    [found] = discriminants(pooled(kept), (0.5,))
    equal(found, direct(together, 0.5))


def test_a_weight_counts_a_devices_rows_as_often() -> None:
    devices = three_devices(rows())
    given = [0.25, 2.0, 1.0]
    weighted = [(sums, weight) for device, weight in zip(devices, given, strict=True) for sums in parts([device])]
    [found] = discriminants(pool(weighted), (0.5,))
    together = Rows(*(np.concatenate(each) for each in zip(*devices, strict=True)))
    often = np.repeat(given, [len(device.targets) for device in devices])
    equal(found, direct(together, 0.5, often))


def test_the_classifier_tells_labels_of_new_rows() -> None:
    rng = np.random.default_rng(4)
    centres = 2 * rng.standard_normal((LABELS, 8))
    targets = np.arange(400) % LABELS
    states = centres[targets] + rng.standard_normal((400, 8))
    fitted, judged = Rows(states[:200], targets[:200]), Rows(states[200:], targets[200:])
    [found] = discriminants(pooled(parts(three_devices(fitted))), (0.5,))
    right = (judged.states @ found.weights + found.bias).argmax(axis=1) == judged.targets
    assert right.mean() > 0.95


# --- the solver ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 7, 8, 9, 40])
def test_both_branches_of_the_solver_solve_the_same_equations(n: int) -> None:
    rng = np.random.default_rng(n)
    matrix, diagonal, right = rng.standard_normal((n, 8)), rng.uniform(0.1, 2, 8), rng.standard_normal((8, 3))
    # Rows of zeros change nothing, but choose the other branch.
    more = np.concatenate([matrix, np.zeros((20, 8))])
    solvers = [_solver(each, diagonal, right) for each in (matrix, more)]
    for a, b in ((1.0, 0.1), (0.4, 0.6), (0.05, 2.0)):
        full = a * (matrix.T @ matrix + np.diag(diagonal)) + b * np.eye(8)
        for solve in solvers:
            np.testing.assert_allclose(full @ solve(a, b), right, atol=1e-9)


# --- few dimensions of a factor --------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_rank", [1, 4, 16])
def test_a_cut_factor_and_its_rest_keep_each_dimensions_variance(max_rank: int) -> None:
    whole = rows(size=24)
    centred = (
        whole.states - np.stack([whole.states[whole.targets == k].mean(axis=0) for k in range(LABELS)])[whole.targets]
    )
    sums = fold_sums(*whole, LABELS, max_rank)
    assert sums.factor.shape == (max_rank, 24)
    assert (sums.rest > 0).all()
    np.testing.assert_allclose((sums.factor**2).sum(axis=0) + sums.rest, (centred**2).sum(axis=0))
    exact = fold_sums(*whole, LABELS, ALL)
    np.testing.assert_allclose(exact.factor.T @ exact.factor, centred.T @ centred, atol=1e-8)
    np.testing.assert_allclose(exact.rest, 0)
    # No other matrix of as many rows is nearer.
    values = np.linalg.svd(centred, compute_uv=False)
    lost = np.linalg.norm(centred.T @ centred - sums.factor.T @ sums.factor, 2)
    assert lost == pytest.approx(values[max_rank] ** 2)


def test_a_cut_factor_changes_the_classifier_a_little() -> None:
    whole = rows(n=200, size=24)
    cut, exact = (discriminants(pooled(parts([whole], max_rank)), (0.6,))[0] for max_rank in (12, ALL))
    logits = [whole.states @ each.weights + each.bias for each in (cut, exact)]
    agree = logits[0].argmax(axis=1) == logits[1].argmax(axis=1)
    assert agree.mean() > 0.9
    assert not np.allclose(cut.weights, exact.weights)


@pytest.mark.parametrize("n", [0, 1, 2, 5])
def test_a_fold_of_few_rows_has_a_factor_of_its_free_rows(n: int) -> None:
    whole = rows(n=5, n_labels=2)
    sums = fold_sums(whole.states[:n], whole.targets[:n], LABELS, ALL)
    n_present = len(np.unique(whole.targets[:n]))
    assert sums.factor.shape == (n - n_present, 8)
    assert sums.means.shape == (n_present, 8)
    assert sums.counts.tolist() == np.bincount(whole.targets[:n], minlength=LABELS).tolist()


# --- labels without rows ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("uniform", [False, True])
def test_a_label_without_rows_is_an_average_row_and_rare(uniform: bool) -> None:
    whole = rows(n_labels=2)
    [found] = discriminants(pooled(parts([whole])), (0.5,), uniform)
    assert not found.weights[:, 2].any()
    counts = np.bincount(whole.targets)
    assert found.bias[2] == pytest.approx(0.0 if uniform else np.log(0.5 / (counts.max() + 0.5)))
    logits = whole.states @ found.weights + found.bias
    assert (logits[:, :2].argmax(axis=1) == whole.targets).mean() > 0.7


def test_without_rows_all_labels_are_equal() -> None:
    none = fold_sums(np.zeros((0, 8)), np.zeros(0, dtype=np.intp), LABELS, ALL)
    for found in discriminants(pooled([none, none]), (0.5, 0.9)):
        assert not found.weights.any()
        assert not found.bias.any()


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e3])
def test_labels_of_one_row_each_give_weights_that_half_precision_holds(scale: float) -> None:
    states = scale * np.random.default_rng(0).standard_normal((LABELS, 8))
    whole = Rows(states, np.arange(LABELS))
    [found] = discriminants(pooled([fold_sums(*whole, LABELS, ALL)]), (0.6,))
    assert np.abs(found.weights).max() < np.finfo(np.float16).max
    assert np.isfinite(found.bias).all()
    assert (states @ found.weights + found.bias).argmax(axis=1).tolist() == [0, 1, 2]


def test_uniform_priors_move_rows_to_the_rarer_label() -> None:
    rng = np.random.default_rng(2)
    targets = (np.arange(200) % 10 == 0).astype(np.intp)
    whole = Rows(rng.standard_normal((200, 4)) + targets[:, None], targets)
    sums = pooled(parts([whole], n_labels=2))
    [by_share], [uniform] = discriminants(sums, (0.5,)), discriminants(sums, (0.5,), uniform=True)
    np.testing.assert_allclose(by_share.weights, uniform.weights)
    difference = (uniform.bias - by_share.bias) - (uniform.bias - by_share.bias)[0]
    np.testing.assert_allclose(difference, [0, np.log(180.5 / 20.5)])


# --- folds -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_folds", [2, 4, 5])
@pytest.mark.parametrize("n", [0, 1, 3, 4, 7, 8, 61])
def test_folds_share_the_rows_of_each_label(n: int, n_folds: int) -> None:
    targets = np.random.default_rng(n).choice(LABELS, n, p=(0.6, 0.3, 0.1))
    folds = assign_folds(targets, n_folds, np.random.default_rng(0))
    assert (folds == 0).sum() == n // n_folds
    sizes = np.bincount(folds, minlength=n_folds)
    assert len(sizes) == n_folds
    assert sizes.max() - sizes.min() <= 1
    for label in range(LABELS):
        of_label = np.bincount(folds[targets == label], minlength=n_folds)
        assert of_label.max() - of_label.min() <= 1


def test_folds_follow_from_the_seed_and_are_random() -> None:
    targets = np.arange(40) % LABELS
    found = [assign_folds(targets, FOLDS, np.random.default_rng(seed)).tolist() for seed in (0, 0, 1)]
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.0, 0.5)])
def test_sketches_that_are_added_up_give_the_sums_of_all_rows(weights: tuple[float, float]) -> None:
    rng = np.random.default_rng(3)
    matrix = sketching(40, 16, seed=5)
    parts = []
    total = []
    for weight in weights:
        states = rng.standard_normal((7, 40)) + 3 * rng.standard_normal(40)
        targets = rng.integers(0, 3, 7)
        parts.append((fold_sums(states, targets, 4, 64), weight))
        one_hot = (targets == np.arange(4)[:, None]).astype(float)
        numbers = (one_hot.sum(axis=1), one_hot @ states, (states**2).sum(axis=0), states.T @ (states @ matrix))
        total.append([weight * each for each in numbers])
    found = sketched_sums(*(np.sum(each, axis=0) for each in zip(*total, strict=True)), matrix)
    expected = pool(parts)
    np.testing.assert_allclose(found.counts, expected.counts)
    np.testing.assert_allclose(found.means, expected.means[expected.counts > 0], atol=1e-9)
    np.testing.assert_allclose(found.factor.T @ found.factor, expected.factor.T @ expected.factor, atol=1e-6)
    np.testing.assert_allclose(found.rest, 0.0, atol=1e-6)


def test_a_sketch_of_more_rows_than_columns_keeps_the_variances() -> None:
    rng = np.random.default_rng(4)
    states = rng.standard_normal((60, 30)) * np.linspace(3, 0.1, 30)
    targets = np.arange(60) % 2
    one_hot = (targets == np.arange(2)[:, None]).astype(float)
    matrix = sketching(30, 8, seed=1)
    found = sketched_sums(
        one_hot.sum(axis=1), one_hot @ states, (states**2).sum(axis=0), states.T @ (states @ matrix), matrix
    )
    exact = fold_sums(states, targets, 2, 64)
    variances = (found.factor**2).sum(axis=0) + found.rest
    np.testing.assert_allclose(variances, (exact.factor**2).sum(axis=0), rtol=0.02)


def test_a_fold_without_rows_has_empty_sums() -> None:
    matrix = sketching(5, 3, seed=1)
    found = sketched_sums(np.zeros(2), np.zeros((2, 5)), np.zeros(5), np.zeros((5, 3)), matrix)
    assert found.counts.tolist() == [0.0, 0.0]
    assert found.means.shape == (0, 5)
    assert found.factor.shape[1] == 5
    assert not found.factor.any()
