"""The coordinator is killed at every write and commit, and at random times: the digest does not change."""

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
STEP = 1 if ALL else 17  # of the statements at which to kill


@pytest.fixture
def urls(fleet: Fleet) -> list[str]:
    return [url for _, url in fleet.devices(("a", "--slow", "0.02"), ("b", "--slow", "0.02"))]


@pytest.fixture
def whole(urls: list[str], tmp_path: Path) -> tuple[str, int]:
    """The digest of a run without faults, and its number of statements."""
    session = Coordinator(tmp_path / "whole", urls)
    assert session.wait() == 0
    return digest(tmp_path / "whole"), session.statements


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


def test_killed_several_times_in_one_run_it_ends_with_the_same_digest(
    urls: list[str], tmp_path: Path, whole: tuple[str, int]
) -> None:
    path = tmp_path / "often"
    sessions = 0
    while Coordinator(path, urls, kill_at=30 + sessions).wait() == DIES:
        sessions += 1
        assert sessions < 100
    assert sessions > 1
    assert digest(path) == whole[0]


def test_killed_at_random_times_it_resumes_to_the_same_digest(
    urls: list[str], tmp_path: Path, whole: tuple[str, int]
) -> None:
    rng = random.Random(5)
    for number in range(RANDOM_KILLS):
        path = tmp_path / f"random-{number}"
        session = Coordinator(path, urls)
        time.sleep(rng.uniform(0.0, 0.6))
        session.kill()
        assert Coordinator(path, urls).wait() == 0
        assert digest(path) == whole[0]
