"""What a device sends for the fit of a readout from layers: quantised sums of its states, and its losses."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from fedbpt.aggregation.layer_fit import sums_of as received
from fedbpt.engine.discriminant import assign_folds, discriminants, fold_sums, pool
from fedbpt.engine.layers import normalized
from fedbpt.errors import InputError, WireError
from fedbpt.objective.layer_sums import SMOOTHING, cross_result, sums_result
from fedbpt.objective.layer_view import Views
from fedbpt.objective.losses import log_probabilities
from fedbpt.protocol.rounds import CrossResult, CrossWork, Reading, SumsResult, SumsWork
from fedbpt.protocol.specs import Array, Quantized, Template
from tests.support.raises import raises

SIZE, LABELS, FOLDS, VIEWS, LAYERS, ROWS = 10, 3, 4, 2, 2, 60
MORE = Template(pattern="{text} Q", label_words=("a", "b", "c"))


def reading(n_word_views: int = 1) -> Reading:
    return Reading(
        latent=Array.of(np.zeros(2)), templates=(MORE,), layers=(1, 3), n_word_views=n_word_views, n_folds=FOLDS
    )


def device(
    n: int = ROWS, n_word_views: int = 1, n_labels: int = LABELS, size: int = SIZE, seed: int = 0
) -> tuple[Views, NDArray[np.intp], NDArray[np.intp]]:
    """Views, targets and folds of a device's rows."""
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, n_labels, n)
    states = 3 * rng.standard_normal((VIEWS, LAYERS, size)) + rng.standard_normal((n, VIEWS, LAYERS, size))
    states += rng.standard_normal((n_labels, VIEWS, LAYERS, size))[targets]
    words = log_probabilities(rng.standard_normal((n, n_word_views, n_labels))) if n_word_views else np.zeros((n, 0, 0))
    views = Views(normalized(states).astype(np.float16), words)
    return views, targets, assign_folds(targets, FOLDS, rng)


