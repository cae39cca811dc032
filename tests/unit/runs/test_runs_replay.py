"""``fedbpt runs replay`` rebuilds and checks a stored run; ``scalars`` writes its metrics for TensorBoard."""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tensorboardX.proto.event_pb2 import Event as BoardEvent

from fedbpt import cli
from fedbpt.coordinator.clients.in_process import InProcessClient
from fedbpt.coordinator.federation import Federation
from fedbpt.coordinator.ledger import RunLedger
from fedbpt.device.device import Device
from fedbpt.errors import ConfigError
from fedbpt.protocol import codec
from fedbpt.protocol.rounds import PooledResult, RoundReport
from fedbpt.protocol.specs import Array, ObjectiveSpec, PromptSpec
from fedbpt.runs.as_json import task_of_run
from fedbpt.runs.events import EventCallback, RoundClosed
from fedbpt.runs.result import RunResult
from fedbpt.runs.settings import RunSettings
from fedbpt.runs.store import RunStore
from tests.support.toy_scene import StopRunError, stop
from tests.support.toy_scorer import ToyScorer
from tests.support.toy_task import TASK, TASK_FILE, rows

pytestmark = pytest.mark.slow

SETTINGS = RunSettings(
    rounds=3, popsize=6, prompt=PromptSpec(d=4), evaluate_every=1, fit_rows=8,
    objective=ObjectiveSpec(readout_words=4), ensemble=1,
)  # fmt: skip
DB = "runs/runs.db"
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mood.toml").write_text(TASK_FILE)

    def call(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            cli.main(["runs", *arguments])
        return (int(caught.value.code or 0), *capfd.readouterr())

    return call


def stop_after_search(rounds: int) -> EventCallback:
    """End a run before its readout."""
    return lambda event: stop() if isinstance(event, RoundClosed) and event.searched == rounds else None


def tuned(on_event: EventCallback = lambda _event: None, **changes: Any) -> RunResult:
    settings = msgspec.structs.replace(SETTINGS, **changes)
    clients = [
        InProcessClient(Device(name, ToyScorer(), rows(8, i), rows(4, i), [], task=TASK)) for i, name in enumerate("ab")
    ]
    with RunStore(DB) as store:
        return Federation(clients, TASK, settings, settings.aggregator(), store, "toy", on_event).run()


def change(sql: str, *values: object) -> None:
    with RunStore(DB) as store, store._transaction() as db:
        assert db.execute(sql, values).rowcount == 1


@pytest.mark.parametrize("method", ["pooled", "fedbpt", "fedavg"])
def test_a_run_replays_to_its_digest(run: Run, method: str) -> None:
    result = tuned(method=method, iterations=2)
    with RunStore(DB) as store:
        n_rounds = store.get_run("toy").n_rounds
    assert n_rounds > 4  # those that calibrate and fit the readout are among them
    answer = run("replay", "toy", "--json")
    assert (answer[0], answer[2]) == (0, "")
    assert json.loads(answer[1]) == {"run": "toy", "n_rounds": n_rounds, "digest": result.digest}
    assert f"{n_rounds} rounds" in run("replay", "toy", "-t", "mood.toml")[1]
    assert run("replay", "toy", "-q")[1] == f"{result.digest}\n"


def test_a_run_whose_budget_changed_on_the_way_replays(run: Run) -> None:
    with pytest.raises(StopRunError):
        tuned(stop_after_search(2))
    result = tuned(rounds=4, patience=1)  # the best mean counts from now on
    answer = run("replay", "toy", "-t", "mood.toml", "-q")
    assert answer == (0, f"{result.digest}\n", "")


def altered_report(round: int) -> bytes:
    """Device a's of ``round``, with another loss."""
    with RunStore(DB) as store:
        stored = next(found for found in store.rounds("toy") if found.round == round)
    report = stored.reports[0]
    assert isinstance(report.result, PooledResult)
    losses = report.result.losses.numpy()
    losses[0] += 1000.0
    return codec.encode(msgspec.structs.replace(report, result=PooledResult(losses=Array.of(losses))))


def search_rounds() -> list[int]:
    with RunStore(DB) as store:
        return [found.round for found in store.rounds("toy") if isinstance(found.reports[0].result, PooledResult)]


def assert_names(answer: tuple[int, str, str], round: int) -> None:
    code, out, err = answer
    assert (code, out) == (1, "")
    assert err.startswith(f"fedbpt: round {round} of run 'toy'")
    assert len(err.splitlines()) == 1


def test_the_first_changed_round_is_named(run: Run) -> None:
    tuned()
    _, second, third = search_rounds()
    replay = ("replay", "toy", "-t", "mood.toml")
    change("UPDATE rounds SET state_digest = 'x' WHERE round = ?", third)
    assert_names(run(*replay), third)
    at = "WHERE round = ? AND device = 'a'"
    change(f"UPDATE reports SET body = ? {at}", altered_report(second), second)
    assert_names(run(*replay), second)
    change(f"UPDATE reports SET body = x'00' {at}", second)
    assert_names(run(*replay), second)


def test_missing_reports_and_those_of_another_round_are_named(run: Run) -> None:
    tuned()
    first, second, _ = search_rounds()
    with RunStore(DB) as store:
        selection = codec.encode(next(store.rounds("toy")).reports[0])
        report = codec.decode(selection, RoundReport)
    assert report.round == 0
    change("UPDATE reports SET body = ? WHERE round = ? AND device = 'a'", selection, second)
    assert_names(run("replay", "toy", "-t", "mood.toml"), second)
    with RunStore(DB) as store, store._transaction() as db:
        db.execute("DELETE FROM reports WHERE round = ?", (first,))
    assert_names(run("replay", "toy", "-t", "mood.toml"), first)


def test_a_changed_result_is_reported(run: Run) -> None:
    result = tuned()
    change("UPDATE runs SET result = ?", codec.encode(msgspec.structs.replace(result, digest="0" * 64)))
    code, _, err = run("replay", "toy", "-t", "mood.toml")
    assert (code, len(err.splitlines())) == (1, 1)
    assert result.digest in err


def test_replaying_changes_nothing(run: Run) -> None:
    tuned()

    def content() -> list[str]:
        with RunStore(DB) as store:
            return list(store._db.iterdump())

    before = content()
    assert run("replay", "toy", "-t", "mood.toml")[0] == 0
    assert content() == before


# --- scalars ---------------------------------------------------------------------------------------------------------


def scalars(folder: Path) -> dict[tuple[str, int], float]:
    """What an event file holds: records of length, checksum, event, checksum."""
    [path] = folder.iterdir()
    content, found = path.read_bytes(), {}
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        event = BoardEvent.FromString(content[12 : 12 + length])
        found.update({(value.tag, event.step): value.simple_value for value in event.summary.value})
        content = content[16 + length :]
    return found


def test_scalars_are_every_metric_of_every_round(run: Run, tmp_path: Path) -> None:
    tuned()
    code, out, err = run("scalars", "toy", "--out", "boards", "--json")
    assert (code, err, json.loads(out)) == (0, "", {"run": "toy", "folder": "boards/toy"})
    with RunStore(DB) as store:
        kept = {(name, line.round): value for line in store.history("toy") for name, value in line.metrics.items()}
    assert {"loss", "seconds", "tokens", "dev_loss", "dev_accuracy"} <= {name for name, _ in kept}
    assert scalars(tmp_path / "boards" / "toy") == pytest.approx(kept, rel=1e-6)
    code, out, err = run("scalars", "toy", "--out", "boards")
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert "--out" in err
    assert run("scalars", "toy", "--out", "others")[1] == "others/toy\n"


def test_without_the_extra_the_error_names_it(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    tuned(rounds=1)
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    code, _, err = run("scalars", "toy", "--out", "boards")
    assert (code, len(err.splitlines())) == (2, 1)
    assert "pip install 'fedbpt[tensorboard]'" in err


@pytest.mark.parametrize("changes", [{"name": "x"}, {"labels": TASK.labels[::-1]}, {"templates": TASK.templates[:1]}])
def test_a_run_of_another_task_is_not_resumed(run: Run, changes: dict[str, Any]) -> None:  # noqa: ARG001 - the folder
    tuned(rounds=1)
    settings = msgspec.structs.replace(SETTINGS, rounds=1)
    other = msgspec.structs.replace(TASK, **changes)
    with RunStore(DB) as store:
        assert RunLedger(store, "toy", TASK, settings, settings.aggregator()).finished() is not None
        with pytest.raises(ConfigError, match="another task"):
            RunLedger(store, "toy", other, settings, settings.aggregator()).finished()


def test_the_store_keeps_the_task_of_the_latest_session(run: Run) -> None:  # noqa: ARG001 - the folder
    with pytest.raises(StopRunError):
        tuned(stop_after_search(2))
    change("DELETE FROM tasks")  # as a version that only stored the name
    tuned()
    with RunStore(DB) as store:
        assert task_of_run(store.get_run("toy")) == TASK
