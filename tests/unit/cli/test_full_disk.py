"""A full disk: the run ends with a one-line error, stored rounds are intact, and the run can be resumed."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedbpt import models
from fedbpt.errors import StoreError
from fedbpt.models import records
from fedbpt.runs.store import RunStore
from tests.support.fake_device import FakeDevice
from tests.support.toy_scene import Scene, closed

ROUNDS = 12


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    scene = Scene(tmp_path / "runs.sqlite", *(FakeDevice(name) for name in "abc"))
    yield scene
    scene.store.close()


def test_a_run_stops_in_one_line_and_resumes_when_there_is_space(scene: Scene) -> None:
    whole = scene.run("whole", rounds=ROUNDS)

    def fill_the_disk() -> None:
        # SQLite's own limit fails as a full disk does: SQLITE_FULL
        (pages,) = scene.store._db.execute("PRAGMA page_count").fetchone()
        scene.store._db.execute(f"PRAGMA max_page_count = {pages}")

    scene.when(closed(3), fill_the_disk)
    with pytest.raises(StoreError, match="full") as caught:
        scene.run(rounds=ROUNDS)
    assert "\n" not in str(caught.value)
    scene.store.close()

    scene.store = RunStore(scene.store.path)
    kept = scene.store.get_run("r").n_rounds
    assert 4 <= kept < ROUNDS
    result = scene.run(rounds=ROUNDS)
    assert (result.digest, result.evaluations, result.rounds) == (whole.digest, whole.evaluations, whole.rounds)


def test_a_fingerprint_that_cannot_be_stored_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("FEDBPT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "model.gguf").write_bytes(b"weights")

    def full(_temporary: Path, _target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(records, "publish", full)
    with caplog.at_level(logging.WARNING):
        first = models.fingerprint(tmp_path / "model.gguf")
    [record] = caplog.records
    assert "No space left" in record.getMessage()
    assert models.fingerprint(tmp_path / "model.gguf") == first
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
