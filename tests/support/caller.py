"""A coordinator's server and devices that poll it, in this process."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from fedbpt.coordinator.devices.enrolment import DeviceRegistry
from fedbpt.coordinator.service.server import CoordinatorServer
from fedbpt.device.agent import AgentService, LocalDevice
from fedbpt.device.agent.calls import enrol
from fedbpt.device.agent.poller import Poller


@contextmanager
def called_by(folder: Path, *devices: LocalDevice, **options: Any) -> Iterator[CoordinatorServer]:
    """A server on loopback that ``devices``, enrolled under their names, poll within the block."""
    with ExitStack() as stack:
        registry = stack.enter_context(DeviceRegistry(folder / "devices.db"))
        server = stack.enter_context(CoordinatorServer(registry, **options))
        for device in devices:
            credentials = enrol(server.url, registry.invite(device.name))
            stack.enter_context(Poller(AgentService(device), credentials, pauses_s=(0.02, 0.2)))
        wait_until(lambda: len(server.present()) == len(devices))
        yield server


def wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    """Poll ``condition`` until it holds. Fails after ``seconds``."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not true within {seconds:g} s"
        time.sleep(0.02)
