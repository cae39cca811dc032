"""Notebooks: the panel of a run, and tables of results. `tests.integration` uses a real kernel."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fedbpt import Budget, PromptSpec, tune
from fedbpt.display import notebook
from fedbpt.display.console import RunDisplay
from fedbpt.display.notebook import NotebookDisplay, in_notebook, live_display
from fedbpt.html_tables import html_table
from fedbpt.results import EvaluationResult
from fedbpt.runs.events import DeviceLost
from tests.support.toy_scorer import ToyScorer
from tests.support.toy_task import TASK, rows
from tests.unit.display.test_display import closed, started
from tests.unit.prompts.test_prompt import READOUT, make


@pytest.fixture
def panels(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The HTML sent to a notebook's front end, in order."""
    shown: list[str] = []

    def show(panel: Any, display_id: bool = False) -> Any:
        assert display_id
        shown.append(panel._repr_html_())
        return SimpleNamespace(update=lambda panel: shown.append(panel._repr_html_()))

    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "IPython.display", SimpleNamespace(display=show))
    return shown


def test_scripts_and_ipython_in_a_terminal_are_not_notebooks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "IPython", raising=False)
    assert not in_notebook()
    for shell, expected in ((None, False), (SimpleNamespace(config={}), False), (kernel(), True)):
        monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda shell=shell: shell))
        assert in_notebook() == expected


def kernel() -> Any:
    return SimpleNamespace(config={"IPKernelApp": {}})


@pytest.mark.parametrize(
    ("inside", "shown", "panel", "visible"),
    [
        (True, None, True, True),
        (True, True, True, True),
        (True, False, False, False),
        (False, None, False, True),
        (False, True, False, True),
        (False, False, False, False),
    ],
)
def test_notebooks_have_a_panel_and_terminals_have_lines(
    monkeypatch: pytest.MonkeyPatch, inside: bool, shown: bool | None, panel: bool, visible: bool
) -> None:
    monkeypatch.setattr(notebook, "in_notebook", lambda: inside)
    made = live_display(shown)
    assert type(made) is (NotebookDisplay if panel else RunDisplay)
    assert panel or made._shown == visible


def test_the_panel_is_updated_in_place(panels: list[str]) -> None:
    with NotebookDisplay() as panel:
        panel(started(rounds=10))
        panel(closed(4))
        assert 'value="0.4000"' in panels[-1]
        assert "round 4" in panels[-1]
        assert "loss 0.510" in panels[-1]
        panel(DeviceLost(device="c", round=5, reason="c: <no> answer"))
        assert "device c is lost: &lt;no&gt; answer" in panels[-1]
    assert "done" in panels[-1]
    assert "is lost" in panels[-1]
    assert "done  100 %" in repr(panel)


def test_a_run_that_fails_is_not_shown_as_done(panels: list[str]) -> None:
    def broken() -> None:
        with NotebookDisplay() as panel:
            panel(started())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        broken()
    assert "done" not in panels[-1]


def test_tune_shows_itself_in_a_notebook(panels: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notebook, "in_notebook", lambda: True)
    tune(ToyScorer(), TASK, rows(12), budget=Budget(evaluations=32), prompt=PromptSpec(d=4))
    assert "connecting" in panels[0]
    assert len(panels) > 4
    n = len(panels)
    tune(ToyScorer(), TASK, rows(12), budget=Budget(evaluations=32), prompt=PromptSpec(d=4), show=False)
    assert len(panels) == n


def test_tables_escape_markup() -> None:
    found = html_table("<b>", [("a & b", "<script>"), ("c", "d", "e")])
    assert "<b>" not in found
    assert "<script>" not in found
    assert "a &amp; b" in found
    assert found.count("<tr>") == 2
    assert found.count("<td") == 3


def test_results_are_tables_in_a_notebook() -> None:
    result = tune(
        ToyScorer(), TASK, rows(12), rows(6, first=50), budget=Budget(evaluations=32), prompt=PromptSpec(d=4),
        evaluate_every=1,
    )  # fmt: skip
    shown = result._repr_html_()
    assert f"{result.run.tokens:,}" in shown
    assert "development accuracy" in shown
    assert "Prompt for toy-mood" in shown
    assert "bad → bad" in make(**READOUT)._repr_html_()
    assert "3 words" in make(**READOUT)._repr_html_()


def test_an_evaluation_is_a_table_of_its_figure() -> None:
    scored = EvaluationResult(40, 31, 0.5, np.zeros(40, np.intp))._repr_html_()
    assert "0.7750" in scored
    assert "95 % interval" in scored
    written = EvaluationResult(40, 0, 0.5, np.full(40, -1))._repr_html_()
    assert "1.649" in written
    assert "accuracy" not in written
