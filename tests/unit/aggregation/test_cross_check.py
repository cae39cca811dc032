"""`fedbpt.aggregation.cross_check` finds devices whose sums mislead; honest ones stay, whatever their labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec
import numpy as np
import pytest

from fedbpt.aggregation import cross_check
from fedbpt.aggregation.cross_check import DeviceSums, misleading
from fedbpt.aggregation.layer_fit import LayerFit, sums_of
from fedbpt.engine.discriminant import assign_folds
from fedbpt.engine.layers import normalized
from fedbpt.objective.layer_sums import sums_result
from fedbpt.protocol.rounds import CrossResult, RoundReport, SumsResult, SumsWork
from fedbpt.protocol.specs import Array, Quantized
from tests.unit.aggregation.test_layer_fit import FOLDS, SIZE, Rows, answer, reading_of, rows

LABELS = 4
READERS = ((0.9, 0.2), (0.7, 0.0))
"""How far labels lie apart, by view and layer: the last tells nothing."""


def everything(n: int = 400, seed: int = 0) -> Rows:
    return rows(READERS, n, seed, LABELS)


def shared(whole: Rows, which: Sequence[np.ndarray]) -> list[Rows]:
    """Devices with the rows ``which``, each with folds of its own."""
    found = []
    for place, mine in enumerate(which):
        own = Rows(*(part[mine] for part in whole))
        found.append(own._replace(folds=assign_folds(own.targets, FOLDS, np.random.default_rng(place))))
    return found


def evenly(whole: Rows, n: int) -> list[Rows]:
    return shared(whole, [np.arange(device, len(whole.targets), n) for device in range(n)])


def wrong(device: Rows) -> Rows:
    """All labels shifted by one."""
    targets = (device.targets + 1) % LABELS
    return device._replace(targets=targets, folds=assign_folds(targets, FOLDS, np.random.default_rng(0)))


def result_of(device: Rows) -> SumsResult:
    work = SumsWork(purpose="probe", reading=reading_of(device), max_rank=64)
    return sums_result(work, device.read_by(work), device.targets, device.folds, LABELS)


def negated(result: SumsResult) -> SumsResult:
    return msgspec.structs.replace(result, means=Quantized.of(-result.means.numpy()))


def check(
    devices: Sequence[Rows], lies: dict[int, Callable[[SumsResult], SumsResult]] | None = None, weight: float = 1.0
) -> list[int]:
    """Places of those that are found; ``lies``: of devices; ``weight``: of a row of these."""
    lies = lies or {}
    results = [lies.get(place, lambda given: given)(result_of(device)) for place, device in enumerate(devices)]
    return misleading([DeviceSums(sums_of(each), weight if i in lies else 1.0) for i, each in enumerate(results)])


@pytest.mark.parametrize("n", [3, 5, 10])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_device_with_wrong_labels_is_found(n: int, seed: int) -> None:
    *honest, last = evenly(everything(seed=seed), n)
    assert check([*honest, wrong(last)]) == [n - 1]
    assert check([wrong(last), *honest]) == [0]


def test_a_device_with_negated_means_is_found() -> None:
    devices = evenly(everything(), 5)
    assert check(devices, {2: negated}) == [2]


def test_a_device_whose_rows_weigh_double_is_found() -> None:
    *honest, last = evenly(everything(), 5)
    assert check([*honest, wrong(last)], {4: lambda given: given}, 2.0) == [4]


def test_of_four_in_twenty_that_lie_alike_at_least_three_are_found() -> None:
    """The last one alone harms others' rows too little to tell."""
    devices = evenly(everything(1200), 20)
    found = check([*map(wrong, devices[:4]), *devices[4:]])
    assert len(found) >= 3
    assert set(found) <= {0, 1, 2, 3}


def test_rows_that_are_repeated_do_not_vouch_for_each_other() -> None:
    *honest, last = evenly(everything(), 5)
    liar = wrong(last)
    many = liar.of(np.resize(np.arange(len(liar.targets)), 512))
    many = many._replace(folds=assign_folds(many.targets, FOLDS, np.random.default_rng(0)))
    assert check([*honest, many], {4: lambda given: given}, 2 * len(last.targets) / 512) == [4]


@pytest.mark.parametrize("n", [2, 3, 5, 10])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_honest_devices_stay(n: int, seed: int) -> None:
    assert check(evenly(everything(seed=seed), n)) == []


