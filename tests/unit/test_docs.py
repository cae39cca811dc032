"""The documentation covers public names, errors, commands and routes. `tests.integration` builds it."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
from starlette.applications import Starlette
from starlette.routing import Route

import fedbpt
from fedbpt import cli, errors
from fedbpt.coordinator.monitoring.monitor import build_app as monitor_app
from fedbpt.coordinator.service.http import build_app as coordinator_app
from fedbpt.coordinator.service.run_routes import run_routes
from fedbpt.device.agent.http import build_app as device_app
from fedbpt.net.bodies import STATUS_OF_CODE
from fedbpt.prompts.model_card import PLACES
from fedbpt.prompts.prompt import _LAYERS_TENSORS, _OTHERS_TENSORS, _TENSORS, _Header
from fedbpt.protocol.refusals import WORK_FAILED, WORK_FAULT
from fedbpt.serving.http import build_app as serving_app

DOCS = Path(__file__).parents[2] / "docs"


def page(name: str) -> str:
    return (DOCS / name).read_text()


def routes(app: Starlette) -> set[str]:
    """The routes as ``METHOD /path``, without converters."""
    found = [route for route in app.routes if isinstance(route, Route)]
    assert found
    methods = [(method, route.path) for route in found for method in (route.methods or set()) - {"HEAD"}]
    return {f"{method} {re.sub(r':[a-z]+}', '}', path)}" for method, path in methods}


def documented_routes(text: str) -> set[str]:
    """The routes that a page names, without the names of parameters."""
    return {bare(found) for found in re.findall(r"`((?:GET|POST|DELETE) /[^`?]*)", text)}


def bare(route: str) -> str:
    return re.sub(r"{[^}]*}", "{}", route)


def app(build: Any) -> Starlette:
    """An application with mocked parts."""
    parts = [MagicMock() for name, part in inspect.signature(build).parameters.items() if part.default is part.empty]
    application: Starlette = build(*parts)
    return application


def operators_app(worker: Any) -> Starlette:
    return Starlette(routes=run_routes(worker, "t" * 43))


@pytest.mark.parametrize(
    ("build", "where"),
    [
        (device_app, "http.md"),
        (coordinator_app, "http.md"),
        (operators_app, "http.md"),
        (monitor_app, "observability.md"),
        (serving_app, "serve.md"),
    ],
)
def test_every_route_is_documented(build: Any, where: str) -> None:
    expected = {bare(route) for route in routes(app(build))}
    assert expected - documented_routes(page(where)) == set()


def test_every_documented_route_exists() -> None:
    known = {bare(route) for build in (device_app, coordinator_app, operators_app) for route in routes(app(build))}
    assert documented_routes(page("http.md")) - known == set()


def test_every_code_of_a_refusal_is_documented_with_its_status() -> None:
    lines = [re.match(r"\| (\d+) \| (.*) \|$", line) for line in page("http.md").splitlines()]
    documented = {code: int(line[1]) for line in lines if line for code in re.findall(r"`([a-z-]+)`", line[2])}
    assert documented == {**STATUS_OF_CODE, WORK_FAILED: 500, WORK_FAULT: 500, "internal": 500}


def test_every_error_has_an_entry_in_troubleshooting() -> None:
    classes = [
        name
        for name, kind in vars(errors).items()
        if inspect.isclass(kind) and issubclass(kind, errors.FedbptError) and kind is not errors.FedbptError
    ]
    assert re.findall(r"^### (\w+)$", page("troubleshooting.md"), re.MULTILINE) != []
    assert set(classes) == set(re.findall(r"^### (\w+)$", page("troubleshooting.md"), re.MULTILINE))


def test_every_public_name_is_in_the_reference() -> None:
    shown = {name.split(".")[-1] for name in re.findall(r"^::: (\S+)$", page("reference/python.md"), re.MULTILINE)}
    assert set(fedbpt.__all__) - shown == set()


def test_every_command_is_mentioned() -> None:
    text = "\n".join(path.read_text() for path in DOCS.rglob("*.md"))
    assert [name for name in cli.COMMANDS if f"fedbpt {name}" not in text] == []


def test_every_field_of_a_prompt_file_is_documented() -> None:
    text = page("formats.md")
    for name in [*_TENSORS, *_OTHERS_TENSORS, *_LAYERS_TENSORS, *_Header.__struct_fields__, *PLACES]:
        assert f"`{name}`" in text


def test_every_table_of_the_stores_is_documented() -> None:
    from fedbpt.coordinator.devices import enrolment
    from fedbpt.runs import store

    text = page("formats.md")
    for module in (store, enrolment):
        tables = re.findall(r"CREATE TABLE (\w+)", inspect.getsource(module))
        assert tables
        assert [table for table in tables if f"| `{table}` |" not in text] == []


def test_every_path_in_the_development_page_exists() -> None:
    named = re.findall(r"`([a-z_/.-]+/[a-z_.-]*)`", page("development.md"))
    roots = (DOCS.parent, DOCS.parent / "python" / "fedbpt", DOCS.parent / "tests", DOCS)
    assert len(named) > 25
    assert [name for name in named if not any((root / name).exists() for root in roots) and "build/" not in name] == []
