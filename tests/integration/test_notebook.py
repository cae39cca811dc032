"""The quickstart notebook runs in a real kernel: the smallest model, BBC News, a small budget."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

pytestmark = pytest.mark.slow

PATH = Path(__file__).parents[2] / "docs" / "notebooks" / "quickstart.ipynb"


def read() -> Any:
    return nbformat.read(PATH, as_version=4)


def test_it_is_committed_without_outputs() -> None:
    cells = [cell for cell in read().cells if cell.cell_type == "code"]
    assert cells
    assert [cell.outputs for cell in cells] == [[]] * len(cells)
    assert {cell.execution_count for cell in cells} == {None}


@pytest.mark.timeout(1800)  # on a busy machine; on an idle one less than 3 minutes of two cores
def test_it_runs_from_top_to_bottom_and_tuning_helps() -> None:
    found = read()
    NotebookClient(
        found, timeout=1500, kernel_name="python3", resources={"metadata": {"path": str(PATH.parent)}}
    ).execute()
    outputs = [output for cell in found.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    html = "\n".join(output.data.get("text/html", "") for output in outputs if "data" in output)
    assert "bbc-news" in html
    assert re.search(r"<progress .*value=\"1.0000\"", html)  # the live panel at its end
    assert [output for output in outputs if "image/png" in output.get("data", {})]  # result.plot()
    scores = [output.data["text/plain"] for output in outputs if "EvaluationResult" in str(output.get("data"))]
    zero_shot, tuned = (float(re.search(r"accuracy=([0-9.]+)", text)[1]) for text in scores)  # type: ignore[index]
    assert zero_shot < tuned <= 1
    printed = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    assert "smollm2-135m" in printed
    assert "Apache-2.0" in printed
    assert "adapter" in outputs[-1].data["text/plain"]
