"""The architecture, proved from the source: which part may import which, and where Python and C++ meet."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "python" / "fedbpt"
NATIVE = ROOT / "src" / "fedbpt_native"

# From the ground up: a part (a package, or a module beside the packages) imports only parts before it.
ORDER: tuple[str, ...] = (
    *("plain_text", "html_tables", "errors", "version", "checking", "decoders", "quantities", "argument_types"),
    *("metrics", "protocol", "faults", "machine", "net"),
    *("models", "tasks", "search", "engine", "secure", "aggregation", "model_check", "bench"),
    *("prompts", "objective", "exchange", "runs", "side_by_side"),
    *("device", "coordinator"),
    *("display", "results", "api", "answering", "calibrating", "refining", "target_sampling"),
    *("serving", "dashboard", "flower", "__init__", "cli", "__main__"),
)
RANK = {part: rank for rank, part in enumerate(ORDER)}

NONDESCRIPT = {"utils", "util", "common", "helpers", "helper", "misc"}

MODULES = sorted(PACKAGE.rglob("*.py"))
SOURCES = sorted(NATIVE.glob("*.*"))


def part_of(path: Path) -> str:
    inside = path.relative_to(PACKAGE)
    return inside.parts[0] if len(inside.parts) > 1 else inside.stem


def part_named(dotted: list[str]) -> str:
    """The part that ``fedbpt.<dotted>`` lies in; a name that is no part is one that ``__init__`` defines."""
    return dotted[0] if dotted and (dotted[0] in RANK or (PACKAGE / f"{dotted[0]}.py").is_file()) else "__init__"


def imported(path: Path) -> Iterator[tuple[int, list[str]]]:
    """(line, dotted name below ``fedbpt``) of everything that a module imports from the package, at any depth."""
    here = ["fedbpt", *path.relative_to(PACKAGE).with_suffix("").parts]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = here[: -node.level] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            names = [[*base, alias.name] for alias in node.names]
        else:
            continue
        yield from ((node.lineno, name[1:]) for name in names if name[0] == "fedbpt")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down_only(path: Path) -> None:
    part = part_of(path)
    assert part in RANK, f"give {part} its place in ORDER"
    wrong = [
        f"{path.name}:{line}: {part} imports {part_named(name)}"
        for line, name in imported(path)
        if name != ["_native"] and part_named(name) != part and RANK[part_named(name)] >= RANK[part]
    ]
    assert not wrong


def test_the_order_names_every_part_once_and_no_other() -> None:
    assert len(RANK) == len(ORDER)
    assert set(ORDER) == {part_of(path) for path in MODULES}


def test_only_scorer_generator_formats_and_parts_import_the_native_module() -> None:
    importers = {str(path.relative_to(PACKAGE)) for path in MODULES for _, name in imported(path) if "_native" in name}
    engine = {"engine/native_generator.py", "engine/native_scorer.py"}
    assert importers == {"models/formats.py", "models/parts.py"} | engine


def test_import_finder_sees_every_way_to_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path)
    (tmp_path / "cli").mkdir()
    module = tmp_path / "cli" / "tune.py"
    module.write_text(
        "import fedbpt.api, numpy\nfrom fedbpt import tasks\nfrom fedbpt.errors import E\n"
        "from . import models\nfrom ..runs import RunStore\ndef f():\n    import fedbpt\n"
    )
    assert [name for _, name in imported(module)] == [
        ["api"],
        ["tasks"],
        ["errors", "E"],
        ["cli", "models"],
        ["runs", "RunStore"],
        [],
    ]


def test_only_the_bindings_include_pybind11() -> None:
    wrong = [
        source.name
        for source in SOURCES
        if re.search(r'#\s*include\s*[<"](pybind11/|Python\.h)', source.read_text())
        and not (source.match("bind_*.cpp") or source.name == "module.cpp")
    ]
    assert SOURCES
    assert not wrong


@pytest.mark.parametrize("folder", ["python", "src", "tests", "vendor", "benchmarks"])
def test_no_file_has_a_name_that_says_nothing(folder: str) -> None:
    named = [path for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".cpp", ".h")]
    assert not [str(path.relative_to(ROOT)) for path in named if path.stem in NONDESCRIPT]


def test_only_the_decoders_make_msgspec_collect_what_it_knows_of_a_type() -> None:
    others = [path for path in MODULES if path != PACKAGE / "decoders.py"]
    collects = re.compile(r"msgspec\.convert\(|Decoder\(|msgspec\.\w+\.decode\([^\n]*type=(?!dict\[str, str\])")
    assert not [str(path.relative_to(PACKAGE)) for path in others if collects.search(path.read_text())]
