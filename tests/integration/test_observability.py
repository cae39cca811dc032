"""A coordinator process is monitored: its stream is read to the end, its metrics are parsed, its log is read."""

from __future__ import annotations

import json
import re
import signal
import stat
import subprocess
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from fedbpt.protocol import codec
from fedbpt.runs.event_log import Entry
from fedbpt.runs.events import DeviceLost
from tests.integration.processes import Fleet
from tests.integration.test_cli_processes import assert_one_line

TASK_FILE = """
name = "toy"
labels = ["x", "y"]
[[templates]]
pattern = "{text}\\nit was"
label_words = [" bad", " good"]
[[templates]]
pattern = "{text}\\nin one word"
label_words = [" bad", " good"]
"""


class Site:
    """A folder with a task and a run over toy devices."""

    def __init__(self, folder: Path, fleet: Fleet) -> None:
        self.folder = folder
        self.fleet = fleet
        (folder / "mood.toml").write_text(TASK_FILE)

    def tune(self, urls: list[str], limit: str, *more: object) -> subprocess.Popen[str]:
        head = f'run = "mood"\ntask = "mood.toml"\ndevices = {json.dumps(urls)}\n[settings]\n{limit}\n'
        fixed = "popsize = 6\nprompt.d = 8\ndeadline_s = 60.0\ncalibrate = false\nobjective.readout_words = 0\n"
        (self.folder / "run.toml").write_text(f"{head}{fixed}evaluate_every = 2\n")
        return self.fleet.spawn("fedbpt", "tune", "run.toml", *more, cwd=self.folder)

    def run(self, *arguments: object) -> tuple[int, str, str]:
        process = self.fleet.spawn("fedbpt", *arguments, cwd=self.folder)
        out, err = process.communicate(timeout=120)
        return process.returncode, out, err

    def log(self) -> list[bytes]:
        return (self.folder / "log.jsonl").read_bytes().splitlines()


@pytest.fixture
def site(tmp_path: Path, fleet: Fleet) -> Site:
    return Site(tmp_path, fleet)


def monitor_of(process: subprocess.Popen[str]) -> str:
    """The URL that ``fedbpt tune`` prints."""
    assert process.stderr is not None
    line = process.stderr.readline()
    found = re.search(r"https?://\S+", line)
    assert found, line
    return found[0]


def test_a_run_is_monitored_from_start_to_end(site: Site) -> None:
    devices = site.fleet.devices(("a", "--slow", "0.05"), ("b", "--slow", "0.05"))
    given = ("--log", "log.jsonl", "--monitor", "127.0.0.1:0", "--monitor-token", "token")
    process = site.tune([url for _, url in devices], "rounds = 15\nquorum = 1.0", *given)
    url = monitor_of(process)
    token = (site.folder / "token").read_text().strip()
    assert stat.S_IMODE((site.folder / "token").stat().st_mode) == 0o600
    assert httpx.get(f"{url}/metrics", trust_env=False).status_code == 401

    data, rounds = [], []
    headers = {"authorization": f"Bearer {token}"}
    with httpx.Client(base_url=url, headers=headers, trust_env=False, timeout=60) as http:
        with http.stream("GET", "/v1/runs/mood/events") as answer:
            for line in answer.iter_lines():
                if line.startswith("data: "):
                    data.append(line.removeprefix("data: ").encode())
                if line == "event: RoundClosed" and not rounds:
                    devices[1][0].send_signal(signal.SIGSTOP)  # the next round waits for it
                    families = list(text_string_to_metric_families(http.get("/metrics").text))
                    rounds = [s.value for f in families for s in f.samples if s.name == "fedbpt_run_round"]
                    shown = http.get("/v1/runs/mood").json()
                    devices[1][0].send_signal(signal.SIGCONT)
    assert rounds
    assert 0 <= rounds[0] < 15
    assert (shown["status"], len(shown["devices"])) == ("running", 2)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, "Traceback" in err) == (0, False)

    assert data == site.log()
    entries = [codec.decode_json(line, Entry) for line in data]
    assert [entry.seq for entry in entries] == list(range(1, len(entries) + 1))
    kinds = [type(entry.event).__name__ for entry in entries]
    assert (kinds[0], kinds[-1], kinds.count("RoundClosed")) == ("RunStarted", "RunFinished", 16)

    code, out, err = site.run("runs", "replay", "mood", "--task", "mood.toml", "--json")
    assert (code, err) == (0, "")
    finished = json.loads(data[-1])["event"]["result"]
    assert json.loads(out) == {"run": "mood", "n_rounds": 16, "digest": finished["digest"]}
    assert site.run("tune", "run.toml", *given)[0] == 0  # it was finished: the monitor ends at once
    assert len(site.log()) == len(data) + 1


def test_a_killed_device_is_in_the_log_and_the_stream_of_a_stopped_run_ends(site: Site) -> None:
    (_, a), (victim, b) = site.fleet.devices(("a",), ("b",))
    process = site.tune([a, b], "rounds = 1000000", "--log", "log.jsonl", "--monitor", "127.0.0.1:0")
    url = monitor_of(process)
    kinds: list[str] = []
    with httpx.stream("GET", f"{url}/v1/runs/mood/events", trust_env=False, timeout=60) as answer:
        for line in answer.iter_lines():
            if line.startswith("event: "):
                kinds.append(line.removeprefix("event: "))
                if len(kinds) == 10:
                    victim.kill()
                if kinds[-1] == "DeviceLost":
                    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "DeviceLost" in kinds
    lost = [e for e in (codec.decode_json(line, Entry).event for line in site.log()) if isinstance(e, DeviceLost)]
    assert lost[0].device == "b"
    assert "fedbpt tune run.toml --log log.jsonl" in err.splitlines()[-1]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_log_on_a_full_disk_is_one_warning(site: Site) -> None:
    [(_, url)] = site.fleet.devices(("a",))
    process = site.tune([url], "rounds = 3", "--quiet", "--log", "/dev/full")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0
    [line] = err.splitlines()
    assert "/dev/full" in line
    assert "No space left on device" in line


def test_a_public_monitor_without_a_token_is_refused_before_the_run(site: Site) -> None:
    process = site.tune(["http://127.0.0.1:9"], "rounds = 3", "--quiet", "--monitor", "0.0.0.0:0", "--allow-insecure")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (2, "")
    assert_one_line(err, "--monitor-token FILE")
