"""The run store keeps closed rounds and refuses other files."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import numpy as np
import pytest

from fedbpt.coordinator.devices.enrolment import DeviceRegistry
from fedbpt.errors import StoreError
from fedbpt.protocol import codec
from fedbpt.protocol.rounds import DeviceInfo, PooledResult, RoundReport
from fedbpt.protocol.specs import Array
from fedbpt.runs.store import RunStore, Traffic
from tests.support.raises import raises


def report(device: str, round: int = 1) -> RoundReport:
    return RoundReport(
        run="r",
        round=round,
        device=device,
        plan_digest="0",
        result=PooledResult(losses=Array.of(np.arange(3.0))),
        n_texts=1,
        evaluations=3,
        tokens=9,
        seconds=0.5,
        peak_rss_bytes=1,
    )


@pytest.fixture
def store(tmp_path: Path):
    with RunStore(tmp_path / "new" / "runs.sqlite") as store:
        yield store


def create(store: RunStore, run: str = "r") -> None:
    store.create_run(
        run, task="t", model_fingerprint="f", model_name="m", identity="i", settings=b"s", devices=("a", "b")
    )


def commit(store: RunStore, round: int, *devices: str) -> None:
    store.commit_round(
        "r",
        round,
        work_digest=f"w{round}",
        state_digest=f"s{round}",
        reports=[report(device, round) for device in devices],
        metrics={"loss": 0.5 * round},
        traffic={"a": Traffic(round * 10, round * 20, 7)},
    )


def test_a_closed_round_survives_reopening(store: RunStore) -> None:
    create(store)
    commit(store, 1, "b", "a")
    commit(store, 2, "a")
    with RunStore(store.path) as again:
        first, second = again.rounds("r")
        assert first.reports == (report("a"), report("b"))
        assert (second.round, second.work_digest, second.state_digest) == (2, "w2", "s2")
        assert again.traffic("r") == {"a": Traffic(20, 40, 7), "b": Traffic(0, 0, 0)}
        assert again.get_run("r").n_rounds == 2


def test_it_uses_a_write_ahead_log_and_syncs(store: RunStore) -> None:
    assert store._query("PRAGMA journal_mode") == [("wal",)]
    assert store._query("PRAGMA synchronous") == [(2,)]


def test_a_round_is_all_or_nothing(store: RunStore) -> None:
    create(store)
    with pytest.raises(StoreError, match="UNIQUE"):
        commit(store, 1, "a", "b", "a")
    assert list(store.rounds("r")) == []
    assert store.history("r") == []
    assert store.traffic("r")["a"].bytes_up == 0


def test_a_round_closes_only_once(store: RunStore) -> None:
    create(store)
    commit(store, 1, "a")
    with pytest.raises(StoreError, match="UNIQUE"):
        commit(store, 1, "b")
    assert [r.device for r in next(store.rounds("r")).reports] == ["a"]


def test_a_run_begins_only_once(store: RunStore) -> None:
    create(store)
    with raises(StoreError, field="run"):
        create(store)


def test_late_reports_are_kept_but_never_replayed(store: RunStore) -> None:
    create(store)
    commit(store, 1, "a")
    store.record_late("r", report("b"))
    store.record_late("r", report("b"))
    store.record_late("r", report("a"))  # already counted: stays used, not late
    assert [r.device for r in next(store.rounds("r")).reports] == ["a"]
    (line,) = store.history("r")
    assert (line.reported, line.late) == (("a",), ("b",))


def test_the_history_names_lost_devices_and_metrics(store: RunStore) -> None:
    create(store)
    commit(store, 1, "a")
    store.record_losses("r", 1, {"b": "no answer"})
    store.record_metrics("r", 1, {"accuracy": 0.75})
    (line,) = store.history("r")
    assert line.lost == {"b": "no answer"}
    assert line.metrics == {"loss": 0.5, "accuracy": 0.75}


def test_runs_are_listed_marked_and_deleted(store: RunStore) -> None:
    create(store)
    create(store, "other")
    store.set_status("r", "finished", b"result")
    store.set_status("r", "finished")
    assert {run.run: (run.status, run.result) for run in store.list_runs()} == {
        "r": ("finished", b"result"),
        "other": ("running", None),
    }
    commit(store, 1, "a")
    store.delete_run("r")
    store.delete_run("r")
    assert store.find_run("r") is None
    assert store._query("SELECT count(*) FROM reports") == [(0,)]


def test_descriptions_of_devices_are_kept(store: RunStore) -> None:
    create(store)
    info = DeviceInfo(
        name="a",
        version="1",
        model_fingerprint="f",
        model_name="m",
        backend="cpu",
        n_train=1,
        n_dev=0,
        n_test=0,
        ram_bytes=1,
        rss_bytes=1,
        peak_rss_bytes=1,
    )
    store.record_devices("r", {"a": info})
    assert store.devices("r") == {"a": info, "b": None}


def test_an_unknown_run_is_named(store: RunStore) -> None:
    with raises(StoreError, field="run") as caught:
        store.get_run("x")
    assert "'x'" in str(caught.value)


def test_a_damaged_report_is_named(store: RunStore) -> None:
    create(store)
    commit(store, 1, "a")
    with store._transaction() as db:
        db.execute("UPDATE reports SET body = ?", (codec.encode(report("a"))[:-1],))
    with raises(StoreError) as caught:
        list(store.rounds("r"))
    assert "round 1 " in str(caught.value)


def test_another_kind_of_file_is_refused(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("hello " * 1000)
    with pytest.raises(StoreError, match=str(text)):
        RunStore(text)
    other = tmp_path / "other.sqlite"
    db = sqlite3.connect(other)
    db.execute("CREATE TABLE t (x)")
    db.close()
    with pytest.raises(StoreError, match="version 2"):
        RunStore(other)
    with DeviceRegistry(tmp_path / "devices.sqlite"):
        pass  # has version 1, as run databases once had
    with pytest.raises(StoreError, match="version 2"):
        RunStore(tmp_path / "devices.sqlite")


def as_of_version_1(path: Path) -> None:
    """Turn a database into one of the previous version."""
    db = sqlite3.connect(path)
    db.execute("DROP TABLE tasks")
    db.execute("ALTER TABLE devices DROP COLUMN address")
    db.execute("PRAGMA user_version = 1")
    db.close()


def test_a_database_of_version_1_is_upgraded(store: RunStore) -> None:
    create(store)
    commit(store, 1, "a")
    store.close()
    as_of_version_1(store.path)
    for _ in range(2):
        with RunStore(store.path) as again:
            assert again.get_run("r").definition is None
            assert [line.reported for line in again.history("r")] == [("a",)]
    with RunStore(store.path) as again:
        again.record_task("r", b"task")
        again.record_addresses("r", {"a": "http://pi5:8401", "unknown": "x"})
        assert again.addresses("r") == {"a": "http://pi5:8401", "b": ""}
        assert again.get_run("r").definition == b"task"
        again.delete_run("r")
        assert again._query("SELECT count(*) FROM tasks") == [(0,)]


def test_a_folder_that_cannot_be_made_is_a_store_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "runs.sqlite"
    with pytest.raises(StoreError, match=str(path)):
        RunStore(path)
