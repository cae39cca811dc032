"""A coordinator process and thousands of devices without a model that call it over loopback, for `bench_scale.py`.

Its CPU in rounds, and between rounds (the run is paused), and the delay of acknowledgements, as a device sees it and in
the coordinator: from the request to its response, and by how much its event loop is late. The peer is the same run with
devices that do not know of call times, whose polls are held.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from bench_coordinator import POPSIZE, D
from virtual_devices import TASK, VirtualDevice, call_in

from fedbpt.coordinator.control import RunControl
from fedbpt.coordinator.devices.enrolment import DeviceRegistry
from fedbpt.coordinator.federation import Federation
from fedbpt.coordinator.gc_policy import collect_between_rounds
from fedbpt.coordinator.service import http
from fedbpt.coordinator.service.server import CoordinatorServer
from fedbpt.machine.memory import memory_of_process
from fedbpt.net.tokens import Credentials, digest, new_token
from fedbpt.protocol.specs import ObjectiveSpec, PromptSpec
from fedbpt.runs.events import Event, RoundClosed, RunStarted
from fedbpt.runs.settings import RunSettings
from fedbpt.runs.store import RunStore

LAG_S = 0.02
"""Interval at which the event loop's delay is measured, seconds."""


def open_files() -> None:
    """Raise the limit of open files as far as is allowed."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def coordinate(folder: Path, n: int, per_round: int, rounds: int, idle_s: float) -> None:
    """Run ``rounds`` rounds with ``n`` devices, pause for ``idle_s`` seconds, and print figures as JSON lines."""
    settings = RunSettings(
        rounds=rounds + 1, popsize=POPSIZE, prompt=PromptSpec(d=D), objective=ObjectiveSpec(readout_words=0),
        calibrate=False, deadline_s=600.0, quorum=0.5, per_round=per_round, ensemble=1,
    )  # fmt: skip
    control = RunControl()
    lags: list[float] = []
    handled: list[float] = []
    timed(handled)

    def tell(**figures: Any) -> None:
        figures |= {"cpu_s": time.process_time(), "at": time.monotonic(), "rss": memory_of_process()["rss"]}
        print(json.dumps(figures), flush=True)

    def pause() -> None:
        time.sleep(2.0)  # the last reports of the round
        tell(what="idle")
        time.sleep(idle_s)
        tell(what="idle over", connections=len(server._socket._open), away=away(server))
        control.resume()

    def watch(event: Event) -> None:
        collect_between_rounds(event)  # as `fedbpt tune` does
        if isinstance(event, RunStarted):
            tell(what="started")
        elif isinstance(event, RoundClosed):
            tell(what="round", away=away(server), reported=len(event.reported))
            if event.searched == 1:
                lags.clear()
                handled.clear()
            if event.searched == rounds:
                control.pause()
                threading.Thread(target=pause, daemon=True).start()

    open_files()
    with contextlib.ExitStack() as stack:
        store = stack.enter_context(RunStore(folder / "runs.db"))
        registry = stack.enter_context(DeviceRegistry(folder / "devices.db"))
        server = stack.enter_context(CoordinatorServer(registry))
        print(json.dumps({"url": server.url}), flush=True)
        loop = server.office._loop
        assert loop is not None
        asyncio.run_coroutine_threadsafe(measure_lag(lags), loop)
        while len(server.present()) < n:
            time.sleep(0.5)
        tell(what="present")
        clients = [server.client(name) for name in server.present()]
        Federation(clients, TASK, settings, settings.aggregator(), store, "r", watch, control).run()
    tell(what="over", lags=quantiles(lags), handled=quantiles(handled))


def away(server: CoordinatorServer) -> int:
    """Number of devices that were told to call later."""
    return sum(box.due_s > 0 for box in server.office._boxes.copy().values())


def timed(handled: list[float]) -> None:
    """Have the route of replies note how long it takes."""
    take = http._Routes.take_reply

    async def take_reply(self: Any, request: Any) -> Any:
        began = time.monotonic()
        try:
            return await take(self, request)
        finally:
            handled.append(time.monotonic() - began)

    http._Routes.take_reply = take_reply  # type: ignore[method-assign]


async def measure_lag(lags: list[float]) -> None:
    while True:
        due = time.monotonic() + LAG_S
        await asyncio.sleep(LAG_S)
        lags.append(max(time.monotonic() - due, 0.0))


def quantiles(seconds: list[float]) -> dict[str, float]:
    """In milliseconds."""
    return {f"p{100 * q:g}_ms": 1e3 * float(np.quantile(seconds, q)) for q in (0.5, 0.99)} if seconds else {}


def enrol_all(folder: Path, n: int) -> list[Credentials]:
    """Credentials of ``n`` devices, without a code for each: an enrolment reads all invitations."""
    made = [Credentials("", f"d{i}", new_token()) for i in range(n)]
    with DeviceRegistry(folder / "devices.db") as registry, registry._transaction() as db:
        rows = [(each.device, digest(each.secret)) for each in made]
        db.executemany("INSERT INTO devices VALUES (?, ?, '2026-01-01T00:00:00+00:00', NULL)", rows)
    return made


async def measure(n: int, per_round: int, rounds: int, idle_s: float, work_s: float, paced: bool) -> dict[str, Any]:
    """Figures of one run with ``n`` devices."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        credentials = await asyncio.to_thread(enrol_all, folder, n)
        command = [sys.executable, __file__, name, *map(str, (n, per_round, rounds, idle_s))]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        url = json.loads(await asyncio.to_thread(process.stdout.readline))["url"]
        waits: list[float] = []
        own = (Credentials(url, each.device, each.secret) for each in credentials)
        calling = asyncio.ensure_future(call_in(VirtualDevice(each, work_s, POPSIZE, waits, paced) for each in own))
        said: list[dict[str, Any]] = []
        try:
            while line := await asyncio.to_thread(process.stdout.readline):
                said.append(json.loads(line))
                print(f"# {line.rstrip()}", file=sys.stderr, flush=True)
                if said[-1]["what"] == "round" and sum(each["what"] == "round" for each in said) == 1:
                    waits.clear()
        finally:
            process.stdout.close()
            calling.cancel()
            await asyncio.gather(calling, return_exceptions=True)
            process.wait()
    if process.returncode:
        raise SystemExit(f"the coordinator ended with {process.returncode}")
    return figures(n, per_round, paced, said, waits)


