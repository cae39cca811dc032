"""`LogisticFit` learns a task from gradients alone, as well from several devices as from one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import numpy as np
import pytest

from fedbpt.aggregation.logistic_fit import EXCHANGES, RIDGE, LogisticFit
from fedbpt.engine.discriminant import assign_folds
from fedbpt.engine.layers import normalized
from fedbpt.errors import InputError
from fedbpt.objective.layer_view import Views
from fedbpt.objective.logistic import logistic_result, moments_result
from fedbpt.objective.losses import log_probabilities
from fedbpt.protocol.rounds import LogisticResult, MomentsResult, MomentsWork, Reading, RoundReport
from fedbpt.protocol.specs import Array, LayerReadout, Template
from tests.support.raises import raises
from tests.support.toy_federation import report

VIEWS, SIZE, LABELS, ROWS = 2, 8, 3, 120
OTHER = Template(pattern="{text} Q", label_words=("a", "b", "c"))
READING = Reading(latent=Array.of(np.zeros(2)), templates=(OTHER,), layers=(3,), n_word_views=1)

Device = tuple[Views, Any, Any]


def device(n: int = ROWS, seed: int = 0, apart: float = 2.0) -> Device:
    """Rows whose states lie ``apart`` by label, the label words hardly; targets, folds."""
    rng = np.random.default_rng(seed)
    targets = np.arange(n) % LABELS
    centres = np.random.default_rng(99).standard_normal((LABELS, SIZE))
    states = rng.standard_normal((n, VIEWS, 1, SIZE))
    states[:, 0, 0] += apart * centres[targets]
    words = rng.standard_normal((n, 1, LABELS)) + 0.3 * np.eye(LABELS)[targets][:, None]
    views = Views(normalized(states).astype(np.float16), log_probabilities(words))
    return views, targets, assign_folds(targets, READING.n_folds, rng)


def parts_of(of: Device, n_parts: int) -> list[Device]:
    views, targets, folds = of
    return [
        (Views(views.states[part], views.words[part]), targets[part], folds[part])
        for part in np.array_split(np.arange(len(targets)), n_parts)
    ]


def fitted(
    devices: Sequence[Device],
    change: Callable[[str, Any], Any] = lambda _name, result: result,
    **options: Any,
) -> LogisticFit:
    """A whole fit. ``change``: of a device's results."""
    fit = LogisticFit("probe", READING, LABELS, **options)
    for _ in range(EXCHANGES + 1):
        work = fit.work()
        reports: list[RoundReport] = []
        for number, (views, targets, folds) in enumerate(devices):
            result: MomentsResult | LogisticResult
            if isinstance(work, MomentsWork):
                result = moments_result(work, views, targets, LABELS)
            else:
                result = logistic_result(work, views, targets, folds, np.ones(len(targets)))
            name = f"device-{number}"
            reports.append(report(name, 1, change(name, result), n_texts=len(targets)))
        fit.update(reports)
        if fit.done:
            return fit
    raise AssertionError("the fit does not end")


def logits(readout: LayerReadout, views: Views) -> Any:
    found = readout.bias.numpy() + np.einsum("nvle,vlek->nk", views.states.astype(float), readout.weights.numpy())
    return found + np.einsum("v,nvk->nk", readout.word_scales.numpy()[: views.words.shape[1]], views.words)


def accuracy(readout: LayerReadout, of: Device) -> float:
    return float((logits(readout, of[0]).argmax(axis=1) == of[1]).mean())


def test_it_learns_the_labels_from_states() -> None:
    fit = fitted([device()])
    assert accuracy(fit.readout, device(seed=1)) > 0.85
    assert accuracy(fit.held_readout or fit.readout, device(seed=1)) > 0.85


