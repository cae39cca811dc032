"""Fixtures, and the switch between a short selection of faults and all of them (``make faults``)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest

from tests.faults.proxy import Fault, FaultProxy
from tests.integration.conftest import fleet

__all__ = ["fleet"]

ALL = bool(os.environ.get("FEDBPT_FAULTS"))


@pytest.fixture
def proxy() -> Iterator[Callable[[str, Fault], FaultProxy]]:
    """``proxy(url, fault)``, closed at the end of the test."""
    made: list[FaultProxy] = []

    def make(url: str, fault: Fault = "none") -> FaultProxy:
        made.append(FaultProxy(url, fault))
        return made[-1]

    yield make
    for each in made:
        each.close()
