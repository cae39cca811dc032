"""Reports on the fit of a readout from layers: an honest device's pass, and each lie is refused by its field."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest

from fedbpt.coordinator.reports.report_checks import check_evaluation, check_report
from fedbpt.coordinator.work_kinds import kind_of
from fedbpt.engine.discriminant import assign_folds
from fedbpt.engine.layers import normalized
from fedbpt.errors import WireError
from fedbpt.objective.layer_sums import cross_result, sums_result
from fedbpt.objective.layer_view import Views
from fedbpt.objective.logistic import logistic_result, moments_result
from fedbpt.objective.losses import log_probabilities
from fedbpt.protocol import codec
from fedbpt.protocol.rounds import (
    CrossResult,
    CrossWork,
    EvaluateReport,
    EvaluateRequest,
    FitResult,
    HeldRows,
    LogisticWork,
    MomentsResult,
    MomentsWork,
    Reading,
    RoundPlan,
    RoundReport,
    SumsResult,
    SumsWork,
    Work,
)
from fedbpt.protocol.specs import Array, ObjectiveSpec, PromptSpec, Quantized, Template
from tests.support.fake_device import TOY
from tests.support.raises import raises

SIZE, LABELS, FOLDS, LAYERS, ROWS, MAX_RANK = 6, 3, 4, 2, 40, 3
TEMPLATE = Template(pattern="{text} It was", label_words=(" a", " b", " c"))
OTHER = Template(pattern="{text} so", label_words=(" a", " b", " c"))


def reading(n_word_views: int = 1) -> Reading:
    return Reading(
        latent=Array.of(np.zeros(2)), templates=(OTHER,), layers=(1, 3), n_word_views=n_word_views, n_folds=FOLDS
    )


def plan(work: Work, label_weights: tuple[float, ...] = ()) -> RoundPlan:
    return RoundPlan(
        run="r",
        round=1,
        device="a",
        seed=0,
        model_fingerprint="sha256:0",
        task=TOY,
        labels=("x", "y", "z"),
        template=TEMPLATE,
        prompt=PromptSpec(d=2),
        objective=ObjectiveSpec(),
        work=work,
        label_weights=label_weights,
    )


def report(asked: RoundPlan, result: Any, n_texts: int = ROWS, **changes: Any) -> RoundReport:
    made = RoundReport(
        run="r",
        round=1,
        device="a",
        plan_digest=codec.digest(asked),
        result=result,
        n_texts=n_texts,
        evaluations=2,
        tokens=9,
        seconds=0.5,
        peak_rss_bytes=1,
    )
    return codec.decode(codec.encode(msgspec.structs.replace(made, **changes)), RoundReport)


def rows(n: int = ROWS, n_word_views: int = 1, extreme: bool = False) -> tuple[Views, Any, Any]:
    """Views, targets, folds. ``extreme``: states with one large element, of either sign."""
    rng = np.random.default_rng(0)
    states = rng.standard_normal((n, 2, LAYERS, SIZE)) * (0.01 if extreme else 1)
    if extreme:
        states[..., 0] = 9 * np.resize([-1, 1], n)[:, None, None]
    words = log_probabilities(rng.standard_normal((n, n_word_views, LABELS))) if n_word_views else np.zeros((n, 0, 0))
    targets = rng.integers(0, LABELS, n)
    return Views(normalized(states).astype(np.float16), words), targets, assign_folds(targets, FOLDS, rng)


def sums(n: int = ROWS, n_word_views: int = 1, max_rank: int = MAX_RANK, extreme: bool = False) -> Any:
    """A plan, and an honest device's result."""
    work = SumsWork(purpose="probe", reading=reading(n_word_views), max_rank=max_rank)
    return plan(work), sums_result(work, *rows(n, n_word_views, extreme), LABELS)


