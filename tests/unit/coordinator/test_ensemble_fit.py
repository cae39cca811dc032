"""Fitting the readouts of several templates at once: each reaches what it reaches separately."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec
import numpy as np
import pytest

from fedbpt.aggregation.readout import EXCHANGES, RIDGE, ReadoutFit
from fedbpt.errors import InputError
from fedbpt.objective.losses import cross_entropy
from fedbpt.objective.readout import blocks, ensemble, loss_and_gradient, moments, read
from fedbpt.protocol import codec
from fedbpt.protocol.rounds import FitResult, FitWork, RoundReport
from fedbpt.protocol.specs import Array, Dtype, Readout, Template
from tests.support.raises import raises
from tests.support.toy_federation import report
from tests.unit.aggregation.test_aggregation_readout import LABELS, WORDS, Rows, by_label, fitted, optimum, rows

N_TEMPLATES = 3
OTHERS = tuple(Template(pattern=f"{{text}} {i}:", label_words=("a", "b", "c")) for i in range(1, N_TEMPLATES))
SCALES = (1.0, 20.0, 0.05)  # of each template's words


class Views:
    """A device's logits of the same rows under each template."""

    def __init__(self, views: Sequence[Rows]) -> None:
        self.views = list(views)
        self.targets = views[0].targets

    def of(self, which: object) -> Views:
        return Views([view.of(which) for view in self.views])

    def by_label(self) -> list[Views]:
        """The most skewed devices: one label each."""
        return [self.of(self.targets == label) for label in range(LABELS)]


def views(n: int = 150, seed: int = 0) -> Views:
    """The rows of `rows`, and two more views of them: worse label words; mixed words, elsewhere and on other scales."""
    whole, rng = rows(n, seed), np.random.default_rng(100 + seed)
    made = [whole]
    for scale in SCALES[1:]:
        labels = rng.normal((0, 1, -1), 1, (n, LABELS))
        words = scale * (
            whole.logits[:, LABELS:] @ rng.standard_normal((WORDS, WORDS)) / 3 + rng.standard_normal(WORDS)
        )
        words += scale * rng.standard_normal((n, WORDS))
        made.append(Rows(np.concatenate([labels, words], axis=1).astype(np.float32), whole.targets))
    return Views(made)


def answer(work: FitWork, device: Views, name: str, round: int = 0, dtype: Dtype = "<f2") -> RoundReport:
    """What a device does with decoded work, template by template."""
    work = codec.decode(codec.encode(work), FitWork)
    logits = [view.logits[:, : LABELS + work.n_words].astype(np.float64) for view in device.views]
    if work.readout is None:
        loss, means = 0.0, Array.of(np.stack([moments(own[:, LABELS:]) for own in logits]), "<f4")
    else:
        arrays = (work.readout.weights, *work.readout.others)
        centres = np.zeros((N_TEMPLATES, 0)) if work.centre is None else work.centre.numpy().reshape(N_TEMPLATES, -1)
        found = [
            loss_and_gradient(own, device.targets, array.numpy(), centre)
            for own, array, centre in zip(logits, arrays, centres, strict=True)
        ]
        loss, means = sum(one for one, _ in found) / N_TEMPLATES, Array.of(np.stack([g for _, g in found]), dtype)
    return report(name, round, FitResult(purpose=work.purpose, loss=loss, means=means), n_texts=len(device.targets))


def answers(work: FitWork, devices: Sequence[Views], round: int = 0, dtype: Dtype = "<f2") -> list[RoundReport]:
    return [answer(work, device, f"device-{i}", round, dtype) for i, device in enumerate(devices)]


def fresh(n_words: int = WORDS, bias: np.ndarray | None = None) -> ReadoutFit:
    return ReadoutFit("readout", np.zeros(2), n_words, LABELS, bias, others=OTHERS)


def jointly(
    devices: Sequence[Views], n_words: int = WORDS, bias: np.ndarray | None = None, dtype: Dtype = "<f2"
) -> tuple[ReadoutFit, list[list[RoundReport]]]:
    """A fit to its end, and the reports of its exchanges."""
    fit, history = fresh(n_words, bias), []
    while not fit.done:
        history.append(answers(fit.work(), devices, len(history), dtype))
        fit.update(history[-1])
    return fit, history


