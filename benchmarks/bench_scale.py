"""Limits of a coordinator as the fleet grows to a million devices, and designs that remove them.

Measures on this machine the cost of a poll, a call, a held connection, a report and a member for the coordinator (real
sockets and processes), computes the number of devices at which each saturates a core, and checks this with a
discrete-event simulation with a virtual clock, in which every poll, plan and report of a fleet queues for one event
loop. With call times, the simulated devices are drawn and called by the coordinator's own code. The peer of each
design is the one before it. docs/scale.md discusses the results.

    python benchmarks/bench_scale.py
    python benchmarks/bench_scale.py --costs 0.6,0.9,1.9,2.5,0.001,40 --devices 1000,1000000    # ms, KB: not measured
    python benchmarks/bench_scale.py --sockets 10000    # a real coordinator and real connections, see socket_fleet.py
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import heapq
import itertools
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
import socket_fleet
from bench_coordinator import POPSIZE, TASK, D, InstantDevice, enrol
from virtual_devices import Connection

from fedbpt.coordinator.clients import DeviceClient, InProcessClient
from fedbpt.coordinator.devices.call_times import DRAWN, MAX_AHEAD, CallTimes
from fedbpt.coordinator.devices.drafts import Draft
from fedbpt.coordinator.devices.enrolment import DeviceRegistry
from fedbpt.coordinator.federation import Federation
from fedbpt.coordinator.service.server import CoordinatorServer
from fedbpt.device.agent.calls import client_options
from fedbpt.device.agent.worker import Worker
from fedbpt.machine.memory import memory_of_process
from fedbpt.net import certs
from fedbpt.net.tls import Tls
from fedbpt.protocol import codec
from fedbpt.protocol.polling import MAX_PAUSE_S, POLL_PATH, POLL_S, Poll, call_s, poll_s
from fedbpt.protocol.specs import ObjectiveSpec, PromptSpec
from fedbpt.runs.events import Event, RoundClosed
from fedbpt.runs.settings import RunSettings
from fedbpt.runs.store import RunStore

HERE = Path(__file__).parent


class Costs(NamedTuple):
    """Costs for the coordinator: CPU milliseconds, and KB of memory."""

    poll_ms: float
    """An empty poll, over an open connection."""
    call_ms: float
    """A poll of a device that is told when to call again, with its connection."""
    tls_call_ms: float
    """The same over TLS, with the handshake."""
    report_ms: float
    """A device's part of a round: plan, report, and the polls that carry them."""
    member_ms: float
    """A device in a round that does not ask it."""
    connection_kb: float
    """A held poll."""


# --- measuring -------------------------------------------------------------------------------------------------------


def serve(folder: Path) -> None:
    """A coordinator's server in a separate process, which prints its CPU seconds and memory for each input line."""
    fleet = [f"d{i}" for i in range(100_000)]
    pacer = CallTimes(frozenset(fleet), lambda: MAX_PAUSE_S)
    drafts = [Draft("r", 0, round, ASKED, len(fleet)) for round in range(MAX_AHEAD + 1)]
    pacer.opened(lambda ahead, device: drafts[ahead].draws(device))
    certs.init(folder / "certs", {"coordinator": ["127.0.0.1"]})
    tls = Tls(*certs.pair(folder / "certs", "coordinator"))
    with contextlib.ExitStack() as stack:
        registry = stack.enter_context(DeviceRegistry(folder / "devices.db"))
        for server in (CoordinatorServer(registry), CoordinatorServer(registry, tls=tls)):
            stack.enter_context(server).office.pace("r", pacer)
            print(server.url, flush=True)
        for _ in sys.stdin:
            print(json.dumps({"cpu_s": time.process_time(), "rss": memory_of_process()["rss"]}), flush=True)


