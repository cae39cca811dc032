"""Runs of target texts: held-out training rows judge whether the tuned prompt is better than none."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from fedbpt.api import make_prompt
from fedbpt.coordinator.run_state import RunState
from fedbpt.dashboard.state import RunState as Page
from fedbpt.dashboard.texts import basis
from fedbpt.engine.text_generator import Answer
from fedbpt.errors import ConfigError, FederationError
from fedbpt.metrics import metric_named
from fedbpt.prompts.model_card import model_card
from fedbpt.protocol.rounds import EvaluateReport, EvaluateRequest, PooledWork
from fedbpt.protocol.specs import ObjectiveSpec, PrivacySpec, PromptSpec, Template
from fedbpt.runs.events import RoundClosed, TemplateSelected
from fedbpt.runs.settings import RunSettings
from fedbpt.tasks import Generation, Row, Task
from tests.support.raises import raises
from tests.support.toy_scene import D, StopRunError, closed, stop
from tests.support.toy_scorer import ToyPlan, ToyScorer
from tests.unit.coordinator.test_layer_runs import LayerScene, SpyDevice, held_reports, same

TARGETS = Task(name="toy-echo", labels=(), templates=(Template(pattern="{text}\nSay:", label_words=()),))


def texts(n: int, first: int = 0) -> list[Row]:
    return [(f"number {i}", "go on") for i in range(first, first + n)]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., LayerScene]]:
    scenes: list[LayerScene] = []

    def made(*train: list[Row]) -> LayerScene:
        shares = train or (texts(24), texts(26, 50))
        scene = LayerScene(tmp_path / f"{len(scenes)}.sqlite", dict(zip("abc", shares, strict=False)), TARGETS)
        for number, device in enumerate(scene.devices.values()):
            device._rows["test"] = tuple(texts(8, 300 + 50 * number))
        scenes.append(scene)
        return scene

    yield made
    for scene in scenes:
        scene.store.close()


def lying(device: SpyDevice, gain: float) -> None:
    """The device says that on held rows the prompt's loss is lower by ``gain`` nats, row by row alike."""
    honest = device.evaluate

    def evaluate(request: EvaluateRequest, *rest: Any) -> EvaluateReport:
        report = honest(request, *rest)
        if request.split != "held" or request.generation is not msgspec.UNSET:
            return report
        before = report.loss_sums[0]
        return msgspec.structs.replace(
            report,
            loss_sums=(before, before - gain * report.n),
            difference_squares=(0.0, gain**2 * report.n),
        )

    device.evaluate = evaluate  # type: ignore[method-assign]


def test_the_search_never_scores_the_rows_that_judge(make: Callable[..., LayerScene]) -> None:
    scene = make()
    scene.run(rounds=6)
    for device in scene.devices.values():
        train = {text for text, _ in device._rows["train"]}
        held = device.scored["held"]
        assert held <= train
        assert len(held) == len(train) // 4
        assert not held & device.scored[PooledWork.__name__]


@pytest.mark.parametrize(("gain", "shipped"), [(0.5, ""), (-0.5, "zero_shot"), (0.0, "zero_shot")])
def test_a_prompt_that_is_not_better_on_these_rows_is_not_shipped(
    make: Callable[..., LayerScene], gain: float, shipped: str
) -> None:
    scene = make()
    for device in scene.devices.values():
        lying(device, gain)
    result = scene.run()
    assert result.shipped == shipped
    assert result.is_not_better == bool(shipped)
    assert bool(result.latent.any()) != bool(shipped)
    prompt = make_prompt(ToyScorer(), TARGETS, result)
    if shipped:
        assert result.tuned == result.zero_shot
        assert result.baselines["prompt"].loss != result.zero_shot.loss
        assert "was not shown to be better" in model_card(prompt, "")
    else:
        assert result.tuned.loss != result.zero_shot.loss
        assert result.baselines == {}


def state(**changes: Any) -> RunState:
    chosen = RunSettings(rounds=1, prompt=PromptSpec(d=D), **changes).for_labels(())
    return RunState(TARGETS, chosen, chosen.aggregator())


