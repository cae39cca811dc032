"""A device does a round's work."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest

from fedbpt.device.device import Device
from fedbpt.errors import DataError, InputError, ScoringInterrupted, TaskError
from fedbpt.objective.objective import Objective
from fedbpt.protocol.codec import digest
from fedbpt.protocol.rounds import (
    DeviceInfo,
    EvaluateRequest,
    LocalWork,
    PooledWork,
    RoundPlan,
    RoundReport,
    SearchState,
    SelectWork,
    Work,
)
from fedbpt.protocol.seeding import generator
from fedbpt.protocol.specs import Array, ObjectiveSpec, PromptSpec, Template
from fedbpt.search.cma_es import CmaSearch
from fedbpt.search.local_search import local_search
from fedbpt.search.population import sample_population
from fedbpt.tasks import Task
from fedbpt.tasks.rows import batch_indices
from tests.support.raises import raises
from tests.support.toy_scorer import ToyScorer

TEMPLATE = Template(pattern="{text}\nMood: (", label_words=("b", "g"))
OTHER = Template(pattern="Review: {text}\nIt was: (", label_words=("b", "g"))
LABELS = ("bad", "good")
TASK = Task(name="mood", labels=LABELS, templates=(TEMPLATE, OTHER))
ROWS = [(f"text {i} {'ugly' * (i % 2)}", i % 2) for i in range(20)]
PROMPT = PromptSpec(n_prompt=2, d=6, seed=1, alpha=2.0)


def device(scorer: ToyScorer | None = None) -> Device:
    return Device("pi5", scorer or ToyScorer(), ROWS, ROWS[:6], ROWS[3:10], task=TASK)


def plan(work: Work, **changes: Any) -> RoundPlan:
    fields: dict[str, Any] = {
        "run": "r",
        "round": 4,
        "device": "kitchen",
        "seed": 7,
        "model_fingerprint": ToyScorer().fingerprint,
        "task": TASK.identity,
        "labels": LABELS,
        "template": TEMPLATE,
        "prompt": PROMPT,
        "objective": ObjectiveSpec(batch_size=5),
        "work": work,
    }
    return RoundPlan(**{**fields, **changes})


def pooled(generation: int = 3, popsize: int = 6) -> PooledWork:
    return PooledWork(state=CmaSearch(6, seed=7).state(), generation=generation, popsize=popsize)


def local(state: SearchState | None = None, iterations: int = 3) -> LocalWork:
    return LocalWork(state=state or CmaSearch(6, seed=7).state(), iterations=iterations, popsize=5)


def through_the_wire(value: Any) -> Any:
    return msgspec.msgpack.decode(msgspec.msgpack.encode(value), type=type(value))


# --- pooled --------------------------------------------------------------------------------------------------------


def test_pooled_losses_are_those_of_the_shared_population_on_the_devices_mini_batch() -> None:
    report = device().run(plan(pooled()))
    objective = Objective(ToyScorer(), TEMPLATE, LABELS, ROWS, ObjectiveSpec(batch_size=5), PROMPT)
    latents = sample_population(pooled().state, 6, 7, 3)
    chosen = batch_indices(20, 5, generator(7, "batch", "kitchen", 3), objective.targets)
    expected = objective.losses(objective.embeds(latents), chosen).astype(np.float32)
    np.testing.assert_array_equal(report.result.losses.numpy(), expected)
    assert (report.run, report.round, report.device) == ("r", 4, "kitchen")
    # the mini-batch stands for all 20 rows
    assert (report.n_texts, report.evaluations, report.tokens) == (20, 6, objective.tokens)
    assert report.plan_digest == digest(plan(pooled()))
    assert report.peak_rss_bytes == ToyScorer().memory()["peak_rss"]


WORKS: list[Work] = [pooled(), local(), SelectWork(templates=(TEMPLATE, OTHER))]
every_work = pytest.mark.parametrize("work", WORKS, ids=lambda work: type(work).__name__)


@every_work
def test_the_same_plan_gives_the_same_result_whatever_ran_before(work: Work) -> None:
    busy, fresh = device(), device()
    for other in WORKS:
        busy.run(plan(other, seed=1))
    again = busy.run(plan(work)), busy.run(plan(work)), fresh.run(through_the_wire(plan(work)))
    assert again[0].result == again[1].result == again[2].result
    assert again[0].plan_digest == again[2].plan_digest


@every_work
def test_a_report_survives_the_wire(work: Work) -> None:
    report = device().run(plan(work))
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(report), type=RoundReport) == report


@every_work
def test_progress_ends_at_its_total(work: Work) -> None:
    seen: list[tuple[int, int]] = []
    device().run(plan(work), lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1]
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


@every_work
def test_cancelling_interrupts(work: Work) -> None:
    with pytest.raises(ScoringInterrupted):
        device().run(plan(work), cancelled=lambda: True)


@every_work
def test_another_model_is_refused_by_name(work: Work) -> None:
    with pytest.raises(InputError, match="toy") as error:
        device().run(plan(work, model_fingerprint="sha256:beef"))
    assert "sha256:beef" in str(error.value)
    assert ToyScorer().fingerprint in str(error.value)


def test_devices_and_generations_draw_mini_batches_of_their_own() -> None:
    results = [
        device().run(plan(pooled(generation), device=name)).result.losses.data
        for name in ("kitchen", "garage")
        for generation in (0, 1)
    ]
    assert len(set(results)) == 4


def test_the_perturbed_objective_runs_and_repeats() -> None:
    asked = plan(pooled(), objective=ObjectiveSpec(batch_size=5, perturb=0.5))
    assert device().run(asked).result == device().run(asked).result
    assert device().run(asked).result != device().run(plan(pooled())).result


def test_a_batch_size_of_zero_takes_all_rows() -> None:
    everything = ObjectiveSpec(batch_size=0)
    report = device().run(plan(pooled(), objective=everything))
    objective = Objective(ToyScorer(), TEMPLATE, LABELS, ROWS, everything, PROMPT)
    expected = objective.losses(objective.embeds(sample_population(pooled().state, 6, 7, 3))).astype(np.float32)
    np.testing.assert_array_equal(report.result.losses.numpy(), expected)
    assert report.n_texts == len(ROWS)


# --- local search --------------------------------------------------------------------------------------------------

MEAN = np.array([1.0, -2.0, 0.5])
SCALES = np.array([0.5, 2.0, 1.0])
ROOT = np.array([[1.0, 0.0, 0.0], [0.5, 1.0, 0.0], [-0.3, 0.2, 0.7]])


def bowl(z: np.ndarray) -> np.ndarray:
    return ((z - [2.0, 1.0, -1.0]) ** 2 * [1, 3, 0.5]).sum(axis=1)


@pytest.mark.parametrize(
    ("state", "root"),
    [
        (SearchState(mean=Array.of(MEAN), sigma=0.4), np.eye(3)),
        (SearchState(mean=Array.of(MEAN), sigma=0.4, scales=Array.of(SCALES)), np.diag(SCALES)),
        (SearchState(mean=Array.of(MEAN), sigma=0.4, covariance=Array.of(ROOT @ ROOT.T)), ROOT),
    ],
    ids=["isotropic", "diagonal", "full"],
)
def test_local_search_is_cma_es_in_the_states_coordinates(state: SearchState, root: np.ndarray) -> None:
    work = LocalWork(state=state, iterations=6, popsize=8)
    drawn = []

    def losses(z: np.ndarray, iteration: int) -> np.ndarray:
        drawn.append((iteration, z))
        return bowl(z)

    mean, squares, _ = local_search(work, 11, losses)
    plain = CmaSearch(3, 0.4, 8, 11, "full" if state.covariance else "diagonal")
    expected = 0.0
    for number in range(6):
        expected += plain.sigma**2
        y = plain.ask()
        assert drawn[number][0] == number
        np.testing.assert_allclose(drawn[number][1], MEAN + y @ root.T, atol=1e-9)
        plain.tell(bowl(MEAN + y @ root.T))
    np.testing.assert_allclose(mean, MEAN + root @ plain.mean, atol=1e-9)
    assert squares == pytest.approx(expected, rel=1e-12)
    assert bowl(mean[None]) < bowl(MEAN[None])


def test_a_local_report_holds_the_fitness_of_its_mean_on_all_rows() -> None:
    report = device().run(plan(local()))
    objective = Objective(ToyScorer(), TEMPLATE, LABELS, ROWS, ObjectiveSpec(), PROMPT)
    fitness = objective.losses(objective.embeds(report.result.mean.numpy()[None]))[0]
    assert report.result.fitness == pytest.approx(fitness, abs=0)
    assert (report.n_texts, report.evaluations) == (len(ROWS), 3 * 5 + 1)


def test_devices_and_rounds_search_with_samples_of_their_own() -> None:
    results = {
        device().run(plan(local(), device=name, round=number)).result.mean.data
        for name in ("kitchen", "garage")
        for number in (0, 1)
    }
    assert len(results) == 4


def test_local_search_lowers_the_devices_loss() -> None:
    everything = ObjectiveSpec(batch_size=0)
    objective = Objective(ToyScorer(), TEMPLATE, LABELS, ROWS, everything, PROMPT)
    report = device().run(plan(local(iterations=20), objective=everything))
    assert report.result.fitness < objective.losses(objective.zero_shot_embeds())[0] - 0.01


# --- selecting a template ------------------------------------------------------------------------------------------


def test_select_sums_the_zero_shot_loss_of_each_template() -> None:
    report = device().run(plan(SelectWork(templates=(TEMPLATE, OTHER), max_rows=0)))
    for template, loss in zip((TEMPLATE, OTHER), report.result.loss_sums.numpy(), strict=True):
        objective = Objective(ToyScorer(), template, LABELS, ROWS, ObjectiveSpec(), PROMPT)
        assert objective.evaluate(objective.zero_shot_embeds()).loss_sums[0] == pytest.approx(loss, rel=1e-12)
    assert (report.n_texts, report.evaluations) == (len(ROWS), 2)


def test_select_scores_at_most_max_rows() -> None:
    assert device().run(plan(SelectWork(templates=(TEMPLATE,), max_rows=7))).n_texts == 7


def test_select_without_templates_is_refused() -> None:
    with raises(InputError, field="templates"):
        device().run(plan(SelectWork(templates=())))


# --- evaluating ----------------------------------------------------------------------------------------------------


def request(**changes: Any) -> EvaluateRequest:
    fields: dict[str, Any] = {
        "model_fingerprint": ToyScorer().fingerprint,
        "task": TASK.identity,
        "labels": LABELS,
        "template": TEMPLATE,
        "prompt": PROMPT,
        "objective": ObjectiveSpec(),
        "latents": Array.of(np.stack([np.zeros(6), np.ones(6)])),
    }
    return EvaluateRequest(**{**fields, **changes})


@pytest.mark.parametrize(("split", "rows"), [("test", ROWS[3:10]), ("dev", ROWS[:6])])
def test_evaluation_counts_on_the_requested_rows(split: str, rows: list[tuple[str, int]]) -> None:
    report = device().evaluate(request(split=split))
    objective = Objective(ToyScorer(), TEMPLATE, LABELS, rows, ObjectiveSpec(), PROMPT)
    expected = objective.evaluate(objective.embeds(np.stack([np.zeros(6), np.ones(6)])))
    assert (report.n, report.correct, report.loss_sums) == (len(rows), expected.correct, expected.loss_sums)


def test_in_front_a_latent_of_zero_is_the_model_without_a_prompt() -> None:
    front = PromptSpec(placement="front", n_prompt=2, d=6, seed=1, alpha=2.0)
    latents = np.stack([np.ones(6), np.zeros(6), -np.ones(6), np.zeros(6)])
    report = device().evaluate(request(prompt=front, latents=Array.of(latents), split="dev"))
    objective = Objective(ToyScorer(), TEMPLATE, LABELS, ROWS[:6], ObjectiveSpec(), front)
    bare = objective.evaluate(objective.zero_shot_embeds()).loss_sums[0]
    moved = objective.evaluate(objective.embeds(latents[::2])).loss_sums
    assert report.loss_sums == (moved[0], bare, moved[1], bare)
    cue = request(latents=Array.of(np.zeros((1, 6))), split="dev")
    assert device().evaluate(cue).loss_sums[0] == pytest.approx(bare, rel=1e-6)


def test_evaluation_takes_the_first_rows_where_there_is_a_limit() -> None:
    assert device().evaluate(request(max_rows=2)).n == 2
    assert device().evaluate(request(max_rows=200)).n == 7


def test_evaluation_is_not_perturbed() -> None:
    assert (
        device().evaluate(request(objective=ObjectiveSpec(perturb=0.5))).correct == device().evaluate(request()).correct
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"latents": Array.of(np.zeros((0, 6)))},
        {"latents": Array.of(np.zeros(6))},
        {"latents": Array.of(np.zeros((1, 5)))},
        {"latents": Array.of(np.zeros((1, 5))), "prompt": PromptSpec(placement="front", n_prompt=2, d=6)},
        {"readouts": (None,)},
        {"model_fingerprint": "sha256:beef"},
        {"labels": ("one", "two", "three")},
    ],
)
def test_an_inconsistent_evaluation_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        device().evaluate(request(**changes))


def test_evaluating_a_split_without_rows_is_refused() -> None:
    with raises(DataError, field="test"):
        Device("pi5", ToyScorer(), ROWS, task=TASK).evaluate(request())


# --- the device's description -----------------------------------------------------------------------------------------


def test_info_counts_rows_and_has_no_labels() -> None:
    mine = device(ToyScorer(name="Smol LM (Q4)"))
    before = mine.info()
    mine.run(plan(pooled()))
    info = msgspec.msgpack.decode(msgspec.msgpack.encode(mine.info()), type=DeviceInfo)
    assert (info.n_train, info.n_dev, info.n_test) == (20, 6, 7)
    assert info.model_name == "Smol-LM-Q4"
    assert info.ram_bytes > 0
    assert before.tokens_per_second is None
    assert info.tokens_per_second is not None
    assert info.tokens_per_second > 0


def test_a_device_needs_training_rows() -> None:
    with raises(DataError, field="train_rows"):
        Device("pi5", ToyScorer(), [], task=TASK)


def test_a_template_that_cannot_work_is_a_task_error() -> None:
    with pytest.raises(TaskError):
        device().run(plan(pooled(), prompt=PromptSpec(n_prompt=100, d=6)))


def test_the_speed_does_not_count_the_time_of_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("fedbpt.device.device.time.monotonic", lambda: now[0])

    class Slow(ToyScorer):
        def score_with_soft_prompt(self, *given: Any, **named: Any) -> Any:
            now[0] += 1.0
            return super().score_with_soft_prompt(*given, **named)

    def speed(pause_s: float) -> float | None:
        def paused() -> bool:
            now[0] += pause_s
            return False

        pi = device(Slow())
        pi.run(plan(pooled()), cancelled=paused)
        return pi.info().tokens_per_second

    assert speed(1000.0) == speed(0.0)
