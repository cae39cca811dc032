"""Flower's own processes on loopback: a SuperLink with TLS, SuperNodes, and ``flwr run``."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from fedbpt.net import certs
from tests.support.caller import wait_until

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


class Deployment:
    """Processes in ``folder``, with their logs, certificates and state; they end with the block."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._port = free_port()
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._ca = certs.init(folder / "certs")
        self._own = certs.issue(folder / "certs", "superlink", ["localhost", "127.0.0.1"])
        home = folder / "home"
        home.mkdir()
        address = f'address = "127.0.0.1:{self._port}"\nroot-certificates = "{self._ca.cert}"'
        (home / "config.toml").write_text(f'[superlink]\ndefault = "here"\n[superlink.here]\n{address}\n')
        self._environment = {
            **os.environ,
            "FLWR_HOME": str(home),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
        }

    def __enter__(self) -> Deployment:
        tls = ["--ssl-certfile", self._own.cert, "--ssl-keyfile", self._own.key, "--ssl-ca-certfile", self._ca.cert]
        self._start("superlink", "flower-superlink", "--disable-runtime-dependency-installation", *tls, port=self._port)
        wait_until(self._answers, 120)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        for process in reversed(self._processes.values()):
            process.terminate()
        for process in self._processes.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(15)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if error is not None and hasattr(error, "add_note"):
            for log in sorted(self.folder.glob("*.log")):
                error.add_note(f"--- {log.name}\n{log.read_text()[-2000:]}")

    def start_node(self, name: str, **config: Any) -> None:
        """Start, or restart, the SuperNode ``name``."""
        given = " ".join(f"{key.replace('_', '-')}={json.dumps(value)}" for key, value in config.items())
        to = ["--superlink", f"127.0.0.1:{self._port}", "--root-certificates", self._ca.cert, "--node-config", given]
        self._start(name, "flower-supernode", *to, port=free_port())

    def kill_node(self, name: str) -> None:
        """Kill a node and all of its processes with SIGKILL."""
        process = self._processes.pop(name)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def run(self, app: Path, **config: Any) -> subprocess.CompletedProcess[str]:
        """Run ``flwr run`` to its end, with the log on its standard output."""
        given = " ".join(f"{key}={json.dumps(value)}" for key, value in config.items())
        command = [BIN / "flwr", "run", app, "here", "--stream", "--run-config", given]
        return subprocess.run(command, env=self._environment, capture_output=True, text=True, timeout=600)

    def listing(self) -> list[dict[str, Any]]:
        """The runs that ``flwr list`` reports."""
        command = [BIN / "flwr", "list", "here", "--format", "json"]
        done = subprocess.run(command, env=self._environment, capture_output=True, text=True, check=True)
        return list(json.loads(done.stdout)["runs"])

    def _answers(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self._port)) == 0

    def _start(self, name: str, command: str, *options: Any, port: int) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            self._processes[name] = subprocess.Popen(
                [BIN / command, "--host", "127.0.0.1", "--port", str(port), *options],
                env=self._environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip


@contextlib.contextmanager
def deployed(folder: Path, nodes: int, **config: Any) -> Iterator[Deployment]:
    """A SuperLink and ``nodes`` SuperNodes, each with its number as ``partition-id``."""
    with Deployment(folder) as made:
        for number in range(nodes):
            made.start_node(f"node-{number}", partition_id=number, **config)
        yield made
