"""Losses in which every label has the same weight: on a device, and in runs over several."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from fedbpt import Budget, evaluate, tune
from fedbpt.coordinator.costs.estimate import estimate
from fedbpt.coordinator.federation import Federation
from fedbpt.device.device import Device
from fedbpt.errors import InputError, WireError
from fedbpt.objective.losses import balanced_weights
from fedbpt.objective.objective import Objective
from fedbpt.protocol import codec
from fedbpt.protocol.rounds import RoundPlan, SelectResult, SelectWork, Work
from fedbpt.protocol.specs import ObjectiveSpec, PrivacySpec, PromptSpec
from fedbpt.runs.events import RoundClosed, TemplateSelected
from fedbpt.runs.settings import RunSettings
from fedbpt.search.population import sample_population
from fedbpt.tasks import Row, Task
from tests.support.raises import raises
from tests.support.toy_scene import StopRunError, stop
from tests.support.toy_scorer import ToyScorer
from tests.support.toy_task import TASK
from tests.unit.coordinator.test_federation_fit import SETTINGS, FitScene, nth, same
from tests.unit.device.test_device import LABELS, OTHER, PROMPT, TEMPLATE, local, plan, pooled, request
from tests.unit.device.test_device import TASK as MOOD
from tests.unit.device.test_local_fit import fit

WEIGHTS = (3.0, 0.5)
SKEWED = [(f"text {i} {'ugly' * (i % 3)}", int(i % 8 > 0)) for i in range(24)]  # 3 of 24 have label 0


def mixed(n: int, n_negative: int, first: int = 0) -> list[Row]:
    """Rows of both labels; two of three texts reveal the label."""
    words = (("zzz", "zzz", "iii"), ("aaa", "aaa", "iii"))
    labels = [0] * n_negative + [1] * (n - n_negative)
    return [(f"{words[label][i % 3]} number {first + i}", label) for i, label in enumerate(labels)]


# --- a device ------------------------------------------------------------------------------------------------------


def device(rows: list[Row] = SKEWED) -> Device:
    return Device("pi5", ToyScorer(), rows, rows[:6], rows[3:10], task=MOOD)


def objective() -> Objective:
    return Objective(ToyScorer(), TEMPLATE, LABELS, SKEWED, ObjectiveSpec(), PROMPT)


def test_pooled_losses_of_all_rows_are_weighted() -> None:
    asked = plan(pooled(), objective=ObjectiveSpec(batch_size=0), label_weights=WEIGHTS)
    found = device().run(asked).result.losses.numpy()
    expected = objective()
    weights = np.array(WEIGHTS)[expected.targets]
    latents = sample_population(pooled().state, 6, 7, 3)
    losses = expected.losses(expected.embeds(latents), row_weights=weights)
    np.testing.assert_array_equal(found, losses.astype(np.float32))


def test_a_mini_batch_stands_for_the_weighted_mean_of_all_rows() -> None:
    weights = tuple(balanced_weights([3, 21]).tolist())
    mine, spec = device(), ObjectiveSpec(batch_size=4)
    state = pooled().state
    still = msgspec.structs.replace(state, sigma=1e-9)  # every candidate is the mean, so only draws differ
    means = []
    for generation in range(200):
        work = msgspec.structs.replace(pooled(generation, 3), state=still)
        means.append(mine.run(plan(work, objective=spec, label_weights=weights)).result.losses.numpy()[0])
    whole = objective()
    of_rows = np.array(weights)[whole.targets]
    expected = whole.losses(whole.embeds(state.mean.numpy()[None]), row_weights=of_rows)[0]
    assert np.mean(means) == pytest.approx(expected, abs=4 * np.std(means) / np.sqrt(200))
    rng = np.random.default_rng(0)
    embeds = whole.embeds(state.mean.numpy()[None])
    drawn_evenly = [rng.choice(24, 4, replace=False) for _ in range(200)]
    noisy = [whole.losses(embeds, chosen, row_weights=of_rows)[0] for chosen in drawn_evenly]
    assert np.std(means) < 0.5 * np.std(noisy)


def test_a_local_search_weighs_its_rows_one_on_average() -> None:
    found = device().run(plan(local(), label_weights=WEIGHTS)).result
    doubled = device().run(plan(local(), label_weights=(6.0, 1.0))).result
    assert found == doubled
    whole = objective()
    weights = np.array(WEIGHTS)[whole.targets]
    fitness = whole.losses(whole.embeds(found.mean.numpy()[None]), row_weights=weights / weights.mean())[0]
    assert found.fitness == pytest.approx(fitness, rel=1e-12)


def test_a_fits_gradient_is_of_the_weighted_loss() -> None:
    """Doubling label 0's weight equals doubling its rows."""
    twice = [row for row in SKEWED for _ in range(2 - row[1])]
    spec = ObjectiveSpec(readout_words=6)
    heavy = device().run(plan(fit(max_rows=0), objective=spec, label_weights=(2.0, 1.0))).result
    there = device(twice).run(plan(fit(max_rows=0), objective=spec)).result
    scale = len(twice) / len(SKEWED)
    assert heavy.loss == pytest.approx(scale * there.loss, rel=1e-6)
    np.testing.assert_allclose(heavy.means.numpy(), scale * there.means.numpy(), rtol=2e-3, atol=1e-4)