@pytest.mark.parametrize(
    ("differences", "shipped"), [([], ""), ([-0.1, 0.05, 0.0], ""), ([0.3] * 4, "zero_shot"), ([30.0], "zero_shot")]
)
def test_few_rows_only_keep_back_a_prompt_that_is_worse_on_them(differences: list[float], shipped: str) -> None:
    made = state()
    made.choose_texts(held_reports(np.array(differences)) if differences else [])
    assert made.shipped == shipped


@pytest.mark.parametrize(
    ("losses", "answers", "shipped"),
    [
        (-1.0, 0.0, "zero_shot"),  # the metric cannot tell the answers apart
        (-1.0, -0.1, ""),  # too few answers to be sure
        (-1.0, 0.1, "zero_shot"),
        (0.1, -1.0, ""),  # the metric is what is asked for
        (0.1, -0.1, "zero_shot"),
        (0.1, 0.0, "zero_shot"),
    ],
)
def test_likelihood_makes_up_for_few_answers(losses: float, answers: float, shipped: str) -> None:
    noise = np.random.default_rng(0).standard_normal(16)
    noise = 0.5 * (noise - noise.mean()) / noise.std()  # ± 0.22 at 95 %
    made = state()
    made.choose_texts(held_reports(losses + noise), held_reports(answers + noise * bool(answers)))
    assert made.shipped == shipped


def test_answers_of_few_rows_after_the_cap_judge_nothing() -> None:
    made = state()
    likelier, worse = np.full(16, -1.0), np.full(16, 1.0)
    reports = held_reports(worse)
    made.choose_texts(held_reports(likelier), [*held_reports(worse[:1]), *held_reports(worse[:1]), *reports])
    assert made.shipped == ""


@pytest.mark.parametrize("changes", [{"readout": "words"}, {"robust": "median"}, {"privacy": True}], ids=str)
def test_runs_that_do_not_judge_search_with_all_rows(changes: dict[str, Any]) -> None:
    if "privacy" in changes:
        changes = {
            "privacy": PrivacySpec(clip=0.5, noise_multiplier=1.0),
            "calibrate": False,
            "objective": msgspec.structs.replace(RunSettings().objective, readout_words=0),
        }
    made = state(**changes)
    assert not made.holds_rows
    assert made.held_lines() == {}
    assert state().holds_rows


def test_settings_of_target_texts_tell_whether_rows_are_held_out() -> None:
    judged, words = (RunSettings(rounds=1, readout=each).for_labels(()) for each in ("logistic", "words"))
    assert judged.readout == "auto"
    assert judged.identity() != words.identity()
    assert judged.continuing(words).identity() == words.identity()


def test_devices_with_too_few_rows_to_hold_any_run_to_the_end(make: Callable[..., LayerScene]) -> None:
    scene = make(texts(2), texts(1, 9))
    result = scene.run()
    assert result.shipped == ""
    assert result.latent.any()


@pytest.mark.slow
def test_a_run_stopped_at_every_round_resumes_to_the_same_result(make: Callable[..., LayerScene]) -> None:
    whole, scene = make(), make()
    expected = whole.run()
    for round in range(1, len(whole.of(RoundClosed)) + 1):  # one template: there is no round 0
        scene.when(closed(round), stop)
        with pytest.raises(StopRunError):
            scene.run()
    same(scene.run(), expected)


MEASURED = msgspec.structs.replace(TARGETS, generation=Generation(metric="contains", max_tokens=3))


class Answering:
    """A plan's `generate`: the target text under a prompt that moves anything, in a share of the texts."""

    def __init__(self, share: float) -> None:
        self.share = share
        self.bare: Any = 0.0  # the rows of no prompt

    def __call__(self, embeds: Any, indices: Any, *_: Any, **_options: Any) -> list[list[Answer]]:
        said = []
        for rows in np.asarray(embeds):
            moved = bool(np.abs(rows - self.bare).max(initial=0.0) > 1e-6)
            right = self.share if moved else 0.5
            texts = ["go on" if number < right * len(indices) else f"no {number}" for number in range(len(indices))]
            said.append([Answer(text, np.zeros(0, dtype=np.int32)) for text in texts])
        return said


