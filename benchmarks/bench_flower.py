"""Cost of a round on Flower, in seconds and bytes, compared with the same round over fedbpt's own transport.

Devices without a model, whose work takes no time, poll over loopback: a fedbpt coordinator, and as SuperNodes a
SuperLink. A relay between them counts all bytes, including headers and polls. Then without sockets: in Flower's
simulation engine, and in this process. `make test-flower` creates the environment for it.

    build/flower/bin/python benchmarks/bench_flower.py
    build/flower/bin/python benchmarks/bench_flower.py --simulate 1000
    build/flower/bin/python benchmarks/bench_flower.py --no-sockets --simulate 0 --model smollm2-135m
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.util
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bench_coordinator import POPSIZE, TASK, D, InstantDevice, enrol

from fedbpt import tasks
from fedbpt.coordinator.clients import DeviceClient, InProcessClient
from fedbpt.coordinator.devices.enrolment import DeviceRegistry
from fedbpt.coordinator.federation import Federation
from fedbpt.coordinator.service.server import CoordinatorServer
from fedbpt.device.agent import AgentService
from fedbpt.device.agent.poller import Poller
from fedbpt.device.agent.worker import Worker
from fedbpt.machine.memory import memory_of_process
from fedbpt.protocol import codec
from fedbpt.protocol.specs import ObjectiveSpec, PromptSpec
from fedbpt.runs.result import RunResult
from fedbpt.runs.settings import RunSettings
from fedbpt.runs.store import RunStore

HERE = Path(__file__).parent
BIN = Path(sys.executable).parent
DEADLINE_S = 600.0

APP = """
[project]
name = "bench"
version = "1.0.0"
description = "bench"
license = "MIT"
dependencies = []
[tool.flwr.app]
publisher = "fedbpt"
[tool.flwr.app.components]
serverapp = "bench_flower:server_app"
clientapp = "bench_flower:node_app"
[tool.flwr.app.config]
store = ""
devices = 0
rounds = 0
"""


def settings(rounds: int) -> RunSettings:
    return RunSettings(
        rounds=rounds, popsize=POPSIZE, prompt=PromptSpec(d=D), objective=ObjectiveSpec(readout_words=0),
        calibrate=False, deadline_s=DEADLINE_S, quorum=1.0, stragglers=0.0, ensemble=1,
    )  # fmt: skip


if importlib.util.find_spec("flwr"):
    from flwr.app import Context
    from flwr.serverapp import Grid, ServerApp

    from fedbpt.flower import APP as APP_FOLDER
    from fedbpt.flower import FedBPT, client_app

    server_app = ServerApp()

    @server_app.main()
    def main_of_server(grid: Grid, context: Context) -> None:
        given = context.run_config
        with RunStore(str(given["store"])) as store:
            FedBPT(TASK, settings(int(given["rounds"])), store, "r", devices=int(given["devices"])).start(grid)

    node_app = client_app(lambda context, _state: InstantDevice(f"d{context.node_config['partition-id']}"))


class Relay:
    """Forwards TCP connections to ``port`` and counts the bytes, on its own thread."""

    def __init__(self, port: int) -> None:
        self.up = self.down = 0
        self._to = port
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        serving = asyncio.run_coroutine_threadsafe(asyncio.start_server(self._serve, "127.0.0.1", 0), self._loop)
        self.port: int = serving.result(10).sockets[0].getsockname()[1]

    def count(self) -> tuple[int, int]:
        return self.up, self.down

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            other_reader, other_writer = await asyncio.open_connection("127.0.0.1", self._to)
        except OSError:  # not up yet, or shut down: the caller retries
            writer.close()
            return
        await asyncio.gather(self._pass(reader, other_writer, True), self._pass(other_reader, writer, False))

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, up: bool) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                if up:
                    self.up += len(data)
                else:
                    self.down += len(data)
                writer.write(data)
                await writer.drain()
        writer.close()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def round_seconds(path: Path) -> list[float]:
    """Seconds of the search's rounds, without the first, which starts with cold caches."""
    with RunStore(path) as store:
        return [line.metrics["seconds"] for line in store.history("r") if line.round > 1]


