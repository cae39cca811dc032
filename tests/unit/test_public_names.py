"""Every package lists its public names, and has them."""

from __future__ import annotations

import ast
import importlib
import inspect
from pathlib import Path
from typing import get_origin

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "python" / "fedbpt"


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def defines_all(path: Path) -> bool:
    tree = ast.parse(path.read_text())
    targets = [target for node in tree.body if isinstance(node, ast.Assign) for target in node.targets]
    return any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets)


WITH_ALL = [module_name(path) for path in sorted(PACKAGE.rglob("*.py")) if defines_all(path)]


def test_packages_have_public_names() -> None:
    assert {
        "fedbpt.tasks",
        "fedbpt.models",
        "fedbpt.coordinator.clients",
        "fedbpt.aggregation",
        "fedbpt.device.agent",
    } <= set(WITH_ALL)


@pytest.mark.parametrize("name", WITH_ALL)
def test_every_public_name_is_there_once(name: str) -> None:
    module = importlib.import_module(name)
    assert len(set(module.__all__)) == len(module.__all__)
    assert not [public for public in module.__all__ if not hasattr(module, public)]


@pytest.mark.parametrize("name", WITH_ALL)
def test_everything_public_is_documented(name: str) -> None:
    module = importlib.import_module(name)
    defined = {public: getattr(module, public) for public in module.__all__}
    undocumented = [
        public
        for public, value in defined.items()
        # a type alias counts as a class in Python 3.10
        if get_origin(value) is None and (inspect.isclass(value) or inspect.isroutine(value)) and not value.__doc__
    ]
    assert module.__doc__
    assert not undocumented
