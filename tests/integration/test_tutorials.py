"""The tutorials are run as printed: every command and every line of Python, with the real model.

Hosts are folders and loopback addresses of this machine; ports are free ones. `NOT_RUN` lists what is not run, and why.
"""

from __future__ import annotations

import re
import shlex
import shutil
import signal
import socket
import subprocess
import threading
from pathlib import Path
from typing import IO, Final

import pytest

from fedbpt import Prompt
from fedbpt.protocol import codec
from fedbpt.runs.result import RunResult
from fedbpt.runs.store import RunStore
from tests.integration.processes import Fleet
from tests.support.printed import Block, blocks, commands

pytestmark = pytest.mark.slow

TUTORIALS: Final = Path(__file__).parents[2] / "docs" / "tutorials"
SUPPORT: Final = TUTORIALS / "support"

NOT_RUN: Final = {
    "pip install": "the tested package is installed",
    "fedbpt bench": "measures the machine for a minute; tests.native.test_bench tests it",
}

SERVERS: Final = {"device", "serve", "dashboard"}
"""Commands that run until they are stopped. They print their URL when they are ready."""

TIMEOUT_S: Final = 600.0
"""For any command on a busy machine; on an idle one none takes longer than 30 s."""


def page(name: str) -> list[Block]:
    return blocks((TUTORIALS / name).read_text())


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


class Host:
    """A machine of a tutorial: ``folder`` with its files; ``means``: replacements in printed commands."""

    def __init__(self, fleet: Fleet, folder: Path, means: dict[str, str]) -> None:
        self.folder = folder
        self.means = means
        self._fleet = fleet
        folder.mkdir(exist_ok=True)

    def take(self, *files: str) -> None:
        """Copy files of the first tutorial here."""
        for file in files:
            shutil.copy(SUPPORT / file, self.folder)

    def mine(self, part: int, of: int) -> None:
        """Write ``mine.csv`` with every ``of``th row, from ``part`` on."""
        header, *rows = (SUPPORT / "train.csv").read_text().splitlines(keepends=True)
        (self.folder / "mine.csv").write_text("".join([header, *rows[part::of]]))

    def meant(self, text: str) -> str:
        for printed, ours in self.means.items():
            text = text.replace(printed, ours)
        return text

    def run(self, command: str) -> str:
        """Run a command and return its output. A server is run until it is ready, a device until the test ends."""
        if command.startswith(tuple(NOT_RUN)):
            return ""
        words = shlex.split(self.meant(command))
        if words[0] == "scp":
            shutil.copy(self.folder / words[1], self.folder.parent / words[2].rstrip(":"))
            return ""
        assert words[0] == "fedbpt", command
        process = self._fleet.spawn(*words, cwd=self.folder)
        if words[1] not in SERVERS:
            out, err = process.communicate("", timeout=TIMEOUT_S)
            assert process.returncode == 0, f"{command}\n{out}\n{err}"
            return str(out)
        if "--enrol" in words:
            return ""  # it waits for its coordinator
        wait_for_output(process, r"https?://")
        if words[1] != "device":
            process.send_signal(signal.SIGINT)
            assert process.wait(TIMEOUT_S) in (0, 130), command
        return ""


def wait_for_output(process: subprocess.Popen[str], pattern: str) -> None:
    """Wait until the process prints ``pattern``; its output is read on in the background."""
    lines: list[str] = []
    found = threading.Event()

    def read(stream: IO[str] | None) -> None:
        assert stream is not None
        for line in stream:
            lines.append(line)
            if re.search(pattern, line):
                found.set()
        found.set()  # the process has ended

    for stream in (process.stdout, process.stderr):
        threading.Thread(target=read, args=(stream,), daemon=True).start()
    assert found.wait(TIMEOUT_S)
    assert re.search(pattern, "".join(lines)), "".join(lines)


def result_of(folder: Path, run: str) -> RunResult:
    with RunStore(folder / "runs" / "runs.db") as store:
        found = store.get_run(run)
    assert found.status == "finished"
    assert found.result is not None
    return codec.decode(found.result, RunResult)


