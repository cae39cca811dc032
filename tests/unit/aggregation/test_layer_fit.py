"""`LayerFit` finds out which layers know the task, however the rows are spread over devices."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import NamedTuple

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from fedbpt.aggregation.layer_fit import JUDGES, MANY_LABELS, SHRINKAGES, TEMPERATURES, LayerFit
from fedbpt.engine.discriminant import assign_folds
from fedbpt.engine.layers import normalized
from fedbpt.errors import InputError
from fedbpt.objective.layer_sums import cross_result, sums_result
from fedbpt.objective.layer_view import Views
from fedbpt.objective.losses import log_probabilities
from fedbpt.protocol.rounds import CrossResult, CrossWork, FitPurpose, Reading, RoundReport, SumsResult, SumsWork, Work
from fedbpt.protocol.specs import Array, LayerReadout, Quantized, Template
from tests.support.raises import raises
from tests.support.toy_federation import report

Floats = NDArray[np.float64]

SIZE, LABELS, FOLDS = 16, 3, 4
LAYERS = (1, 3)
PROMPTED = Template(pattern="{text} P", label_words=("a", "b", "c"))
OTHER = Template(pattern="{text} Q", label_words=("a", "b", "c"))
MORE = Template(pattern="{text} R", label_words=("a", "b", "c"))


class Rows(NamedTuple):
    """A device's data: states [n, n_views, n_layers, SIZE], words [n, n_word_views, LABELS], targets and folds [n]."""

    states: NDArray[np.float16]
    words: Floats
    targets: NDArray[np.intp]
    folds: NDArray[np.intp]

    def of(self, which: NDArray[np.bool_] | NDArray[np.intp]) -> Rows:
        return Rows(self.states[which], self.words[which], self.targets[which], self.folds[which])

    def read_by(self, work: SumsWork | CrossWork) -> Views:
        """The views that ``work`` asks for: its first templates."""
        reading = work.reading
        return Views(self.states[:, : reading.n_views], self.words[:, : reading.n_word_views])


def rows(
    knows: Sequence[Sequence[float]],
    n: int = 240,
    seed: int = 0,
    n_labels: int = LABELS,
    words: Sequence[float] = (),
) -> Rows:
    """``knows`` [n_views, n_layers]: how far labels lie apart in a reader's states; ``words`` [n_word_views]: in those
    of the label words."""
    rng = np.random.default_rng(seed)
    targets = rng.permutation(np.arange(n) % n_labels)
    apart = np.array(knows)
    centres = rng.standard_normal((*apart.shape, n_labels, SIZE)) * apart[..., None, None]
    common = 2 * rng.standard_normal((*apart.shape, SIZE))
    states = common + np.moveaxis(centres[:, :, targets], 2, 0) + rng.standard_normal((n, *apart.shape, SIZE))
    scores = rng.standard_normal((n, len(words), n_labels))
    scores[np.arange(n), :, targets] += np.array(words)
    scores += np.linspace(0, 2, n_labels)  # words are not calibrated
    folds = assign_folds(targets, FOLDS, np.random.default_rng(seed + 1))
    found = log_probabilities(scores) if words else np.zeros((n, 0, 0))
    return Rows(normalized(states).astype(np.float16), found, targets, folds)


def reading_of(whole: Rows, templates: tuple[Template, ...] | None = None) -> Reading:
    _, n_views, n_layers, _ = whole.states.shape
    found = (OTHER, MORE)[: n_views - 1] if templates is None else templates
    return Reading(
        latent=Array.of(np.zeros(2)),
        templates=found,
        layers=LAYERS[:n_layers],
        n_word_views=whole.words.shape[1],
        n_folds=FOLDS,
    )


def fresh(whole: Rows, n_labels: int = LABELS, purpose: FitPurpose = "probe", uniform: bool = False) -> LayerFit:
    return LayerFit(purpose, reading_of(whole), n_labels, uniform)