def figures(path: Path, n_devices: int, before: tuple[int, int], after: tuple[int, int]) -> dict[str, float]:
    """Median seconds of a round; bytes of the run per round and device, including connecting and polls."""
    seconds = round_seconds(path)
    per = n_devices * (len(seconds) + 1)
    return {
        "round_s": statistics.median(seconds),
        "up_bytes": (after[0] - before[0]) / per,
        "down_bytes": (after[1] - before[1]) / per,
    }


# --- over sockets ----------------------------------------------------------------------------------------------------


def by_coordinator(folder: Path, n_devices: int, rounds: int) -> dict[str, float]:
    """fedbpt's own transport: the devices poll the coordinator."""
    with contextlib.ExitStack() as stack:
        registry = stack.enter_context(DeviceRegistry(folder / "devices.db"))
        server = stack.enter_context(CoordinatorServer(registry))
        relay = Relay(int(server.url.rsplit(":", 1)[1]))
        worker = Worker("devices")
        stack.callback(worker.close)
        for each in enrol(folder, n_devices, f"http://127.0.0.1:{relay.port}"):
            service = AgentService(InstantDevice(each.device), worker)
            stack.enter_context(Poller(service, each, tell=lambda _line: None))
        until(lambda: len(server.present()) == n_devices)
        before = relay.count()
        tune([server.client(name) for name in server.present()], rounds, folder / "ours.db")
        return figures(folder / "ours.db", n_devices, before, relay.count())


def by_superlink(folder: Path, n_devices: int, rounds: int) -> dict[str, float]:
    """Flower's transport: SuperNode processes poll a SuperLink, and start a process for each message."""
    home, app, port = folder / "home", folder / "app", free_port()
    relay = Relay(port)
    with superlink(home, port, folder / "log") as environment, contextlib.ExitStack() as stack:
        for number in range(n_devices):
            options = ["--superlink", f"127.0.0.1:{relay.port}", "--node-config", f"partition-id={number}"]
            command = ["flower-supernode", "--insecure", "--host", "127.0.0.1", "--port", str(free_port()), *options]
            stack.enter_context(process(command, environment, folder / "log"))
        write_app(app)
        before = relay.count()
        flwr_run(app, environment, store=str(folder / "flower.db"), devices=n_devices, rounds=rounds)
        return figures(folder / "flower.db", n_devices, before, relay.count())


@contextlib.contextmanager
def superlink(home: Path, port: int, log: Path, *options: str) -> Iterator[dict[str, str]]:
    """Run a SuperLink; gives the environment in which ``flwr run APP here`` reaches it."""
    home.mkdir()
    here = f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    (home / "config.toml").write_text(here)
    environment = {
        **os.environ, "FLWR_HOME": str(home), "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1",
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(HERE),
    }  # fmt: skip
    command = ["flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(port), *options]
    with process([*command, "--disable-runtime-dependency-installation"], environment, log):
        until(lambda: answers(port))
        yield environment


@contextlib.contextmanager
def process(command: list[str], environment: dict[str, str], log: Path) -> Iterator[None]:
    with log.open("ab") as file:
        started = subprocess.Popen(
            [BIN / command[0], *command[1:]], env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file,
            start_new_session=True,
        )  # fmt: skip
    try:
        yield
    finally:
        started.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            started.wait(15)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)
        started.wait()


def write_app(folder: Path) -> None:
    folder.mkdir()
    (folder / "pyproject.toml").write_text(APP)


