"""Checks of reports: shapes, bounds and counts."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest

from fedbpt.coordinator.reports.report_checks import check_report
from fedbpt.errors import WireError
from fedbpt.protocol import codec
from fedbpt.protocol.rounds import (
    FitResult,
    FitWork,
    PooledResult,
    PooledWork,
    RoundPlan,
    RoundReport,
    SearchState,
    SelectResult,
    SelectWork,
    Work,
)
from fedbpt.protocol.specs import Array, ObjectiveSpec, PromptSpec, Readout, Template
from tests.support.fake_device import TOY
from tests.support.raises import raises

N_WORDS, N_LABELS = 4, 3
STATE = SearchState(mean=Array.of(np.zeros(2)), sigma=1.0)


def plan(n_words: int = N_WORDS, moments: bool = False, work: Work | None = None, n_others: int = 0) -> RoundPlan:
    zeros = Array.of(np.zeros((1 + n_words, N_LABELS)))
    readout = None if moments else Readout(weights=zeros, others=(zeros,) * n_others)
    template = Template(pattern="{text} It was", label_words=(" a", " b", " c"))
    fit = FitWork(
        purpose="probe", latent=Array.of(np.zeros(2)), n_words=n_words, readout=readout, others=(template,) * n_others
    )
    return RoundPlan(
        run="r",
        round=1,
        device="a",
        seed=0,
        model_fingerprint="sha256:0",
        task=TOY,
        labels=("x", "y", "z"),
        template=template,
        prompt=PromptSpec(d=2),
        objective=ObjectiveSpec(),
        work=work or fit,
    )


def report(asked: RoundPlan, result: Any) -> RoundReport:
    return RoundReport(
        run="r",
        round=1,
        device="a",
        plan_digest=codec.digest(asked),
        result=result,
        n_texts=8,
        evaluations=0,
        tokens=9,
        seconds=0.5,
        peak_rss_bytes=1,
    )


def means(*shape: int, purpose: str = "probe", value: float = 0.2) -> FitResult:
    return FitResult(purpose=purpose, loss=0.5, means=Array.of(np.full(shape, value)))


FITS = {
    "gradient": plan(),
    "moments": plan(moments=True),
    "bias": plan(0),
    "gradients of three": plan(n_others=2),
    "moments of three": plan(moments=True, n_others=2),
    "biases of three": plan(0, n_others=2),
}
RIGHT: dict[str, tuple[int, ...]] = {
    "gradient": (1, 1 + N_WORDS, N_LABELS),
    "moments": (1, 1 + N_WORDS),
    "bias": (1, 1, N_LABELS),
    "gradients of three": (3, 1 + N_WORDS, N_LABELS),
    "moments of three": (3, 1 + N_WORDS),
    "biases of three": (3, 1, N_LABELS),
}
every_fit = pytest.mark.parametrize("fit", FITS)


@every_fit
def test_a_fits_report_of_the_right_shape_passes(fit: str) -> None:
    check_report(report(FITS[fit], means(*RIGHT[fit])), FITS[fit])


@every_fit
def test_a_fits_report_of_another_shape_is_refused(fit: str) -> None:
    first, *rest = RIGHT[fit]
    flat = first * N_LABELS
    for wrong in ((), (flat,), (first, *rest, 1), (first + 1, *rest), (first - 1, *rest), (first, N_LABELS + 1)):
        with raises(WireError, field="means"):
            check_report(report(FITS[fit], means(*wrong)), FITS[fit])


@every_fit
def test_moments_and_gradients_are_not_confused(fit: str) -> None:
    for other in FITS:
        if other != fit:
            with raises(WireError, field="means"):
                check_report(report(FITS[fit], means(*RIGHT[other])), FITS[fit])


@every_fit
@pytest.mark.parametrize("purpose", ["calibration", "readout"])
def test_a_report_of_another_fit_is_refused(fit: str, purpose: str) -> None:
    with raises(WireError, field="purpose"):
        check_report(report(FITS[fit], means(*RIGHT[fit], purpose=purpose)), FITS[fit])


def test_a_result_of_other_work_is_refused() -> None:
    with raises(WireError, field="result"):
        check_report(report(FITS["gradient"], PooledResult(losses=Array.of(np.ones(15)))), FITS["gradient"])


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e12])
def test_impossible_numbers_are_refused(value: float) -> None:
    body = codec.encode(report(FITS["gradient"], means(*RIGHT["gradient"], value=value)))
    with pytest.raises(WireError):
        codec.decode(body, RoundReport)


def test_a_loss_of_nan_is_refused() -> None:
    lie = msgspec.structs.replace(means(*RIGHT["gradient"]), loss=float("nan"))
    with pytest.raises(WireError):
        codec.decode(codec.encode(report(FITS["gradient"], lie)), RoundReport)


# --- a selection's report: 8 texts, 2 templates, 3 labels ----------------------------------------------------------


def selection(by_label: bool) -> RoundPlan:
    template = Template(pattern="{text} It was", label_words=(" a", " b", " c"))
    return plan(work=SelectWork(templates=(template, template), by_label=by_label))


def sums(*shape: int, counts: tuple[int, ...] = ()) -> SelectResult:
    return SelectResult(loss_sums=Array.of(np.ones(shape)), label_counts=counts)


def test_a_selections_report_of_the_right_shape_passes() -> None:
    for asked, result in ((selection(False), sums(2)), (selection(True), sums(2, 3, counts=(5, 0, 4)))):
        check_report(report(asked, result), asked)


@pytest.mark.parametrize(
    ("by_label", "result", "field"),
    [
        (False, sums(2, counts=(5, 0, 4)), "label_counts"),
        (False, sums(2, 3), "loss_sums"),
        (True, sums(2), "loss_sums"),
        (True, sums(2, 3), "label_counts"),
        (True, sums(2, 3, counts=(5, 4)), "label_counts"),
        (True, sums(2, 3, counts=(3, 2, 2)), "label_counts"),
    ],
    ids=["counts unasked", "sums unasked", "no sums", "no counts", "too few labels", "fewer rows than texts"],
)
def test_a_selections_report_of_another_shape_is_refused(by_label: bool, result: SelectResult, field: str) -> None:
    with raises(WireError, field=field):
        check_report(report(selection(by_label), result), selection(by_label))


@pytest.mark.parametrize("loss", [1e5, -1e5])
def test_a_loss_out_of_bounds_is_refused(loss: float) -> None:
    fit = plan()
    with raises(WireError, field="loss"):
        check_report(report(fit, FitResult(purpose="probe", loss=loss, means=means(1, 5, 3).means)), fit)
    pooled = plan(work=PooledWork(state=STATE, generation=0, popsize=2))
    losses = PooledResult(losses=Array.of(np.array([0.5, loss])))
    with raises(WireError, field="losses"):
        check_report(report(pooled, losses), pooled)
    if loss > 0:
        heavy = msgspec.structs.replace(pooled, label_weights=(20.0, 1.0, 1.0))
        check_report(report(heavy, losses), heavy)


def test_a_perturbed_ratio_has_no_such_bound() -> None:
    pooled = plan(work=PooledWork(state=STATE, generation=0, popsize=1))
    ratio = msgspec.structs.replace(pooled, objective=ObjectiveSpec(perturb=0.5))
    check_report(report(ratio, PooledResult(losses=Array.of(np.array([1e6])))), ratio)


def test_more_rows_than_the_device_said_it_has_are_refused() -> None:
    fit = plan()
    check_report(report(fit, means(1, 5, 3)), fit, n_rows=8)
    with raises(WireError, field="n_texts", limit=7):
        check_report(report(fit, means(1, 5, 3)), fit, n_rows=7)


def test_more_evaluations_than_the_plan_asks_for_are_refused() -> None:
    pooled = plan(work=PooledWork(state=STATE, generation=0, popsize=2))
    given = report(pooled, PooledResult(losses=Array.of(np.zeros(2))))
    check_report(msgspec.structs.replace(given, evaluations=2), pooled)
    with raises(WireError, field="evaluations", limit=2):
        check_report(msgspec.structs.replace(given, evaluations=3), pooled)


@pytest.mark.parametrize("square", [-0.5, 0.0, 0.9])
def test_a_mean_of_squares_below_the_square_of_the_mean_is_refused(square: float) -> None:
    fit = plan(moments=True)
    found = np.array([[0.5] * N_WORDS + [square]])
    with raises(WireError, field="means"):
        check_report(report(fit, FitResult(purpose="probe", loss=0.5, means=Array.of(found))), fit)
    found[0, -1] = 1.0
    check_report(report(fit, FitResult(purpose="probe", loss=0.5, means=Array.of(found))), fit)
