"""The parts of ``fedbpt demo`` that need no model; the whole is in `tests.integration`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fedbpt import Budget, PromptSpec, cli, models, tune
from fedbpt.cli import demo
from fedbpt.tasks import Row, load, read_task_rows, split_rows
from tests.support.toy_scorer import ToyScorer
from tests.support.toy_task import TASK, rows

NEWS = load("bbc-news")
ASKED = {"model": "sha256:1", "devices": 3, "rows": "all"}


def test_a_demo_goes_on_only_where_it_was_stopped(tmp_path: Path) -> None:
    record = demo._Record(tmp_path / "demo.json", ASKED)
    assert not record.tells_of_interruption()
    record.write(ended=False)
    assert record.tells_of_interruption()
    record.write(ended=True)
    assert not record.tells_of_interruption()


@pytest.mark.parametrize("change", [{"model": "sha256:2"}, {"devices": 2}, {"rows": "quick"}])
def test_a_stopped_demo_of_something_else_is_no_use(tmp_path: Path, change: dict[str, object]) -> None:
    path = tmp_path / "demo.json"
    demo._Record(path, ASKED).write(ended=False)
    assert not demo._Record(path, {**ASKED, **change}).tells_of_interruption()


def news(n: int) -> list[Row]:
    return [(f"article number {i}", i % len(NEWS.labels)) for i in range(n)]


@pytest.mark.parametrize(
    ("sizes", "devices"), [(demo.ROWS, 1), (demo.ROWS, 3), (demo.ROWS, 16), (demo.QUICK_ROWS, 3), (demo.QUICK_ROWS, 15)]
)
def test_every_device_gets_rows_of_each_split_and_all_are_dealt(
    tmp_path: Path, devices: int, sizes: dict[str, int]
) -> None:
    files = demo._write_data(tmp_path, NEWS, split_rows(news(1200), sizes, 0), devices, 0)
    assert len(files) == devices
    for split, wanted in sizes.items():
        dealt = [row for share in files for row in read_task_rows(NEWS, share[split])]
        assert len(dealt) == len(set(dealt)) == wanted


def test_the_training_rows_are_skewed_and_the_same_each_time(tmp_path: Path) -> None:
    splits = split_rows(news(1200), demo.ROWS, 7)
    first, again, other = (
        [path["train"].read_bytes() for path in demo._write_data(tmp_path / str(i), NEWS, splits, 3, seed)]
        for i, seed in enumerate((7, 7, 8))
    )
    assert first == again != other
    counts = [Counter(json.loads(line)["label"] for line in part.splitlines()) for part in first]
    shares = np.array([[count[label] / count.total() for label in NEWS.labels] for count in counts])
    assert shares.std(axis=0).max() > 0.1


def test_examples_are_what_only_the_tuned_model_gets_right() -> None:
    scorer = ToyScorer()
    prompt = tune(scorer, TASK, rows(24), budget=Budget(evaluations=240), prompt=PromptSpec(d=6, alpha=2.0)).prompt
    held_out = rows(100, first=200)
    found = list(demo._examples(scorer, TASK, held_out, prompt))
    assert 0 < len(found) <= 2
    for example in found:
        assert (example.text, TASK.labels.index(example.label)) in held_out
        assert example.original != example.label


def test_the_table_is_printed_before_examples_are_looked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = tune(ToyScorer(), TASK, rows(24), budget=Budget(evaluations=16), prompt=PromptSpec(d=6), show=False)
    printed: list[str] = []

    def look() -> Iterator[demo.Example]:
        printed.append(capsys.readouterr().out)
        yield demo.Example("a text", "positive", "negative")

    demo._report(result.run, tmp_path / "p", look(), tmp_path, as_json=False)
    assert "16 evaluations" in printed[0]
    after = capsys.readouterr().out
    assert "a text" in after
    assert "16 evaluations" not in after


def test_a_device_that_cannot_start_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "m.gguf"
    model.write_text("a web page")
    monkeypatch.setattr(models, "locate", lambda _name: model)
    monkeypatch.setattr(demo.tasks, "bbc_news", lambda **_: news(1200))
    with pytest.raises(SystemExit):
        cli.main(["demo", "--model", str(model), "--out", str(tmp_path), "--quiet", "--devices", "1"])
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("fedbpt: device-0 did not start: ")
    assert "m.gguf" in line
    assert line.count("fedbpt") == 1


@pytest.mark.parametrize(
    ("address", "said"), [("0.0.0.0:8500", "on this machine alone"), ("nowhere:99999", "is no HOST:PORT")]
)
def test_its_dashboard_is_for_this_machine(address: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["demo", "--dashboard", address])
    assert ended.value.code != 0
    assert said in capsys.readouterr().err
