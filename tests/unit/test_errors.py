"""The exception tree: what its docstring draws is what there is."""

from __future__ import annotations

import inspect
import re

import pytest

import fedbpt.errors
from fedbpt.errors import DeviceRefusedError, FedbptError, MissingExtraError

DRAWN = re.compile(r"^(?P<indent>[ │├└─]*)(?P<name>[A-Z]\w+)(?: \((?P<also>\w+)\))?")


def all_errors() -> list[type[FedbptError]]:
    return [
        value for value in vars(fedbpt.errors).values() if inspect.isclass(value) and issubclass(value, FedbptError)
    ]


def drawn_tree() -> dict[str, tuple[str, ...]]:
    """Name → names of its bases, as the module's docstring draws them."""
    tree: dict[str, tuple[str, ...]] = {}
    ancestors: list[str] = []
    block = (fedbpt.errors.__doc__ or "").split("::\n\n")[1].split("\n\n")[0]
    for line in block.splitlines():
        match = DRAWN.match(line)
        assert match, line
        depth = len(match["indent"]) // 4 - 1
        parents = ancestors[depth - 1 : depth] if depth else ["Exception"]
        tree[match["name"]] = (*parents, *([match["also"]] if match["also"] else []))
        ancestors[depth:] = [match["name"]]
    return tree


def test_docstring_draws_the_tree_that_there_is() -> None:
    assert drawn_tree() == {error.__name__: tuple(base.__name__ for base in error.__bases__) for error in all_errors()}


@pytest.mark.parametrize("error", all_errors(), ids=lambda error: error.__name__)
def test_every_error_has_an_exit_code_and_says_what_it_is(error: type[FedbptError]) -> None:
    assert error.exit_code in (1, 2, 130)
    assert error.__doc__


def test_a_refusal_has_a_code_for_programs() -> None:
    assert DeviceRefusedError("no").code == "refused"
    assert DeviceRefusedError("busy with another round", "busy").code == "busy"


def test_a_missing_extra_says_what_to_install() -> None:
    assert "pip install 'fedbpt[data]'" in str(MissingExtraError("reading data sets from the hub", "data"))
