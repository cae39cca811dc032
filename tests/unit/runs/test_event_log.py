"""The journal numbers every event and warning as a line of JSON; a full disk loses lines, not the run."""

from __future__ import annotations

import logging
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest

from fedbpt.errors import ConfigError, DataError
from fedbpt.protocol import codec
from fedbpt.runs.event_log import Entry, Journal, Line, LogFile, Logged
from fedbpt.runs.events import DeviceLost, LateReport
from tests.support.fake_device import FakeDevice
from tests.support.raises import raises
from tests.support.toy_scene import Scene

LATE = LateReport(device="a", round=3)


def entries(path: Path) -> list[Entry]:
    return [codec.decode_json(line, Entry) for line in path.read_bytes().splitlines()]


def test_every_event_of_a_run_is_a_line_that_can_be_read_again(tmp_path: Path) -> None:
    scene = Scene(tmp_path / "runs.db", FakeDevice("a"), FakeDevice("b"))
    with LogFile(tmp_path / "logs" / "run.jsonl") as file:
        scene.on_event = Journal(file)
        scene.run(evaluate_every=2)
    scene.store.close()
    found = entries(tmp_path / "logs" / "run.jsonl")
    assert [entry.event for entry in found] == scene.events
    assert [entry.seq for entry in found] == list(range(1, len(found) + 1))
    assert len({entry.sitting for entry in found}) == 1
    assert {datetime.fromisoformat(entry.time).utcoffset() for entry in found} == {timedelta(0)}
    first = msgspec.json.decode((tmp_path / "logs" / "run.jsonl").read_bytes().splitlines()[0])
    assert (first["event"]["type"], first["event"]["run"]) == ("RunStarted", "r")


def test_a_second_session_appends_to_the_file_under_another_id(tmp_path: Path) -> None:
    for _ in range(2):
        with LogFile(tmp_path / "log") as file:
            Journal(file)(LATE)
    first, second = entries(tmp_path / "log")
    assert (first.seq, second.seq) == (1, 1)
    assert first.sitting != second.sitting


def test_warnings_of_the_library_are_entries_and_others_are_not(caplog: pytest.LogCaptureFixture) -> None:
    kept: list[Any] = []
    journal = Journal(lambda line: kept.append(line.entry.event) or "")
    with journal.hearing_warnings():
        logging.getLogger("fedbpt.coordinator.devices.fleet").warning("device %s", "a")
        logging.getLogger("fedbpt.coordinator.devices.fleet").info("nothing")
        logging.getLogger("elsewhere").warning("no")
        try:
            raise ValueError("cause")
        except ValueError:
            logging.getLogger("fedbpt.runs.store").exception("it broke")
    logging.getLogger("fedbpt.coordinator.devices.fleet").warning("after")
    plain, broken = kept
    assert plain == Logged(level="WARNING", logger="fedbpt.coordinator.devices.fleet", message="device a")
    assert (broken.level, broken.message) == ("ERROR", "it broke")
    assert broken.exception.endswith("ValueError")
    assert "test_event_log.py" in broken.exception
    assert [record.getMessage() for record in caplog.records] == ["device a", "no", "it broke", "after"]


def test_no_entry_has_what_errors_quote_of_rows() -> None:
    kept: list[Any] = []
    journal = Journal(lambda line: kept.append(line.entry.event) or "")
    log, row = logging.getLogger("fedbpt.device.agent"), "the cat sat"
    with journal.hearing_warnings():
        log.warning("round %d failed: %s", 1, DataError(f"row 3: {row!r}", public="row 3"))
        log.warning("round %d failed: %s", 2, KeyError(row))
        try:
            try:
                raise TypeError(row)
            except TypeError as error:
                raise DataError(f"row 3: {row!r}", public="row 3") from error
        except DataError:
            log.exception("work failed")
    assert [entry.message for entry in kept] == ["round 1 failed: row 3", kept[1].message, "work failed"]
    assert not [entry for entry in kept if "cat" in entry.message + entry.exception]
    assert {"DataError: row 3", "TypeError"} <= set(kept[2].exception.splitlines())


def test_warnings_still_reach_stderr_without_logging_handlers(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    with Journal().hearing_warnings():
        logging.getLogger("fedbpt.coordinator.devices.fleet").warning("told once")
    assert capfd.readouterr().err == "told once\n"


class FullDisk:
    """A file that accepts ``room`` bytes."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.content = b""

    def write(self, content: bytes) -> int:
        taken = content[: self.room]
        if not taken:
            raise OSError(28, "No space left on device")
        self.room -= len(taken)
        self.content += taken
        return len(taken)

    def close(self) -> None:
        pass


def test_a_full_disk_is_one_warning_and_lines_continue_when_there_is_space(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[Line] = []
    file = LogFile(tmp_path / "log")
    file._file.close()
    disk = FullDisk(150)
    file._file = disk  # type: ignore[assignment]
    journal = Journal(file, lambda line: told.append(line) or "")
    with journal.hearing_warnings():
        for _ in range(4):
            journal(LATE)
        assert [line.entry.seq for line in told] == [1, 2, 3, 4, 5]  # the warning is one of them
        disk.room = 10_000
        journal(DeviceLost(device="b", round=4, reason="gone"))
    [record] = caplog.records
    assert "No space left on device" in record.getMessage()
    first, cut, last = disk.content.splitlines()
    assert codec.decode_json(first, Entry).seq == 1
    assert told[1].json.startswith(cut)
    assert codec.decode_json(last, Entry).event == DeviceLost(device="b", round=4, reason="gone")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_run_whose_log_cannot_be_written_ends_as_without_a_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    scene = Scene(tmp_path / "runs.db", FakeDevice("a"))
    digest = scene.run("without").digest
    with LogFile(Path("/dev/full")) as file:
        scene.on_event = Journal(file)
        assert scene.run("with").digest == digest
    scene.store.close()
    assert len(caplog.records) == 1


def test_a_log_that_cannot_be_opened_is_refused_at_once(tmp_path: Path) -> None:
    with raises(ConfigError, field="log"):
        LogFile(tmp_path)
