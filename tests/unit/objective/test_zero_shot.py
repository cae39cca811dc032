"""Zero-shot accuracy of each template is reported, and whether it is better than chance."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from fedbpt import Budget, PromptSpec, evaluate, tune
from fedbpt.cli.report import print_result, result_as_json
from fedbpt.coordinator.reports.report_checks import check_report
from fedbpt.device.device import Device
from fedbpt.display.console import describe_accuracy
from fedbpt.errors import WireError
from fedbpt.protocol.codec import digest
from fedbpt.protocol.rounds import SelectResult, SelectWork
from fedbpt.protocol.specs import PrivacySpec, Template
from fedbpt.runs.events import TemplateSelected
from fedbpt.runs.intervals import beats_chance, wilson_interval
from fedbpt.runs.result import Score, TemplateScore
from tests.support.raises import raises
from tests.support.toy_scene import StopRunError, closed, stop
from tests.support.toy_scorer import ToyScorer
from tests.support.toy_task import TASK, rows
from tests.unit.coordinator.test_federation_fit import SETTINGS, FitScene
from tests.unit.device.test_device import OTHER, ROWS, TEMPLATE, plan
from tests.unit.device.test_device import TASK as MOOD

MANY = 10**6  # rows: all that a device has
WORK = SelectWork(templates=(TEMPLATE, OTHER), max_rows=MANY)


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[FitScene]:
    made = FitScene(tmp_path / "runs.db")
    with made.store:
        yield made


def device(data: list[Any] = ROWS) -> Device:
    return Device("pi5", ToyScorer(), data, task=MOOD)


@pytest.mark.parametrize("by_label", [False, True])
def test_a_device_counts_each_templates_correct_predictions(by_label: bool) -> None:
    work = msgspec.structs.replace(WORK, by_label=by_label)
    result = device().run(plan(work)).result
    expected = [evaluate(ToyScorer(), MOOD, ROWS, template=template).correct for template in WORK.templates]
    assert isinstance(result, SelectResult)
    assert list(result.correct) == expected


def test_only_counts_of_all_templates_and_texts_are_accepted() -> None:
    asked = plan(WORK)
    honest = device().run(asked)
    check_report(honest, asked)
    assert isinstance(honest.result, SelectResult)
    check_report(msgspec.structs.replace(honest, result=SelectResult(loss_sums=honest.result.loss_sums)), asked)
    for lie in ((1,), (1, 2, 3), (0, len(ROWS) + 1)):
        result = msgspec.structs.replace(honest.result, correct=lie)
        with raises(WireError, field="correct"):
            check_report(msgspec.structs.replace(honest, result=result), asked)


def test_a_private_device_sends_no_counts_and_none_are_accepted_from_it() -> None:
    spec = msgspec.structs.replace(plan(WORK).objective, readout_words=0)
    asked = plan(WORK, privacy=PrivacySpec(clip=1.0, noise_multiplier=1.0), objective=spec)
    report = device().run(asked)
    assert isinstance(report.result, SelectResult)
    assert report.result.correct == ()
    lie = msgspec.structs.replace(report.result, correct=(1, 1))
    with raises(WireError, field="correct"):
        check_report(msgspec.structs.replace(report, result=lie), asked)
    assert digest(asked) == report.plan_digest


def test_a_run_reports_and_stores_every_templates_accuracy_over_all_devices(scene: FitScene) -> None:
    result = scene.run(select_rows=0)
    (event,) = scene.of(TemplateSelected)
    assert event.candidates == result.templates
    assert [each.template for each in result.templates] == list(TASK.templates)
    everything = [*rows(12), *rows(14, 50)]
    for each, loss in zip(result.templates, event.losses, strict=True):
        expected = evaluate(ToyScorer(), TASK, everything, template=each.template)
        assert (each.score.n, each.score.correct) == (26, expected.correct)
        assert each.score.loss == pytest.approx(loss)


def test_a_resumed_run_reports_them_again_except_one_of_an_earlier_version(scene: FitScene) -> None:
    scene.when(closed(1), stop)
    with pytest.raises(StopRunError):
        scene.run()
    result = scene.run()
    first, again = scene.of(TemplateSelected)
    assert first.candidates == again.candidates == result.templates != ()
    for stored in scene.store.rounds("r"):
        if stored.round == 0:
            reports = [msgspec.structs.replace(r, result=without_counts(r.result)) for r in stored.reports]
    with scene.store._transaction() as db:
        for report in reports:
            body = msgspec.msgpack.encode(report)
            db.execute("UPDATE reports SET body = ? WHERE round = 0 AND device = ?", (body, report.device))
    longer = scene.run(rounds=SETTINGS["rounds"] + 1)
    assert longer.templates == ()


def without_counts(result: Any) -> SelectResult:
    return SelectResult(loss_sums=result.loss_sums)


def test_one_template_is_not_chosen_and_has_no_line(scene: FitScene) -> None:
    one = msgspec.structs.replace(TASK, templates=TASK.templates[:1])
    assert scene.federation("r", one, **{**SETTINGS, "balanced": True}).run().templates == ()


# --- chance ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("correct", "n", "n_labels", "beats"),
    [
        (16, 32, 2, False),
        (21, 32, 2, False),
        (22, 32, 2, True),
        (12, 32, 4, False),
        (14, 32, 4, True),
        (0, 0, 2, False),
    ],
)
def test_an_accuracy_beats_chance_with_its_whole_interval(correct: int, n: int, n_labels: int, beats: bool) -> None:
    assert beats_chance(correct, n, n_labels) == beats
    assert beats == (wilson_interval(correct, n)[0] > 1 / n_labels)


def scored(correct: int) -> TemplateScore:
    template = Template(pattern="{text}\nIs it:", label_words=(" a", " b", " c", " d"))
    return TemplateScore(template=template, score=Score(n=100, correct=correct, loss_sum=1.0))


def test_a_template_at_chance_level_is_marked() -> None:
    assert "no better than chance (0.250)" in describe_accuracy(scored(30))
    assert "chance" not in describe_accuracy(scored(60))
    assert "0.600 [0.502, 0.691] of 100" in describe_accuracy(scored(60))


def test_a_result_shows_them_as_a_table_and_as_json(scene: FitScene, capsys: pytest.CaptureFixture[str]) -> None:
    result = msgspec.structs.replace(scene.run(), templates=(scored(30), scored(60)))
    guessing = Score(n=22, correct=11, loss_sum=9.0)
    print_result(msgspec.structs.replace(result, zero_shot=guessing), None)
    out = capsys.readouterr().out
    assert out.count("'{text}\\nIs it:'") == 2
    assert out.count("no better than chance (0.250)") == 1
    assert out.count("no better than chance (0.500)") == 1
    print_result(msgspec.structs.replace(result, zero_shot=Score(n=22, correct=22, loss_sum=9.0)), None)
    assert "chance (0.500)" not in capsys.readouterr().out
    first, second = result_as_json(result, None)["templates"]
    assert (first["accuracy"], first["beats_chance"], second["beats_chance"]) == (0.3, False, True)
    assert first["pattern"] == "{text}\nIs it:"
    assert np.allclose(second["interval"], wilson_interval(60, 100))


def test_a_notebook_shows_them_with_the_result() -> None:
    result = tune(ToyScorer(), TASK, rows(16), budget=Budget(evaluations=4), prompt=PromptSpec(d=4), popsize=4)
    assert result._repr_html_().count("zero-shot, ") == 2


def test_losses_by_label_and_counts_add_up(scene: FitScene) -> None:
    plain, balanced = scene.run("plain"), scene.run("balanced", balanced=True)
    assert [each.score.correct for each in plain.templates] == [each.score.correct for each in balanced.templates]
