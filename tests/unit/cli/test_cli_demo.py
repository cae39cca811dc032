"""The parts of ``fedbpt demo`` that need no model; `tests.integration` runs it completely."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from fedbpt import Budget, PromptSpec, cli, models, tune
from fedbpt.cli import demo
from fedbpt.cli.observe import Observers
from fedbpt.errors import FedbptError
from fedbpt.tasks import Row, load, read_task_rows, split_rows
from tests.support.toy_scorer import ToyScorer
from tests.support.toy_task import TASK, rows

NEWS = load("bbc-news")
PARAMETERS = {"model": "sha256:1", "devices": 3, "rows": "all"}


def test_a_demo_is_resumed_only_if_it_was_interrupted(tmp_path: Path) -> None:
    record = demo._Record(tmp_path / "demo.json", PARAMETERS)
    assert not record.is_interrupted()
    record.write(ended=False)
    assert record.is_interrupted()
    record.write(ended=True)
    assert not record.is_interrupted()


@pytest.mark.parametrize("change", [{"model": "sha256:2"}, {"devices": 2}, {"rows": "quick"}])
def test_a_stopped_demo_with_other_parameters_is_not_resumed(tmp_path: Path, change: dict[str, object]) -> None:
    path = tmp_path / "demo.json"
    demo._Record(path, PARAMETERS).write(ended=False)
    assert not demo._Record(path, {**PARAMETERS, **change}).is_interrupted()


def news(n: int) -> list[Row]:
    return [(f"article number {i}", i % len(NEWS.labels)) for i in range(n)]


@pytest.mark.parametrize(
    ("sizes", "devices"), [(demo.ROWS, 1), (demo.ROWS, 3), (demo.ROWS, 16), (demo.QUICK_ROWS, 3), (demo.QUICK_ROWS, 15)]
)
def test_every_device_gets_rows_of_each_split_and_all_rows_are_used(
    tmp_path: Path, devices: int, sizes: dict[str, int]
) -> None:
    files = demo._write_data(tmp_path, NEWS, split_rows(news(1200), sizes, 0), devices, 0)
    assert len(files) == devices
    for split, wanted in sizes.items():
        dealt = [row for share in files for row in read_task_rows(NEWS, share[split])]
        assert len(dealt) == len(set(dealt)) == wanted


def test_the_training_rows_are_skewed_and_reproducible(tmp_path: Path) -> None:
    splits = split_rows(news(1200), demo.ROWS, 7)
    first, again, other = (
        [path["train"].read_bytes() for path in demo._write_data(tmp_path / str(i), NEWS, splits, 3, seed)]
        for i, seed in enumerate((7, 7, 8))
    )
    assert first == again != other
    counts = [Counter(json.loads(line)["label"] for line in part.splitlines()) for part in first]
    shares = np.array([[count[label] / count.total() for label in NEWS.labels] for count in counts])
    assert shares.std(axis=0).max() > 0.1


def test_the_table_is_printed_before_examples_are_computed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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


def test_an_invalid_address_is_reported_before_anything_is_fetched(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["demo", "--dashboard", "nowhere:99999"])
    assert ended.value.code != 0
    assert "--dashboard nowhere:99999" in capsys.readouterr().err


@pytest.mark.parametrize("more", [[], ["--json"], ["--quiet"]])
def test_beyond_loopback_it_has_an_operators_and_a_read_only_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], more: list[str]
) -> None:
    made: list[dict[str, object]] = []

    class Server:
        """A stand-in for the server; `tests.browser` uses the real one."""

        def __init__(self, *_: object, **options: object) -> None:
            made.append(options)
            self.link, self.watch_link = (
                f"http://127.0.0.1:8500/?token={options['token']}",
                "http://pi5:8500/?token=watch",
            )

        def __enter__(self) -> Callable[[object], str]:
            return lambda _line: ""

        def __exit__(self, *_: object) -> None:
            raise FedbptError("that is enough")

    monkeypatch.setattr("fedbpt.dashboard.server.DashboardServer", Server)
    monkeypatch.setattr(models, "locate", lambda _name: tmp_path / "m.gguf")
    monkeypatch.setattr(models, "fingerprint", lambda _path: "sha256:1")
    monkeypatch.setattr(demo.tasks, "bbc_news", lambda **_: news(1200))
    with pytest.raises(SystemExit):
        cli.main(["demo", "--model", "m.gguf", "--out", str(tmp_path), "--dashboard", "0.0.0.0:8500", *more])
    said = capfd.readouterr().err
    [options] = made
    assert options["allow_insecure"] is True
    assert len(str(options["token"])) >= 32
    assert "unencrypted" in said
    assert f"dashboard at http://127.0.0.1:8500/?token={options['token']}\n" in said
    assert ": http://pi5:8500/?token=watch\n" in said
    assert "█" not in said  # that is for a terminal


def test_on_loopback_it_needs_no_token() -> None:
    assert Observers(dashboard="127.0.0.1:8500").dashboard_secret is None