def answer(work: Work, device: Rows, name: str, n_labels: int = LABELS) -> RoundReport:
    """What a device does with decoded work; its result is decoded too."""
    work = msgspec.msgpack.decode(msgspec.msgpack.encode(work), type=SumsWork | CrossWork)
    views = device.read_by(work)
    result: SumsResult | CrossResult
    if isinstance(work, SumsWork):
        result = sums_result(work, views, device.targets, device.folds, n_labels)
    else:
        result = cross_result(work, views, device.targets, device.folds, np.ones(len(device.targets)))
    decoded = msgspec.msgpack.decode(msgspec.msgpack.encode(result), type=SumsResult | CrossResult)
    return report(name, 0, decoded, n_texts=len(device.targets))


def finish(
    fit: LayerFit,
    devices: Sequence[Rows],
    change: Callable[[RoundReport], RoundReport] = lambda given: given,
    backwards: bool = False,
    n_labels: int = LABELS,
) -> LayerFit:
    """Run ``fit`` to its end. ``change``: applied to each report."""
    exchanges = 0
    while not fit.done:
        reports = [change(answer(fit.work(), device, f"d{i}", n_labels)) for i, device in enumerate(devices)]
        fit.update(reports[::-1] if backwards else reports)
        exchanges += 1
    assert exchanges == 3
    return fit


def logits_of(readout: LayerReadout, whole: Rows, views: Sequence[int] | None = None) -> Floats:
    """Label logits [n, LABELS]: ``views``, the view of each of the readout's templates."""
    if views is None:
        of_template = {OTHER: 1, MORE: 2}
        views = [0, *(of_template[template] for template in readout.others)]
    states = normalized(whole.states)[:, list(views)]
    found: Floats = readout.bias.numpy() + np.einsum("ntle,tlek->nk", states, readout.weights.numpy())
    for view, scale in zip(views, readout.word_scales.numpy(), strict=True):
        if scale:
            found = found + scale * whole.words[:, view]
    return found


def loss_of(logits: Floats, targets: NDArray[np.intp]) -> float:
    return float(-log_probabilities(logits)[np.arange(len(targets)), targets].mean())


def accuracy_of(logits: Floats, targets: NDArray[np.intp]) -> float:
    return float((logits.argmax(axis=1) == targets).mean())


def halves(whole: Rows) -> tuple[Rows, Rows]:
    """Rows to fit, and rows to judge."""
    first = np.arange(len(whole.targets)) < len(whole.targets) // 2
    fitted = whole.of(first)
    folds = assign_folds(fitted.targets, FOLDS, np.random.default_rng(9))
    return fitted._replace(folds=folds), whole.of(~first)


def by_label(whole: Rows) -> list[Rows]:
    """The most skewed devices: one label each."""
    return [whole.of(whole.targets == label) for label in range(LABELS)]


def without_judges_losses(given: RoundReport) -> RoundReport:
    """``given`` with other losses of fold 0."""
    if not isinstance(given.result, CrossResult):
        return given
    sums = given.result.loss_sums.numpy()
    sums[:, JUDGES] = np.random.default_rng(3).uniform(0, 1e3, len(sums))
    return msgspec.structs.replace(given, result=msgspec.structs.replace(given.result, loss_sums=Array.of(sums, "<f4")))


# --- what is learned -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_separable_labels_are_learned(seed: int, uniform: bool) -> None:
    fitted, judged = halves(rows([[0.8, 0.8]], n=480, seed=seed))
    fit = finish(fresh(fitted, uniform=uniform), [fitted])
    for readout in (fit.readout, fit.held_readout):
        logits = logits_of(readout, judged)
        assert accuracy_of(logits, judged.targets) > 0.9
        assert loss_of(logits, judged.targets) < 0.3
    assert fit.loss == pytest.approx(loss_of(logits_of(fit.readout, judged), judged.targets), abs=0.15)


def test_states_that_know_nothing_give_a_loss_no_worse_than_a_guess() -> None:
    fitted, judged = halves(rows([[0.0, 0.0]], n=480))
    fit = finish(fresh(fitted), [fitted])
    assert loss_of(logits_of(fit.readout, judged), judged.targets) < np.log(LABELS) + 0.03


@pytest.mark.parametrize("seed", range(3))
def test_devices_of_one_label_each_give_the_readout_of_one_device_with_all_rows(seed: int) -> None:
    fitted, judged = halves(rows([[0.5, 0.2]], n=480, seed=seed, words=[0.5]))
    together = finish(fresh(fitted), [fitted])
    apart = finish(fresh(fitted), by_label(fitted))
    logits = [logits_of(fit.readout, judged) for fit in (together, apart)]
    losses = [loss_of(each, judged.targets) for each in logits]
    assert losses[0] == pytest.approx(losses[1], abs=0.03)
    assert (logits[0].argmax(axis=1) == logits[1].argmax(axis=1)).mean() > 0.95
    assert losses[1] < np.log(LABELS) - 0.2


