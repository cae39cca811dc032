"""`ReadoutFit` reaches the optimum of all rows, however they are spread over devices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedbpt.aggregation.readout import EXCHANGES, RIDGE, ReadoutFit
from fedbpt.errors import InputError
from fedbpt.objective.readout import full_weights, loss_and_gradient, moments, read
from fedbpt.protocol.rounds import FitResult, FitWork, PooledResult, RoundReport
from fedbpt.protocol.specs import Array, Dtype, Readout
from tests.support.toy_federation import report

LABELS, WORDS = 3, 8


class Rows(NamedTuple):
    """A device's data: logits [n, LABELS + WORDS] and targets [n]."""

    logits: np.ndarray
    targets: np.ndarray

    def of(self, which: Any) -> Rows:
        return Rows(self.logits[which], self.targets[which])


def rows(n: int = 150, seed: int = 0) -> Rows:
    """Weakly informative label words and more informative words; their logits are not centred."""
    rng = np.random.default_rng(seed)
    words = 2 * rng.standard_normal((n, WORDS)) + 5 * rng.standard_normal(WORDS)
    labels = rng.normal((2, 0, -1), 1, (n, LABELS))
    clean = 0.5 * labels + (words - words.mean(axis=0)) @ rng.standard_normal((WORDS, LABELS)) / 4
    targets = (clean + rng.gumbel(size=clean.shape)).argmax(axis=1)
    return Rows(np.concatenate([labels, words], axis=1).astype(np.float32), targets)


def by_label(whole: Rows) -> list[Rows]:
    """The most skewed devices: one label each."""
    return [whole.of(whole.targets == label) for label in range(LABELS)]


def answer(work: FitWork, device: Rows, name: str, round: int = 0, dtype: Dtype = "<f2") -> RoundReport:
    """What a device does with decoded work; its gradient is sent as ``dtype``."""
    work = msgspec.msgpack.decode(msgspec.msgpack.encode(work), type=FitWork)
    logits = device.logits[:, : LABELS + work.n_words].astype(np.float64)
    if work.readout is None:
        loss, means = 0.0, Array.of(moments(logits[:, LABELS:])[None], "<f4")
    else:
        weights = full_weights(work.readout, work.n_words, LABELS)
        centre = None if work.centre is None else work.centre.numpy()
        loss, gradient = loss_and_gradient(logits, device.targets, weights, centre)
        means = Array.of(gradient[None], dtype)
    result = FitResult(purpose=work.purpose, loss=loss, means=means)
    return report(name, round, result, n_texts=len(device.targets))


def answers(work: FitWork, devices: Sequence[Rows], round: int = 0, dtype: Dtype = "<f2") -> list[RoundReport]:
    return [answer(work, device, f"device-{i}", round, dtype) for i, device in enumerate(devices)]


def fresh(n_words: int = WORDS, bias: np.ndarray | None = None) -> ReadoutFit:
    return ReadoutFit("readout", np.zeros(2), n_words, LABELS, bias)


def fitted(
    devices: Sequence[Rows],
    n_words: int = WORDS,
    bias: np.ndarray | None = None,
    backwards: bool = False,
    dtype: Dtype = "<f2",
) -> tuple[ReadoutFit, list[list[RoundReport]]]:
    """A fit to its end, and the reports of its exchanges."""
    fit, history = fresh(n_words, bias), []
    while not fit.done:
        reports = answers(fit.work(), devices, len(history), dtype)
        history.append(reports)
        fit.update(reports[::-1] if backwards else reports)
    return fit, history


def label_logits(fit: ReadoutFit, whole: Rows) -> np.ndarray:
    weights = full_weights(fit.readout, WORDS, LABELS)
    return read(whole.logits, weights)


def softmax(logits: np.ndarray) -> np.ndarray:
    odds = np.exp(logits - logits.max(axis=1, keepdims=True))
    return odds / odds.sum(axis=1, keepdims=True)


def optimum(whole: Rows, n_words: int = WORDS, bias: np.ndarray | None = None) -> float:
    """The objective that a long plain gradient descent on all rows reaches, nats."""
    n = len(whole.targets)
    own = whole.logits[:, :LABELS].astype(np.float64) + (0 if bias is None else bias)
    words = whole.logits[:, LABELS : LABELS + n_words].astype(np.float64)
    centred = words - words.mean(axis=0)
    radius = np.sqrt((centred**2).sum(axis=1).mean()) if n_words else 1.0
    features = np.concatenate([np.ones((n, 1)), 3 * centred / radius], axis=1)
    truth, weights, ridge = np.eye(LABELS)[whole.targets], np.zeros((1 + n_words, LABELS)), RIDGE / n
    step = 1 / (np.linalg.eigvalsh(features.T @ features / n).max() / 2 + ridge)
    for _ in range(3000):
        wrong = softmax(own + features @ weights) - truth
        weights -= step * (features.T @ wrong / n + ridge * weights)
    likelihood = (softmax(own + features @ weights) * truth).sum(axis=1)
    return float(-np.log(likelihood).mean() + ridge / 2 * (weights**2).sum())