def cross(
    n: int = ROWS, n_word_views: int = 1, extreme: bool = False, weights: tuple[float, ...] = (), factor: float = 1.0
) -> Any:
    """A plan, and an honest device's result. ``factor``: of the classifiers."""
    rng = np.random.default_rng(1)
    readers, mixtures = (0, 3), 4
    work = CrossWork(
        purpose="probe",
        reading=reading(n_word_views),
        readers=readers,
        weights=Array.of(factor * rng.standard_normal((FOLDS, len(readers), SIZE, LABELS)), "<f2"),
        biases=Array.of(factor * rng.standard_normal((FOLDS, len(readers), LABELS)), "<f4"),
        coefficients=Array.of(rng.uniform(0, 1, (mixtures, len(readers))), "<f4"),
        word_scales=Array.of(rng.uniform(0, 1, (mixtures, n_word_views)), "<f4"),
        centres=Array.of(rng.standard_normal((n_word_views, LABELS)), "<f4"),
    )
    views, targets, folds = rows(n, n_word_views, extreme)
    row_weights = np.array(weights or (1.0,) * LABELS)[targets]
    return plan(work, weights), cross_result(work, views, targets, folds, row_weights)


def moments(n: int = ROWS, n_word_views: int = 1, extreme: bool = False) -> Any:
    """A plan, and an honest device's result."""
    work = MomentsWork(purpose="probe", reading=reading(n_word_views))
    views, targets, _ = rows(n, n_word_views, extreme)
    return plan(work), moments_result(work, views, targets, LABELS)


def logistic(
    n: int = ROWS, n_word_views: int = 1, extreme: bool = False, weights: tuple[float, ...] = (), factor: float = 1.0
) -> Any:
    """A plan, and an honest device's result. ``factor``: of the weights."""
    rng = np.random.default_rng(1)
    views, targets, folds = rows(n, n_word_views, extreme)
    work = LogisticWork(
        purpose="probe",
        reading=reading(n_word_views),
        centre=Array.of(views.states.mean(axis=0, dtype=float), "<f4"),
        word_centre=Array.of(views.words.mean(axis=0), "<f4"),
        weights=Array.of(factor * rng.standard_normal((2, 2, LAYERS, SIZE, LABELS)), "<f2"),
        word_scales=Array.of(factor * rng.standard_normal((2, n_word_views)), "<f4"),
        bias=Array.of(rng.standard_normal((2, LABELS)), "<f4"),
    )
    row_weights = np.array(weights or (1.0,) * LABELS)[targets]
    return plan(work, weights), logistic_result(work, views, targets, folds, row_weights)


# --- honest reports --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extreme", [False, True])
@pytest.mark.parametrize("max_rank", [1, 3, 64])
@pytest.mark.parametrize("n_word_views", [0, 1, 2])
@pytest.mark.parametrize("n", [1, 2, 7, ROWS])
def test_honest_sums_pass(n: int, n_word_views: int, max_rank: int, extreme: bool) -> None:
    asked, result = sums(n, n_word_views, max_rank, extreme)
    check_report(report(asked, result, n), asked, n)


@pytest.mark.parametrize("factor", [0.0, 1.0, 1e3])
@pytest.mark.parametrize("weights", [(), (0.5, 3.0, 1.0)], ids=["plain", "weighted"])
@pytest.mark.parametrize("n_word_views", [0, 1, 2])
@pytest.mark.parametrize("n", [1, ROWS])
def test_honest_losses_pass(n: int, n_word_views: int, weights: tuple[float, ...], factor: float) -> None:
    for extreme in (False, True):
        asked, result = cross(n, n_word_views, extreme, weights, factor)
        check_report(report(asked, result, n), asked, n)


@pytest.mark.parametrize("extreme", [False, True])
@pytest.mark.parametrize("n_word_views", [0, 1, 2])
@pytest.mark.parametrize("n", [1, 2, ROWS])
def test_honest_moments_pass(n: int, n_word_views: int, extreme: bool) -> None:
    asked, result = moments(n, n_word_views, extreme)
    check_report(report(asked, result, n), asked, n)


@pytest.mark.parametrize("factor", [0.0, 1.0, 1e3])
@pytest.mark.parametrize("weights", [(), (0.5, 3.0, 1.0)], ids=["plain", "weighted"])
@pytest.mark.parametrize("n_word_views", [0, 1, 2])
@pytest.mark.parametrize("n", [1, ROWS])
def test_honest_gradients_pass(n: int, n_word_views: int, weights: tuple[float, ...], factor: float) -> None:
    for extreme in (False, True):
        asked, result = logistic(n, n_word_views, extreme, weights, factor)
        check_report(report(asked, result, n), asked, n)


