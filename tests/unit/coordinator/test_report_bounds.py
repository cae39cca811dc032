"""Every number that a device sends has a bound, and is refused beyond it when it is decoded or checked."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedbpt.coordinator.reports.report_checks import check_evaluation, check_progress, check_report
from fedbpt.engine.layers import normalized
from fedbpt.errors import WireError
from fedbpt.objective.layer_means import means_result, public_result
from fedbpt.objective.layer_sums import cross_result, sketch_result, sums_result
from fedbpt.objective.layer_view import Views
from fedbpt.objective.logistic import logistic_result, moments_result
from fedbpt.objective.losses import log_probabilities
from fedbpt.objective.privacy import Releases
from fedbpt.protocol import codec, polling, questions, rounds, specs
from fedbpt.protocol.rounds import (
    CrossWork,
    DeviceInfo,
    EvaluateReport,
    EvaluateRequest,
    FitResult,
    LocalResult,
    LocalWork,
    LogisticWork,
    MeansWork,
    MomentsWork,
    PooledResult,
    PooledWork,
    PublicWork,
    Reading,
    RoundPlan,
    RoundProgress,
    RoundReport,
    SearchState,
    SelectResult,
    SelectWork,
    SketchWork,
    SumsWork,
)
from fedbpt.protocol.specs import Array, Generation, Message, ObjectiveSpec, PrivacySpec, PromptSpec, Readout
from fedbpt.search.local_search import farthest_move, local_search, sigma_squares_bounds
from tests.support.fake_device import FakeDevice
from tests.support.lies import EXTREMES, changed, largest, leaves
from tests.unit.coordinator.test_report_checks import FITS, N_LABELS, N_WORDS, RIGHT, STATE, means, plan, report

FROM_DEVICES = (
    *(rounds.DeviceInfo, rounds.RoundReport, rounds.RoundProgress, rounds.EvaluateReport, rounds.ErrorReply),
    *(questions.Answer, polling.Poll, polling.Reply, polling.Enrolment),
)
TO_DEVICES = (
    *(rounds.RoundPlan, rounds.EvaluateRequest, questions.Question, polling.Request, polling.Delivery),
    polling.Enrolled,
)


NUMBERS = (msgspec.inspect.IntType, msgspec.inspect.FloatType, msgspec.inspect.StructType)  # the last: an array


def numbers_of(kinds: tuple[type[Any], ...]) -> Iterator[tuple[str, Any]]:
    """(type and field, type info) of every number in messages of these kinds, and of every array."""
    todo, seen = list(kinds), set()
    while todo:
        kind = todo.pop()
        if kind in seen:
            continue
        seen.add(kind)
        for field in msgspec.inspect.type_info(kind).fields:
            inner = [field.type]
            while inner:
                found = inner.pop()
                if isinstance(found, msgspec.inspect.StructType) and found.cls is not Array:
                    todo.append(found.cls)
                elif isinstance(
                    found, msgspec.inspect.StructType | msgspec.inspect.IntType | msgspec.inspect.FloatType
                ):
                    yield f"{kind.__name__}.{field.name}", found
                elif isinstance(found, msgspec.inspect.UnionType):
                    inner += found.types
                elif isinstance(found, msgspec.inspect.VarTupleType):
                    inner.append(found.item_type)
                elif isinstance(found, msgspec.inspect.TupleType):
                    inner += found.item_types
                else:
                    assert not hasattr(found, "item_type"), f"what does a {found} hold?"
                    assert not isinstance(found, msgspec.inspect.AnyType)


def closure(kinds: tuple[type[Any], ...]) -> set[str]:
    return {where.split(".")[0] for where, _ in numbers_of(kinds)} | {kind.__name__ for kind in kinds}


def test_every_message_is_known_to_come_from_devices_or_to_go_to_them() -> None:
    known = closure(FROM_DEVICES) | closure(TO_DEVICES)
    for module in (rounds, specs, questions, polling):
        for name, kind in inspect.getmembers(module, inspect.isclass):
            if issubclass(kind, Message) and kind not in (Message, Array):
                own = [where for where, _ in numbers_of((kind,)) if where.startswith(f"{name}.")]
                assert name in known or not own, f"say in FROM_DEVICES or TO_DEVICES: {name}"


def test_every_number_of_a_device_is_bounded_on_both_sides() -> None:
    numbers = [(where, of) for where, of in numbers_of(FROM_DEVICES) if not isinstance(of, msgspec.inspect.StructType)]
    assert {"RoundReport.peak_rss_bytes", "EvaluateReport.n", "LocalResult.sigma_squares"} <= {at for at, _ in numbers}
    for where, of in numbers:
        low = [bound for bound in (of.ge, of.gt) if bound is not None]
        high = [bound for bound in (of.le, of.lt) if bound is not None]
        assert low, f"{where} has no lower bound"
        assert high, f"{where} has no upper bound"
        if isinstance(of, msgspec.inspect.IntType):
            assert high[0] <= 2**50, f"{where}: sums of it do not fit 64 bits"


# --- numbers that the plan bounds ------------------------------------------------------------------------------------

SELECT = plan(work=SelectWork(templates=(FITS["bias"].template,) * 2, max_rows=9))
BY_LABEL = plan(work=SelectWork(templates=(FITS["bias"].template,) * 2, max_rows=9, by_label=True))
SHIFTS = msgspec.structs.replace(SELECT, prompt=PromptSpec(d=2, placement="layers"))
ANSWERS = msgspec.structs.replace(SELECT, objective=ObjectiveSpec(generation=Generation()))
POOLED = plan(work=PooledWork(state=STATE, generation=0, popsize=4))
LOCAL = plan(work=LocalWork(state=STATE, iterations=2, popsize=4))
LOCALLY = LocalResult(mean=Array.of(np.ones(2)), fitness=0.5, sigma_squares=2.1)

REPORTS: dict[str, tuple[RoundPlan, RoundReport]] = {
    "selection": (SELECT, report(SELECT, SelectResult(loss_sums=Array.of(np.ones(2))))),
    "by label": (
        BY_LABEL,
        report(BY_LABEL, SelectResult(loss_sums=Array.of(np.ones((2, 3))), label_counts=(5, 0, 11))),
    ),
    "shifts": (
        SHIFTS,
        report(SHIFTS, SelectResult(loss_sums=Array.of(np.ones(2)), sizes=Array.of(np.ones((2, 3)), "<f4"))),
    ),
    "answers": (
        ANSWERS,
        report(ANSWERS, SelectResult(loss_sums=Array.of(np.ones(2)), reward_sums=Array.of(np.ones(2)), n_answered=4)),
    ),
    "pooled": (POOLED, report(POOLED, PooledResult(losses=Array.of(np.ones(4))))),
    "local": (LOCAL, report(LOCAL, LOCALLY)),
    **{name: (fit, report(fit, means(*RIGHT[name]))) for name, fit in FITS.items()},
}
N_ROWS = 16


def layer_reports() -> dict[str, tuple[RoundPlan, RoundReport]]:
    """The exchanges of a layer readout's fits, by sums and by gradients.

    Of 8 rows of three labels in two folds, in two dimensions.
    """
    rng = np.random.default_rng(0)
    states = normalized(rng.standard_normal((8, 1, 1, 2)).astype(np.float32)).astype(np.float16)
    views = Views(states, log_probabilities(rng.standard_normal((8, 1, 3))))
    targets, folds = np.arange(8) % 2, np.arange(8) // 4  # none of the third label
    reading = Reading(latent=Array.of(np.zeros(2)), templates=(), layers=(1,), n_word_views=1, n_folds=2)
    sums = plan(work=SumsWork(purpose="probe", reading=reading, max_rank=1))
    cross = plan(
        work=CrossWork(
            purpose="probe",
            reading=reading,
            readers=(0,),
            weights=Array.of(rng.standard_normal((2, 1, 2, 3)), "<f2"),
            biases=Array.of(np.zeros((2, 1, 3)), "<f4"),
            coefficients=Array.of(np.array([[0.5], [1.0]]), "<f4"),
            word_scales=Array.of(np.array([[0.0], [0.0]]), "<f4"),
            centres=Array.of(np.zeros((1, 3)), "<f4"),
        )
    )
    moments = plan(work=MomentsWork(purpose="probe", reading=reading))
    logistic = plan(
        work=LogisticWork(
            purpose="probe",
            reading=reading,
            centre=Array.of(np.zeros((1, 1, 2)), "<f4"),
            word_centre=Array.of(np.zeros((1, 3)), "<f4"),
            weights=Array.of(rng.standard_normal((2, 1, 1, 2, 3)), "<f2"),
            word_scales=Array.of(np.ones((2, 1)), "<f4"),
            bias=Array.of(np.zeros((2, 3)), "<f4"),
        )
    )
    public = plan(work=PublicWork(purpose="probe", reading=reading, n_texts=8))
    noisy = msgspec.structs.replace(
        plan(
            work=MeansWork(
                purpose="probe",
                reading=reading,
                centre=Array.of(np.zeros((1, 2)), "<f4"),
                projection=Array.of(np.ones((1, 2, 1)), "<f2"),
                word_centres=Array.of(np.zeros((1, 3)), "<f4"),
                word_clip=1.0,
            )
        ),
        privacy=PrivacySpec(readout_noise=0.5),
    )
    assert isinstance(public.work, PublicWork)
    assert isinstance(noisy.work, MeansWork)
    assert noisy.privacy is not None
    releases = Releases(noisy.privacy, b"key", "question")
    sketched = plan(work=SketchWork(purpose="probe", reading=reading, rank=2))
    assert isinstance(sketched.work, SketchWork)
    assert isinstance(sums.work, SumsWork)
    assert isinstance(cross.work, CrossWork)
    assert isinstance(moments.work, MomentsWork)
    assert isinstance(logistic.work, LogisticWork)
    return {
        "state moments": (moments, report(moments, moments_result(moments.work, views, targets, N_LABELS))),
        "logistic": (logistic, report(logistic, logistic_result(logistic.work, views, targets, folds, np.ones(8)))),
        "sketched": (
            sketched,
            report(sketched, sketch_result(sketched.work, views, targets, folds, N_LABELS, seed=0)),
        ),
        "sums": (sums, report(sums, sums_result(sums.work, views, targets, folds, N_LABELS))),
        "public": (public, report(public, public_result(public.work, views))),
        "noisy": (noisy, report(noisy, means_result(noisy.work, views, targets, N_LABELS, releases))),
        "cross": (cross, report(cross, cross_result(cross.work, views, targets, folds, np.ones(8)))),
    }


REPORTS |= layer_reports()

ARRAYS: dict[str, dict[str, tuple[float, ...]]] = {
    "SelectResult.loss_sums": {"selection": (-1.0, 8.1e4), "by label": (-1.0, 8.1e4)},
    "SelectResult.reward_sums": {"answers": (-0.1, 4.1)},
    "SelectResult.sizes": {"shifts": (-1.0, 0.0, 1e6)},
    "PooledResult.losses": {"pooled": (-1.0, 1.1e4)},
    "LocalResult.mean": {"local": (-200.0, 200.0, 9.9e8)},
    "FitResult.means": {"gradient": (-2e4, 2e4), "moments": (-1e5, 1e5), "bias": (-1.1, 1.1)},
    "SumsResult.centres": {"sums": (-1.5, 1.5)},
    "Quantized.scales": {"sums": (-4.1, 4.1), "public": (-1.5, 1.5)},
    "PublicResult.centres": {"public": (-1.5, 1.5)},
    "PublicResult.words": {"public": (-1.1e4, 1.0)},
    "MeansResult.label_sums": {"noisy": (-36.1, 36.1)},
    "MeansResult.state_sums": {"noisy": (-36.1, 36.1)},
    "MeansResult.word_sums": {"noisy": (-36.1, 36.1)},
    "SumsResult.rests": {"sums": (-1.0, 16.1)},
    "SumsResult.word_means": {"sums": (-1.1e4, 1.0)},
    "SketchResult.counts": {"sketched": (-1.0, 8.1)},
    "SketchResult.sums": {"sketched": (-12.0, 12.0)},
    "SketchResult.squares": {"sketched": (-0.1, 16.1)},
    "SketchResult.sketches": {"sketched": (-25.0, 25.0)},
    "SketchResult.word_means": {"sketched": (-1.1e4, 1.0)},
    "CrossResult.loss_sums": {"cross": (-1.0, 300.0)},
    "MomentsResult.means": {"state moments": (-1.5, 1.5)},
    "MomentsResult.squares": {"state moments": (-0.1, 2.1)},
    "MomentsResult.word_means": {"state moments": (-1.1e4, 1.0)},
    "MomentsResult.word_squares": {"state moments": (-0.1, 1.1e8)},
    "LogisticResult.losses": {"logistic": (-1.0, 3e4)},
    "LogisticResult.by_weights": {"logistic": (-1.5, 1.5)},
    "LogisticResult.by_word_scales": {"logistic": (-2.1e4, 2.1e4)},
    "LogisticResult.by_bias": {"logistic": (-1.1, 1.1)},
}
"""By array: the reports that have it, and values out of bounds for all its entries."""


def test_every_array_of_a_device_has_its_bound_tested() -> None:
    assert set(ARRAYS) == {
        where for where, of in numbers_of(FROM_DEVICES) if isinstance(of, msgspec.inspect.StructType)
    }


@pytest.mark.parametrize("name", REPORTS)
def test_honest_reports_pass(name: str) -> None:
    asked, answer = REPORTS[name]
    check_report(codec.decode(codec.encode(answer), RoundReport), asked, N_ROWS)


@pytest.mark.parametrize(("where", "name"), [(where, name) for where, names in ARRAYS.items() for name in names])
def test_entries_beyond_the_plans_bound_are_refused(where: str, name: str) -> None:
    asked, answer = REPORTS[name]
    field = where.split(".")[1]
    paths = [path for path in leaves(answer) if path[-1] == field]
    assert paths
    for value in ARRAYS[where][name]:
        for path in paths:
            with pytest.raises(WireError):
                check_report(changed(answer, path, value), asked, N_ROWS)


LARGEST: dict[str, float] = {
    "n_texts": N_ROWS,
    "n_answered": N_ROWS,
    "reward_sums": N_ROWS + 1e-9,
    "evaluations": 9,
    "tokens": 10**6,
    "label_counts": N_ROWS,
    "counts": N_ROWS,
    "ranks": N_ROWS,
    "shape": N_ROWS,
    "centres": 1.5,
    "scales": 4.1,
    "rests": 16.1,
    "word_means": 1e4,
    "loss_sums": 8e4,
    "losses": 1e5,
    "by_weights": 1.5,
    "by_word_scales": 2.1e4,
    "by_bias": 1.1,
    "squares": 16.1,
    "word_squares": 1.1e8,
    "sums": 12.0,
    "sketches": 25.0,
    "sizes": 1e6,
    "words": 1e4,
    "label_sums": 36.1,
    "state_sums": 36.1,
    "word_sums": 36.1,
    "mean": 100,
    "fitness": 1e4,
    "sigma_squares": 40,
    "loss": 1e4,
    "means": N_WORDS * 1e8,
    "seconds": 1e9,
    "peak_rss_bytes": 2**50,
}


@pytest.mark.parametrize("name", REPORTS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_accepted_numbers_are_within_the_plans_bounds(name: str, data: st.DataObject) -> None:
    asked, answer = REPORTS[name]
    path = data.draw(st.sampled_from([path for path in leaves(answer) if path[-1] != "round"]))
    value = data.draw(st.sampled_from(EXTREMES))
    lie = changed(answer, path, value)
    field = next(part for part in reversed(path) if isinstance(part, str))
    try:
        received = codec.decode(codec.encode(lie), RoundReport)
        check_report(received, asked, N_ROWS)
    except WireError:
        return
    assert largest(received, path) <= LARGEST[field]


def evaluation(**changes: Any) -> tuple[EvaluateReport, EvaluateRequest]:
    request = EvaluateRequest(
        model_fingerprint="f", task=SELECT.task, labels=("x", "y"), template=SELECT.template, prompt=PromptSpec(d=2),
        objective=ObjectiveSpec(), latents=Array.of(np.zeros((2, 2))),
    )  # fmt: skip
    answer = EvaluateReport(n=20, correct=(3, 20), loss_sums=(2.0, 8.0), seconds=1.0)
    return msgspec.structs.replace(answer, **changes), request


@pytest.mark.parametrize(
    "lie",
    [{"n": 21}, {"n": 10**9}, {"correct": (21, 3)}, {"loss_sums": (2.1e5, 1.0)}, {"loss_sums": (1.0, -1.0)}],
    ids=str,
)
def test_an_impossible_evaluation_is_refused(lie: dict[str, Any]) -> None:
    check_evaluation(*evaluation(), n_rows=20)
    with pytest.raises(WireError):
        check_evaluation(*evaluation(**lie), n_rows=20)


@pytest.mark.parametrize(
    "lie",
    [
        {"n_failed": (21, 0)},
        {"n_distinct": (1,)},
        {"n_failed": msgspec.UNSET},
        {"loss_sums": (20.1, 0.0)},
        {"loss_sums": (-0.1, 0.0)},
    ],
    ids=str,
)
def test_an_impossible_evaluation_of_answers_is_refused(lie: dict[str, Any]) -> None:
    right = {"loss_sums": (20.0, 0.0), "correct": (0, 20), "n_failed": (1, 0), "n_distinct": (3, 20)}
    report, request = evaluation(**right)
    asked = msgspec.structs.replace(request, generation=specs.Generation())
    check_evaluation(report, asked, n_rows=20)
    with pytest.raises(WireError):
        check_evaluation(evaluation(**{**right, **lie})[0], asked, n_rows=20)
    with pytest.raises(WireError):
        check_evaluation(report, request, n_rows=20)  # scores were asked for


@pytest.mark.parametrize("kind", [DeviceInfo, EvaluateReport, RoundProgress])
def test_an_extreme_number_is_refused_or_small_enough_to_be_stored(kind: type[Message]) -> None:
    honest: dict[type[Message], Message] = {
        DeviceInfo: msgspec.structs.replace(FakeDevice("a").info(), celsius=40.0, battery=50.0, tokens_per_second=9.0),
        EvaluateReport: evaluation()[0],
        RoundProgress: RoundProgress(run="r", round=1, state="running", done=1, total=2),
    }
    for path in leaves(honest[kind]):
        for value in EXTREMES:
            try:
                received = codec.decode(codec.encode(changed(honest[kind], path, value)), kind)
            except WireError:
                continue
            assert codec.decode(codec.encode(received), kind) == received
            assert largest(received, path) <= (1e30 if "loss_sums" in path else 2**50)


def test_progress_beyond_the_total_is_refused() -> None:
    check_progress(RoundProgress(run="r", round=1, state="running", done=2, total=2))
    with pytest.raises(WireError):
        check_progress(RoundProgress(run="r", round=1, state="running", done=3, total=2))


def test_a_readout_widens_the_bounds_by_what_it_adds() -> None:
    """A readout spoilt by other devices makes honest losses large; they must be accepted."""
    weights = Array.of(np.full((1 + N_WORDS, N_LABELS), 100.0))
    spoilt = msgspec.structs.replace(FITS["gradient"].work, readout=Readout(weights=weights))
    asked = msgspec.structs.replace(FITS["gradient"], work=spoilt)
    loss = FitResult(purpose="probe", loss=1e6, means=means(*RIGHT["gradient"]).means)
    check_report(report(asked, loss), asked)
    with pytest.raises(WireError):
        check_report(report(FITS["gradient"], loss), FITS["gradient"])


@pytest.mark.parametrize("d", [1, 4, 32, 500])
@pytest.mark.parametrize("scales", [False, True])
def test_a_local_search_stays_within_its_bounds_whatever_the_losses(d: int, scales: bool) -> None:
    rng = np.random.default_rng(1)
    along = rng.standard_normal(d)
    spread = Array.of(rng.uniform(0.1, 3.0, d)) if scales else None
    state = SearchState(mean=Array.of(rng.standard_normal(d)), sigma=0.3, scales=spread)
    farther = {
        "longest": lambda z, _: -np.linalg.norm(z - state.mean.numpy(), axis=1),
        "shortest": lambda z, _: np.linalg.norm(z - state.mean.numpy(), axis=1),
        "one way": lambda z, _: -(z @ along),
        "noise": lambda z, _: rng.standard_normal(len(z)),
    }
    for popsize, iterations in ((3, 8), (20, 8), (8, 1)):
        work = LocalWork(state=state, iterations=iterations, popsize=popsize)
        for losses in farther.values():
            found = local_search(work, 5, losses)
            assert np.linalg.norm(found.mean - state.mean.numpy()) < 0.7 * farthest_move(work)
            low, high = sigma_squares_bounds(work)
            assert low <= found.sigma_squares <= high


@pytest.mark.parametrize(
    "changes",
    [
        {"n_answered": msgspec.UNSET},
        {"reward_sums": msgspec.UNSET},
        {"n_answered": N_ROWS + 1},
        {"reward_sums": Array.of(np.ones(3))},
    ],
)
def test_rewards_come_with_the_number_of_answers(changes: dict[str, Any]) -> None:
    asked, right = REPORTS["answers"]
    wrong = msgspec.structs.replace(right, result=msgspec.structs.replace(right.result, **changes))
    with pytest.raises(WireError):
        check_report(wrong, asked, N_ROWS)


def test_rewards_are_refused_where_no_answers_were_asked_for() -> None:
    asked, _ = REPORTS["selection"]
    _, answered = REPORTS["answers"]
    with pytest.raises(WireError, match="reward_sums"):
        check_report(report(asked, answered.result), asked, N_ROWS)
