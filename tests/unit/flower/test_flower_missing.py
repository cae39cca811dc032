"""Without Flower, only `fedbpt.flower` fails, with an error that names the extra."""

from __future__ import annotations

import subprocess
import sys

import pytest

from fedbpt.errors import MissingExtraError


def test_without_flower_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flwr", None)
    for name in [name for name in sys.modules if name.startswith("fedbpt.flower")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(MissingExtraError, match=r"fedbpt\[flower\]"):
        import fedbpt.flower  # noqa: F401


def test_nothing_else_imports_flower() -> None:
    modules = "fedbpt.cli, fedbpt.coordinator.federation, fedbpt.coordinator.clients"
    code = f"import sys, {modules}; print([m for m in sys.modules if 'flwr' in m])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