def objectives(fit: ReadoutFit, whole: Views, n_words: int = WORDS, bias: np.ndarray | None = None) -> list[float]:
    """Objective of each template with its part of the readout, nats: cross-entropy and ridge."""
    n, found = len(whole.targets), []
    for number, (view, v) in enumerate(zip(whole.views, blocks(fit.readout, n_words, LABELS), strict=True)):
        words = view.logits[:, LABELS : LABELS + n_words].astype(np.float64)
        centre = words.mean(axis=0)
        radius = np.sqrt(((words - centre) ** 2).sum(axis=1).mean()) if n_words else 1.0
        own_bias = v[0] + centre @ v[1:] - (0 if bias is None or number else bias)
        size = (own_bias**2).sum() + ((v[1:] * radius / 3) ** 2).sum()
        loss = cross_entropy(read(view.logits[:, : LABELS + n_words], v), whole.targets).mean()
        found.append(float(loss + RIDGE / (2 * n) * size))
    return found


# --- the optimum ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("skewed", [True, False])
def test_each_template_reaches_its_own_optimum(seed: int, skewed: bool) -> None:
    whole = views(seed=seed)
    fit, history = jointly(whole.by_label() if skewed else [whole.of(slice(i, None, 4)) for i in range(4)])
    assert len(history) <= EXCHANGES + 1
    reached = objectives(fit, whole)
    np.testing.assert_allclose(reached, [optimum(view) for view in whole.views], atol=3e-3)
    assert fit.loss == pytest.approx(np.mean(reached), abs=1e-3)


@pytest.mark.parametrize("seed", range(3))
def test_templates_fitted_together_reach_what_they_reach_separately(seed: int) -> None:
    whole = views(seed=seed)
    together = objectives(jointly(whole.by_label())[0], whole)
    alone = [fitted(by_label(view))[0].loss for view in whole.views]
    np.testing.assert_allclose(together, alone, atol=3e-3)


@pytest.mark.parametrize("seed", range(3))
def test_without_words_each_template_gets_its_own_bias(seed: int) -> None:
    whole = views(seed=seed)
    fit, history = jointly(whole.by_label(), n_words=0)
    assert [array.shape for array in (fit.readout.weights, *fit.readout.others)] == [(1, LABELS)] * N_TEMPLATES
    assert {reports[0].result.means.shape for reports in history} == {(N_TEMPLATES, 1, LABELS)}  # none for moments
    assert len(history) <= EXCHANGES
    np.testing.assert_allclose(objectives(fit, whole, 0), [optimum(view, 0) for view in whole.views], atol=2e-3)


def test_the_initial_bias_applies_only_to_the_prompts_template() -> None:
    whole, bias = views(), np.array([-1.0, 0.5, 2.0])
    start = fresh(bias=bias)
    start.update(answers(start.work(), [whole]))
    assert blocks(start.readout, WORDS, LABELS)[:, 0].tolist() == [bias.tolist(), [0] * LABELS, [0] * LABELS]
    fit, _ = jointly(whole.by_label(), bias=bias)
    expected = [optimum(view, bias=None if i else bias) for i, view in enumerate(whole.views)]
    np.testing.assert_allclose(objectives(fit, whole, bias=bias), expected, atol=3e-3)


@pytest.mark.parametrize("seed", range(3))
def test_the_average_predicts_better_than_its_templates_do_on_average(seed: int) -> None:
    whole, held_out = views(600, seed).of(slice(200)), views(600, seed).of(slice(200, None))
    fit, _ = jointly(whole.by_label())
    weights = blocks(fit.readout, WORDS, LABELS)
    average = cross_entropy(ensemble([view.logits for view in held_out.views], weights), held_out.targets).mean()
    each = [
        cross_entropy(read(view.logits, v), held_out.targets).mean()
        for view, v in zip(held_out.views, weights, strict=True)
    ]
    assert average < np.mean(each) - 0.01


@pytest.mark.parametrize("seed", range(3))
def test_rounding_of_reports_costs_less_than_the_stopping_gain(seed: int) -> None:
    devices = views(seed=seed).by_label()
    exact, rounded = (jointly(devices, dtype=dtype)[0] for dtype in ("<f8", "<f2"))
    assert rounded.loss == pytest.approx(exact.loss, abs=3e-4)


def test_constant_words_under_one_template_do_not_affect_the_others() -> None:
    whole = views()
    still = whole.views[1].logits.copy()
    still[:, LABELS:] = 7.3
    frozen = Views([whole.views[0], Rows(still, whole.targets), whole.views[2]])
    found = objectives(jointly(frozen.by_label())[0], whole)
    for number in (0, 2):
        assert found[number] == pytest.approx(optimum(whole.views[number]), abs=3e-3)


