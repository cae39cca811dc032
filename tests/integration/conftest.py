"""Fixture of processes that end with their test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.integration.processes import Fleet


@pytest.fixture
def fleet() -> Iterator[Fleet]:
    fleet = Fleet()
    yield fleet
    fleet.end()