def test_the_order_of_reports_does_not_matter() -> None:
    whole = rows([[0.5, 0.2]], words=[0.5])
    forwards = finish(fresh(whole), by_label(whole))
    backwards = finish(fresh(whole), by_label(whole), backwards=True)
    assert forwards.digest() == backwards.digest()
    assert forwards.readout == backwards.readout


@pytest.mark.parametrize("knowing", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_a_reader_that_knows_nothing_gets_no_weight(knowing: tuple[int, int]) -> None:
    knows = np.zeros((2, 2))
    knows[knowing] = 0.8
    whole = rows(knows.tolist())
    readout = finish(fresh(whole), [whole]).readout
    weights = np.abs(readout.weights.numpy()).sum(axis=(2, 3))
    view = knowing[0]
    assert readout.others == (() if view == 0 else (OTHER,))
    expected = np.zeros((1 + view, 2), dtype=bool)
    expected[knowing] = True
    np.testing.assert_array_equal(weights > 0, expected)


def test_readers_that_know_equally_much_share_the_weight() -> None:
    whole = rows([[0.5, 0.5], [0.5, 0.5]], n=480)
    readout = finish(fresh(whole), [whole]).readout
    assert readout.others == (OTHER,)
    assert (np.abs(readout.weights.numpy()).sum(axis=(2, 3)) > 0).all()


def test_label_words_get_a_scale_where_they_help() -> None:
    fitted, judged = halves(rows([[0.1, 0.1]], n=480, words=[2.5]))
    readout = finish(fresh(fitted), [fitted]).readout
    assert readout.word_scales.numpy()[0] > 0
    with_words = loss_of(logits_of(readout, judged), judged.targets)
    alone = msgspec.structs.replace(readout, word_scales=Array.of(np.zeros(1)))
    assert with_words < loss_of(logits_of(alone, judged), judged.targets) - 0.1
    assert with_words < loss_of(judged.words[:, 0], judged.targets) - 0.1  # which are not calibrated


def test_label_words_get_no_scale_where_they_mislead() -> None:
    whole = rows([[0.4, 0.4]], words=[-1.0])
    assert not finish(fresh(whole), [whole]).readout.word_scales.numpy().any()


def test_of_two_views_the_one_whose_label_words_help_gets_the_scale() -> None:
    whole = rows([[0.1, 0.1], [0.1, 0.1]], words=[-1.0, 2.5])
    readout = finish(fresh(whole), [whole]).readout
    assert readout.others == (OTHER,)
    first, second = readout.word_scales.numpy()
    assert first == 0 < second


# --- the fold that judges --------------------------------------------------------------------------------------------


def test_losses_of_the_first_fold_choose_nothing() -> None:
    whole = rows([[0.4, 0.2], [0.3, 0.1]], words=[0.5])
    plain = finish(fresh(whole), by_label(whole))
    changed = finish(fresh(whole), by_label(whole), change=without_judges_losses)
    assert changed.readout == plain.readout
    assert changed.held_readout == plain.held_readout
    assert changed.loss == plain.loss
    assert changed.digest() != plain.digest()


def test_the_held_readout_does_not_depend_on_rows_of_the_first_fold() -> None:
    whole = rows([[0.5, 0.4]])
    strange = whole.states.copy()
    judges = whole.folds == JUDGES
    strange[judges] = np.random.default_rng(5).permutation(strange[judges])  # of other labels now
    found = []
    for device in (whole, whole._replace(states=strange)):
        fit = fresh(device)
        fit.update([answer(fit.work(), device, "d0")])
        losses = np.full((len(SHRINKAGES) * len(TEMPERATURES) * 2, FOLDS), 60.0)
        losses[[3, 25]] = 40.0  # the same choices in both fits
        fit.update([report("d0", 1, CrossResult(purpose="probe", loss_sums=Array.of(losses, "<f4")), n_texts=240)])
        found.append((fit.held_readout, fit.readout))
    (held, readout), (other_held, other_readout) = found
    weights = held.weights.numpy()
    # Sums are quantised by the largest of all folds: equal up to that.
    near = np.abs(other_held.weights.numpy() - weights).mean() / np.abs(weights).mean()
    far = np.abs(other_readout.weights.numpy() - readout.weights.numpy()).mean() / np.abs(weights).mean()
    assert near < 0.1 < 0.2 < far


# --- a base ----------------------------------------------------------------------------------------------------------


def with_base(base: LayerFit, template: Template | None = PROMPTED) -> LayerFit:
    reading = Reading(latent=Array.of(np.ones(2)), templates=(), layers=LAYERS, n_word_views=1, n_folds=FOLDS)
    return LayerFit("readout", reading, LABELS, False, base, template)


class Prompted(Rows):
    """Rows whose first view is the prompt's, the others those of the rows without a prompt that ``base`` read."""

    def read_by(self, work: SumsWork | CrossWork) -> Views:
        at = {PROMPTED: 1, OTHER: 2, MORE: 3}
        views = [0, *(at[template] for template in work.reading.templates)]
        return Views(self.states[:, views], self.words[:, : work.reading.n_word_views])


def prompted(plain: Rows, own: Rows) -> Prompted:
    return Prompted(np.concatenate([own.states, plain.states], axis=1), own.words, plain.targets, plain.folds)


def test_readers_of_a_finished_fit_are_mixed_with_those_of_the_prompt() -> None:
    plain = rows([[0.0, 0.5], [0.0, 0.5]], words=[0.5], seed=1)
    own = rows([[0.5, 0.0]], words=[0.5], seed=1)  # the same targets and folds
    base = finish(fresh(plain), [plain])
    device = prompted(plain, own)
    fit = finish(with_base(base), [device])
    assert fit.readout.others == (PROMPTED, OTHER)
    weights = np.abs(fit.readout.weights.numpy()).sum(axis=(2, 3)) > 0
    np.testing.assert_array_equal(weights, [[True, False], [False, True], [False, True]])
    losses = [
        loss_of(logits_of(base.readout, plain), plain.targets),
        loss_of(logits_of(fit.readout, device, [0, 1, 2]), plain.targets),
    ]
    assert losses[1] < losses[0] - 0.05
    assert fit.loss < base.loss - 0.05
    assert fit.held_readout.others == (PROMPTED, OTHER)


def test_a_prompt_that_knows_nothing_leaves_the_readers_of_the_base() -> None:
    plain = rows([[0.0, 0.0], [0.0, 0.8]], words=[0.0], seed=1)
    own = rows([[0.0, 0.0]], words=[0.0], seed=1)
    base = finish(fresh(plain), [plain])
    device = prompted(plain, own)
    fit = finish(with_base(base), [device])
    assert fit.readout.others == (OTHER,)
    assert not fit.readout.weights.numpy()[0].any()
    assert fit.loss == pytest.approx(base.loss, abs=0.02)


def test_a_base_without_a_template_is_refused() -> None:
    plain = rows([[0.4, 0.4]], words=[0.0])
    base = finish(fresh(plain), [plain])
    fit = with_base(base, template=None)
    fit.update([answer(fit.work(), plain, "d0")])
    losses = answer(fit.work(), plain, "d0")
    before = fit.digest(), fit.work()
    with raises(InputError, field="template"):
        fit.update([losses])
    assert (fit.digest(), fit.work()) == before


# --- state -----------------------------------------------------------------------------------------------------------


def test_a_copy_is_independent() -> None:
    whole = rows([[0.4, 0.2]], words=[0.5])
    fit = fresh(whole)
    for _ in range(3):
        before = fit.digest(), fit.work(), fit.done
        made = copy.deepcopy(fit)
        assert (made.digest(), made.work(), made.done) == before
        reports = [answer(fit.work(), whole, "d0")]
        made.update(reports)
        assert (fit.digest(), fit.work(), fit.done) == before
        assert made.digest() != fit.digest()
        fit.update(reports)
        assert (made.digest(), made.work(), made.done) == (fit.digest(), fit.work(), fit.done)
    assert fit.done
    assert made.readout == fit.readout


@pytest.mark.parametrize("exchange", range(3))
def test_the_digest_depends_on_every_result(exchange: int) -> None:
    whole = rows([[0.4, 0.2]], words=[0.5])
    devices = by_label(whole)
    digests = []
    for changed_device in (None, *range(len(devices))):
        fit = fresh(whole)
        for number in range(3):
            reports = [answer(fit.work(), device, f"d{i}") for i, device in enumerate(devices)]
            if number == exchange and changed_device is not None:
                reports[changed_device] = slightly_changed(reports[changed_device])
            fit.update(reports)
        digests.append(fit.digest())
    assert len(set(digests)) == 1 + len(devices)


def slightly_changed(given: RoundReport) -> RoundReport:
    result = given.result
    if isinstance(result, SumsResult):
        changed: SumsResult | CrossResult = msgspec.structs.replace(result, loss=result.loss + 1e-3)
    else:
        assert isinstance(result, CrossResult)
        sums = result.loss_sums.numpy()
        sums[-1, -1] += 1e-3
        changed = msgspec.structs.replace(result, loss_sums=Array.of(sums, "<f4"))
    return msgspec.structs.replace(given, result=changed)


def test_the_digest_depends_on_what_is_asked() -> None:
    whole = rows([[0.4, 0.2]])
    fits = [fresh(whole), fresh(whole, uniform=True), fresh(whole, n_labels=4), fresh(whole, purpose="readout")]
    assert len({fit.digest() for fit in fits}) == 4


@pytest.mark.parametrize("n_labels", [MANY_LABELS, MANY_LABELS + 1])
def test_for_many_labels_one_shrinkage_is_tried(n_labels: int) -> None:
    whole = rows([[1.0, 0.0]], n=6 * n_labels, n_labels=n_labels)
    fit = fresh(whole, n_labels)
    fit.update([answer(fit.work(), whole, "d0", n_labels)])
    work = fit.work()
    assert isinstance(work, CrossWork)
    tried = len(SHRINKAGES) if n_labels == MANY_LABELS else 1
    assert work.weights.shape == (FOLDS, 2 * tried, SIZE, n_labels)
    assert work.coefficients.shape == (2 * tried * len(TEMPERATURES), 2 * tried)
    finish_from = [fit.update([answer(fit.work(), whole, "d0", n_labels)]) for _ in range(2)]
    assert finish_from == [None, None]
    assert fit.done
    assert accuracy_of(logits_of(fit.readout, whole), whole.targets) > 0.8


# --- rows that are few ---------------------------------------------------------------------------------------------


def finite(fit: LayerFit) -> bool:
    arrays = [(each.weights, each.bias, each.word_scales) for each in (fit.readout, fit.held_readout)]
    return all(np.isfinite(array.numpy()).all() for pair in arrays for array in pair)


@pytest.mark.parametrize("n_devices", [1, 2, 5])
def test_devices_of_one_row_each_give_a_finite_readout(n_devices: int) -> None:
    whole = rows([[0.5, 0.5]], words=[0.5])
    devices = [
        row._replace(folds=assign_folds(row.targets, FOLDS, np.random.default_rng(0)))
        for row in (whole.of(np.arange(len(whole.targets)) == i) for i in range(n_devices))
    ]
    assert finite(finish(fresh(whole), devices))


@pytest.mark.parametrize("n_rows", [2, 3, 4, 7])
def test_few_rows_give_a_finite_readout(n_rows: int) -> None:
    few = rows([[0.5, 0.5]], n=n_rows, words=[0.5])
    fit = finish(fresh(few), [few])
    assert finite(fit)


def test_equal_states_give_a_finite_readout() -> None:
    whole = rows([[0.5, 0.5]], n=40)
    equal = whole._replace(states=np.broadcast_to(whole.states[:1], whole.states.shape))
    assert finite(finish(fresh(equal), [equal]))


def test_states_that_differ_by_their_label_alone_give_a_finite_readout() -> None:
    whole = rows([[0.5, 0.5]], n=40)
    first = [int(np.flatnonzero(whole.targets == label)[0]) for label in range(LABELS)]
    clear = whole._replace(states=whole.states[np.array(first)[whole.targets]])
    fit = finish(fresh(clear), [clear])
    assert finite(fit)
    assert accuracy_of(logits_of(fit.readout, clear), clear.targets) == 1.0


def test_a_label_without_rows_is_never_predicted_for_rows_of_others() -> None:
    whole = rows([[0.8, 0.8]], n_labels=2, words=[])
    fit = finish(fresh(whole, n_labels=3), [whole], n_labels=3)
    assert accuracy_of(logits_of(fit.readout, whole), whole.targets) > 0.9


# --- reports that do not fit -----------------------------------------------------------------------------------------


def replaced(given: RoundReport, **fields: object) -> RoundReport:
    return msgspec.structs.replace(given, result=msgspec.structs.replace(given.result, **fields))


def of_shape(*shape: int) -> Array:
    return Array.of(np.zeros(shape), "<f4")


SHAPES: dict[str, Callable[[RoundReport], RoundReport]] = {
    "a label less": lambda given: replaced(given, counts=tuple(fold[:-1] for fold in given.result.counts)),  # type: ignore[union-attr]
    "a fold less": lambda given: replaced(given, counts=given.result.counts[:-1]),  # type: ignore[union-attr]
    "a rank less": lambda given: replaced(given, ranks=given.result.ranks[:-1]),  # type: ignore[union-attr]
    "centres of other size": lambda given: replaced(given, centres=of_shape(2, SIZE + 1)),
    "centres without readers": lambda given: replaced(given, centres=of_shape(SIZE)),
    "means of other size": lambda given: replaced(given, means=Quantized.of(np.zeros((2, FOLDS, SIZE + 1)))),
    "fewer means": lambda given: replaced(given, means=Quantized.of(np.zeros((2, FOLDS - 1, SIZE)))),
    "means of fewer bytes": lambda given: replaced(given, means=msgspec.structs.replace(given.result.means, data=b"1")),  # type: ignore[union-attr]
    "factors of other size": lambda given: replaced(given, factors=Quantized.of(np.zeros((2, 4, SIZE + 1)))),
    "fewer factors": lambda given: replaced(given, factors=Quantized.of(np.zeros((2, 4, SIZE)))),
    "rests of other size": lambda given: replaced(given, rests=of_shape(2, FOLDS, SIZE + 1)),
    "words of other size": lambda given: replaced(given, word_means=of_shape(1, LABELS + 1)),
    "no words": lambda given: replaced(given, word_means=of_shape(0, 0)),
}


@pytest.mark.parametrize("lie", SHAPES)
def test_sums_of_another_shape_are_refused_and_change_nothing(lie: str) -> None:
    whole = rows([[0.4, 0.2]], words=[0.5])
    fit = fresh(whole)
    reports = [answer(fit.work(), device, f"d{i}") for i, device in enumerate(by_label(whole))]
    before = fit.digest(), fit.work()
    with pytest.raises(InputError):
        fit.update([*reports[:2], SHAPES[lie](reports[2])])
    assert (fit.digest(), fit.work()) == before
    fit.update(reports)
    assert isinstance(fit.work(), CrossWork)


@pytest.mark.parametrize("exchange", [1, 2])
@pytest.mark.parametrize("change", [(1, 0), (-1, 0), (0, 1), (0, -1)])
def test_losses_of_another_shape_are_refused_and_change_nothing(exchange: int, change: tuple[int, int]) -> None:
    whole = rows([[0.4, 0.2]], words=[0.5])
    fit = fresh(whole)
    for _ in range(exchange):
        fit.update([answer(fit.work(), whole, "d0")])
    right = answer(fit.work(), whole, "d0")
    assert isinstance(right.result, CrossResult)
    n_mixtures, n_folds = right.result.loss_sums.shape
    before = fit.digest(), fit.work()
    with raises(InputError, field="loss_sums"):
        fit.update([replaced(right, loss_sums=of_shape(n_mixtures + change[0], n_folds + change[1]))])
    assert (fit.digest(), fit.work(), fit.done) == (*before, False)


def test_results_of_the_other_exchange_are_refused() -> None:
    whole = rows([[0.4, 0.2]])
    fit = fresh(whole)
    sums = answer(fit.work(), whole, "d0")
    fit.update([sums])
    with raises(InputError, field="result"):
        fit.update([sums])
    with raises(InputError, limit=1):
        fit.update([])