def test_reports_tell_their_purpose_and_mean_loss() -> None:
    asked, result = sums()
    kind = kind_of(asked.work)
    assert kind.purpose(result) == "probe"
    assert kind.mean_loss(result, ROWS) == result.loss
    asked, result = cross()
    kind = kind_of(asked.work)
    assert kind.purpose(result) == "probe"
    assert kind.mean_loss(result, ROWS) == pytest.approx(result.loss_sums.numpy().sum(axis=1).min() / ROWS)
    for asked, result in (moments(), logistic()):
        other = kind_of(asked.work)
        assert other.purpose(result) == "probe"
        expected = result.loss if isinstance(result, MomentsResult) else result.losses.numpy()[0]
        assert other.mean_loss(result, ROWS) == expected
    asked, result = cross()
    half = kind.scaled(result, 0.5)
    np.testing.assert_allclose(half.loss_sums.numpy(), result.loss_sums.numpy() / 2)


# --- lies about sums -------------------------------------------------------------------------------------------------

R = 2 * LAYERS  # readers


def filled(shape: tuple[int, ...], value: float) -> Array:
    return Array.of(np.full(shape, value), "<f4")


def scales(given: Quantized, value: float) -> Quantized:
    return msgspec.structs.replace(given, scales=filled(given.scales.shape, value))


def moved(counts: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], ...]:
    """A row of the last fold in another: as many as before, but other ranks or cells."""
    first, *rest, last = (list(fold) for fold in counts)
    last[int(np.argmax(last))] -= 1
    first[0] += 1
    return tuple(map(tuple, (first, *rest, last)))


