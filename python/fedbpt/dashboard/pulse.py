"""`Pulse`: asks devices again and again whether they are there, while somebody may look.

A round notices a dead device when a call to it has failed for some seconds; people see it at once. It asks by
connections of its own: the run neither waits for a pulse nor counts its bytes.
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

PULSE_S: Final = 0.5
"""Between two questions to a device."""

PATIENCE_S: Final = 1.0
"""How long an answer may take."""

STATUS_EVERY: Final = 20
"""So many pulses apart, a device is asked for its status: heat and battery change."""


class Pulse:
    """Asks ``clients`` that are called or call in; of others nothing is known. Use within one event loop.

    Args:
        heard: told by name whether a device answers, each time.
        met: told what a device says of itself.
    """

    def __init__(
        self,
        clients: Sequence[DeviceClient],
        heard: Callable[[str, bool], None],
        met: Callable[[str, DeviceInfo], None],
    ) -> None:
        self._twins = [client.twin() for client in clients if isinstance(client, RemoteDevice)]
        self._heard, self._met = heard, met

    async def run(self) -> None:
        """Until cancelled."""
        try:
            await asyncio.gather(*(self._follow(twin) for twin in self._twins))
        finally:
            for twin in self._twins:
                await twin.aclose()

    async def _follow(self, twin: RemoteDevice) -> None:
        beat = 0
        while True:
            answers = await twin.responds(PATIENCE_S)
            self._heard(twin.name, answers)
            if answers and beat % STATUS_EVERY == 0:
                await self._ask(twin)
            beat += 1
            await asyncio.sleep(PULSE_S)

    async def _ask(self, twin: RemoteDevice) -> None:
        try:
            self._met(twin.name, await within(PATIENCE_S, twin.status()))
        except (DeviceError, WireError, asyncio.TimeoutError) as error:
            log.info("%s does not say how it is: %s", twin.name, error or "it takes too long")
