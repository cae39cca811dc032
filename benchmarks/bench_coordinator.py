"""Cost of a report for the coordinator, delay of its acknowledgement, and time to recover from a kill.

A coordinator process, and in this process many devices without a model that poll it over loopback, like `fedbpt
device --coordinator`; their reports arrive over some seconds. The peer is the same run with the devices inside the
coordinator's process, whose work then counts as the coordinator's, but without sockets and HTTP. Then the coordinator
is repeatedly killed (SIGKILL) during the run, and timed until it has resumed.

    python benchmarks/bench_coordinator.py --devices 1000 --rounds 100
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from virtual_devices import TASK, VirtualDevice, call_in, info_of, report_on

from fedbpt.coordinator.clients import DeviceClient, InProcessClient
from fedbpt.coordinator.devices.enrolment import DeviceRegistry
from fedbpt.coordinator.federation import Federation
from fedbpt.coordinator.gc_policy import collect_between_rounds
from fedbpt.coordinator.service.server import CoordinatorServer
from fedbpt.device.agent.worker import Worker
from fedbpt.machine.memory import memory_of_process
from fedbpt.net.tokens import Credentials, digest, new_token
from fedbpt.protocol.rounds import DeviceInfo, EvaluateReport, RoundPlan, RoundReport
from fedbpt.protocol.specs import ObjectiveSpec, PromptSpec
from fedbpt.runs.events import Event, RoundClosed, RunStarted
from fedbpt.runs.settings import RunSettings
from fedbpt.runs.store import RunStore

D = 500
POPSIZE = 16


class InstantDevice:
    """A `fedbpt.device.agent.LocalDevice` with synthetic losses."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._losses = np.random.default_rng(0).random(POPSIZE)

    def info(self) -> DeviceInfo:
        return info_of(self.name)

    def run(self, plan: RoundPlan, _progress: Callable[[int, int], None], _cancel: Callable[[], bool]) -> RoundReport:
        return report_on(plan, self._losses)

    def interrupt(self) -> None:
        """Do nothing: work takes no time."""

    def evaluate(self, *_: Any) -> EvaluateReport:
        raise NotImplementedError("it has no test rows")


# --- the coordinator's process ---------------------------------------------------------------------------------------


def coordinate(folder: Path, n_devices: int, rounds: int, port: int) -> None:
    """Run with devices that poll at ``port`` (0: devices in this process), and print the costs."""
    settings = RunSettings(
        rounds=rounds, popsize=POPSIZE, prompt=PromptSpec(d=D), objective=ObjectiveSpec(readout_words=0),
        calibrate=False, deadline_s=600.0, quorum=1.0, stragglers=0.0, ensemble=1,
    )  # fmt: skip
    rss: list[int] = []

    def watch(event: Event) -> None:
        collect_between_rounds(event)  # as `fedbpt tune` does
        if isinstance(event, RunStarted):
            print(json.dumps({"resumed": event.resumed, "at": time.monotonic()}), flush=True)
        elif isinstance(event, RoundClosed):
            rss.append(memory_of_process()["rss"])
            print(json.dumps({"closed": event.round}), flush=True)

    with contextlib.ExitStack() as stack:
        store = stack.enter_context(RunStore(folder / f"runs-{port}.db"))
        clients: Sequence[DeviceClient]
        if port:
            registry = stack.enter_context(DeviceRegistry(folder / "devices.db"))
            server = stack.enter_context(CoordinatorServer(registry, port=port))
            print(json.dumps({"answers": time.monotonic()}), flush=True)
            while len(server.present()) < n_devices:
                time.sleep(0.02)
            clients = [server.client(name) for name in server.present()]
        else:
            worker = Worker("devices")
            stack.callback(worker.close)
            clients = [InProcessClient(InstantDevice(f"d{i}"), worker=worker) for i in range(n_devices)]
        before, began = time.process_time(), time.monotonic()
        Federation(clients, TASK, settings, settings.aggregator(), store, "r", watch).run()
        cpu, seconds = time.process_time() - before, time.monotonic() - began
    print(json.dumps({"cpu_s": cpu, "seconds": seconds, "reports": n_devices * rounds, "rss": rss}), flush=True)


# --- the swarm -------------------------------------------------------------------------------------------------------


def enrol(folder: Path, n_devices: int, url: str) -> list[Credentials]:
    made = []
    with DeviceRegistry(folder / "devices.db") as registry:
        for name in (f"d{i}" for i in range(n_devices)):
            token = new_token()
            registry.enrol(registry.invite(name), digest(token))
            made.append(Credentials(url, name, token))
    return made


def spawn(folder: Path, n_devices: int, rounds: int, port: int) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, "--devices", str(n_devices), "--rounds", str(rounds)]
    return subprocess.Popen([*command, "--coordinate", str(folder), str(port)], stdout=subprocess.PIPE, text=True)


