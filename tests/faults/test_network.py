"""Faults of a network: the run ends with the digest of the run without faults."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.conftest import ALL
from tests.faults.coordinator import Coordinator, digest
from tests.faults.proxy import FAULTS, Fault, FaultProxy
from tests.integration.processes import Fleet

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

Proxy = Callable[..., FaultProxy]


@pytest.fixture
def urls(fleet: Fleet) -> list[str]:
    return [url for _, url in fleet.devices(("a",), ("b",))]


@pytest.fixture
def expected(urls: list[str], tmp_path: Path) -> str:
    assert Coordinator(tmp_path / "whole", urls).wait() == 0
    return digest(tmp_path / "whole")


@pytest.mark.parametrize("fault", ["delay", "duplicate", "throttle"] if ALL else ["duplicate"])
def test_a_permanently_faulty_network_changes_nothing(
    urls: list[str], expected: str, tmp_path: Path, proxy: Proxy, fault: Fault
) -> None:
    bad = [proxy(url, fault) for url in urls]
    assert Coordinator(tmp_path / "run", [each.url for each in bad]).wait() == 0
    assert digest(tmp_path / "run") == expected
    assert all(each.broken > 5 for each in bad)


@pytest.mark.parametrize("fault", FAULTS if ALL else ["stall", "unacknowledged"])
def test_a_network_that_fails_and_recovers_changes_nothing(
    urls: list[str], expected: str, tmp_path: Path, proxy: Proxy, fault: Fault
) -> None:
    bad = [proxy(url) for url in urls]
    session = Coordinator(tmp_path / "run", [each.url for each in bad], rounds=4)
    stop = threading.Event()

    def shake() -> None:
        """Each device's network in turn: 0.7 s of the fault, then none."""
        while not stop.wait(0.3):
            for each in bad:
                each.fault = fault
                stop.wait(0.7)
                each.fault = "none"

    shaking = threading.Thread(target=shake)
    shaking.start()
    try:
        assert session.wait() == 0
    finally:
        stop.set()
        shaking.join()
    assert digest(tmp_path / "run") == expected
    assert sum(each.broken for each in bad) > 0


def test_a_device_that_hangs_for_good_costs_one_round_its_deadline(
    urls: list[str], tmp_path: Path, proxy: Proxy
) -> None:
    stuck = proxy(urls[1], "stall")
    session = Coordinator(tmp_path / "run", [urls[0], stuck.url], deadline_s=5.0, quorum=0.5)
    assert session.wait() == 0