@pytest.mark.parametrize("n", [4, 5, 8])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_devices_with_a_single_label_each_stay(n: int, seed: int) -> None:
    whole = everything(seed=seed)
    of_label = [np.flatnonzero(whole.targets == label) for label in range(LABELS)]
    assert check(shared(whole, [of_label[i % LABELS][i // LABELS :: -(-n // LABELS)] for i in range(n)])) == []


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("alpha", [0.1, 0.5])
def test_devices_with_skewed_labels_stay(alpha: float, seed: int) -> None:
    whole = everything(seed=seed)
    rng = np.random.default_rng(seed)
    shares = rng.dirichlet([alpha] * 6, LABELS)
    owner = np.array([rng.choice(6, p=shares[label]) for label in whole.targets])
    which = [mine for device in range(6) if len(mine := np.flatnonzero(owner == device))]
    assert check(shared(whole, which)) == []


@pytest.mark.parametrize("seed", range(3))
def test_the_only_device_with_a_rare_label_stays(seed: int) -> None:
    whole = everything(seed=seed)
    rare = np.flatnonzero(whole.targets == 3)
    others = np.flatnonzero(whole.targets != 3)
    assert check(shared(whole, [*(others[i::4] for i in range(4)), rare[:20]])) == []
    assert check(shared(whole, [*(np.append(others[i::4], rare[50 + i]) for i in range(4)), rare[:20]])) == []


@pytest.mark.parametrize("seed", range(3))
def test_a_device_with_nearly_all_rows_of_a_label_stays(seed: int) -> None:
    """Others' rows of other labels are predicted worse with its sums, as a label more is taken seriously."""
    whole = rows(READERS, 240, seed, 2)
    mine, others = (np.flatnonzero(whole.targets == label) for label in (0, 1))
    shares = [*(np.append(others[i::4], mine[i : i + 1]) for i in range(4)), mine[4:]]
    assert check(shared(whole, shares)) == []


@pytest.mark.parametrize("seed", range(3))
def test_a_device_with_a_handful_of_rows_stays(seed: int) -> None:
    whole = everything(seed=seed)
    handful = wrong(shared(whole, [np.arange(2)])[0])
    assert check([*shared(whole, [np.arange(2 + i, 400, 4) for i in range(4)]), handful]) == []


def test_where_states_tell_nothing_nobody_is_found() -> None:
    whole = rows(((0.0, 0.0),), 400, 0, LABELS)
    devices = evenly(whole, 5)
    assert check([*devices[:4], wrong(devices[4])]) == []


def test_of_two_that_disagree_neither_is_left_out() -> None:
    first, second = evenly(everything(), 2)
    assert check([first, wrong(second)]) == []


# --- one device must not get another thrown out ----------------------------------------------------------------------


def relabelled(device: Rows, targets: np.ndarray) -> Rows:
    return device._replace(targets=targets, folds=assign_folds(targets, FOLDS, np.random.default_rng(9)))


@pytest.mark.parametrize("n", [4, 6, 10])
@pytest.mark.parametrize("seed", range(6))
def test_a_few_made_up_rows_of_a_label_do_not_throw_out_its_only_honest_device(n: int, seed: int) -> None:
    whole = everything(600, seed)
    rare, others = np.flatnonzero(whole.targets == 3), np.flatnonzero(whole.targets != 3)
    only, *honest, last = shared(whole, [rare[:20], *(others[i :: n - 1] for i in range(n - 1))])
    made_up = last.targets.copy()
    made_up[:6] = 3
    assert check([only, *honest, relabelled(last, made_up)]) == []


@pytest.mark.parametrize("seed", range(6))
def test_of_two_devices_with_the_same_labels_neither_is_believed(seed: int) -> None:
    """The second shares labels with the liar only, which swaps them."""
    whole = everything(300, seed)
    low, high = np.flatnonzero(whole.targets < 2), np.flatnonzero(whole.targets >= 2)
    first, second, liar = shared(whole, [low[::2], high[::2], np.concatenate([low[1::2], high[1::2]])])
    swapped = np.where(liar.targets >= 2, 5 - liar.targets, liar.targets)
    assert check([first, second, relabelled(liar, swapped)]) == []


# --- domains ---------------------------------------------------------------------------------------------------------


def with_another_domain(n: int, cosine: float, seed: int) -> list[Rows]:
    """``n`` devices, the last with another mean of all rows, and label means at ``cosine`` to those of the others."""
    rng = np.random.default_rng(seed)
    apart = np.array(READERS)
    usual, other = rng.standard_normal((2, *apart.shape, LABELS, SIZE))
    common = 2 * rng.standard_normal((*apart.shape, SIZE))
    shift = rng.standard_normal(common.shape)
    n_rows = 400 // n // LABELS * LABELS
    devices = []
    for place in range(n):
        odd = place == n - 1
        targets = rng.permutation(np.arange(n_rows) % LABELS)
        means = (cosine * usual + np.sqrt(1 - cosine**2) * other if odd else usual) * apart[..., None, None]
        states = common + odd * shift + np.moveaxis(means[:, :, targets], 2, 0)
        states = states + rng.standard_normal((n_rows, *apart.shape, SIZE))
        folds = assign_folds(targets, FOLDS, np.random.default_rng(place))
        devices.append(Rows(normalized(states).astype(np.float16), np.zeros((n_rows, 0, 0)), targets, folds))
    return devices


@pytest.mark.parametrize("n", [3, 5, 10])
@pytest.mark.parametrize("cosine", [0.3, 0.5])
def test_a_device_of_another_domain_stays(cosine: float, n: int) -> None:
    assert [check(with_another_domain(n, cosine, seed)) for seed in range(5)] == [[]] * 5


@pytest.mark.parametrize("n", [3, 5, 10])
def test_a_device_whose_domain_has_nothing_in_common_mostly_stays(n: int) -> None:
    """Its labels may contradict those of the others by chance."""
    found = [check(with_another_domain(n, 0.0, seed)) for seed in range(10)]
    assert found.count([]) >= 8


def test_a_device_that_costs_others_hardly_anything_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    *honest, last = evenly(everything(seed=1), 16)
    assert check([*honest, wrong(last)]) == []
    with monkeypatch.context() as patch:
        patch.setattr(cross_check, "LEAST", 0.0)
        assert check([*honest, wrong(last)]) == [15]


# --- losses against sums ---------------------------------------------------------------------------------------------


def exchanged(devices: Sequence[Rows]) -> tuple[LayerFit, list[RoundReport]]:
    """A fit that waits for the losses of readers, and these losses."""
    fit = LayerFit("probe", reading_of(devices[0]), LABELS, bound=True)
    fit.update([answer(fit.work(), device, f"d{i}", LABELS) for i, device in enumerate(devices)])
    return fit, [answer(fit.work(), device, f"d{i}", LABELS) for i, device in enumerate(devices)]


def losses_of(given: RoundReport, change: Callable[[np.ndarray], np.ndarray]) -> RoundReport:
    assert isinstance(given.result, CrossResult)
    losses = change(given.result.loss_sums.numpy())
    return msgspec.structs.replace(
        given, result=msgspec.structs.replace(given.result, loss_sums=Array.of(losses, "<f4"))
    )


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("fleet", ["even", "single", "wrong", "tiny"])
def test_losses_of_a_devices_own_rows_do_not_contradict_its_sums(fleet: str, seed: int) -> None:
    whole = everything(seed=seed)
    devices = {
        "even": lambda: evenly(whole, 5),
        "single": lambda: shared(whole, [np.flatnonzero(whole.targets == label) for label in range(LABELS)]),
        "wrong": lambda: [*evenly(whole, 5)[:4], wrong(evenly(whole, 5)[4])],
        "tiny": lambda: shared(whole, [np.arange(100 * i, 100 * i + 1 + i) for i in range(4)]),
    }[fleet]()
    fit, reports = exchanged(devices)
    assert fit.contradicting(reports) == []


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_inverted_losses_contradict_sums(scale: float) -> None:
    fit, reports = exchanged(evenly(everything(), 5))
    reports[3] = losses_of(reports[3], lambda losses: scale * (losses.max(axis=0) - losses))
    assert fit.contradicting(reports) == ["d3"]


def test_only_the_losses_of_readers_are_compared_and_only_where_sums_are_known() -> None:
    fit, reports = exchanged(evenly(everything(), 5))
    inverted = [losses_of(each, lambda losses: losses.max(axis=0) - losses) for each in reports]
    stranger = msgspec.structs.replace(inverted[0], device="came later")
    assert fit.contradicting([stranger]) == []
    fit.update(reports)
    assert fit.contradicting(inverted) == []  # of mixtures, which label words may be part of
    trusting = LayerFit("probe", fit.reading, LABELS)
    trusting.update([answer(trusting.work(), each, f"d{i}", LABELS) for i, each in enumerate(evenly(everything(), 5))])
    assert trusting.contradicting(inverted) == []