SUMS_LIES: dict[str, tuple[str, Callable[[SumsResult], dict[str, Any]]]] = {
    "another purpose": ("purpose", lambda _: {"purpose": "readout"}),
    "more rows": ("counts", lambda r: {"counts": ((r.counts[0][0] + 1, *r.counts[0][1:]), *r.counts[1:])}),
    "no rows": ("means", lambda _: {"counts": ((0,) * LABELS,) * FOLDS}),
    "fewer folds": ("counts", lambda r: {"counts": r.counts[1:]}),
    "no folds": ("counts", lambda _: {"counts": ()}),
    "fewer labels": ("counts", lambda r: {"counts": tuple(fold[1:] for fold in r.counts)}),
    "a label more": ("counts", lambda r: {"counts": tuple((*fold, 0) for fold in r.counts)}),
    "fewer ranks": ("ranks", lambda r: {"ranks": r.ranks[1:]}),
    "a rank less": (
        "ranks",
        lambda r: {
            "ranks": (r.ranks[0] - 1, *r.ranks[1:]),
            "factors": Quantized.of(r.factors.numpy()[:, 1:]),
        },
    ),
    "a rank more": (
        "ranks",
        lambda r: {
            "ranks": (r.ranks[0] + 1, *r.ranks[1:]),
            "factors": Quantized.of(np.zeros((R, sum(r.ranks) + 1, SIZE))),
        },
    ),
    "ranks without factors": ("factors", lambda r: {"ranks": (10**9, *r.ranks[1:])}),
    "no shape of centres": ("centres", lambda _: {"centres": filled((), 0.0)}),
    "flat centres": ("centres", lambda _: {"centres": filled((SIZE,), 0.0)}),
    "centres of no size": ("centres", lambda _: {"centres": filled((R, 0), 0.0)}),
    "centres of another size": ("means", lambda _: {"centres": filled((R, SIZE + 1), 0.0)}),
    "centres of fewer readers": ("centres", lambda _: {"centres": filled((R - 1, SIZE), 0.0)}),
    "centres of a dimension more": ("centres", lambda _: {"centres": filled((R, SIZE, 1), 0.0)}),
    "huge centres": ("centres", lambda _: {"centres": filled((R, SIZE), 1e3)}),
    "fewer means": ("means", lambda r: {"means": Quantized.of(r.means.numpy()[:, 1:])}),
    "means of fewer readers": ("means", lambda r: {"means": Quantized.of(r.means.numpy()[1:])}),
    "means of fewer bytes": ("means", lambda r: {"means": msgspec.structs.replace(r.means, data=r.means.data[1:])}),
    "means of more bytes": ("means", lambda r: {"means": msgspec.structs.replace(r.means, data=r.means.data + b"1")}),
    "scales of another size": (
        "means",
        lambda r: {"means": msgspec.structs.replace(r.means, scales=filled((R, SIZE - 1), 1.0))},
    ),
    "huge means": ("means", lambda r: {"means": scales(r.means, 1e3)}),
    "negative scales of means": ("means", lambda r: {"means": scales(r.means, -0.1)}),
    "fewer factors": ("factors", lambda r: {"factors": Quantized.of(r.factors.numpy()[:, 1:])}),
    "huge factors": ("factors", lambda r: {"factors": scales(r.factors, 1e3)}),
    "negative scales of factors": ("factors", lambda r: {"factors": scales(r.factors, -0.1)}),
    "factors of fewer bytes": (
        "factors",
        lambda r: {"factors": msgspec.structs.replace(r.factors, data=r.factors.data[1:])},
    ),
    "factors larger than states": ("factors", lambda r: {"factors": Quantized.of(2 * r.factors.numpy())}),
    "states of no size": (
        "factors",
        lambda r: {
            "centres": filled(r.centres.shape, 0.0),
            "means": Quantized.of(0 * r.means.numpy()),
            "factors": Quantized.of(0 * r.factors.numpy()),
        },
    ),
    "rests of another size": ("rests", lambda _: {"rests": filled((R, FOLDS, SIZE + 1), 0.1)}),
    "rests of fewer folds": ("rests", lambda _: {"rests": filled((R, FOLDS - 1, SIZE), 0.1)}),
    "huge rests": ("rests", lambda _: {"rests": filled((R, FOLDS, SIZE), 1e6)}),
    "negative rests": ("rests", lambda _: {"rests": filled((R, FOLDS, SIZE), -0.1)}),
    "words of another size": ("word_means", lambda _: {"word_means": filled((1, LABELS + 1), -1.0)}),
    "words of more views": ("word_means", lambda _: {"word_means": filled((2, LABELS), -1.0)}),
    "no words": ("word_means", lambda _: {"word_means": filled((0, 0), 0.0)}),
    "huge words": ("word_means", lambda _: {"word_means": filled((1, LABELS), -1e6)}),
    "words more than likely": ("word_means", lambda _: {"word_means": filled((1, LABELS), 0.1)}),
    "a negative loss": ("loss", lambda _: {"loss": -1.0}),
    "a huge loss": ("loss", lambda _: {"loss": 1e6}),
}


@pytest.mark.parametrize("lie", SUMS_LIES)
def test_each_lie_about_sums_is_refused_by_its_field(lie: str) -> None:
    field, change = SUMS_LIES[lie]
    asked, result = sums()
    with raises(WireError, field=field):
        check_report(report(asked, msgspec.structs.replace(result, **change(result))), asked, ROWS)


def test_rows_in_other_folds_need_other_sums() -> None:
    asked, result = sums(12)
    with pytest.raises(WireError):
        check_report(report(asked, msgspec.structs.replace(result, counts=moved(result.counts)), 12), asked, 12)


def test_words_that_were_not_asked_for_are_refused() -> None:
    asked, result = sums(n_word_views=0)
    with raises(WireError, field="word_means"):
        lie = msgspec.structs.replace(result, word_means=filled((1, LABELS), -1.0))
        check_report(report(asked, lie), asked, ROWS)


# --- lies about moments and gradients --------------------------------------------------------------------------------

SHAPE = (2, LAYERS, SIZE)

