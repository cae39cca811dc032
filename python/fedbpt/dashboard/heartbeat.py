"""`Heartbeat`: polls devices for whether they respond, so that the dashboard shows a dead one at once.

The run itself notices a dead device only after calls to it have failed for some seconds. Heartbeats use separate
connections: they neither delay the run nor count as its traffic.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Final

from fedbpt.coordinator.clients import DeviceClient, RemoteDevice
from fedbpt.errors import DeviceError, WireError
from fedbpt.net.deadlines import within
from fedbpt.protocol.rounds import DeviceInfo

log = logging.getLogger(__name__)

INTERVAL_S: Final = 0.5
"""Interval between two heartbeats of a device, in seconds."""

TIMEOUT_S: Final = 1.0
"""Time limit for a response, in seconds."""

STATUS_EVERY: Final = 20
"""Number of heartbeats between two requests for a device's status, which has its temperature and battery."""


class Heartbeat:
    """Polls those of ``clients`` that are remote devices. Use within one event loop.

    Args:
        on_heartbeat: called with a device's name and whether it responds.
        on_status: called with a device's name and status.
    """

    def __init__(
        self,
        clients: Sequence[DeviceClient],
        on_heartbeat: Callable[[str, bool], None],
        on_status: Callable[[str, DeviceInfo], None],
    ) -> None:
        self._twins = [client.twin() for client in clients if isinstance(client, RemoteDevice)]
        self._on_heartbeat = on_heartbeat
        self._on_status = on_status

    async def run(self) -> None:
        """Poll until cancelled."""
        try:
            await asyncio.gather(*(self._follow(twin) for twin in self._twins))
        finally:
            for twin in self._twins:
                await twin.aclose()

    async def _follow(self, twin: RemoteDevice) -> None:
        beat = 0
        while True:
            responds = await twin.responds(TIMEOUT_S)
            self._on_heartbeat(twin.name, responds)
            if responds and beat % STATUS_EVERY == 0:
                await self._request_status(twin)
            beat += 1
            await asyncio.sleep(INTERVAL_S)

    async def _request_status(self, twin: RemoteDevice) -> None:
        try:
            self._on_status(twin.name, await within(TIMEOUT_S, twin.status()))
        except (DeviceError, WireError, asyncio.TimeoutError) as error:
            log.info("%s does not report its status: %s", twin.name, error or "timed out")
