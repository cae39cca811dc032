"""Atomic writes of files."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import pytest

from fedbpt.machine.files import write_whole


def test_a_file_and_its_folder_are_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a power failure could undo the rename after the file was reported as written."""
    synced: list[bool] = []
    sync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(stat.S_ISDIR(os.fstat(file).st_mode)) or sync(file))
    write_whole({tmp_path / "a": b"x"})
    assert synced == [False, True]


def test_a_folder_that_may_not_be_listed_is_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = os.open

    def refusing(path: Any, flags: int, *mode: int) -> int:
        if Path(path) == tmp_path:
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, flags, *mode)

    monkeypatch.setattr(os, "open", refusing)
    write_whole({tmp_path / "a": b"x"})
    assert (tmp_path / "a").read_bytes() == b"x"