MOMENTS_LIES: dict[str, tuple[str, dict[str, Any]]] = {
    "another purpose": ("purpose", {"purpose": "readout"}),
    "no shape of means": ("means", {"means": filled((), 0.0)}),
    "means of no size": ("means", {"means": filled((2, LAYERS, 0), 0.0)}),
    "means of another size": ("squares", {"means": filled((2, LAYERS, SIZE + 1), 0.0)}),
    "squares of fewer views": ("squares", {"squares": filled((1, LAYERS, SIZE), 1.0)}),
    "huge means": ("means", {"means": filled(SHAPE, 1e3)}),
    "huge squares": ("squares", {"squares": filled(SHAPE, 1e3)}),
    "squares below those of the means": ("squares", {"means": filled(SHAPE, 1.0), "squares": filled(SHAPE, 0.5)}),
    "words of more views": ("word_means", {"word_means": filled((2, LABELS), -1.0)}),
    "words more than likely": ("word_means", {"word_means": filled((1, LABELS), 0.1)}),
    "negative squares of words": ("word_squares", {"word_squares": filled((1,), -1.0)}),
    "a negative loss": ("loss", {"loss": -1.0}),
}

GRADIENT_LIES: dict[str, tuple[str, dict[str, Any]]] = {
    "another purpose": ("purpose", {"purpose": "readout"}),
    "losses of one point": ("losses", {"losses": filled((1,), 1.0)}),
    "a negative loss": ("losses", {"losses": filled((2,), -1.0)}),
    "a huge loss": ("losses", {"losses": filled((2,), 1e6)}),
    "gradients of one point": ("by_weights", {"by_weights": filled((1, *SHAPE, LABELS), 0.0)}),
    "a huge gradient": ("by_weights", {"by_weights": filled((2, *SHAPE, LABELS), 1e2)}),
    "a huge gradient by scales": ("by_word_scales", {"by_word_scales": filled((2, 1), 1e6)}),
    "a huge gradient by the bias": ("by_bias", {"by_bias": filled((2, LABELS), 1.1)}),
    "a bias of more labels": ("by_bias", {"by_bias": filled((2, LABELS + 1), 0.1)}),
}


@pytest.mark.parametrize("lie", MOMENTS_LIES)
def test_each_lie_about_moments_is_refused_by_its_field(lie: str) -> None:
    field, change = MOMENTS_LIES[lie]
    asked, result = moments()
    with raises(WireError, field=field):
        check_report(report(asked, msgspec.structs.replace(result, **change)), asked, ROWS)


@pytest.mark.parametrize("lie", GRADIENT_LIES)
def test_each_lie_about_gradients_is_refused_by_its_field(lie: str) -> None:
    field, change = GRADIENT_LIES[lie]
    asked, result = logistic()
    with raises(WireError, field=field):
        check_report(report(asked, msgspec.structs.replace(result, **change)), asked, ROWS)


# --- lies about losses -----------------------------------------------------------------------------------------------


def losses(result: CrossResult, value: float) -> Array:
    changed = result.loss_sums.numpy()
    changed[1, 2] = value
    return Array.of(changed, "<f4")


CROSS_LIES: dict[str, tuple[str, Callable[[CrossResult], dict[str, Any]]]] = {
    "another purpose": ("purpose", lambda _: {"purpose": "readout"}),
    "fewer mixtures": ("loss_sums", lambda r: {"loss_sums": Array.of(r.loss_sums.numpy()[1:], "<f4")}),
    "more folds": ("loss_sums", lambda _: {"loss_sums": filled((4, FOLDS + 1), 1.0)}),
    "flat losses": ("loss_sums", lambda _: {"loss_sums": filled((4 * FOLDS,), 1.0)}),
    "no losses": ("loss_sums", lambda _: {"loss_sums": filled((0,), 1.0)}),
    "a negative loss": ("loss_sums", lambda r: {"loss_sums": losses(r, -1.0)}),
    "a huge loss": ("loss_sums", lambda r: {"loss_sums": losses(r, 9e8)}),
}


@pytest.mark.parametrize("n_word_views", [0, 1])
@pytest.mark.parametrize("lie", CROSS_LIES)
def test_each_lie_about_losses_is_refused_by_its_field(lie: str, n_word_views: int) -> None:
    field, change = CROSS_LIES[lie]
    asked, result = cross(n_word_views=n_word_views)
    with raises(WireError, field=field):
        check_report(report(asked, msgspec.structs.replace(result, **change(result))), asked, ROWS)