async def polls(
    server: subprocess.Popen[str], folder: Path, urls: tuple[str, str], n: int, times: int
) -> tuple[list[float], float]:
    """CPU ms of an empty poll, of a call, and of one over TLS, and KB of a held poll.

    ``n``: devices; ``times``: polls and calls of each.
    """
    clients = []
    url, encrypted = urls
    credentials = enrol(folder, n, url)
    trusted = Tls(ca=folder / "certs" / "ca.pem").client_context()
    for each in credentials:
        options = client_options(url, Tls())
        options["headers"]["authorization"] = f"Bearer {each.bearer}"
        clients.append(httpx.AsyncClient(**{**options, "timeout": 90.0}))

    async def poll(client: httpx.AsyncClient, wait_s: float) -> None:
        (await client.post(POLL_PATH, content=codec.encode(Poll(wait_s=wait_s)))).raise_for_status()

    async def call(connection: Connection) -> None:
        await connection.post(POLL_PATH, codec.encode(Poll()))
        connection.close()

    async def all_poll() -> None:
        for start in range(0, n, 50):
            await asyncio.gather(*(poll(client, 0.0) for client in clients[start : start + 50]))

    empty = said(server)
    await all_poll()  # open the connections
    before = said(server)
    for _ in range(times):
        await all_poll()
    after = said(server)
    for _ in range(times):
        for each in credentials:
            await call(Connection(each))
    called = said(server)
    for _ in range(times):
        for each in credentials:
            await call(Connection(replace(each, coordinator=encrypted), tls=trusted))
    called_tls = said(server)
    held = [asyncio.ensure_future(poll(client, 60.0)) for client in clients]
    await asyncio.sleep(3.0)
    held_rss = said(server)["rss"]
    read = [before, after, called, called_tls]
    costs = [1e3 * (last["cpu_s"] - first["cpu_s"]) / (n * times) for first, last in itertools.pairwise(read)]
    for task in held:
        task.cancel()
    await asyncio.gather(*held, return_exceptions=True)
    await asyncio.gather(*(client.aclose() for client in clients))
    return costs, (held_rss - empty["rss"]) / 1024 / n


def said(server: subprocess.Popen[str]) -> dict[str, float]:
    assert server.stdin is not None
    assert server.stdout is not None
    server.stdin.write("\n")
    server.stdin.flush()
    found: dict[str, float] = json.loads(server.stdout.readline())
    return found


