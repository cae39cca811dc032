"""Devices that call in, as processes over TLS: enrolled by code; coordinator and device are killed and restarted."""

from __future__ import annotations

import json
import signal
import socket
import stat
import subprocess
from pathlib import Path

import pytest

from fedbpt.net import tokens
from fedbpt.protocol import codec
from fedbpt.protocol.names import SUM
from fedbpt.runs.result import RunResult
from fedbpt.runs.store import RunStore
from tests.integration.processes import Fleet
from tests.integration.test_cli_processes import Workshop, assert_one_line
from tests.support.caller import wait_until

pytestmark = pytest.mark.slow

ROUNDS = 60
SETTINGS = f"rounds = {ROUNDS}\nquorum = 1.0\nstragglers = 0.0\ndeadline_s = 300.0\n"


class Site(Workshop):
    """A workshop with a CA, a coordinator that listens, and devices that poll it."""

    def __init__(self, folder: Path, fleet: Fleet) -> None:
        super().__init__(folder, fleet)
        assert self.run("certs", "init")[0] == 0
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        files = ("--cert", "certs/coordinator.pem", "--key", "certs/coordinator.key")
        self.listen = ("--listen", f"127.0.0.1:{self.port}", *files)
        self.url = f"https://127.0.0.1:{self.port}"
        self.codes: list[str] = []
        self.output: list[str] = []

    def write_run(self, store: str) -> None:
        head = f'run = "mood"\ntask = "mood.toml"\nstore = "{store}"\n[settings]\n'
        fixed = "popsize = 6\nprompt.d = 16\ncalibrate = false\nobjective.readout_words = 0\n"
        (self.folder / "run.toml").write_text(head + fixed + SETTINGS)

    def tune(self, *more: object) -> subprocess.Popen[str]:
        process = self.spawn("tune", "run.toml", *self.listen, *more)
        wait_until(lambda: self.answers() or process.poll() is not None)
        return process

    def answers(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def invite(self, name: str) -> str:
        code, out, _ = self.run("devices", "invite", name, "--quiet")
        assert code == 0
        self.codes.append(out.strip())
        return out.strip()

    def call(self, name: str, *more: object) -> subprocess.Popen[str]:
        given = ("--data", f"{name}.jsonl", "--test", "test.jsonl", "--task", "mood.toml", "--model", "tiny.gguf")
        link = ("--coordinator", self.url, "--ca", "certs/ca.pem", "--credentials", f"{name}.json")
        return self.spawn("device", *given, *link, "--threads", "1", *more)

    def result(self, store: str) -> RunResult:
        with RunStore(self.folder / store) as opened:
            found = opened.get_run("mood").result
        assert found is not None
        return codec.decode(found, RunResult)

    def rounds(self, store: str) -> int:
        path = self.folder / store
        if not path.is_file():
            return 0
        with RunStore(path) as opened:
            found = opened.find_run("mood")
        return 0 if found is None else found.n_rounds

    def finish(self, process: subprocess.Popen[str]) -> int:
        out, err = process.communicate(timeout=400)
        self.output += [out, err]
        return process.returncode

    def kill(self, process: subprocess.Popen[str]) -> None:
        process.kill()
        self.finish(process)


@pytest.fixture
def site(tmp_path: Path, fleet: Fleet) -> Site:
    return Site(tmp_path, fleet)


@pytest.mark.timeout(900)
def test_a_run_whose_coordinator_and_device_are_killed_ends_with_the_digest_of_one_without_faults(site: Site) -> None:
    codes = {name: site.invite(name) for name in "ab"}
    site.write_run("faults/runs.db")
    coordinator = site.tune("--quiet")
    devices = {name: site.call(name, "--enrol", codes[name]) for name in "ba"}
    wait_until(lambda: site.rounds("faults/runs.db") > 3)
    site.kill(coordinator)
    before = site.rounds("faults/runs.db")
    assert before < ROUNDS
    coordinator = site.tune("--quiet")
    wait_until(lambda: site.rounds("faults/runs.db") > before + 2)
    site.kill(devices["b"])
    assert site.rounds("faults/runs.db") < ROUNDS
    devices["b"] = site.call("b")
    assert site.finish(coordinator) == 0

    site.write_run("whole/runs.db")
    assert site.finish(site.tune("--quiet")) == 0
    code, _, _ = site.run("tune", "run.toml", *site.listen)  # finished: it waits for no device
    assert code == 0
    faults, whole = site.result("faults/runs.db"), site.result("whole/runs.db")
    assert (faults.rounds, faults.digest) == (ROUNDS, whole.digest)
    assert [device.name for device in faults.devices] == ["a", "b"]
    assert [device.reports for device in faults.devices] == [ROUNDS + 1, ROUNDS + 1]
    assert faults.tuned == whole.tuned

    code, out, _ = site.run("tune", "run.toml", "--plan", "--json", *site.listen)
    assert (code, [device["name"] for device in json.loads(out)["devices"]]) == (0, ["a", "b"])
    for process in devices.values():
        process.send_signal(signal.SIGINT)
        assert site.finish(process) == 0
    _assert_no_secret_is_shown(site)


def _assert_no_secret_is_shown(site: Site) -> None:
    """Secrets are neither printed nor in any file but the device's own."""
    own = {site.folder / f"{name}.json" for name in "ab"}
    secrets = [tokens.Credentials.load(path).secret for path in own]
    secrets += [variant for code in site.codes for variant in (code, tokens.plain_code(code))]
    assert {stat.S_IMODE(path.stat().st_mode) for path in own} == {0o600}
    assert len(secrets) == 6
    files = {path: path.read_bytes() for path in site.folder.rglob("*") if path.is_file() and path not in own}
    assert any(content and path.name == "devices.db" for path, content in files.items())
    for secret in secrets:
        assert secret not in "".join(site.output)
        assert not [path for path, content in files.items() if secret.encode() in content]


def test_pushed_and_calling_devices_serve_one_run(site: Site) -> None:
    (site.folder / "dev.token").write_text("t" * 43)
    (site.folder / "dev.token").chmod(0o600)
    shown = ("--cert", "certs/coordinator.pem", "--key", "certs/coordinator.key", "--token-file", "dev.token")
    pushed = site.device("b", *shown)
    assert pushed.stdout is not None
    url = json.loads(pushed.stdout.readline())["ready"]["url"]
    assert url.startswith("https://")
    (site.folder / "tokens.toml").write_text(f'"{url}" = "{"t" * 43}"\n')
    (site.folder / "tokens.toml").chmod(0o600)
    site.write_run("runs/runs.db")
    coordinator = site.tune(
        "--json", "--device", url, "--tokens", "tokens.toml", "--ca", "certs/ca.pem", "--expect", "1"
    )
    site.call("a", "--enrol", site.invite("a"))
    out, err = coordinator.communicate(timeout=400)
    assert (coordinator.returncode, err) == (0, "")
    assert [device["reports"] for device in json.loads(out)["devices"]] == [ROUNDS + 1, ROUNDS + 1]

    code, out, err = site.run("tune", "run.toml", "--fresh", "--quiet", "--device", url, "--ca", "certs/ca.pem")
    assert (code, out) == (1, "")
    assert_one_line(err, "token")


def test_a_device_that_is_not_enrolled_gets_a_one_line_error(site: Site) -> None:
    site.write_run("runs/runs.db")
    site.invite("a")
    coordinator = site.tune()
    for more, value in (((("--enrol", "WRONG")), "fedbpt devices invite"), ((), "--enrol")):
        process = site.call("b", *more)
        out, err = process.communicate(timeout=60)
        assert process.returncode in (1, 2)
        assert_one_line(err, value)
        assert out == ""
    coordinator.send_signal(signal.SIGINT)
    _, err = coordinator.communicate(timeout=60)
    assert coordinator.returncode == 130
    assert site.url in err


@pytest.mark.timeout(600)
def test_devices_that_know_each_other_add_up_securely_and_one_is_killed(site: Site) -> None:
    names = "abcd"
    codes = {name: site.invite(name) for name in names}
    for name in "cd":
        (site.folder / f"{name}.jsonl").write_text((site.folder / "a.jsonl").read_text())
    site.write_run("secure/runs.db")
    run = (site.folder / "run.toml").read_text().replace("quorum = 1.0", "quorum = 0.7").replace("60", "30")
    (site.folder / "run.toml").write_text(run.replace("[settings]\n", "[settings]\nsecure = true\n"))
    coordinator = site.tune("--quiet")
    lines = []
    for name in names:
        first = site.call(name, "--enrol", codes[name], "--identity", f"{name}.key")
        lines.append(next(line for line in iter(first.stderr.readline, "") if line.startswith('"')))
        first.send_signal(signal.SIGINT)
        site.finish(first)
    (site.folder / "peers.toml").write_text("".join(lines))
    trusting = ("--trust", "peers.toml")
    devices = {name: site.call(name, "--identity", f"{name}.key", *trusting) for name in names}
    wait_until(lambda: site.rounds("secure/runs.db") > 5)
    site.kill(devices.pop("d"))
    assert site.finish(coordinator) == 0
    found = site.result("secure/runs.db")
    assert found.rounds == 30
    assert found.tuned.n > 0
    with RunStore(site.folder / "secure/runs.db") as opened:
        stored = list(opened.rounds("mood"))
    assert {report.device for round in stored for report in round.reports} == {SUM}
    assert set(stored[3].reports[0].devices) >= {"a", "b", "c"}
    for process in devices.values():
        process.send_signal(signal.SIGINT)
        assert site.finish(process) == 0
    for name in names:
        assert stat.S_IMODE((site.folder / f"{name}.key").stat().st_mode) == 0o600
