"""How much of a model is read, so that what a device is sent fits into a message."""

from __future__ import annotations

import numpy as np
import pytest

from fedbpt.aggregation.layer_fit import SHRINKAGES, shrinkages_for
from fedbpt.aggregation.logistic_fit import max_views
from fedbpt.coordinator.layer_reading import within_message
from fedbpt.protocol.codec import MAX_BODY_BYTES
from fedbpt.protocol.rounds import N_FOLDS, HeldRows, Reading
from fedbpt.protocol.specs import Array
from fedbpt.runs.settings import RunSettings

LAYERS = (19, 24, 31)


@pytest.mark.parametrize("n_embd", [576, 2048, 4096, 8192])
@pytest.mark.parametrize("n_labels", [2, 10, 20, 77])
def test_classifiers_of_any_model_and_task_fit_into_a_message(n_embd: int, n_labels: int) -> None:
    layers, n_views = within_message(LAYERS, 6, n_labels, n_embd)
    n_readers = len(layers) * n_views
    n_columns = n_readers * len(shrinkages_for(n_labels, n_readers, n_embd))
    assert N_FOLDS * n_columns * n_embd * n_labels * 2 <= 0.75 * MAX_BODY_BYTES


@pytest.mark.parametrize("n_embd", [576, 2048, 4096, 8192])
@pytest.mark.parametrize("n_labels", [2, 20, 77])
def test_weights_of_a_logistic_regression_fit_into_a_message(n_embd: int, n_labels: int) -> None:
    n_views = min(max_views(n_labels, n_embd), 6)
    assert n_views >= 1
    assert 2 * n_views * n_embd * n_labels * 2 <= 0.75 * MAX_BODY_BYTES
    assert max_views(77, 576) >= 6


def test_many_labels_raise_the_default_number_of_fitted_rows_alone() -> None:
    many, few = tuple(map(str, range(77))), tuple(map(str, range(16)))
    assert RunSettings().for_labels(many).fit_rows == 32 * 77
    assert RunSettings().for_labels(few).fit_rows == RunSettings().fit_rows
    assert RunSettings(fit_rows=100).for_labels(many).fit_rows == 100
    assert RunSettings(fit_rows=0).for_labels(many).fit_rows == 0


def test_a_small_model_is_read_whole() -> None:
    assert within_message(LAYERS, 6, 77, 576) == (LAYERS, 6)
    assert shrinkages_for(6, 18, 576) == SHRINKAGES


def test_a_large_model_with_many_labels_keeps_its_last_layers_and_first_templates() -> None:
    layers, n_views = within_message(LAYERS, 6, 77, 4096)
    assert layers == LAYERS[-len(layers) :]
    assert 1 <= n_views < 6
    assert len(layers) < len(LAYERS)


def test_an_unknown_size_limits_nothing() -> None:
    assert within_message(LAYERS, 6, 77, 0) == (LAYERS, 6)


def test_what_judges_is_a_fold_of_what_is_read() -> None:
    reading = Reading(latent=Array.of(np.zeros(1)), templates=(), layers=(0,), n_word_views=0)
    held = HeldRows(seed=0)
    assert (reading.n_folds, reading.max_rows) == (held.n_folds, held.max_rows)
