"""The Python of every page is run as printed, with the real model; the blocks of a page share one namespace.

`test_tutorials` runs the tutorials' Python, and `tests.flower` that of ``flower.md``, which needs Flower.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest

import fedbpt
from fedbpt import ObjectiveSpec, PromptSpec, models, tasks
from fedbpt.objective.objective import Objective
from fedbpt.serving import ModelServer, served_models
from tests.support.printed import blocks

pytestmark = pytest.mark.slow

ROOT: Final = Path(__file__).parents[2]

ELSEWHERE: Final = {"docs/tutorials/one-machine.md", "docs/flower.md"}

SHORTER: Final = {
    "README.md": {"seconds=60": "evaluations=20", '"train": 200, "test": 400': '"train": 8, "test": 8'},
    "docs/bench.md": {'fedbpt.load_model("smollm2-135m")': 'fedbpt.load_model("smollm2-135m"), quick=True'},
}
"""Replacements by page, where the printed code would take a minute or more."""


def code_of(page: Path) -> list[str]:
    return [block.text for block in blocks(page.read_text()) if block.language == "python" and not block.not_run]


PAGES: Final = {
    name: code
    for path in [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/**/*.md"))]
    if (code := code_of(path)) and (name := str(path.relative_to(ROOT))) not in ELSEWHERE
}


@pytest.fixture(scope="module")
def scorer() -> fedbpt.NativeScorer:
    models.pull("smollm2-135m")
    return fedbpt.load_model("smollm2-135m")


@pytest.fixture
def folder(scorer: fedbpt.NativeScorer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with the prompt file that the pages use."""
    monkeypatch.chdir(tmp_path)
    task = tasks.load("ag-news")
    spec = ObjectiveSpec(readout_words=0)
    made = Objective(scorer, task.templates[0], task.labels, [("Stocks rose", 2)], spec, PromptSpec(d=20))
    made.as_prompt(np.zeros(20), task).save("prompt.safetensors")
    return tmp_path


@pytest.mark.timeout(900)  # on a busy machine; on an idle one a page takes some seconds
@pytest.mark.parametrize("name", [*PAGES])
def test_the_python_of_a_page_runs(name: str, folder: Path, scorer: fedbpt.NativeScorer) -> None:
    served = served_models(scorer, [fedbpt.Prompt.load(folder / "prompt.safetensors")])
    with ModelServer(served, port=0) as server:
        replacements = {"http://127.0.0.1:8411": server.url, **SHORTER.get(name, {})}
        namespace: dict[str, Any] = {}
        for code in PAGES[name]:
            for printed, replacement in replacements.items():
                code = code.replace(printed, replacement)
            exec(compile(code, name, "exec"), namespace)


def test_every_replacement_is_used() -> None:
    for name, replacements in SHORTER.items():
        assert [printed for printed in replacements if printed not in "".join(PAGES[name])] == []
