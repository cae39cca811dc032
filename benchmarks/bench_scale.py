"""Limits of a coordinator as the fleet grows to a million devices, and designs that remove them.

Measures on this machine the cost of a poll, a held connection, a report and a member for the coordinator (real sockets
and processes), computes the number of devices at which each saturates a core, and checks this with a discrete-event
simulation with a virtual clock, in which every poll, plan and report of a fleet queues for one event loop. The peer of
each design is the one before it. docs/scale.md discusses the results.

    python benchmarks/bench_scale.py
    python benchmarks/bench_scale.py --costs 0.6,2.5,0.001,40 --devices 1000,1000000    # ms, ms, ms, KB: not measured
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import heapq
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
from bench_coordinator import POPSIZE, TASK, D, InstantDevice, enrol

from fedbpt.coordinator.clients import DeviceClient, InProcessClient
from fedbpt.coordinator.enrolment import DeviceRegistry
from fedbpt.coordinator.federation import Federation
from fedbpt.coordinator.server import CoordinatorServer
from fedbpt.device.agent.calls import client_options
from fedbpt.device.agent.worker import Worker
from fedbpt.machine.memory import memory_of_process
from fedbpt.net.tls import Tls
from fedbpt.protocol import codec
from fedbpt.protocol.polling import POLL_PATH, POLL_S, Poll, poll_s
from fedbpt.protocol.specs import ObjectiveSpec, PromptSpec
from fedbpt.runs.settings import RunSettings
from fedbpt.runs.store import RunStore

HERE = Path(__file__).parent


class Costs(NamedTuple):
    """Costs for the coordinator: CPU milliseconds, and KB of memory."""

    poll_ms: float
    """An empty poll."""
    report_ms: float
    """A device's part of a round: plan, report, and the polls that carry them."""
    member_ms: float
    """A device in a round that does not ask it."""
    connection_kb: float
    """A held poll."""


# --- measuring -------------------------------------------------------------------------------------------------------


def serve(folder: Path) -> None:
    """A coordinator's server in a separate process, which prints its CPU seconds and memory for each input line."""
    with DeviceRegistry(folder / "devices.db") as registry, CoordinatorServer(registry) as server:
        print(server.url, flush=True)
        for _ in sys.stdin:
            print(json.dumps({"cpu_s": time.process_time(), "rss": memory_of_process()["rss"]}), flush=True)


async def polls(server: subprocess.Popen[str], folder: Path, url: str, n: int, times: int) -> tuple[float, float]:
    """CPU ms of an empty poll, and KB of a held one, with ``n`` devices and ``times`` polls each."""
    clients = []
    for each in enrol(folder, n, url):
        options = client_options(url, Tls())
        options["headers"]["authorization"] = f"Bearer {each.bearer}"
        clients.append(httpx.AsyncClient(**{**options, "timeout": 90.0}))

    async def poll(client: httpx.AsyncClient, wait_s: float) -> None:
        (await client.post(POLL_PATH, content=codec.encode(Poll(wait_s=wait_s)))).raise_for_status()

    async def all_poll() -> None:
        for start in range(0, n, 50):
            await asyncio.gather(*(poll(client, 0.0) for client in clients[start : start + 50]))

    empty = said(server)
    await all_poll()  # open the connections
    before = said(server)
    for _ in range(times):
        await all_poll()
    after = said(server)
    held = [asyncio.ensure_future(poll(client, 60.0)) for client in clients]
    await asyncio.sleep(3.0)
    held_rss = said(server)["rss"]
    for task in held:
        task.cancel()
    await asyncio.gather(*held, return_exceptions=True)
    await asyncio.gather(*(client.aclose() for client in clients))
    return 1e3 * (after["cpu_s"] - before["cpu_s"]) / (n * times), (held_rss - empty["rss"]) / 1024 / n


def said(server: subprocess.Popen[str]) -> dict[str, float]:
    assert server.stdin is not None
    assert server.stdout is not None
    server.stdin.write("\n")
    server.stdin.flush()
    found: dict[str, float] = json.loads(server.stdout.readline())
    return found