async def lines(process: subprocess.Popen[str]) -> list[dict[str, Any]]:
    """The lines that the process prints until it ends."""
    out, _ = await asyncio.to_thread(process.communicate)
    if process.returncode:
        raise SystemExit(f"the coordinator ended with {process.returncode}")
    return [json.loads(line) for line in out.splitlines()]


async def killed(folder: Path, n_devices: int, port: int, times: int) -> tuple[list[float], list[float]]:
    """Kill a coordinator ``times`` times during a run. Returns the seconds from each restart until it serves devices,
    and until the last device has polled again and the run continues.
    """
    answers: list[float] = []
    resumes: list[float] = []
    for session in range(times + 1):
        began = time.monotonic()
        process = spawn(folder, n_devices, 1_000_000, port)
        assert process.stdout is not None
        while True:
            said = json.loads(await asyncio.to_thread(process.stdout.readline))
            if session and "answers" in said:
                answers.append(said["answers"] - began)
            if session and "at" in said:
                resumes.append(said["at"] - began)
            if "closed" in said:
                break
        os.kill(process.pid, signal.SIGKILL)
        await asyncio.to_thread(process.wait)
        process.stdout.close()
    return answers, resumes


async def measure(folder: Path, n_devices: int, rounds: int, restarts: int, work_s: float) -> dict[str, Any]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    waits: list[float] = []
    credentials = enrol(folder, n_devices, f"http://127.0.0.1:{port}")
    here = (await lines(spawn(folder, n_devices, rounds, 0)))[-1]
    calling = asyncio.ensure_future(call_in(VirtualDevice(each, work_s, POPSIZE, waits) for each in credentials))
    try:
        there = (await lines(spawn(folder, n_devices, rounds, port)))[-1]
        acknowledged = list(waits)
        (folder / f"runs-{port}.db").unlink()
        answers, resumes = await killed(folder, n_devices, port, restarts)
    finally:
        calling.cancel()
        await asyncio.gather(calling, return_exceptions=True)
    quarter = max(len(there["rss"]) // 4, 1)
    return {
        "devices": n_devices,
        "rounds": rounds,
        "work_s": work_s,
        "cpu_ms_per_report": 1e3 * there["cpu_s"] / there["reports"],
        "cpu_ms_per_report_in_process": 1e3 * here["cpu_s"] / here["reports"],
        "seconds": there["seconds"],
        "acknowledged_p50_ms": 1e3 * float(np.quantile(acknowledged, 0.5)),
        "acknowledged_p99_ms": 1e3 * float(np.quantile(acknowledged, 0.99)),
        "rss_mb": max(there["rss"]) / 1e6,
        "rss_growth_mb": (max(there["rss"][-quarter:]) - max(there["rss"][: 2 * quarter])) / 1e6,
        "answers_again_p50_s": float(np.quantile(answers, 0.5)) if answers else None,
        "answers_again_max_s": max(answers, default=None),
        "resumes_p50_s": float(np.quantile(resumes, 0.5)) if resumes else None,
        "resumes_max_s": max(resumes, default=None),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--work", type=float, default=5.0, help="seconds over which the devices' reports are spread")
    parser.add_argument("--restarts", type=int, default=5, help="number of times that the coordinator is killed")
    parser.add_argument("--json", action="store_true", help="print only the JSON line")
    parser.add_argument("--coordinate", nargs=2, metavar=("FOLDER", "PORT"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.coordinate:
        coordinate(Path(given.coordinate[0]), given.devices, given.rounds, int(given.coordinate[1]))
        return
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # two connections per device
    with tempfile.TemporaryDirectory() as folder:
        found = asyncio.run(measure(Path(folder), given.devices, given.rounds, given.restarts, given.work))
    print(json.dumps(found))
    if given.json:
        return
    ratio = found["cpu_ms_per_report"] / found["cpu_ms_per_report_in_process"]
    print(f"{found['devices']} devices call in for {found['rounds']} rounds, {found['seconds']:.1f} s")
    print(f"coordinator's CPU per report {found['cpu_ms_per_report']:.2f} ms, {ratio:.1f} times that without sockets")
    print(
        f"report acknowledged          {found['acknowledged_p50_ms']:.0f} ms, p99 {found['acknowledged_p99_ms']:.0f} ms"
    )
    print(
        f"resident memory              {found['rss_mb']:.0f} MB, {found['rss_growth_mb']:+.1f} MB over the second half"
    )
    if restarts := given.restarts:
        print(f"killed {restarts} times")
        for what, key in (("responds again after", "answers_again"), ("resumed, all devices back", "resumes")):
            print(f"{what:28} {found[f'{key}_p50_s']:.2f} s, longest {found[f'{key}_max_s']:.2f} s")


if __name__ == "__main__":
    main()
