"""A device's gradients of a logistic regression on states are those of its loss."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest

from fedbpt.errors import InputError
from fedbpt.objective.layer_view import Views
from fedbpt.objective.logistic import logistic_result, moments_result
from fedbpt.objective.losses import log_probabilities
from fedbpt.protocol.rounds import LogisticResult, LogisticWork, MomentsWork, Reading
from fedbpt.protocol.specs import Array, Template
from tests.support.raises import raises

VIEWS, LAYERS, SIZE, LABELS, ROWS = 2, 1, 5, 3, 12
OTHER = Template(pattern="{text} so", label_words=(" a", " b", " c"))


def reading(n_word_views: int) -> Reading:
    return Reading(latent=Array.of(np.zeros(2)), templates=(OTHER,), layers=(1,), n_word_views=n_word_views)


def views(n_word_views: int, n: int = ROWS) -> Views:
    rng = np.random.default_rng(0)
    words = log_probabilities(rng.standard_normal((n, n_word_views, LABELS))) if n_word_views else np.zeros((n, 0, 0))
    return Views(rng.standard_normal((n, VIEWS, LAYERS, SIZE)).astype(np.float16), words)


def work(n_word_views: int, n_points: int, **changes: Any) -> LogisticWork:
    rng = np.random.default_rng(1)
    made = LogisticWork(
        purpose="probe",
        reading=reading(n_word_views),
        centre=Array.of(rng.standard_normal((VIEWS, LAYERS, SIZE))),
        word_centre=Array.of(rng.standard_normal((n_word_views, LABELS if n_word_views else 0))),
        weights=Array.of(rng.standard_normal((n_points, VIEWS, LAYERS, SIZE, LABELS))),
        word_scales=Array.of(rng.standard_normal((n_points, n_word_views))),
        bias=Array.of(rng.standard_normal((n_points, LABELS))),
    )
    return msgspec.structs.replace(made, **changes)


TARGETS = np.arange(ROWS) % LABELS
FOLDS = np.arange(ROWS) % 4
WEIGHTS = np.linspace(0.5, 2.0, ROWS)


def result(asked: LogisticWork, n_word_views: int) -> LogisticResult:
    return logistic_result(asked, views(n_word_views), TARGETS, FOLDS, WEIGHTS)


@pytest.mark.parametrize("point", [0, 1])
@pytest.mark.parametrize("n_word_views", [0, 1, 2])
def test_the_gradient_is_that_of_the_loss(n_word_views: int, point: int) -> None:
    asked = work(n_word_views, 2)
    found = result(asked, n_word_views)
    for field, by in (("weights", found.by_weights), ("word_scales", found.by_word_scales), ("bias", found.by_bias)):
        values = getattr(asked, field).numpy()
        for place in np.ndindex(values.shape[1:]):
            losses = []
            for step in (-1e-2, 1e-2):
                moved = values.copy()
                moved[(point, *place)] += step
                losses.append(result(msgspec.structs.replace(asked, **{field: Array.of(moved)}), n_word_views).losses)
            slope = (losses[1].numpy()[point] - losses[0].numpy()[point]) / 2e-2
            assert by.numpy()[(point, *place)] == pytest.approx(slope, abs=2e-3)


def test_the_second_point_is_without_the_rows_of_fold_0() -> None:
    one = work(1, 1)
    twice = {name: Array.of(np.repeat(getattr(one, name).numpy(), 2, 0)) for name in ("weights", "word_scales", "bias")}
    found = result(msgspec.structs.replace(one, **twice), 1)
    kept = FOLDS != 0
    all_views = views(1)
    without = logistic_result(
        one, Views(all_views.states[kept], all_views.words[kept]), TARGETS[kept], FOLDS[kept], WEIGHTS[kept]
    )
    assert found.losses.numpy()[1] == pytest.approx(without.losses.numpy()[0], abs=1e-6)
    assert found.losses.numpy()[0] != pytest.approx(found.losses.numpy()[1], abs=1e-3)
    assert np.allclose(found.by_bias.numpy()[1], without.by_bias.numpy()[0], atol=1e-6)


def test_a_device_whose_rows_are_all_in_fold_0_counts_them_at_both_points() -> None:
    found = logistic_result(work(1, 2), views(1, 1), TARGETS[:1], np.zeros(1, dtype=int), WEIGHTS[:1])
    assert np.isfinite(found.losses.numpy()).all()
    assert found.by_bias.numpy()[1].any()


@pytest.mark.parametrize("n_word_views", [0, 2])
def test_moments_are_those_of_the_rows(n_word_views: int) -> None:
    seen = views(n_word_views)
    found = moments_result(MomentsWork(purpose="probe", reading=reading(n_word_views)), seen, TARGETS, LABELS)
    states = seen.states.astype(np.float64)
    assert np.allclose(found.means.numpy(), states.mean(axis=0), atol=1e-6)
    assert np.allclose(found.squares.numpy() - found.means.numpy() ** 2, states.var(axis=0), atol=1e-5)
    if n_word_views:
        assert np.allclose(found.word_means.numpy(), seen.words.mean(axis=0), atol=1e-5)
        assert np.allclose(found.word_squares.numpy(), seen.words.var(axis=0).mean(axis=1), rtol=1e-5)
        assert found.loss == pytest.approx(-seen.words[np.arange(ROWS), 0, TARGETS].mean())
    else:
        assert found.word_means.shape == (0, 0)
        assert found.loss == pytest.approx(np.log(LABELS))


@pytest.mark.parametrize("field", ["weights", "word_scales", "bias", "centre", "word_centre"])
def test_arrays_that_do_not_fit_are_refused(field: str) -> None:
    asked = work(1, 1)
    wrong = Array.of(np.zeros((3, 1)))
    with raises(InputError, field=field):
        result(msgspec.structs.replace(asked, **{field: wrong}), 1)


def test_a_label_beyond_the_work_is_refused() -> None:
    with raises(InputError, field="bias"):
        logistic_result(work(1, 1), views(1), TARGETS + 1, FOLDS, WEIGHTS)
