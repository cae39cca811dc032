"""The Python of ``docs/flower.md`` is run as printed, with the real model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import fedbpt
from fedbpt import models, tasks
from fedbpt.runs.store import RunStore
from tests.flower.toy_grid import Node, ToyGrid
from tests.support.printed import blocks

PAGE = Path(__file__).parents[2] / "docs" / "flower.md"
SHORTER = {"rounds=40": "rounds=1, iterations=1, popsize=4", "devices=4": "devices=2"}


@pytest.mark.timeout(900)
def test_the_app_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    models.pull("smollm2-135m")
    rows = [(f"Text {number}", number % 4) for number in range(8)]
    for name in ("a", "b"):
        tasks.write_rows(tmp_path / f"{name}.jsonl", rows, tasks.load("ag-news").labels)
    code = "".join(block.text for block in blocks(PAGE.read_text()) if block.language == "python")
    for printed, ours in SHORTER.items():
        assert printed in code
        code = code.replace(printed, ours)
    namespace: dict[str, Any] = {}
    exec(compile(code, "flower.md", "exec"), namespace)
    nodes = [Node(namespace["node_app"], name=name, data=f"{name}.jsonl") for name in ("a", "b")]
    namespace["main"](ToyGrid(*nodes), None)
    with RunStore(tmp_path / "runs.db") as store:
        assert store.get_run("news").status == "finished"
    assert isinstance(namespace["load_model"](), fedbpt.NativeScorer)