@pytest.fixture
def measured(make: Callable[..., LayerScene], monkeypatch: pytest.MonkeyPatch) -> Callable[[float], LayerScene]:
    """A run whose prompt is likelier by far than none, and whose answers are right in a share of the texts."""

    def made(share: float) -> LayerScene:
        scene = make()
        answering = Answering(share)

        def generate(plan: ToyPlan, *args: Any, **options: Any) -> list[list[Answer]]:
            cue = MEASURED.templates[0].pattern.removeprefix("{text}")
            answering.bare = plan._scorer.token_embeddings(plan._scorer.tokenize(cue, add_bos=False)[-1:])
            return answering(*args, **options)

        monkeypatch.setattr(ToyPlan, "generate", generate)
        scene.task = MEASURED
        for device in scene.devices.values():
            device._task = MEASURED
            device._metric = metric_named("contains")
            lying(device, 0.5)
        return scene

    return made


@pytest.mark.parametrize(("share", "shipped"), [(1.0, ""), (0.5, "zero_shot"), (0.0, "zero_shot")])
def test_a_task_with_a_metric_is_judged_by_the_models_own_answers(
    measured: Callable[[float], LayerScene], share: float, shipped: str
) -> None:
    scene = measured(share)
    result = scene.run()
    assert result.shipped == shipped
    assert result.metric == "contains"
    page = Page("r")
    page.refresh(scene.store)
    assert f"contains of answers 0.50 → {max(share, 0.5):.2f} on 16 test rows" in basis(page.view())
    assert result.answers["zero_shot"].mean == 0.5
    assert result.answers["tuned"].mean == (share if share > 0.5 else 0.5)
    assert result.answers["tuned"].n == result.zero_shot.n
    card = model_card(make_prompt(ToyScorer(), MEASURED, result), "")
    assert "contains of its answers" in card


def test_a_device_that_measures_otherwise_scores_as_before(
    measured: Callable[[float], LayerScene], caplog: pytest.LogCaptureFixture
) -> None:
    scene = measured(1.0)
    other = Generation(metric="exact-match")
    for device in scene.devices.values():
        device._task = msgspec.structs.replace(TARGETS, generation=other)
    result = scene.run()
    assert "start it with the run's task file" in caplog.text
    assert "too few answers were measured: likelihood judges the prompt" in caplog.text
    assert result.shipped == ""
    assert result.answers == {}
    assert result.tuned.n == 16


TWO = msgspec.structs.replace(
    TARGETS,
    templates=(*TARGETS.templates, Template(pattern="{text}\nAnd now, please say it:", label_words=())),
    generation=Generation(metric="contains"),
)


@pytest.fixture
def choosing(make: Callable[..., LayerScene], monkeypatch: pytest.MonkeyPatch) -> Callable[[Sequence[float]], Any]:
    """A run of `TWO` whose answers under each template are right in a share of the texts."""

    def made(shares: Sequence[float]) -> LayerScene:
        scene = make()
        cues = [len(template.pattern.removeprefix("{text}")) for template in TWO.templates]

        def generate(plan: ToyPlan, embeds: Any, indices: Any = None, *_: Any, **_options: Any) -> list[list[Answer]]:
            n = plan.n_texts if indices is None else len(indices)
            share = shares[bytes(int(t) for t in plan._texts[0][-cues[1] :]).decode() == TWO.templates[1].pattern[6:]]
            said = ["go on" if number < share * n else "no" for number in range(n)]
            return [[Answer(text, np.zeros(0, dtype=np.int32)) for text in said] for _ in np.asarray(embeds)]

        monkeypatch.setattr(ToyPlan, "generate", generate)
        scene.task = TWO
        for device in scene.devices.values():
            device._task = TWO
            device._metric = metric_named("contains")
        return scene

    return made


@pytest.mark.parametrize("best", [0, 1])
def test_the_template_whose_answers_are_worth_more_is_selected(
    choosing: Callable[[Sequence[float]], LayerScene], best: int
) -> None:
    scene = choosing([0.75, 0.25] if best == 0 else [0.25, 0.75])
    result = scene.run(rounds=2)
    assert result.template == TWO.templates[best]
    rewards = [each.reward for each in result.templates]
    assert rewards == pytest.approx([0.75, 0.25] if best == 0 else [0.25, 0.75], abs=0.02)
    assert {each.n_answered for each in result.templates} == {24 + 26}