def test_its_readout_minimises_the_loss_with_the_ridge() -> None:
    """No step of gradient descent on the standardised states, by finite differences of the definition, gains much."""
    views, targets, folds = device()
    fit = LogisticFit("probe", READING, LABELS, judged=False)
    fit.update([report("a", 1, moments_result(fit.work(), views, targets, LABELS), n_texts=ROWS)])  # type: ignore[arg-type]
    while not fit.done:
        result = logistic_result(fit.work(), views, targets, folds, np.ones(ROWS))  # type: ignore[arg-type]
        fit.update([report("a", 1, result, n_texts=ROWS)])
    states = views.states.astype(float).reshape(ROWS, -1)
    x = (states - states.mean(axis=0)) / states.std(axis=0) * 3 / np.sqrt(states.shape[1])
    s = (views.words[:, 0] - views.words[:, 0].mean(axis=0)) / views.words[:, 0].std(axis=0).mean() * 0.3

    def objective(weights: Any, scale: float, bias: Any) -> float:
        log_p = log_probabilities(x @ weights + scale * s + bias)
        return float(-log_p[np.arange(ROWS), targets].mean() + RIDGE / (2 * ROWS) * ((weights**2).sum() + scale**2))

    weights, scale, bias = np.zeros((x.shape[1], LABELS)), 0.0, np.zeros(LABELS)
    for _ in range(3000):  # plain gradient descent, to the minimum
        p = np.exp(log_probabilities(x @ weights + scale * s + bias))
        p[np.arange(ROWS), targets] -= 1
        weights = weights - 0.5 * (x.T @ p / ROWS + RIDGE / ROWS * weights)
        scale = scale - 0.5 * (float((s * p).sum()) / ROWS + RIDGE / ROWS * scale)
        bias = bias - 0.5 * p.mean(axis=0)
    assert fit.loss == pytest.approx(objective(weights, scale, bias), abs=0.01)


@pytest.mark.parametrize("n_parts", [2, 5])
def test_several_devices_find_what_one_with_all_rows_finds(n_parts: int) -> None:
    whole = device()
    one, several = fitted([whole]), fitted(parts_of(whole, n_parts))
    assert np.allclose(logits(one.readout, whole[0]), logits(several.readout, whole[0]), atol=0.05)


def test_a_median_withstands_a_liar_that_a_mean_does_not() -> None:
    devices = [device(n=60, seed=seed) for seed in range(5)]
    test = device(seed=9)

    def lie(name: str, result: Any) -> Any:
        if name != "device-0" or isinstance(result, MomentsResult):
            return result
        turned = {
            field: Array.of(-30 * getattr(result, field).numpy(), getattr(result, field).dtype)
            for field in ("by_weights", "by_word_scales", "by_bias")
        }
        return msgspec.structs.replace(result, **turned)

    honest = accuracy(fitted(devices).readout, test)
    assert accuracy(fitted(devices, lie, robust="median", judged=False).readout, test) > honest - 0.05
    assert accuracy(fitted(devices, lie).readout, test) < honest - 0.2


def test_without_a_judge_there_is_no_readout_without_its_rows() -> None:
    fit = fitted([device()], judged=False)
    assert fit.held_readout is None


def test_the_order_of_reports_does_not_matter_and_each_number_does() -> None:
    devices = parts_of(device(), 3)
    first, again = fitted(devices), fitted(devices)
    assert first.digest() == again.digest()

    def nudge(name: str, result: Any) -> Any:
        if name == "device-1" and isinstance(result, LogisticResult):
            return msgspec.structs.replace(result, by_bias=Array.of(result.by_bias.numpy() + 1e-3, "<f4"))
        return result

    assert fitted(devices, nudge).digest() != first.digest()


@pytest.mark.parametrize(
    ("field", "moments"),
    [("means", True), ("squares", True), ("word_means", True), ("by_weights", False), ("losses", False)],
)
def test_results_of_other_shapes_are_refused_and_change_nothing(field: str, moments: bool) -> None:
    fit = LogisticFit("probe", READING, LABELS)
    views, targets, folds = device()
    work = fit.work()
    assert isinstance(work, MomentsWork)
    good = moments_result(work, views, targets, LABELS)
    if not moments:
        fit.update([report("a", 1, good, n_texts=ROWS)])
        good = logistic_result(fit.work(), views, targets, folds, np.ones(ROWS))  # type: ignore[arg-type,assignment]
    before = fit.digest()
    wrong = msgspec.structs.replace(good, **{field: Array.of(np.zeros((2, 2, 2)))})
    with raises(InputError, field=field):
        fit.update([report("a", 1, wrong, n_texts=ROWS)])
    assert fit.digest() == before