@contextlib.contextmanager
def coordinator(folder: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    command = [sys.executable, __file__, "--serve", str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process, process.stdout.readline().strip()


def report_ms(devices: int, rounds: int) -> float:
    """CPU ms of a report, by bench_coordinator.py: a run with devices that poll."""
    command = [sys.executable, HERE / "bench_coordinator.py", "--json", "--restarts", "0"]
    command += ["--devices", str(devices), "--rounds", str(rounds)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
    return float(json.loads(done.stdout)["cpu_ms_per_report"])


def member_ms(few: int, many: int) -> float:
    """CPU ms of a round for a device that it does not ask: rounds of 20 reports, in fleets of two sizes."""
    idle_fleet(few, 2)  # warm up
    a_round = {n: (idle_fleet(n, 12) - idle_fleet(n, 2)) / 10 for n in (few, many)}
    return 1e3 * (a_round[many] - a_round[few]) / (many - few)


def idle_fleet(n: int, rounds: int) -> float:
    """CPU seconds of a run of ``n`` devices in this process, of which a round asks 20."""
    asked = RunSettings(
        rounds=rounds, popsize=POPSIZE, prompt=PromptSpec(d=D), objective=ObjectiveSpec(readout_words=0),
        calibrate=False, quorum=0.5, per_round=20, over_selection=0.0, stragglers=0.0, ensemble=1,
    )  # fmt: skip
    worker = Worker("devices")
    clients: list[DeviceClient] = [InProcessClient(InstantDevice(f"d{i}"), worker=worker) for i in range(n)]
    with tempfile.TemporaryDirectory() as folder, RunStore(Path(folder) / "runs.db") as store:
        before = time.process_time()
        Federation(clients, TASK, asked, asked.aggregator(), store, "r").run()
        spent = time.process_time() - before
    worker.close()
    return spent


def measured(devices: int, rounds: int) -> Costs:
    with tempfile.TemporaryDirectory() as name, coordinator(Path(name)) as (server, url):
        poll, connection = asyncio.run(polls(server, Path(name), url, devices, 20))
    return Costs(poll, report_ms(devices, rounds), member_ms(500, 2000), connection)


# --- computation -----------------------------------------------------------------------------------------------------

WORK_S = 60.0  # a device's part of a round, median
SPREAD = 0.5  # σ of its logarithm over devices
OVER = 1.25  # devices asked per report that a round waits for
ROUND_S = WORK_S * math.exp(SPREAD * statistics.NormalDist().inv_cdf(1 / OVER))  # time until these reports have arrived
CALLS = 3.0  # with scheduled polls: devices that poll per device that a round asks


@dataclass(frozen=True)
class Design:
    """A design. ``per_round``: devices that a round asks; 0: all.

    ``held``: polls are held, and repeated every `poll_s`; else devices poll at scheduled times. ``relays``: number of
    processes that receive polls and reports and send sums; 0: none.
    """

    name: str
    per_round: int = 0
    held: bool = True
    relays: int = 0

    def asked(self, n: int) -> int:
        return min(n, self.per_round or n)

    def calls_per_s(self, n: int) -> float:
        return n / poll_s(n) if self.held else CALLS * self.asked(n) / ROUND_S


DESIGNS = (
    Design("current, all asked"),
    Design("current, 1,250 asked", per_round=1250),
    Design("scheduled polls, 1,250 asked", per_round=1250, held=False),
    Design("scheduled polls, all asked, 100 relays", held=False, relays=100),
)


def load(design: Design, costs: Costs, n: int) -> dict[str, float]:
    """Load of each part, of the coordinator or of one relay, in cores; an event loop has one."""
    processes = max(design.relays, 1)
    return {
        "polls": design.calls_per_s(n) * costs.poll_ms / 1e3 / processes,
        "reports": design.asked(n) / ROUND_S * costs.report_ms / 1e3 / processes,
        "members": n / ROUND_S * costs.member_ms / 1e3 if design.held else 0.0,
    }


def limits(costs: Costs, memory_gb: float) -> dict[str, float]:
    """Number of devices at which each part alone reaches its limit."""
    return {
        "reports of all devices saturate a core": ROUND_S / (costs.report_ms / 1e3),
        "polls saturate a core": POLL_S[1] / (costs.poll_ms / 1e3),
        f"held polls fill {memory_gb:g} GB": memory_gb * 1e6 / costs.connection_kb,
        "idle members saturate a core": ROUND_S / max(costs.member_ms / 1e3, 1e-12),
    }


# --- simulation ------------------------------------------------------------------------------------------------------


@dataclass
class Loop:
    """One event loop, which does work in order of arrival. Times in virtual seconds."""

    free_at: float = 0.0
    busy_s: float = 0.0
    waits: list[float] = field(default_factory=list)

    def serve(self, now: float, cost_s: float) -> float:
        """The time at which work that arrives at ``now`` is done."""
        start = max(now, self.free_at)
        self.waits.append(start - now)
        self.free_at = start + cost_s
        self.busy_s += cost_s
        return self.free_at


POLL, REPORT, SUM = 0, 1, 2


class Fleet:
    """Simulates ``n`` devices, the coordinator and its relays, from time 0 on."""

    def __init__(self, design: Design, costs: Costs, n: int, seed: int = 0) -> None:
        self._design, self._costs, self._n = design, costs, n
        self._rng = np.random.default_rng(seed)
        self._top = Loop()
        self._relays = [Loop() for _ in range(design.relays)]
        self._queue: list[tuple[float, int, int, int]] = []  # time, kind, device or relay, round
        self._asked = design.asked(n)
        self._arrived: list[int] = [0] * max(design.relays, 1)
        self._sums = 0
        self._began = 0.0
        self.rounds: list[float] = []

    def run(self, horizon_s: float) -> dict[str, float]:
        self._polls(horizon_s)
        self._begin(0.0)
        queue, costs, events = self._queue, self._costs, 0
        while queue and queue[0][0] < horizon_s:
            now, kind, who, round = heapq.heappop(queue)
            events += 1
            if kind == POLL:
                self._loop(who).serve(now, costs.poll_ms / 1e3)
                if self._design.held:
                    heapq.heappush(queue, (now + poll_s(self._n), POLL, who, 0))
            elif kind == REPORT:
                self._report(self._loop(who).serve(now, costs.report_ms / 1e3), who, round)
            else:
                self._sum(self._top.serve(now, costs.report_ms / 1e3), round)
        busiest = max([self._top, *self._relays], key=lambda loop: loop.busy_s)
        return {
            "cores": busiest.busy_s / horizon_s,
            "wait_p99_s": float(np.quantile(busiest.waits, 0.99)),
            "behind_s": max(busiest.free_at - horizon_s, 0.0),
            "rounds": len(self.rounds),
            "round_s": statistics.median(self.rounds) if self.rounds else math.nan,
            "events": events,
        }

    def _loop(self, device: int) -> Loop:
        return self._relays[device % len(self._relays)] if self._relays else self._top

    def _polls(self, horizon_s: float) -> None:
        if self._design.held:
            first = self._rng.uniform(0.0, poll_s(self._n), self._n)
        else:
            calls = self._rng.poisson(self._design.calls_per_s(self._n) * horizon_s)
            first = self._rng.uniform(0.0, horizon_s, calls)
        self._queue = [(when, POLL, device, 0) for device, when in enumerate(first.tolist())]
        heapq.heapify(self._queue)

    def _begin(self, now: float) -> None:
        """Devices that are asked report after their work; those after the round has enough reports are late."""
        self._began, self._sums = now, 0
        self._arrived = [0] * len(self._arrived)
        for device, seconds in enumerate(self._rng.lognormal(math.log(WORK_S), SPREAD, self._asked).tolist()):
            heapq.heappush(self._queue, (now + seconds, REPORT, device, len(self.rounds)))

    def _report(self, done: float, device: int, round: int) -> None:
        if round != len(self.rounds):
            return
        place = device % len(self._arrived)
        self._arrived[place] += 1
        if self._arrived[place] == math.ceil(self._asked / OVER / len(self._arrived)):
            if self._relays:
                heapq.heappush(self._queue, (done, SUM, place, round))
            else:
                self._close(done)

    def _sum(self, done: float, round: int) -> None:
        if round == len(self.rounds):
            self._sums += 1
            if self._sums == len(self._relays):
                self._close(done)

    def _close(self, done: float) -> None:
        if self._design.held:
            done = self._top.serve(done, self._n * self._costs.member_ms / 1e3)
        self.rounds.append(done - self._began)
        self._begin(done)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--costs", help="poll, report, member in ms and connection in KB, instead of measuring")
    parser.add_argument("--devices", default="1000,10000,100000,1000000")
    parser.add_argument("--horizon", type=float, default=300.0, help="virtual seconds; a third for large fleets")
    parser.add_argument("--memory", type=float, default=64.0, help="GB of the coordinator's machine")
    parser.add_argument("--measure-devices", type=int, default=100)
    parser.add_argument("--measure-rounds", type=int, default=10)
    parser.add_argument("--json", action="store_true", help="print only the JSON line")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        serve(given.serve)
        return
    given_costs = [float(each) for each in given.costs.split(",")] if given.costs else None
    costs = Costs(*given_costs) if given_costs else measured(given.measure_devices, given.measure_rounds)
    lines: list[dict[str, Any]] = []
    for design in DESIGNS:
        for n in map(int, given.devices.split(",")):
            horizon = given.horizon if n <= 100_000 else given.horizon / 3
            found = Fleet(design, costs, n).run(horizon)
            parts = load(design, costs, n)
            lines.append({"design": asdict(design), "devices": n, "arithmetic": parts, "simulated": found})
    if not given.json:
        show(costs, given.memory, lines)
    print(json.dumps({"costs": costs._asdict(), "limits": limits(costs, given.memory), "lines": lines}))


def show(costs: Costs, memory_gb: float, lines: list[dict[str, Any]]) -> None:
    print(
        f"a poll {costs.poll_ms:.2f} ms, a report {costs.report_ms:.2f} ms, a member {1e3 * costs.member_ms:.2f} µs a "
        f"round, a held poll {costs.connection_kb:.0f} KB"
    )
    for what, n in limits(costs, memory_gb).items():
        print(f"  {n:14,.0f} devices: {what}")
    heads = f"{'devices':>9}  {'polls':>8} {'reports':>8} {'members':>8} {'sum':>7} {'simulated':>10}"
    print(f"{'cores of one process':22} {heads} {'behind':>8} {'wait p99':>11} {'round':>8}")
    for line in lines:
        parts, found = line["arithmetic"], line["simulated"]
        print(
            f"{line['design']['name']:22} {line['devices']:9,}  {parts['polls']:8.3f} {parts['reports']:8.3f} "
            f"{parts['members']:8.3f} {sum(parts.values()):7.2f} {found['cores']:10.2f} {found['behind_s']:6.0f} s "
            f"{found['wait_p99_s']:9.2f} s {found['round_s']:6.0f} s"
        )


if __name__ == "__main__":
    main()