def test_dev_losses_are_weighted_and_accuracy_is_not() -> None:
    mine = device()
    plain, weighted = mine.evaluate(request(split="dev")), mine.evaluate(request(split="dev", label_weights=WEIGHTS))
    assert weighted.correct == plain.correct
    rows = Objective(ToyScorer(), TEMPLATE, LABELS, SKEWED[:6], ObjectiveSpec(), PROMPT)
    expected = rows.evaluate(rows.embeds(request().latents.numpy()), row_weights=np.array(WEIGHTS)[rows.targets])
    assert weighted.loss_sums == expected.loss_sums
    assert mine.evaluate(request(split="dev")).loss_sums == plain.loss_sums  # no state remains


@pytest.mark.parametrize("privacy", [None, PrivacySpec(clip=1.0, noise_multiplier=0.5)])
@pytest.mark.parametrize("work", [pooled(), local()])
def test_earlier_requests_to_a_device_change_no_result(work: Work, privacy: PrivacySpec | None) -> None:
    asked = plan(work, privacy=privacy, objective=ObjectiveSpec(batch_size=4))
    fresh, used = device(), device()
    used.state.key = fresh.state.key  # seeds the noise
    used.run(plan(pooled(), label_weights=WEIGHTS, objective=ObjectiveSpec(batch_size=4)))
    used.run(plan(pooled(), label_bias=(1.0, -1.0), objective=ObjectiveSpec(batch_size=4)))
    assert used.run(asked).result == fresh.run(asked).result


def test_a_selection_by_label_sums_label_by_label_and_counts_all_rows() -> None:
    work = SelectWork(templates=(TEMPLATE, OTHER), max_rows=0)
    plain = device().run(plan(work)).result
    parted = device().run(plan(msgspec.structs.replace(work, by_label=True)))
    assert plain.label_counts == ()
    assert parted.result.label_counts == (3, 21)
    np.testing.assert_allclose(parted.result.loss_sums.numpy().sum(axis=1), plain.loss_sums.numpy())
    some = device().run(plan(SelectWork(templates=(TEMPLATE,), max_rows=5, by_label=True)))
    assert (some.n_texts, some.result.label_counts) == (5, (3, 21))


@pytest.mark.parametrize("work", [pooled(), local(), fit(n_words=0, readout=None)], ids=lambda w: type(w).__name__)
def test_label_weights_of_other_labels_are_refused(work: Any) -> None:
    with raises(InputError, field="label_weights"):
        device().run(plan(work, label_weights=(1.0, 2.0, 3.0)))


def test_weights_and_counts_survive_the_wire_and_invalid_weights_do_not() -> None:
    asked = plan(SelectWork(templates=(TEMPLATE,), by_label=True))
    weighted = plan(pooled(), label_weights=WEIGHTS)
    for message in (asked, weighted, request(label_weights=WEIGHTS), device().run(asked)):
        assert codec.decode(codec.encode(message), type(message)) == message
        assert codec.decode_json(codec.encode_json(message), type(message)) == message
    for weight in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(WireError):
            codec.decode(codec.encode(plan(pooled(), label_weights=(1.0, weight))), RoundPlan)


# --- runs ----------------------------------------------------------------------------------------------------------


SHARES = {"a": mixed(24, 2), "b": mixed(12, 9, 50)}


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[FitScene]:
    scene = FitScene(tmp_path / "runs.sqlite", SHARES)
    yield scene
    scene.store.close()


def plans_of(scene: FitScene) -> list[Any]:
    """Record every plan that device a receives from now on."""
    seen: list[Any] = []
    device, run = scene.devices["a"], scene.devices["a"].run

    def spy(plan: Any, *rest: Any) -> Any:
        seen.append(plan)
        return run(plan, *rest)

    device.run = spy
    return seen


def test_weights_are_of_all_devices_rows_and_go_with_every_later_plan(scene: FitScene) -> None:
    plans = plans_of(scene)
    scene.run(balanced=True)
    first, *later = plans
    assert isinstance(first.work, SelectWork)
    assert first.work.by_label
    assert first.label_weights == ()
    assert {type(plan.work).__name__ for plan in later} == {"FitWork", "PooledWork"}
    assert {plan.label_weights for plan in later} == {(36 / (2 * 11), 36 / (2 * 25))}


def test_without_it_no_label_count_leaves_a_device(scene: FitScene) -> None:
    plans = plans_of(scene)
    scene.run()
    assert RunSettings().balanced is False
    assert not any(plan.label_weights for plan in plans)
    results = [report.result for round in scene.store.rounds("r") for report in round.reports]
    selections = [result for result in results if isinstance(result, SelectResult)]
    assert len(selections) == 2
    assert all(result.label_counts == () and result.loss_sums.shape == (2,) for result in selections)