# --- the optimum ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_devices_of_one_label_each_reach_the_optimum_of_all_rows(seed: int) -> None:
    whole = rows(seed=seed)
    fit, history = fitted(by_label(whole))
    assert fit.loss == pytest.approx(optimum(whole), abs=1e-3)
    assert len(history) <= EXCHANGES + 1
    right = (label_logits(fit, whole).argmax(axis=1) == whole.targets).mean()
    assert right > (whole.logits[:, :LABELS].argmax(axis=1) == whole.targets).mean() + 0.1


def test_the_loss_is_that_of_the_readout_and_the_ridge() -> None:
    whole = rows()
    fit, _ = fitted(by_label(whole))
    plain = loss_and_gradient(whole.logits, whole.targets, fit.readout.weights.numpy())[0]
    assert plain < fit.loss < plain + 0.2


@pytest.mark.parametrize("seed", range(3))
def test_a_fit_from_a_bias_is_a_fit_of_logits_with_that_bias(seed: int) -> None:
    whole, bias = rows(seed=seed), np.array([-1.0, 0.5, 2.0])
    given_bias, _ = fitted(by_label(whole), bias=bias)
    assert given_bias.loss == pytest.approx(optimum(whole, bias=bias), abs=1e-3)
    shifted = Rows(whole.logits + np.concatenate([bias, np.zeros(WORDS)]).astype(np.float32), whole.targets)
    built_in, _ = fitted(by_label(shifted))
    np.testing.assert_allclose(label_logits(given_bias, whole), label_logits(built_in, shifted), atol=0.02)


@pytest.mark.parametrize("seed", range(3))
def test_without_words_mean_probabilities_become_the_labels_shares(seed: int) -> None:
    whole = rows(seed=seed)
    fit, history = fitted(by_label(whole), n_words=0)
    assert fit.readout.weights.shape == (1, LABELS)
    assert len(history) <= EXCHANGES
    assert history[0][0].result.means.shape == (1, 1, LABELS)  # no exchange for moments
    assert fit.loss == pytest.approx(optimum(whole, n_words=0), abs=1e-3)
    (bias,) = fit.readout.weights.numpy()
    shares = np.bincount(whole.targets, minlength=LABELS) / len(whole.targets)
    found = softmax(whole.logits[:, :LABELS] + bias).mean(axis=0)
    assert np.abs(softmax(whole.logits[:, :LABELS]).mean(axis=0) - shares).max() > 0.05
    np.testing.assert_allclose(found + RIDGE / len(whole.targets) * bias, shares, atol=0.01)


@pytest.mark.parametrize("seed", range(3))
def test_few_rows_barely_change_the_model(seed: int) -> None:
    whole = rows(400, seed)
    few, many = (fitted([whole.of(slice(n))])[0] for n in (2, 400))
    moved = [np.abs(label_logits(fit, whole) - whole.logits[:, :LABELS]).mean() for fit in (few, many)]
    assert moved[0] < 0.5 < 1 < moved[1]


CONSTANT = "the variance of words that never change is rounding noise, by which ReadoutFit then scales them up"


@pytest.mark.parametrize("seed", range(3))
def test_one_row_moves_only_the_bias(seed: int) -> None:
    fit, _ = fitted([rows(400, seed).of(slice(1))])
    assert np.abs(fit.readout.weights.numpy()).max() < 1


def test_constant_words_give_only_a_bias() -> None:
    for seed in range(4):
        whole = rows(seed=seed)
        never = np.tile(whole.logits[:1, LABELS:], (150, 1))
        still = Rows(np.concatenate([whole.logits[:, :LABELS], never], axis=1), whole.targets)
        fit, _ = fitted(by_label(still))
        alone, _ = fitted(by_label(still), n_words=0)
        np.testing.assert_allclose(label_logits(fit, still), label_logits(alone, still), atol=0.02)


# --- indifferent to devices ----------------------------------------------------------------------------------------


@given(seed=st.integers(0, 5), cuts=st.lists(st.integers(1, 149), min_size=1, max_size=4, unique=True))
@settings(max_examples=15, deadline=None)
def test_how_rows_are_spread_over_devices_does_not_matter(seed: int, cuts: list[int]) -> None:
    whole = rows(seed=seed)
    shuffled = np.random.default_rng(seed).permutation(150)
    spread = [whole.of(part) for part in np.split(shuffled, sorted(cuts))]
    one, many, skewed = (fitted(devices, dtype="<f8")[0] for devices in ([whole], spread, by_label(whole)))
    for other in (many, skewed):
        assert other.loss == pytest.approx(one.loss, abs=1e-6)
        np.testing.assert_allclose(label_logits(other, whole), label_logits(one, whole), atol=1e-3)