def figures(n: int, per_round: int, paced: bool, said: list[dict[str, Any]], waits: list[float]) -> dict[str, Any]:
    def share(first: dict[str, Any], last: dict[str, Any]) -> float:
        return float((last["cpu_s"] - first["cpu_s"]) / (last["at"] - first["at"]))

    by = {each["what"]: each for each in said}
    closed = [each for each in said if each["what"] == "round"][:-1]  # the last is that after the pause
    ends = [each["at"] for each in closed]
    return {
        "devices": n,
        "per_round": per_round,
        "paced": paced,
        "start_s": by["started"]["at"] - by["present"]["at"],
        "round_s": float(np.median(np.diff(ends))),
        "cores_in_rounds": share(closed[0], closed[-1]),
        "cores_between_rounds": share(by["idle"], by["idle over"]),
        "connections": by["idle over"]["connections"],
        "told_to_call_later": by["idle over"]["away"],
        "acknowledged": quantiles(waits),
        "acknowledged_in_coordinator": by["over"]["handled"],
        "loop_late": by["over"]["lags"],
        "rss_mb": max(each["rss"] for each in said) / 1e6,
    }


def measured(n: int, per_round: int, rounds: int, idle_s: float, work_s: float, paced: bool) -> dict[str, Any]:
    """`measure`, in a loop of its own."""
    open_files()
    return asyncio.run(measure(n, per_round, rounds, idle_s, work_s, paced))


if __name__ == "__main__":
    coordinate(Path(sys.argv[1]), *map(int, sys.argv[2:5]), float(sys.argv[5]))