# --- numbers of four bits --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 5, 3), (3, 4, 8), (1, 7, 5), (2, 0, 3), (0, 2, 3)])
def test_a_quantised_number_is_wrong_by_half_a_step_at_most(shape: tuple[int, int, int]) -> None:
    rng = np.random.default_rng(0)
    values = rng.standard_normal(shape) * rng.uniform(1e-3, 1e3, (shape[0], 1, shape[2]))
    packed = msgspec.msgpack.decode(msgspec.msgpack.encode(Quantized.of(values)), type=Quantized)
    found = packed.numpy()
    assert found.shape == shape
    assert len(packed.data) == packed.n_bytes == -(-values.size // 2)
    steps = np.abs(values).max(axis=1, initial=0.0, keepdims=True) / 7
    assert (np.abs(found - values) <= 0.505 * steps).all()  # steps are rounded to half precision
    if values.size:
        assert np.abs(found - values).max() > 0.0


def test_each_column_is_quantised_by_its_own_largest_number() -> None:
    values = np.array([[[7.0, 0.007], [-3.0, 0.002]]])
    np.testing.assert_allclose(Quantized.of(values).numpy(), values, rtol=2e-3)


def test_zeros_and_the_largest_numbers_stay() -> None:
    values = np.array([[[0.0, 14.0], [0.0, -14.0], [0.0, 0.0]]])
    np.testing.assert_array_equal(Quantized.of(values).numpy(), values)


@pytest.mark.parametrize(
    "change",
    [
        {"data": b""},
        {"data": b"\x88" * 4},
        {"data": b"\x88" * 6},
        {"shape": (1, 3, 4)},
        {"shape": (3, 3, 1)},
        {"shape": (10**9, 10**9, 10**9)},
        {"scales": Array.of(np.ones((3, 1)), "<f2")},
        {"scales": Array.of(np.ones(3), "<f2")},
        {"scales": Array.of(np.full((1, 3), np.inf), "<f2")},
        {"scales": Array.of(np.full((1, 3), np.nan), "<f2")},
    ],
    ids=str,
)
def test_quantised_numbers_of_other_lengths_are_refused(change: dict[str, Any]) -> None:
    packed = Quantized.of(np.random.default_rng(0).standard_normal((1, 3, 3)))
    assert len(packed.data) == 5
    with raises(WireError):
        msgspec.structs.replace(packed, **change).numpy()


# --- sums ------------------------------------------------------------------------------------------------------------


def sums_of(n: int = ROWS, max_rank: int = 64, **options: Any) -> tuple[SumsResult, Any]:
    rows = device(n, **options)
    work = SumsWork(purpose="probe", reading=reading(options.get("n_word_views", 1)), max_rank=max_rank)
    result = sums_result(work, *rows, options.get("n_labels", LABELS))
    return msgspec.msgpack.decode(msgspec.msgpack.encode(result), type=SumsResult), rows


@pytest.mark.parametrize("max_rank", [2, 64])
@pytest.mark.parametrize("n", [1, 3, 20, ROWS])
def test_the_coordinator_reads_the_sums_of_each_reader_and_fold(n: int, max_rank: int) -> None:
    result, (views, targets, folds) = sums_of(n, max_rank)
    found = received(result)
    assert len(found) == VIEWS * LAYERS
    for place, by_fold in enumerate(found):
        assert len(by_fold) == FOLDS
        states = views.states[:, place // LAYERS, place % LAYERS].astype(np.float64)
        exact = [fold_sums(states[folds == f], targets[folds == f], LABELS, max_rank) for f in range(FOLDS)]
        for field in ("means", "factor"):
            every = np.concatenate([getattr(each, field) for each in exact])
            centre = states.mean(axis=0) if field == "means" else 0.0
            half_step = 0.505 * np.abs(every - centre).max(axis=0, initial=0.0) / 7 + 1e-6
            for got, wanted in zip(by_fold, exact, strict=True):
                own, right = getattr(got, field), getattr(wanted, field)
                assert own.shape == right.shape
                if field == "factor":  # singular vectors have no sign
                    signs = np.where((own * right).sum(axis=1) < 0, -1.0, 1.0)
                    own = signs[:, None] * own
                assert (np.abs(own - right) <= half_step).all()
        for got, wanted in zip(by_fold, exact, strict=True):
            np.testing.assert_array_equal(got.counts, wanted.counts)
            np.testing.assert_allclose(got.rest, wanted.rest, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("n", [200, 4000])
def test_quantised_sums_of_many_rows_give_nearly_the_exact_classifier(n: int) -> None:
    result, (views, targets, folds) = sums_of(n)
    states = views.states[:, 0, 0].astype(np.float64)
    exact = [fold_sums(states[folds == f], targets[folds == f], LABELS, 10**6) for f in range(FOLDS)]
    logits = []
    for parts in (received(result)[0], exact):
        [found] = discriminants(pool([(part, 1.0) for part in parts]), (0.6,))
        logits.append(states @ found.weights + found.bias)
    spread = logits[1].std()
    assert np.abs(logits[0] - logits[1]).max() < 0.25 * spread
    assert (logits[0].argmax(axis=1) == logits[1].argmax(axis=1)).mean() > 0.97


def test_sums_of_squares_of_very_many_rows_are_finite() -> None:
    n = 40_000
    rng = np.random.default_rng(0)
    states = normalized(rng.standard_normal((n, 1, 1, 4)) * [1, 1, 1, 0.9]).astype(np.float16)
    targets = np.zeros(n, dtype=np.intp)
    one = msgspec.structs.replace(reading(0), templates=(), layers=(1,), n_folds=2)
    work = SumsWork(purpose="probe", reading=one, max_rank=1)
    result = sums_result(work, Views(np.repeat(states, 1, axis=1) * np.float16(2), np.zeros((n, 0, 0))), targets,
                         np.arange(n) % 2, 1)  # fmt: skip
    assert result.rests.numpy().max() > np.finfo(np.float16).max


def test_nothing_left_out_is_not_sent() -> None:
    assert sums_of(max_rank=64)[0].rests.data == b""
    assert sums_of(max_rank=2)[0].rests.shape == (VIEWS * LAYERS, FOLDS, SIZE)


def test_sums_hold_the_mean_scores_of_the_label_words_and_their_loss() -> None:
    result, (views, targets, _) = sums_of(n_word_views=2)
    np.testing.assert_allclose(result.word_means.numpy(), views.words.mean(axis=0), rtol=1e-6)
    assert result.loss == pytest.approx(-np.mean([views.words[i, 0, k] for i, k in enumerate(targets)]))
    alone, _ = sums_of(n_word_views=0)
    assert alone.word_means.numpy().size == 0
    assert alone.loss == pytest.approx(np.log(LABELS))


# --- losses ----------------------------------------------------------------------------------------------------------

READERS = (0, 3, 3)
MIXTURES = 5


def cross_work(n_word_views: int = 1, seed: int = 1) -> CrossWork:
    rng = np.random.default_rng(seed)
    coefficients = rng.standard_normal((MIXTURES, len(READERS)))
    coefficients[0] = 0
    coefficients[1, 1] = 0
    scales = rng.uniform(0, 2, (MIXTURES, n_word_views))
    scales[:2] = 0
    return CrossWork(
        purpose="probe",
        reading=reading(n_word_views),
        readers=READERS,
        weights=Array.of(rng.standard_normal((FOLDS, len(READERS), SIZE, LABELS)), "<f2"),
        biases=Array.of(rng.standard_normal((FOLDS, len(READERS), LABELS)), "<f4"),
        coefficients=Array.of(coefficients, "<f4"),
        word_scales=Array.of(scales, "<f4"),
        centres=Array.of(rng.standard_normal((n_word_views, LABELS)), "<f4"),
    )


def naive(work: CrossWork, views: Views, targets: Any, folds: Any, row_weights: Any) -> NDArray[np.float64]:
    """Mixture by mixture, row by row, as `CrossWork` describes it."""
    weights, biases = work.weights.numpy(), work.biases.numpy()
    sums = np.zeros((MIXTURES, FOLDS))
    for mixture in range(MIXTURES):
        for row, (target, fold) in enumerate(zip(targets, folds, strict=True)):
            logits = np.zeros(LABELS)
            for column, reader in enumerate(work.readers):
                state = views.states[row, reader // LAYERS, reader % LAYERS].astype(np.float64)
                factor = work.coefficients.numpy()[mixture, column]
                logits += factor * (state @ weights[fold, column] + biases[fold, column])
            for view, scale in enumerate(work.word_scales.numpy()[mixture]):
                logits += scale * (views.words[row, view] - work.centres.numpy()[view])
            odds = np.exp(logits)
            smoothed = np.full(LABELS, SMOOTHING / LABELS)
            smoothed[target] += 1 - SMOOTHING
            sums[mixture, fold] -= row_weights[row] * smoothed @ np.log(odds / odds.sum())
    return sums


@pytest.mark.parametrize("n_word_views", [0, 1, 2])
@pytest.mark.parametrize("n", [1, ROWS])
def test_losses_are_those_of_each_mixture_and_row(n: int, n_word_views: int) -> None:
    views, targets, folds = device(n, n_word_views)
    work = cross_work(n_word_views)
    weights = np.random.default_rng(2).uniform(0.5, 2, n)
    result = cross_result(work, views, targets, folds, weights)
    assert isinstance(result, CrossResult)
    assert result.purpose == work.purpose
    np.testing.assert_allclose(result.loss_sums.numpy(), naive(work, views, targets, folds, weights), rtol=1e-5)


def test_a_mixture_of_nothing_is_a_guess() -> None:
    views, targets, folds = device()
    sums = cross_result(cross_work(), views, targets, folds, np.ones(ROWS)).loss_sums.numpy()
    np.testing.assert_allclose(sums[0], np.bincount(folds) * np.log(LABELS), rtol=1e-5)


WRONG: dict[str, tuple[str, tuple[int, ...]]] = {
    "weights of fewer folds": ("weights", (FOLDS - 1, len(READERS), SIZE, LABELS)),
    "weights of more columns": ("weights", (FOLDS, len(READERS) + 1, SIZE, LABELS)),
    "weights of another size": ("weights", (FOLDS, len(READERS), SIZE + 1, LABELS)),
    "weights of fewer labels": ("weights", (FOLDS, len(READERS), SIZE, LABELS - 1)),
    "flat weights": ("weights", (FOLDS,)),
    "biases of fewer folds": ("biases", (FOLDS - 1, len(READERS), LABELS)),
    "biases of more labels": ("biases", (FOLDS, len(READERS), LABELS + 1)),
    "coefficients of more columns": ("coefficients", (MIXTURES, len(READERS) + 1)),
    "flat coefficients": ("coefficients", (MIXTURES,)),
    "fewer word scales": ("word_scales", (MIXTURES - 1, 1)),
    "word scales of more views": ("word_scales", (MIXTURES, 2)),
    "centres of more views": ("centres", (2, LABELS)),
    "centres of more labels": ("centres", (1, LABELS + 1)),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_work_of_wrong_shapes_is_refused(wrong: str) -> None:
    field, shape = WRONG[wrong]
    work = msgspec.structs.replace(cross_work(), **{field: Array.of(np.ones(shape), "<f4")})
    with raises(InputError, field=field):
        cross_result(work, *device(), np.ones(ROWS))


def test_work_for_readers_that_were_not_read_is_refused() -> None:
    work = msgspec.structs.replace(cross_work(), readers=(0, 1, VIEWS * LAYERS))
    with raises(InputError, field="readers"):
        cross_result(work, *device(), np.ones(ROWS))