def flwr_run(app: Path, environment: dict[str, str], *options: str, **config: Any) -> None:
    """Run ``flwr run`` to the end. Raises SystemExit if it fails."""
    given = " ".join(f"{key}={json.dumps(value)}" for key, value in config.items())
    command = [BIN / "flwr", "run", app, "here", "--stream", "--run-config", given, *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    listing = [BIN / "flwr", "list", "here", "--format", "json"]
    said = json.loads(subprocess.run(listing, env=environment, capture_output=True, text=True, check=True).stdout)
    if done.returncode or said["runs"][0]["status"] != "finished:completed":
        raise SystemExit(f"flwr run failed: {said['runs'][:1]}\n{done.stdout[-4000:]}{done.stderr[-2000:]}")


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def until(condition: Callable[[], bool], seconds: float = 300.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise SystemExit("it did not happen in time")
        time.sleep(0.05)


def tune(clients: list[DeviceClient], rounds: int, path: Path) -> str:
    with RunStore(path) as store:
        asked = settings(rounds)
        return Federation(clients, TASK, asked, asked.aggregator(), store, "r").run().digest


# --- without sockets -------------------------------------------------------------------------------------------------


def in_process(folder: Path, n_devices: int, rounds: int) -> dict[str, Any]:
    worker = Worker("devices")
    clients: list[DeviceClient] = [InProcessClient(InstantDevice(f"d{i}"), worker=worker) for i in range(n_devices)]
    digest = tune(clients, rounds, folder / "near.db")
    worker.close()
    return {"round_s": statistics.median(round_seconds(folder / "near.db")), "digest": digest}


def simulated(folder: Path, n_devices: int, rounds: int, workers: int) -> dict[str, Any]:
    """Run Flower's engine in a separate process (this file, with ``--engine``)."""
    path = folder / "simulated.db"
    command = [sys.executable, __file__, "--engine", str(path), str(n_devices), str(rounds), str(workers)]
    environment = {**os.environ, "FLWR_TELEMETRY_ENABLED": "0"}
    began = time.monotonic()
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"Flower's simulation failed: {done.stderr[-4000:]}")
    said = json.loads(done.stdout.splitlines()[-1])
    return {"round_s": statistics.median(round_seconds(path)), "total_s": time.monotonic() - began, **said}


def engine(path: str, n_devices: int, rounds: int, workers: int) -> None:
    """The process of `simulated`: the server, and Ray's ``workers`` for the nodes."""
    from flwr.simulation import run_simulation

    app = ServerApp()

    @app.main()
    def main_of_server(grid: Grid, _context: Context) -> None:
        with RunStore(path) as store:
            strategy = FedBPT(TASK, settings(rounds), store, "r", devices=n_devices)
            strategy.start(grid)
        assert strategy.result is not None
        found = {"digest": strategy.result.digest, "peak_rss_mb": memory_of_process()["peak_rss"] / 1e6}
        print(json.dumps(found), flush=True)

    resources = {"init_args": {"num_cpus": workers}, "client_resources": {"num_cpus": 1}}
    run_simulation(app, node_app, n_devices, backend_config=resources)


# --- a real model ----------------------------------------------------------------------------------------------------

REAL_SETTINGS = """[tool.flwr.app.config.settings]
rounds = {rounds}
popsize = 8
select_rows = 8
quorum = 1.0
stragglers = 0.0
deadline_s = 3600.0
calibrate = false
objective.readout_words = 0
objective.batch_size = 8
"""


def real(folder: Path, model: str, n_devices: int, rounds: int, workers: int) -> dict[str, Any]:
    """The packaged Flower App on BBC News, with ``flwr run`` in Flower's engine, and natively in this process."""
    app = folder / "ready"
    app.mkdir()
    splits = tasks.split_rows(tasks.bbc_news(), {"train": 50 * n_devices, "test": 10 * n_devices})
    files = {name: folder / f"{name}.jsonl" for name in splits}
    for name, rows in splits.items():
        tasks.write_rows(files[name], rows, tasks.load("bbc-news").labels)
    shipped = (APP_FOLDER / "pyproject.toml").read_text()
    asked = shipped.split("[tool.flwr.app.config.settings]")[0] + REAL_SETTINGS.format(rounds=rounds)
    (app / "pyproject.toml").write_text(asked)
    given = {"task": "bbc-news", "model": model, "threads": 1, "devices": n_devices, "partition": "iid"}
    given.update(store=str(folder / "real.db"), data=str(files["train"]), test=str(files["test"]), run="r")
    engine_of = f"num-supernodes={n_devices} client-resources-num-cpus=1 init-args-num-cpus={workers}"
    began = time.monotonic()
    with superlink(folder / "home-2", free_port(), folder / "log-2", "--simulation") as environment:
        flwr_run(app, environment, "--federation-config", engine_of, **given)
    total_s = time.monotonic() - began
    flower = {"round_s": statistics.median(round_seconds(folder / "real.db")), "total_s": total_s}
    with RunStore(folder / "real.db") as store:
        result = codec.decode(store.get_run("r").result or b"", RunResult)
    near = natively(folder / "near-real.db", result, given, n_devices)
    ours = {"round_s": statistics.median(round_seconds(folder / "near-real.db")), "total_s": near.total_seconds}
    if near.digest != result.digest:
        raise SystemExit("the digests differ: it is not the same run")
    return {"ours": ours, "flower": flower, "digest": result.digest, "rows": result.tuned.n}


def natively(path: Path, of: RunResult, given: dict[str, Any], n_devices: int) -> RunResult:
    """The same run as ``of``, with the devices in this process."""
    from flwr.app import RecordDict

    from fedbpt.device.state import DeviceState
    from fedbpt.flower.ready import make_device

    nodes = [{"partition-id": number, "num-partitions": n_devices} for number in range(n_devices)]
    contexts = [Context(0, 0, node, RecordDict(), given) for node in nodes]
    worker = Worker("devices")
    clients = [InProcessClient(make_device(context, DeviceState()), worker=worker) for context in contexts]
    with RunStore(path) as store:
        search = of.settings.aggregator()
        result = Federation(clients, tasks.load("bbc-news"), of.settings, search, store, "r").run()
    worker.close()
    return result


# --- output ----------------------------------------------------------------------------------------------------------


def show(title: str, ours: dict[str, Any], flower: dict[str, Any], what: dict[str, str]) -> None:
    print(title)
    for key, unit in what.items():
        ratio = flower[key] / ours[key]
        print(f"  {key:12} ours {ours[key]:12,.3f} {unit:2}  Flower {flower[key]:12,.3f} {unit:2}  {ratio:8.1f} times")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--devices", type=int, default=4, help="devices over sockets; each has several of Flower's processes"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--simulate", type=int, default=100, metavar="N", help="devices without sockets; 0: none")
    parser.add_argument("--workers", type=int, default=1, help="number of Ray's processes")
    parser.add_argument("--no-sockets", action="store_true", help="only simulate")
    parser.add_argument("--model", help="also simulate 8 devices with this model, such as smollm2-135m")
    parser.add_argument("--json", action="store_true", help="print only the JSON line")
    parser.add_argument("--engine", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if importlib.util.find_spec("flwr") is None:
        raise SystemExit(
            "skipped: Flower is not installed here; make test-flower, then build/flower/bin/python this file"
        )
    if given.engine:
        path, *numbers = given.engine
        engine(path, *map(int, numbers))
        return
    found: dict[str, Any] = {"devices": given.devices, "rounds": given.rounds, "simulated_devices": given.simulate}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if not given.no_sockets:
            found["ours"] = by_coordinator(folder, given.devices, given.rounds)
            found["flower"] = by_superlink(folder, given.devices, given.rounds)
        if given.simulate:
            found["in_process"] = in_process(folder, given.simulate, given.rounds)
            found["simulated"] = simulated(folder, given.simulate, given.rounds, given.workers)
            if found["in_process"]["digest"] != found["simulated"]["digest"]:
                raise SystemExit("the digests differ: it is not the same run")
        if given.model:
            found["real"] = real(folder, given.model, 8, given.rounds, given.workers)
    if not given.json and "ours" in found:
        units = {"round_s": "s", "up_bytes": "B", "down_bytes": "B"}
        show(
            f"{given.devices} devices over loopback, per round (bytes: per device)",
            found["ours"],
            found["flower"],
            units,
        )
    if not given.json and given.simulate:
        title = f"{given.simulate} devices without sockets, same digest"
        show(title, found["in_process"], found["simulated"], {"round_s": "s"})
    if not given.json and given.model:
        title = f"8 devices with {given.model} without sockets, same digest"
        show(title, found["real"]["ours"], found["real"]["flower"], {"round_s": "s", "total_s": "s"})
    print(json.dumps(found))


if __name__ == "__main__":
    main()
