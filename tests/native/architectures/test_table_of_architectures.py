"""docs/models.md against the tests and the engine: architectures compared, tolerances, and architectures refused."""

from __future__ import annotations

import re
from pathlib import Path

import gguf
import pytest
import tiny_gguf
from table import ARCHITECTURES

import fedbpt
from fedbpt.errors import ModelError, UnsupportedModelError

ROOT = Path(__file__).parents[3]
SECTION = (ROOT / "docs" / "models.md").read_text().split("\n## Architectures\n")[1]
COMPARED, REFUSED = SECTION.split("These are refused")


def rows(text: str) -> list[list[str]]:
    """Cells of the table rows that name an architecture in the first cell."""
    return [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| `")]


def names(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


REFUSED_NAMES = [name for row in rows(REFUSED) for name in names(row[0])]


def test_every_architecture_with_a_test_is_in_the_table_and_no_other() -> None:
    documented = [name for row in rows(COMPARED) for name in names(row[0])]
    assert len(documented) == len(set(documented))
    assert set(documented) == {architecture.gguf for architecture in ARCHITECTURES.values()}
    assert len(documented) >= 25


def test_the_table_has_the_tests_tolerances_and_the_scale_of_rows() -> None:
    for row in rows(COMPARED):
        tested = [architecture for architecture in ARCHITECTURES.values() if [architecture.gguf] == names(row[0])]
        assert float(row[2]) == max(architecture.tolerance for architecture in tested)
        assert {architecture.row_scale == 1 for architecture in tested} == {row[3] == "1"}


def test_nothing_is_both_compared_and_refused() -> None:
    assert not set(REFUSED_NAMES) & {architecture.gguf for architecture in ARCHITECTURES.values()}
    assert len(REFUSED_NAMES) == len(set(REFUSED_NAMES))


def test_every_architecture_that_the_engine_refuses_by_name_is_in_the_table() -> None:
    source = (ROOT / "vendor" / "llama.cpp" / "overlay" / "src" / "llama-soft-prompt.cpp").read_text()
    [refuses] = re.findall(r"llama_soft_prompt_refuses\(const char \* architecture\) \{(.*?)\n\}", source, re.DOTALL)
    by_name = set(re.findall(r"case LLM_ARCH_(\w+):", refuses)) - {"UNKNOWN"}
    plain = {re.sub("[-_]", "", name).upper() for name in REFUSED_NAMES}
    assert by_name
    assert {name for name in by_name if name.replace("_", "") not in plain} == set()


def load(folder: Path, architecture: str) -> ModelError:
    """The error for a file that contains only its architecture."""
    tiny_gguf.close(gguf.GGUFWriter(folder / "header.gguf", architecture))
    with pytest.raises(ModelError) as failed:
        fedbpt.load_model(folder / "header.gguf")
    return failed.value


@pytest.mark.parametrize("name", REFUSED_NAMES)
def test_architectures_that_the_table_lists_as_refused_are_refused_by_the_header(tmp_path: Path, name: str) -> None:
    refused = load(tmp_path, name)
    assert isinstance(refused, UnsupportedModelError)
    assert name in str(refused)


def test_no_other_architecture_is_refused(tmp_path: Path) -> None:
    """Of the architectures that `gguf` knows."""
    known = list(gguf.MODEL_ARCH_NAMES.values())
    errors = {name: load(tmp_path, name) for name in known}
    refused = {
        name for name, error in errors.items() if isinstance(error, UnsupportedModelError) and f"'{name}'" in str(error)
    }
    assert refused - set(REFUSED_NAMES) == set()