def test_templates_whose_answers_are_worth_the_same_are_selected_by_likelihood(
    choosing: Callable[[Sequence[float]], LayerScene],
) -> None:
    scene = choosing([0.5, 0.5])
    result = scene.run(rounds=1)
    [selected] = scene.of(TemplateSelected)
    assert result.template == TWO.templates[int(np.argmin(selected.losses))]


def test_devices_that_cannot_measure_answers_select_by_likelihood(
    choosing: Callable[[Sequence[float]], LayerScene],
) -> None:
    scene = choosing([0.0, 1.0])
    for device in scene.devices.values():
        device._metric = None
    result = scene.run(rounds=1)
    [selected] = scene.of(TemplateSelected)
    assert result.template == TWO.templates[int(np.argmin(selected.losses))]
    assert result.templates == ()


def test_the_last_part_of_a_search_rates_candidates_by_their_answers(
    measured: Callable[[float], LayerScene],
) -> None:
    scene = measured(1.0)
    scene.run(rounds=8, metric_share=0.5)
    for device in scene.devices.values():
        searches = [plan for plan in device.plans if isinstance(plan.work, PooledWork)]
        by_metric = [plan.objective.generation is not msgspec.UNSET for plan in searches]
        assert by_metric == [False] * 4 + [True] * 4
    losses = [event.loss for event in scene.of(RoundClosed) if event.purpose == "search"]
    assert all(loss <= 1.01 for loss in losses[4:])  # 1 − the metric, and the tie-breaker
    assert min(losses[:4]) > 1.01


def test_a_device_refuses_to_search_by_a_metric_that_its_own_task_does_not_name(
    measured: Callable[[float], LayerScene],
) -> None:
    scene = measured(1.0)
    for device in scene.devices.values():
        device._task = TARGETS
    with raises(FederationError, field="metric_share"):
        scene.run(rounds=2, metric_share=0.1)
    assert not [plan for device in scene.devices.values() for plan in device.plans if plan.round > 0]


def test_a_metric_that_fails_on_all_answers_judges_nothing(
    measured: Callable[[float], LayerScene], caplog: pytest.LogCaptureFixture
) -> None:
    scene = measured(0.0)

    def broken(_text: str, _answer: str, _row: object) -> float:
        raise ValueError("no number")

    for device in scene.devices.values():
        device._metric = broken
    result = scene.run()
    assert result.shipped == ""
    assert "the metric failed on all answers" in caplog.text
    assert "no number" not in caplog.text
    assert result.answers["tuned"].n_failed == 16


def test_a_finished_run_is_judged_again_by_another_metric(measured: Callable[[float], LayerScene]) -> None:
    scene = measured(0.0)
    assert scene.run().metric == "contains"
    scene.task = msgspec.structs.replace(MEASURED, generation=Generation(metric="max-words:5"))
    for device in scene.devices.values():
        device._task = scene.task
        device._metric = metric_named("max-words:5")
    searched = len(scene.of(RoundClosed))
    assert scene.run().metric == "max-words:5"
    assert len(scene.of(RoundClosed)) == searched


@pytest.mark.parametrize(
    "changes",
    [
        {"prompt": PromptSpec(d=D, placement="front")},
        {"objective": ObjectiveSpec(perturb=0.5, readout_words=0)},
        {"patience": 2},
        {"metric_share": 0.0, "objective": ObjectiveSpec(generation=Generation())},
    ],
    ids=str,
)
def test_settings_that_cannot_search_by_a_metric_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="set"):
        RunSettings(**{"rounds": 1, "metric_share": 0.5, **changes})


def test_a_task_without_a_metric_is_not_searched_by_one() -> None:
    with raises(ConfigError, field="metric_share"):
        RunSettings(rounds=1, metric_share=0.5).for_labels(())
    plain = RunSettings(rounds=1).for_labels((), Generation())
    assert plain.objective.generation is msgspec.UNSET
    assert plain.identity() == RunSettings(rounds=1).for_labels(()).identity()
    assert plain.identity() != RunSettings(rounds=1, metric_share=0.5).for_labels((), Generation()).identity()