@pytest.mark.timeout(1800)
def test_one_machine(fleet: Fleet, tmp_path: Path) -> None:
    host = Host(fleet, tmp_path / "here", {})
    host.take("train.csv", "dev.csv", "test.csv")
    python = ""
    for block in page("one-machine.md"):
        if block.language == "toml":
            assert block.text == (SUPPORT / "support.toml").read_text()
            (host.folder / "support.toml").write_text(block.text)
        elif block.language == "python":
            python += block.text
        else:
            for _, command in commands(block):
                any_port = {"fedbpt serve": " --port 0", "fedbpt dashboard": " --at 127.0.0.1:0"}
                host.run(command + next((more for of, more in any_port.items() if command.startswith(of)), ""))
    found = result_of(host.folder, "support-tickets")
    assert (found.tuned.n, found.evaluations) in {(36, 320), (36, 160)}  # 160: a look saw no gain, on this CPU
    assert found.tuned.loss < found.zero_shot.loss
    assert (host.folder / "adapter" / "adapter_config.json").is_file()
    (host.folder / "tutorial.py").write_text(f"{python}assert result.run.evaluations == {found.evaluations}\n")
    script = fleet.spawn("tutorial", cwd=host.folder)
    _, err = script.communicate("", timeout=TIMEOUT_S)
    assert script.returncode == 0, err
    with RunStore(host.folder / "runs" / "runs.db") as store:
        assert [run.run for run in store.list_runs()] == ["support-tickets"]  # it is the same run
    assert (host.folder / "curve.png").is_file()
    assert "| tuned |" in (host.folder / "prompt.safetensors.md").read_text()


@pytest.mark.timeout(1800)
def test_fleet(fleet: Fleet, tmp_path: Path) -> None:
    addresses = {"pi5": "127.0.0.1", "pixel": "127.0.0.2"}
    ports = {"8401": free_port(), "--dashboard": "--dashboard 127.0.0.1:0"}
    devices = [Host(fleet, tmp_path / name, {**ports, "0.0.0.0": own}) for name, own in addresses.items()]
    coordinator = Host(fleet, tmp_path / "coordinator", {**ports, **addresses})
    for number, device in enumerate(devices):
        device.take("support.toml", "dev.csv", "test.csv")
        device.mine(number, len(devices))
    coordinator.take("support.toml")
    for block in page("fleet.md"):
        if block.language == "toml":
            (coordinator.folder / "run.toml").write_text(coordinator.meant(block.text))
            continue
        for where, command in commands(block):
            for host in {"device": devices, "coordinator": [coordinator]}[where]:
                host.run(command)
    found = result_of(coordinator.folder, "tickets")
    assert [device.reports for device in found.devices] == [found.devices[0].reports] * 2
    assert (found.rounds, found.tuned.n) in {(20, 2 * 36), (10, 2 * 36)}  # 10: a look saw no gain, on this CPU
    assert Prompt.load(coordinator.folder / "prompt.safetensors").task is not None


@pytest.mark.timeout(1800)
def test_add_a_device(fleet: Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDBPT_CREDENTIALS", str(tmp_path / "pi5" / "credentials.json"))
    means = {"8400": free_port(), "coordinator.lan": "localhost", "0.0.0.0": "127.0.0.1"}
    device, coordinator = Host(fleet, tmp_path / "pi5", means), Host(fleet, tmp_path / "coordinator", means)
    device.take("support.toml", "dev.csv", "test.csv")
    device.mine(0, 1)
    coordinator.take("support.toml")
    for block in page("add-a-device.md"):
        if block.language == "toml":
            (coordinator.folder / "run.toml").write_text(block.text)
            continue
        for where, command in commands(block):
            output = (device if where == "device" else coordinator).run(command)
            if "invite" in command and (code := re.search(r"\b[0-9A-Z]{4}(-[0-9A-Z]{4})+\b", output)):
                device.means["CODE"] = code[0]
    assert "CODE" in device.means
    found = result_of(coordinator.folder, "tickets")
    assert [(used.name, used.tuned.n) for used in found.devices] == [("pi5", 36)]
    assert (coordinator.folder / "runs" / "tickets.safetensors").is_file()
