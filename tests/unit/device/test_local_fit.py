"""A device fits a readout."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest

from fedbpt.errors import InputError, ScoringInterrupted
from fedbpt.objective.objective import Objective
from fedbpt.objective.readout import loss_and_gradient, moments
from fedbpt.protocol.rounds import FitResult, FitWork, RoundReport
from fedbpt.protocol.seeding import generator
from fedbpt.protocol.specs import Array, ObjectiveSpec, PromptSpec, Readout
from fedbpt.search.population import sample_population
from fedbpt.tasks.rows import batch_indices
from tests.support.toy_scorer import ToyScorer
from tests.unit.device.test_device import (
    LABELS,
    PROMPT,
    ROWS,
    TEMPLATE,
    device,
    plan,
    pooled,
    request,
    through_the_wire,
)

N_WORDS = 6
SPEC = ObjectiveSpec(readout_words=N_WORDS)
LATENT = np.linspace(-1, 1, 6)


def readout(n_words: int = N_WORDS, seed: int = 0) -> Readout:
    return Readout(weights=Array.of(np.random.default_rng(seed).standard_normal((1 + n_words, 2)), "<f4"))


def fit(**changes: Any) -> FitWork:
    made = FitWork(purpose="readout", latent=Array.of(LATENT), n_words=N_WORDS, readout=readout(), max_rows=12)
    return msgspec.structs.replace(made, **changes)


def asked(**changes: Any) -> Any:
    """A plan of a fit; ``changes``: of the work."""
    return plan(fit(**changes), objective=SPEC)


def rows_of(seed: int = 7, name: str = "kitchen", n: int = 12) -> np.ndarray:
    return batch_indices(len(ROWS), n, generator(seed, "fit", name))


def logits_and_targets(chosen: np.ndarray, n_words: int = N_WORDS) -> tuple[np.ndarray, np.ndarray]:
    objective = Objective(ToyScorer(), TEMPLATE, LABELS, ROWS, SPEC, PROMPT)
    logits = objective.logits(objective.embeds(LATENT[None]), chosen).astype(np.float64)
    return logits[:, : 2 + n_words], objective.targets[chosen]


WORKS = [fit(), fit(readout=None), fit(purpose="calibration", n_words=0, readout=readout(0), max_rows=0)]
every_fit = pytest.mark.parametrize("work", WORKS, ids=["gradient", "moments", "bias"])


# --- what it sends -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_words", [0, 4, N_WORDS])
def test_a_gradient_is_the_mean_over_the_devices_chosen_rows(n_words: int) -> None:
    report = device().run(asked(n_words=n_words, readout=readout(n_words)))
    logits, targets = logits_and_targets(rows_of(), n_words)
    loss, gradient = loss_and_gradient(logits, targets, readout(n_words).weights.numpy())
    assert report.result.purpose == "readout"
    assert report.result.loss == pytest.approx(loss, rel=1e-9)
    assert report.result.means.shape == (1, 1 + n_words, 2)
    np.testing.assert_allclose(report.result.means.numpy()[0], gradient, rtol=1e-3, atol=1e-6)
    assert (report.n_texts, report.evaluations) == (12, 0)


def test_moments_are_the_mean_over_the_same_rows() -> None:
    report = device().run(asked(readout=None))
    logits, targets = logits_and_targets(rows_of())
    np.testing.assert_allclose(report.result.means.numpy()[0], moments(logits[:, 2:]), rtol=1e-6)
    assert report.n_texts == 12
    assert report.result.loss == pytest.approx(loss_and_gradient(logits, targets, np.zeros((1, 2)))[0], rel=1e-9)


def test_a_centre_is_subtracted_from_the_words_only_in_the_gradient() -> None:
    plain, centred = (
        device().run(asked(readout=readout(4), n_words=4, centre=c)) for c in (None, Array.of(np.ones(4)))
    )
    assert centred.result.loss == plain.result.loss
    one, other = plain.result.means.numpy()[0], centred.result.means.numpy()[0]
    np.testing.assert_allclose(other[1:], one[1:] - one[0], atol=2e-3)
    np.testing.assert_array_equal(other[0], one[0])


def test_a_limit_of_zero_or_above_its_rows_takes_all_of_them() -> None:
    assert [device().run(asked(max_rows=n)).n_texts for n in (0, 12, 500)] == [20, 12, 20]


def test_the_bias_of_the_plan_is_not_added_to_the_readouts_own() -> None:
    biased = msgspec.structs.replace(asked(), label_bias=(5.0, -5.0))
    assert device().run(biased).result == device().run(asked()).result


def test_rows_are_scored_once_for_all_exchanges_of_a_fit() -> None:
    mine = device()
    first = mine.run(asked(readout=None))
    calls = len(mine.scorer.calls)
    later = [mine.run(asked(readout=readout(seed=seed))) for seed in range(3)]
    assert first.tokens > 0
    assert [report.tokens for report in later] == [0, 0, 0]
    assert len(mine.scorer.calls) == calls
    assert mine.run(asked(latent=Array.of(-LATENT))).tokens > 0


# --- as any other work ---------------------------------------------------------------------------------------------


@every_fit
def test_the_same_plan_gives_the_same_result_whatever_ran_before(work: FitWork) -> None:
    busy, fresh = device(), device()
    for other in (*WORKS, fit(latent=Array.of(-LATENT)), pooled()):
        busy.run(plan(other, objective=SPEC))
    wanted = plan(work, objective=SPEC)
    again = busy.run(wanted), busy.run(wanted), fresh.run(through_the_wire(wanted))
    assert again[0].result == again[1].result == again[2].result


@pytest.mark.parametrize("changes", [{"seed": 1}, {"device": "garage"}], ids=lambda changes: next(iter(changes)))
def test_rows_of_another_run_are_not_confused(changes: dict[str, Any]) -> None:
    busy = device()
    busy.run(msgspec.structs.replace(asked(), **changes))
    assert busy.run(asked()).result == device().run(asked()).result


@every_fit
def test_a_report_survives_the_wire(work: FitWork) -> None:
    report = device().run(plan(work, objective=SPEC))
    assert isinstance(report.result, FitResult)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(report), type=RoundReport) == report


@every_fit
def test_cancelling_interrupts_and_the_next_try_is_complete(work: FitWork) -> None:
    mine, wanted = device(), plan(work, objective=SPEC)
    with pytest.raises(ScoringInterrupted):
        mine.run(wanted, cancelled=lambda: True)
    assert mine.run(wanted).result == device().run(wanted).result


@every_fit
def test_progress_ends_at_its_total(work: FitWork) -> None:
    seen: list[tuple[int, int]] = []
    device().run(plan(work, objective=SPEC), lambda done, total: seen.append((done, total)))
    assert seen
    assert seen[-1][0] == seen[-1][1]


@pytest.mark.parametrize(
    "changes",
    [
        {"n_words": N_WORDS + 1, "readout": None},
        {"readout": readout(N_WORDS + 1)},
        {"readout": Readout(weights=Array.of(np.zeros((3, 3))))},
        {"latent": Array.of(np.zeros(5))},
    ],
    ids=["too many words", "too large a readout", "other labels", "another d"],
)
def test_an_inconsistent_fit_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        device().run(asked(**changes))


# --- calibrated work -----------------------------------------------------------------------------------------------


def test_candidates_are_scored_with_the_plans_bias() -> None:
    mine, bias = device(), (1.5, -0.5)
    plain = plan(pooled(), objective=ObjectiveSpec(batch_size=0))
    biased = msgspec.structs.replace(plain, label_bias=bias)
    before, with_bias, after = (mine.run(work).result.losses.numpy() for work in (plain, biased, plain))
    objective = Objective(ToyScorer(), TEMPLATE, LABELS, ROWS, ObjectiveSpec(batch_size=0), PROMPT)
    objective.readout = Readout(weights=Array.of(np.array([bias])))
    candidates = sample_population(pooled().state, 6, 7, 3)
    expected = objective.losses(objective.embeds(candidates)).astype(np.float32)
    np.testing.assert_array_equal(with_bias, expected)
    np.testing.assert_array_equal(before, after)
    assert (before != with_bias).all()


def test_an_evaluation_takes_a_readout_for_each_latent() -> None:
    latents = Array.of(np.stack([np.zeros(6), LATENT, LATENT]))
    readouts = (None, None, readout())
    found = device().evaluate(request(objective=SPEC, latents=latents, readouts=readouts))
    objective = Objective(ToyScorer(), TEMPLATE, LABELS, ROWS[3:10], SPEC, PROMPT)
    expected = objective.evaluate(objective.embeds(latents.numpy()), readouts=readouts)
    assert (found.correct, found.loss_sums) == (expected.correct, expected.loss_sums)
    assert found.loss_sums[1] != found.loss_sums[2]


def test_words_depend_on_the_prompts_seed_not_on_the_device() -> None:
    words = [
        Objective(ToyScorer(), TEMPLATE, LABELS, rows, SPEC, PromptSpec(n_prompt=2, d=6, seed=seed)).word_ids.tolist()
        for rows, seed in ((ROWS, 1), (ROWS[:3], 1), (ROWS, 2))
    ]
    assert words[0] == words[1] != words[2]