# --- centres and scales --------------------------------------------------------------------------------------------


def test_devices_get_the_pooled_centre_of_each_templates_words() -> None:
    whole, fit = views(), fresh()
    assert fit.work().centre is None
    fit.update(answers(fit.work(), whole.by_label()))
    work = fit.work()
    assert work.centre is not None
    assert work.centre.shape == (N_TEMPLATES * WORDS,)
    expected = [view.logits[:, LABELS:].astype(np.float64).mean(axis=0) for view in whole.views]
    np.testing.assert_allclose(work.centre.numpy().reshape(N_TEMPLATES, WORDS), expected, rtol=1e-5, atol=1e-5)


def test_the_scale_of_a_templates_words_does_not_matter() -> None:
    whole = views()
    factors = np.array([1.0] * LABELS + [8.0] * WORDS, dtype=np.float32)
    louder = Views([whole.views[0], Rows(whole.views[1].logits * factors, whole.targets), whole.views[2]])
    plain, loud = (blocks(jointly(v.by_label(), dtype="<f8")[0].readout, WORDS, LABELS) for v in (whole, louder))
    np.testing.assert_allclose(loud[1, 1:] * 8, plain[1, 1:], atol=1e-3)
    np.testing.assert_allclose(loud[[0, 2]], plain[[0, 2]], atol=1e-2)


# --- replay --------------------------------------------------------------------------------------------------------


def test_the_same_reports_replay_to_the_same_digest_and_work_at_every_exchange() -> None:
    fit, history, digests = fresh(), [], []
    devices = views().by_label()
    while not fit.done:
        digests.append(fit.digest())
        history.append(answers(fit.work(), devices, len(history)))
        fit.update(history[-1])
        again = fresh()
        for reports in history:
            again.update(msgspec.msgpack.decode(msgspec.msgpack.encode(reports[::-1]), type=list[RoundReport]))
        assert again.digest() == fit.digest()
        assert again.work() == fit.work()
        assert (again.done, again.readout) == (fit.done, fit.readout)
    assert len({*digests, fit.digest()}) == len(digests) + 1


def test_the_digest_depends_on_the_number_of_templates() -> None:
    alone = ReadoutFit("readout", np.zeros(2), WORDS, LABELS)
    assert len({alone.digest(), fresh().digest()}) == 2


# --- malformed reports --------------------------------------------------------------------------------------------


def reshaped(good: RoundReport, shape: tuple[int, ...]) -> RoundReport:
    return msgspec.structs.replace(good, result=FitResult(purpose="readout", loss=1.0, means=Array.of(np.ones(shape))))


WRONG: dict[str, Callable[[tuple[int, ...]], tuple[int, ...]]] = {
    "a template too few": lambda shape: (shape[0] - 1, *shape[1:]),
    "a template too many": lambda shape: (shape[0] + 1, *shape[1:]),
    "one template's": lambda shape: (1, *shape[1:]),
    "no axis of templates": lambda shape: shape[1:],
    "templates in words' place": lambda shape: (shape[1], shape[0], *shape[2:]),
    "flat": lambda shape: (int(np.prod(shape)),),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("exchanges", [0, 1, 3])
def test_reports_of_other_templates_are_refused_and_change_nothing(wrong: str, exchanges: int) -> None:
    fit, devices = fresh(), views().by_label()
    for _ in range(exchanges):
        fit.update(answers(fit.work(), devices))
    before = fit.digest(), fit.work(), fit.readout, fit.done
    good, other, third = answers(fit.work(), devices)
    with raises(InputError, field="means") as caught:
        fit.update([good, reshaped(other, WRONG[wrong](other.result.means.shape)), third])
    assert "device-1" in str(caught.value)
    assert (fit.digest(), fit.work(), fit.readout, fit.done) == before
    fit.update([good, other, third])
    assert fit.digest() != before[0]


def test_work_and_readout_have_the_other_templates_in_order() -> None:
    fit = fresh()
    for _ in range(2):
        assert fit.work().others == OTHERS
        assert len(fit.readout.others) == len(OTHERS)
        fit.update(answers(fit.work(), views().by_label()))
    readout = fit.work().readout
    assert isinstance(readout, Readout)
    assert [array.dtype for array in (readout.weights, *readout.others)] == ["<f4"] * N_TEMPLATES
