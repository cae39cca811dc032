"""The coordinator is killed at its every write and commit, and at random instants: the digest is as without."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from tests.faults.conftest import ALL
from tests.faults.coordinator import DIES, Coordinator, digest
from tests.integration.processes import Fleet

pytestmark = pytest.mark.timeout(3600 if ALL else 300)

RANDOM_KILLS = 50 if ALL else 2
STEP = 1 if ALL else 17  # of the statements that are points to die at


@pytest.fixture
def urls(fleet: Fleet) -> list[str]:
    return [url for _, url in fleet.devices(("a", "--slow", "0.02"), ("b", "--slow", "0.02"))]


@pytest.fixture
def whole(urls: list[str], tmp_path: Path) -> tuple[str, int]:
    """The digest of a run without a fault, and how many statements it has."""
    sitting = Coordinator(tmp_path / "whole", urls)
    assert sitting.wait() == 0
    return digest(tmp_path / "whole"), sitting.statements


def test_killed_at_each_statement_it_resumes_to_the_same_digest(
    urls: list[str], tmp_path: Path, whole: tuple[str, int]
) -> None:
    expected, n_statements = whole
    assert n_statements > 50
    for point in range(1 + n_statements % STEP, n_statements, STEP):
        path = tmp_path / f"killed-{point}"
        assert Coordinator(path, urls, kill_at=point).wait() == DIES
        assert Coordinator(path, urls).wait() == 0
        assert digest(path) == expected, f"killed at statement {point}"


def test_killed_twice_and_more_in_one_run(urls: list[str], tmp_path: Path, whole: tuple[str, int]) -> None:
    path = tmp_path / "often"
    sittings = 0
    while Coordinator(path, urls, kill_at=30 + sittings).wait() == DIES:
        sittings += 1
        assert sittings < 100
    assert sittings > 1
    assert digest(path) == whole[0]


def test_killed_at_random_instants_it_resumes_to_the_same_digest(
    urls: list[str], tmp_path: Path, whole: tuple[str, int]
) -> None:
    rng = random.Random(5)
    for number in range(RANDOM_KILLS):
        path = tmp_path / f"random-{number}"
        sitting = Coordinator(path, urls)
        time.sleep(rng.uniform(0.0, 0.6))
        sitting.kill()
        assert Coordinator(path, urls).wait() == 0
        assert digest(path) == whole[0]