def test_one_template_is_not_selected_but_rows_are_counted(scene: FitScene) -> None:
    task = Task(name=TASK.name, labels=TASK.labels, templates=TASK.templates[:1])
    plans = plans_of(scene)
    settings = {**SETTINGS, "balanced": True}
    scene.federation("r", task, **settings).run()
    assert plans[0].work.max_rows == 1
    assert plans[-1].label_weights == (36 / (2 * 11), 36 / (2 * 25))


def test_templates_are_compared_by_balanced_losses(scene: FitScene) -> None:
    scene.run(balanced=True, select_rows=0, rounds=1)
    expected = []
    everything = [row for share in SHARES.values() for row in share]
    for template in TASK.templates:
        made = Objective(ToyScorer(), template, TASK.labels, everything, ObjectiveSpec(readout_words=0), PROMPT)
        losses = np.array([made.losses(made.zero_shot_embeds(), [i])[0] for i in range(len(made))])
        expected.append(np.mean([losses[made.targets == label].mean() for label in (0, 1)]))
    np.testing.assert_allclose(scene.of(TemplateSelected)[0].losses, expected, rtol=1e-6)


@pytest.mark.parametrize(("purpose", "number"), [("selection", 1), ("calibration", 1), ("search", 2), ("readout", 2)])
def test_a_balanced_run_that_was_stopped_resumes_to_the_same_result(scene: FitScene, purpose: str, number: int) -> None:
    whole = scene.run("whole", balanced=True)
    scene.when(nth(purpose, number), stop)
    with pytest.raises(StopRunError):
        scene.run("stopped", balanced=True)
    same(scene.run("stopped", balanced=True), whole)


def test_how_labels_are_spread_over_devices_does_not_matter(tmp_path: Path) -> None:
    """On all rows the balanced loss is the same, and so is the search."""
    everything = [row for share in SHARES.values() for row in share]
    found = []
    for number, shares in enumerate((SHARES, {"a": everything[::2], "b": everything[1::2]})):
        scene = FitScene(tmp_path / f"{number}.sqlite", shares)
        spec = ObjectiveSpec(batch_size=0, readout_words=0)
        found.append(scene.run(balanced=True, objective=spec, select_rows=0, calibrate=False, baselines=False))
        scene.store.close()
    np.testing.assert_allclose(found[0].latent, found[1].latent, atol=1e-5)


@pytest.mark.parametrize("method", ["pooled", "fedavg", "fedbpt"])
def test_every_method_runs_balanced(scene: FitScene, method: Any) -> None:
    settings = RunSettings(**{**SETTINGS, "balanced": True, "method": method, "iterations": 2, "deadline_s": 5.0})
    clients = list(scene.clients.values())
    federation = Federation(clients, TASK, settings, settings.aggregator(), scene.store, "r")
    assert federation.run().rounds == SETTINGS["rounds"]


def test_a_rare_label_is_found_in_a_balanced_run() -> None:
    """6 of 48 training rows are negative, and half of the test rows, most of which plain losses call positive."""
    train, held_out = mixed(48, 6), mixed(60, 30, 200)
    negative = np.array([label == 0 for _, label in held_out])
    found, right = {}, {}
    for balanced in (False, True):
        spec = ObjectiveSpec(batch_size=8, readout_words=6)
        result = tune(
            ToyScorer(),
            TASK,
            train,
            budget=Budget(evaluations=200),
            objective=spec,
            prompt=PromptSpec(d=8, alpha=2.0),
            balanced=balanced,
            readout="words",
        )
        predictions = evaluate(ToyScorer(), TASK, held_out, result.prompt).predictions
        found[balanced] = float((predictions[negative] == 0).mean())
        right[balanced] = (found[balanced] + float((predictions[~negative] == 1).mean())) / 2
    assert found[True] > found[False] + 0.25
    assert right[True] > right[False] + 0.1


def test_the_plan_of_a_balanced_run_counts_the_text_that_one_template_costs() -> None:
    task = Task(name="one", labels=TASK.labels, templates=TASK.templates[:1])
    settings = RunSettings(rounds=2, popsize=6)
    infos = [device().info()]
    plain = estimate(settings, task, infos, settings.aggregator()).devices[0]
    balanced = msgspec.structs.replace(settings, balanced=True)
    counted = estimate(balanced, task, infos, balanced.aggregator()).devices[0]
    assert plain.select == 0 < counted.select
    assert counted.bytes_down > plain.bytes_down


def test_a_run_cannot_turn_balanced_when_it_resumes() -> None:
    assert RunSettings().identity() != RunSettings(balanced=True).identity()


def test_rounds_of_a_balanced_run_have_the_purposes_of_any(scene: FitScene) -> None:
    scene.run(balanced=True)
    assert scene.purposes() == ["selection", "calibration", "probe", "search", "readout"]
    assert all(np.isfinite(event.loss) for event in scene.of(RoundClosed))