def test_losses_of_states_alone_have_a_low_bound() -> None:
    asked, result = cross(n_word_views=0)
    with raises(WireError, field="loss_sums"):
        check_report(report(asked, msgspec.structs.replace(result, loss_sums=losses(result, 100.0 * ROWS))), asked)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_losses_that_are_not_finite_are_refused(value: float) -> None:
    asked, result = cross()
    with pytest.raises(WireError):
        check_report(report(asked, msgspec.structs.replace(result, loss_sums=losses(result, value))), asked, ROWS)


# --- lies about both -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [sums, cross])
@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("n_texts", {"n_texts": ROWS + 1}),
        ("evaluations", {"evaluations": 3}),
        ("tokens", {"tokens": 10**7}),
    ],
    ids=["rows", "evaluations", "tokens"],
)
def test_claims_of_more_work_are_refused(make: Callable[[], Any], field: str, changes: dict[str, Any]) -> None:
    asked, result = make()
    with raises(WireError, field=field):
        check_report(report(asked, result, **changes), asked, ROWS)


@pytest.mark.parametrize("make", [sums, cross])
def test_rows_beyond_those_of_the_reading_are_refused(make: Callable[[], Any]) -> None:
    asked, result = make()
    few = msgspec.structs.replace(asked.work, reading=msgspec.structs.replace(asked.work.reading, max_rows=ROWS - 1))
    asked = msgspec.structs.replace(asked, work=few)
    with raises(WireError, field="n_texts"):
        check_report(report(asked, result), asked, 10 * ROWS)


def test_results_of_other_exchanges_are_refused() -> None:
    (asked_sums, of_sums), (asked_cross, of_cross) = sums(), cross()
    words = FitResult(purpose="probe", loss=1.0, means=filled((1, 3), 0.1))
    for asked, results in ((asked_sums, (of_cross, words)), (asked_cross, (of_sums, words))):
        for result in results:
            with raises(WireError, field="result"):
                check_report(report(asked, result), asked, ROWS)


# --- the next plan ---------------------------------------------------------------------------------------------------


def test_a_round_knows_its_work_again_by_all_but_the_classifiers() -> None:
    asked, _ = cross()
    work, kind = asked.work, kind_of(asked.work)
    known = kind.digest(work)
    for field in ("weights", "biases"):
        assert kind.digest(msgspec.structs.replace(work, **{field: Array.of(np.zeros(3))})) == known
    for field in ("coefficients", "word_scales", "centres"):
        assert kind.digest(msgspec.structs.replace(work, **{field: Array.of(np.zeros(3))})) != known
    assert kind.digest(msgspec.structs.replace(work, readers=(0, 1))) != known
    more_rows = msgspec.structs.replace(work, reading=msgspec.structs.replace(work.reading, max_rows=0))
    assert kind.digest(more_rows) != known


# --- the evaluation that chooses -------------------------------------------------------------------------------------


def held_request(split: str = "held") -> EvaluateRequest:
    return EvaluateRequest(
        model_fingerprint="sha256:0",
        task=TOY,
        labels=("x", "y", "z"),
        template=TEMPLATE,
        prompt=PromptSpec(d=2),
        objective=ObjectiveSpec(),
        latents=Array.of(np.zeros((2, 2))),
        split=split,  # type: ignore[arg-type]
        held=HeldRows(seed=0),
    )


def held_report(*squares: float) -> EvaluateReport:
    return EvaluateReport(n=5, correct=(1, 2), loss_sums=(3.0, 2.0), seconds=0.1, difference_squares=squares)


def test_a_held_evaluation_has_a_square_for_each_latent() -> None:
    check_evaluation(held_report(0.0, 1.0), held_request(), 5)
    check_evaluation(held_report(), held_request("test"), 5)
    for squares, split in (((), "held"), ((0.0,), "held"), ((0.0, 1.0, 1.0), "held"), ((0.0, 1.0), "test")):
        with raises(WireError, field="difference_squares"):
            check_evaluation(held_report(*squares), held_request(split), 5)


@pytest.mark.parametrize("square", [-1.0, 1e11])
def test_impossible_squares_are_refused(square: float) -> None:
    with raises(WireError, field="difference_squares"):
        check_evaluation(held_report(0.0, square), held_request(), 5)