@contextlib.contextmanager
def coordinator(folder: Path) -> Iterator[tuple[subprocess.Popen[str], tuple[str, str]]]:
    """The process, and its addresses: without TLS, and with it."""
    command = [sys.executable, __file__, "--serve", str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process, (process.stdout.readline().strip(), process.stdout.readline().strip())


def report_ms(devices: int, rounds: int) -> float:
    """CPU ms of a report, by bench_coordinator.py: a run with devices that poll."""
    command = [sys.executable, HERE / "bench_coordinator.py", "--json", "--restarts", "0"]
    command += ["--devices", str(devices), "--rounds", str(rounds)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
    return float(json.loads(done.stdout)["cpu_ms_per_report"])


def member_ms(few: int, many: int) -> float:
    """CPU ms of a round for a device that it does not ask: rounds of 20 reports, in fleets of two sizes."""
    a_round = {n: idle_round(n, 25) for n in (few, many)}
    return 1e3 * (a_round[many] - a_round[few]) / (many - few)


def idle_round(n: int, rounds: int) -> float:
    """CPU seconds of a round, in the median, of a run of ``n`` devices in this process, of which it asks 20."""
    asked = RunSettings(
        rounds=rounds, popsize=POPSIZE, prompt=PromptSpec(d=D), objective=ObjectiveSpec(readout_words=0),
        calibrate=False, quorum=0.5, per_round=20, over_selection=0.0, stragglers=0.0, ensemble=1,
    )  # fmt: skip
    worker = Worker("devices")
    clients: list[DeviceClient] = [InProcessClient(InstantDevice(f"d{i}"), worker=worker) for i in range(n)]
    ends: list[float] = []

    def watch(event: Event) -> None:
        if isinstance(event, RoundClosed):
            ends.append(time.process_time())

    with tempfile.TemporaryDirectory() as folder, RunStore(Path(folder) / "runs.db") as store:
        Federation(clients, TASK, asked, asked.aggregator(), store, "r", watch).run()
    worker.close()
    return float(np.median(np.diff(ends)))


def measured(devices: int, rounds: int) -> Costs:
    with tempfile.TemporaryDirectory() as name, coordinator(Path(name)) as (server, urls):
        calls, connection = asyncio.run(polls(server, Path(name), urls, devices, 20))
    return Costs(*calls, report_ms(devices, rounds), member_ms(500, 8000), connection)


# --- computation -----------------------------------------------------------------------------------------------------

WORK_S = 60.0  # a device's part of a round, median
SPREAD = 0.5  # σ of its logarithm over devices
OVER = 1.25  # devices asked per report that a round waits for
ROUND_S = WORK_S * math.exp(SPREAD * statistics.NormalDist().inv_cdf(1 / OVER))  # time until these reports have arrived
ASKED = 1250  # devices that a round asks
DEADLINE_S = 600.0  # of the run's rounds


@dataclass(frozen=True)
class Design:
    """A design. ``per_round``: devices that a round asks; 0: all.

    ``held``: polls are held, and repeated every `poll_s`; else devices call when they are told, over ``tls`` or
    without. ``relays``: number of processes that receive polls and reports and send sums; 0: none.
    """

    name: str
    per_round: int = 0
    held: bool = True
    relays: int = 0
    tls: bool = False

    def asked(self, n: int) -> int:
        return min(n, self.per_round or n)

    def polls_per_s(self, n: int) -> tuple[float, float]:
        """Polls of devices that wait, and calls of others, a second."""
        if self.held:
            return n / poll_s(n), 0.0
        drawn = min(DRAWN * self.asked(n), n)
        # A device that is drawn calls once, and then waits for three quarters of a round.
        return drawn * 0.75 / poll_s(n), drawn / ROUND_S + (n - drawn) / max(0.875 * bound_s(n), ROUND_S)

    def call_ms(self, costs: Costs) -> float:
        return costs.tls_call_ms if self.tls else costs.call_ms


def bound_s(n: int) -> float:
    """Longest time after which a device calls: half of ``deadline_s``, which is to be long enough for `call_s`."""
    return min(max(DEADLINE_S / 2, call_s(n)), MAX_PAUSE_S)


DESIGNS = (
    Design("held polls, all asked"),
    Design("held polls, 1,250 asked", per_round=ASKED),
    Design("call times, 1,250 asked", per_round=ASKED, held=False),
    Design("call times over TLS, 1,250 asked", per_round=ASKED, held=False, tls=True),
    Design("held polls, all asked, 100 relays", relays=100),
)


def load(design: Design, costs: Costs, n: int) -> dict[str, float]:
    """Load of each part, of the coordinator or of one relay, in cores; an event loop has one."""
    processes = max(design.relays, 1)
    waiting, calling = design.polls_per_s(n // processes)
    return {
        "polls": (waiting * costs.poll_ms + calling * design.call_ms(costs)) / 1e3,
        "reports": design.asked(n) / ROUND_S * costs.report_ms / 1e3 / processes,
        "members": 0.0 if design.relays else n / ROUND_S * costs.member_ms / 1e3,
    }


def limits(costs: Costs, memory_gb: float) -> dict[str, float]:
    """Number of devices at which each part alone reaches its limit."""
    return {
        "reports of all devices saturate a core": ROUND_S / (costs.report_ms / 1e3),
        "held polls saturate a core": POLL_S[1] / (costs.poll_ms / 1e3),
        "calls saturate a core": 0.875 * MAX_PAUSE_S / (costs.call_ms / 1e3),
        "calls over TLS saturate a core": 0.875 * MAX_PAUSE_S / (costs.tls_call_ms / 1e3),
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


class HeldFleet:
    """Simulates ``n`` devices whose polls are held, the coordinator and its relays, from time 0 on."""

    def __init__(self, design: Design, costs: Costs, n: int, seed: int = 0) -> None:
        self._design, self._costs, self._n = design, costs, n
        self._rng = np.random.default_rng(seed)
        self._top = Loop()
        self._relays = [Loop() for _ in range(design.relays)]
        self._queue: list[tuple[float, int, int, int]] = []  # time, kind, device or relay, round
        self._asked = design.asked(n)
        self._poll_s = poll_s(n // max(design.relays, 1))
        self._arrived: list[int] = [0] * max(design.relays, 1)
        self._sums = 0
        self._began = 0.0
        self.rounds: list[float] = []

    def run(self, horizon_s: float) -> dict[str, float]:
        self._polls()
        self._begin(0.0)
        queue, costs, events = self._queue, self._costs, 0
        while queue and queue[0][0] < horizon_s:
            now, kind, who, round = heapq.heappop(queue)
            events += 1
            if kind == POLL:
                self._loop(who).serve(now, costs.poll_ms / 1e3)
                heapq.heappush(queue, (now + self._poll_s, POLL, who, 0))
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

    def _polls(self) -> None:
        first = self._rng.uniform(0.0, self._poll_s, self._n)
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
        if not self._relays:
            done = self._top.serve(done, self._n * self._costs.member_ms / 1e3)
        self.rounds.append(done - self._began)
        self._begin(done)


class PacedFleet:
    """Simulates ``n`` devices that call when the coordinator's own code tells them, from time 0 on."""

    def __init__(self, design: Design, costs: Costs, n: int, seed: int = 0) -> None:
        self._costs, self._n, self._size = costs, n, design.asked(n)
        self._call_ms = design.call_ms(costs)
        self._names = [f"d{i}" for i in range(n)]
        self._rng = np.random.default_rng(seed)
        self._now = 0.0
        self._pacer = CallTimes(
            frozenset(self._names), lambda: bound_s(n), lambda: self._short, random.Random(seed), lambda: self._now
        )
        self._draws = Draft("r", 0, 0, self._size, n)
        self._short = True
        self._loop = Loop()
        self._queue: list[tuple[float, int, int, int]] = []  # time, kind, device, the device's state
        self._state = [0] * n  # rises when a device's next event has become another
        self._waits = [not call_s(n)] * n
        self._working: set[int] = set()
        self._reports = 0
        self._began = 0.0
        self._calls = 0
        self.rounds: list[float] = []
        self.found: list[float] = []  # seconds until as many devices as are needed had the plan

    def run(self, horizon_s: float) -> dict[str, float]:
        for device, when in enumerate(self._rng.uniform(0.0, max(poll_s(self._n), call_s(self._n)), self._n).tolist()):
            self._push(when, POLL, device)
        self._open(0.0)
        events, held = 0, []
        while self._queue and self._queue[0][0] < horizon_s:
            self._now, kind, device, state = heapq.heappop(self._queue)
            if state != self._state[device]:
                continue
            events += 1
            if kind == POLL:
                self._poll(device)
            else:
                self._report(device)
            if events % 100 == 0:
                held.append(sum(self._waits))
        return {
            "cores": self._loop.busy_s / horizon_s,
            "wait_p99_s": float(np.quantile(self._loop.waits, 0.99)),
            "behind_s": max(self._loop.free_at - horizon_s, 0.0),
            "rounds": len(self.rounds),
            "round_s": statistics.median(self.rounds) if self.rounds else math.nan,
            "events": events,
            "calls_per_s": self._calls / horizon_s,
            "held_p50": float(np.median(held)),
            "first_found_s": self.found[0] if self.found else math.nan,
            "found_s": max(self.found[1:], default=math.nan),
        }

    def _push(self, when: float, kind: int, device: int) -> None:
        self._state[device] += 1
        heapq.heappush(self._queue, (when, kind, device, self._state[device]))

    def _poll(self, device: int) -> None:
        if self._short and self._draws.draws(self._names[device]):
            self._start(device)
            return
        pause_s = math.ceil(self._pacer(self._names[device]))
        is_open = self._waits[device]
        done = self._loop.serve(self._now, (self._costs.poll_ms if is_open else self._call_ms) / 1e3)
        self._calls += 1
        self._waits[device] = not pause_s
        self._push(done + (pause_s or poll_s(self._n)), POLL, device)

    def _start(self, device: int) -> None:
        self._working.add(device)
        self._waits[device] = False
        self._push(self._now + float(self._rng.lognormal(math.log(WORK_S), SPREAD)), REPORT, device)
        asked = len(self._working) + self._reports
        self._short = asked < self._size
        if asked == math.ceil(self._size / OVER):
            self.found.append(self._now - self._began)

    def _open(self, now: float) -> None:
        """A round asks the drawn devices that wait, and then the others: see `fedbpt.coordinator.devices.fleet`."""
        self._now = self._began = now
        self._reports = 0
        round = len(self.rounds)
        drafts = [Draft("r", 0, round + ahead, self._size, self._n) for ahead in range(MAX_AHEAD + 1)]
        self._pacer.opened(lambda ahead, device: drafts[ahead].draws(device))
        self._draws, self._short = drafts[0], True
        order = [int(name[1:]) for name in self._draws.cohort(self._names, self._size).order]
        for device in [device for device in order[: DRAWN * self._size] if self._waits[device]][: self._size]:
            self._start(device)

    def _report(self, device: int) -> None:
        done = self._loop.serve(self._now, self._costs.report_ms / 1e3)
        self._working.discard(device)
        self._reports += 1
        self._push(done, POLL, device)
        self._waits[device] = True  # its connection is open
        if self._reports == math.ceil(self._size / OVER):
            done = self._loop.serve(done, self._n * self._costs.member_ms / 1e3)
            self.rounds.append(done - self._began)
            for each in self._working:  # they are told to stop
                self._waits[each] = True
                self._push(done, POLL, each)
            self._working.clear()
            self._open(done)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--costs", help="poll, call, call over TLS, report, member in ms, connection in KB, instead of measuring"
    )
    parser.add_argument("--devices", default="1000,10000,100000,1000000")
    parser.add_argument("--horizon", type=float, default=300.0, help="virtual seconds; a third for large fleets")
    parser.add_argument("--memory", type=float, default=64.0, help="GB of the coordinator's machine")
    parser.add_argument("--measure-devices", type=int, default=100)
    parser.add_argument("--measure-rounds", type=int, default=10)
    parser.add_argument("--sockets", type=int, help="only run this many devices over real connections")
    parser.add_argument("--per-round", type=int, default=1000, help="with --sockets: reports of a round")
    parser.add_argument("--rounds", type=int, default=5, help="with --sockets: rounds")
    parser.add_argument("--idle", type=float, default=60.0, help="with --sockets: seconds between rounds, measured")
    parser.add_argument("--work", type=float, default=30.0, help="with --sockets: longest work of a device, seconds")
    parser.add_argument("--json", action="store_true", help="print only the JSON line")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        serve(given.serve)
        return
    if given.sockets:
        over_sockets(given)
        return
    given_costs = [float(each) for each in given.costs.split(",")] if given.costs else None
    costs = Costs(*given_costs) if given_costs else measured(given.measure_devices, given.measure_rounds)
    lines: list[dict[str, Any]] = []
    for design in DESIGNS:
        for n in map(int, given.devices.split(",")):
            horizon = given.horizon if n <= 100_000 else given.horizon / 3
            horizon = horizon if design.held else 3 * given.horizon
            fleet = HeldFleet if design.held else PacedFleet
            found = fleet(design, costs, n).run(horizon)
            parts = load(design, costs, n)
            lines.append({"design": asdict(design), "devices": n, "arithmetic": parts, "simulated": found})
    if not given.json:
        show(costs, given.memory, lines)
    print(json.dumps({"costs": costs._asdict(), "limits": limits(costs, given.memory), "lines": lines}))


def over_sockets(given: argparse.Namespace) -> None:
    """Real connections: devices that call when they are told, and those whose polls are held."""
    for paced in (True, False):
        found = socket_fleet.measured(given.sockets, given.per_round, given.rounds, given.idle, given.work, paced)
        print(json.dumps(found), flush=True)
        if not given.json:
            seen, here, late = found["acknowledged"], found["acknowledged_in_coordinator"], found["loop_late"]
            print(
                f"{found['devices']:,} devices, {'told when to call' if paced else 'polls held'}: "
                f"{found['cores_between_rounds']:.2f} cores between rounds, {found['cores_in_rounds']:.2f} in rounds "
                f"of {found['round_s']:.0f} s, {found['connections']:,} connections, {found['rss_mb']:.0f} MB\n"
                f"  reports acknowledged: {seen['p50_ms']:.1f} ms, p99 {seen['p99_ms']:.0f} ms at the device; p99 "
                f"{here['p99_ms']:.0f} ms in the coordinator, whose loop is late by {late['p99_ms']:.0f} ms (p99)"
            )


def show(costs: Costs, memory_gb: float, lines: list[dict[str, Any]]) -> None:
    print(
        f"a poll {costs.poll_ms:.2f} ms, a call {costs.call_ms:.2f} ms, over TLS {costs.tls_call_ms:.2f} ms, "
        f"a report {costs.report_ms:.2f} ms, a member {1e3 * costs.member_ms:.2f} µs a round, "
        f"a held poll {costs.connection_kb:.0f} KB"
    )
    for what, n in limits(costs, memory_gb).items():
        print(f"  {n:14,.0f} devices: {what}")
    heads = f"{'devices':>9}  {'polls':>8} {'reports':>8} {'members':>8} {'sum':>7} {'simulated':>10}"
    print(f"{'cores of one process':33} {heads} {'behind':>8} {'wait p99':>11} {'round':>8}")
    for line in lines:
        parts, found = line["arithmetic"], line["simulated"]
        print(
            f"{line['design']['name']:33} {line['devices']:9,}  {parts['polls']:8.3f} {parts['reports']:8.3f} "
            f"{parts['members']:8.3f} {sum(parts.values()):7.2f} {found['cores']:10.2f} {found['behind_s']:6.0f} s "
            f"{found['wait_p99_s']:9.2f} s {found['round_s']:6.0f} s"
            + (
                f"  {found['held_p50']:,.0f} held, devices of the first round found in {found['first_found_s']:.0f} s, "
                f"of others in {found['found_s']:.0f} s"
                if "held_p50" in found
                else ""
            )
        )


if __name__ == "__main__":
    main()