@pytest.mark.parametrize("seed", range(4))
def test_rounding_of_reports_costs_less_than_the_stopping_gain(seed: int) -> None:
    devices = by_label(rows(seed=seed))
    exact, rounded = (fitted(devices, dtype=dtype)[0] for dtype in ("<f8", "<f2"))
    assert rounded.loss == pytest.approx(exact.loss, abs=3e-4)


def test_the_order_of_reports_does_not_matter() -> None:
    devices = by_label(rows())
    forth, back = fitted(devices)[0], fitted(devices, backwards=True)[0]
    assert forth.digest() == back.digest()
    assert forth.readout == back.readout


def test_the_same_reports_replay_to_the_same_digest_and_work_at_every_exchange() -> None:
    fit, history = fresh(), []
    while not fit.done:
        history.append(answers(fit.work(), by_label(rows()), len(history)))
        fit.update(history[-1])
        again = fresh()
        for reports in history:
            again.update(msgspec.msgpack.decode(msgspec.msgpack.encode(reports), type=list[RoundReport]))
        assert again.digest() == fit.digest()
        assert again.work() == fit.work()
        assert (again.done, again.readout) == (fit.done, fit.readout)


def test_every_exchange_changes_the_digest() -> None:
    fit, seen = fresh(), set()
    devices = by_label(rows())
    while not fit.done:
        seen.add(fit.digest())
        assert fit.work() == fit.work()
        fit.update(answers(fit.work(), devices))
    assert len({*seen, fit.digest()}) == len(seen) + 1


def test_a_device_that_misses_one_exchange_costs_little() -> None:
    whole = rows()
    devices, best = by_label(whole), fitted(by_label(whole))[0].loss
    for missed in range(5):
        fit, exchange = fresh(), 0
        while not fit.done:
            fit.update(answers(fit.work(), devices[1:] if exchange == missed else devices))
            exchange += 1
        assert exchange <= EXCHANGES + 1
        weights = fit.readout.weights.numpy()
        assert loss_and_gradient(whole.logits, whole.targets, weights)[0] < best + 0.05


# --- malformed reports --------------------------------------------------------------------------------------------


def reshaped(good: RoundReport, shape: tuple[int, ...]) -> RoundReport:
    result = FitResult(purpose="readout", loss=1.0, means=Array.of(np.ones(shape)))
    return msgspec.structs.replace(good, result=result)


WRONG: dict[str, Callable[[RoundReport, RoundReport], list[RoundReport]]] = {
    "a word too few": lambda good, other: [good, reshaped(other, (1, WORDS, LABELS))],
    "a label too many": lambda good, other: [good, reshaped(other, (1, 1 + WORDS, LABELS + 1))],
    "a flat array": lambda good, other: [good, reshaped(other, ((1 + WORDS) * LABELS,))],
    "a number": lambda good, other: [good, reshaped(other, ())],
    "twice the same device": lambda good, _: [good, good],
    "another kind": lambda good, _: [msgspec.structs.replace(good, result=PooledResult(losses=Array.of(np.ones(9))))],
    "nobody": lambda _good, _other: [],
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("exchanges", [0, 1, 3])
def test_reports_that_do_not_fit_are_refused_and_change_nothing(wrong: str, exchanges: int) -> None:
    fit, devices = fresh(), by_label(rows())
    for _ in range(exchanges):
        fit.update(answers(fit.work(), devices))
    before = fit.digest(), fit.work(), fit.readout, fit.done
    good = answers(fit.work(), devices)
    with pytest.raises(InputError):
        fit.update(WRONG[wrong](*good[:2]))
    assert (fit.digest(), fit.work(), fit.readout, fit.done) == before
    fit.update(good)
    assert fit.digest() != before[0]


# --- the work ----------------------------------------------------------------------------------------


def test_work_asks_for_moments_first_and_then_for_gradients() -> None:
    latent = np.array([0.5, -1.0])
    fit = ReadoutFit("probe", latent, WORDS, LABELS, max_rows=40)
    first = fit.work()
    assert (first.purpose, first.n_words, first.readout, first.max_rows) == ("probe", WORDS, None, 40)
    assert first.latent.numpy().tolist() == latent.tolist()
    fit.update(answers(first, by_label(rows())))
    second = fit.work()
    assert second.readout == Readout(weights=Array.of(np.zeros((1 + WORDS, LABELS)), "<f4"))
    assert (second.purpose, second.latent, second.max_rows) == ("probe", first.latent, 40)


def test_before_the_first_gradient_the_readout_is_the_initial_bias() -> None:
    bias = np.array([0.25, -1.0, 3.0])
    fit = fresh(bias=bias)
    for _ in range(2):
        weights = fit.readout.weights.numpy()
        assert weights[0].tolist() == bias.tolist()
        assert not weights[1:].any()
        fit.update(answers(fit.work(), by_label(rows())))


def test_repr_shows_the_progress_of_a_fit() -> None:
    fit, _ = fitted(by_label(rows()))
    assert "readout, 8 words" in repr(fit)
    assert f"{fit.loss:.4f} nats" in repr(fit)
