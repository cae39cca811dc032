"""Runs over devices in this process: a task, clients that can fail, and the events of the run."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from fedbpt.aggregation.pooled import Pooled
from fedbpt.coordinator.clients import InProcessClient
from fedbpt.coordinator.clients.in_process import InProcessTransport
from fedbpt.coordinator.clients.transport import NoResponseError, Response
from fedbpt.coordinator.control import RunControl
from fedbpt.coordinator.federation import Federation
from fedbpt.device.device import Device
from fedbpt.protocol.specs import ObjectiveSpec, PromptSpec, Template
from fedbpt.runs.events import Event, RoundClosed
from fedbpt.runs.result import RunResult
from fedbpt.runs.settings import RunSettings
from fedbpt.runs.store import RunStore
from fedbpt.tasks import Task
from tests.support.fake_device import TOY, FakeDevice

D = 4


class ToyTask(Task, frozen=True):
    name: str = TOY.name
    labels: tuple[str, ...] = ("x", "y")
    templates: tuple[Template, ...] = (
        Template(pattern="{text} In one word it was", label_words=(" bad", " good")),
        Template(pattern="{text} It was", label_words=(" bad", " good")),
    )


class FlakyTransport(InProcessTransport):
    """A transport that can be ``down``, and whose device can be restarted."""

    down = False
    restarts = 0

    async def send(self, *request: Any) -> Response:
        while not self.down:
            restarts = self.restarts
            sending = asyncio.ensure_future(super().send(*request))
            try:
                while not self.down and restarts == self.restarts:
                    done, _ = await asyncio.wait([sending], timeout=0.05)
                    if done:
                        return sending.result()
            finally:
                sending.cancel()
        raise NoResponseError("cannot be reached")

    def restart(self, graceful: bool) -> None:
        """Forget all rounds, as a device does that is started again."""
        if self._served is not None and graceful:
            self._served[0].stop()
        self._served = None
        self.restarts += 1


class FlakyClient(InProcessClient):
    """A client of a device that can be out of reach (``down``), or restarted."""

    def __init__(self, device: FakeDevice | Device) -> None:
        super().__init__(device)
        self._transport: FlakyTransport = FlakyTransport(device)
        self.restart = self._transport.restart

    @property
    def down(self) -> bool:
        return self._transport.down

    @down.setter
    def down(self, is_down: bool) -> None:
        self._transport.down = is_down

    @property
    def is_idle(self) -> bool:
        """The device has no work, nor any report."""
        return self._transport._served is None or not self.service._jobs


def settings(**changes: Any) -> RunSettings:
    """Settings of a search without calibration and readout."""
    made = RunSettings(
        rounds=4,
        popsize=6,
        prompt=PromptSpec(d=D),
        objective=ObjectiveSpec(readout_words=0),
        calibrate=False,
        deadline_s=5.0,
        quorum=0.5,
        seed=3,
        evaluate_every=0,
    )
    return msgspec.structs.replace(made, **changes)


class Scene:
    """Devices, a store, and the events of the runs over them."""

    def __init__(self, path: Path, *devices: FakeDevice | Device) -> None:
        self.devices: dict[str, Any] = {device.name: device for device in devices}
        self.clients = {name: FlakyClient(device) for name, device in self.devices.items()}
        self.store = RunStore(path)
        self.events: list[Event] = []
        self.on_event: Callable[[Event], None] = lambda _event: None

    def federation(
        self, run: str = "r", task: Task | None = None, control: RunControl | None = None, **changes: Any
    ) -> Federation:
        def hear(event: Event) -> None:
            self.events.append(event)
            self.on_event(event)

        chosen = settings(**changes)
        search = Pooled(D, popsize=chosen.popsize, seed=chosen.seed)
        return Federation(
            list(self.clients.values()), task or ToyTask(), chosen, search, self.store, run, hear, control
        )

    def run(self, run: str = "r", task: Task | None = None, **changes: Any) -> RunResult:
        """Run to the end. ``changes``: of the settings, and ``control``."""
        return self.federation(run, task, **changes).run()

    def of(self, kind: type[Any]) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]

    def when(self, wanted: Callable[[Event], bool], do: Callable[[], None]) -> None:
        """Call ``do`` once, at the first event that is ``wanted``."""
        pending = [do]

        def react(event: Event) -> None:
            if pending and wanted(event):
                pending.pop()()

        self.on_event = react


def closed(round: int) -> Callable[[Event], bool]:
    return lambda event: isinstance(event, RoundClosed) and event.round == round


class StopRunError(Exception):
    pass


def stop() -> None:
    raise StopRunError
