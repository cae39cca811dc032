"""A coordinator that stays up, as processes: runs are handed to it, over devices that enrol once."""

from __future__ import annotations

import html
import json
import signal
import socket
import stat
import subprocess
from pathlib import Path

import httpx
import pytest

from fedbpt import Prompt
from fedbpt.runs.store import RunStore
from tests.integration.processes import Fleet
from tests.integration.test_cli_processes import Workshop, assert_one_line
from tests.support.caller import wait_until

pytestmark = pytest.mark.slow


class Site(Workshop):
    """A workshop with a coordinator that stays up, and devices that call it."""

    def __init__(self, folder: Path, fleet: Fleet) -> None:
        super().__init__(folder, fleet)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def coordinator(self, *more: object) -> subprocess.Popen[str]:
        """Start it, and wait until it takes runs."""
        process = self.spawn("coordinator", "--listen", f"127.0.0.1:{self.port}", "--json", *more)
        assert process.stdout is not None
        self.ready = json.loads(process.stdout.readline())["ready"]
        assert (self.ready["url"], self.ready["admin_token"]) == (self.url, "runs/admin.token")
        return process

    def enrol(self, name: str) -> subprocess.Popen[str]:
        code, out, _ = self.run("devices", "invite", name, "--quiet")
        assert code == 0
        return self.call(name, "--enrol", out.strip())

    def call(self, name: str, *more: object) -> subprocess.Popen[str]:
        given = ("--data", f"{name}.jsonl", "--test", "test.jsonl", "--task", "mood.toml", "--model", "tiny.gguf")
        link = ("--coordinator", self.url, "--credentials", f"{name}.json")
        return self.spawn("device", *given, *link, "--threads", "1", *more)

    def write_run(self, name: str, rounds: int) -> str:
        fixed = "popsize = 6\nprompt.d = 16\ncalibrate = false\nobjective.readout_words = 0\nquorum = 1.0\n"
        head = f'run = "{name}"\ntask = "mood.toml"\n[settings]\n'
        (self.folder / f"{name}.toml").write_text(f"{head}{fixed}stragglers = 0.0\nrounds = {rounds}\n")
        return f"{name}.toml"

    def tune(self, name: str, rounds: int, *more: object) -> subprocess.Popen[str]:
        return self.spawn("tune", self.write_run(name, rounds), "--coordinator", self.url, *more)

    def states(self) -> dict[str, str]:
        code, out, err = self.run("runs", "list", "--coordinator", self.url, "--json")
        assert (code, err) == (0, "")
        return {job["run"]: job["state"] for job in json.loads(out)}

    def rounds(self, run: str) -> int:
        with RunStore(self.folder / "runs" / "runs.db") as store:
            found = store.find_run(run)
        return 0 if found is None else found.n_rounds


@pytest.fixture
def site(tmp_path: Path, fleet: Fleet) -> Site:
    return Site(tmp_path, fleet)


def end(process: subprocess.Popen[str], *signals: signal.Signals) -> tuple[int, str, str]:
    for each in signals:
        process.send_signal(each)
    out, err = process.communicate(timeout=200)
    return process.returncode, out, err


@pytest.mark.timeout(600)
def test_devices_enrolled_once_serve_the_runs_that_are_handed_in(site: Site) -> None:
    coordinator = site.coordinator("--dashboard", "127.0.0.1:0")
    assert stat.S_IMODE((site.folder / "runs" / "admin.token").stat().st_mode) == 0o600
    devices = [site.enrol("a"), site.enrol("b")]
    first = site.tune("one", 5, "--json", "--model", "tiny.gguf", "--expect", "2")
    wait_until(lambda: "one" in site.states())
    second = site.tune("two", 4, "--json")  # waits until the first has ended
    results = []
    for process in (first, second):
        code, out, err = end(process)
        assert (code, err) == (0, "")
        results.append(json.loads(out))
    one, two = results
    assert (one["run"], one["rounds"], two["run"], two["rounds"]) == ("one", 5, "two", 4)
    assert [device["name"] for result in results for device in result["devices"]] == ["a", "b"] * 2
    assert Prompt.load(site.folder / one["prompt_path"]).model_name == one["model"]
    assert two["prompt_path"] is None
    assert site.states() == {"one": "finished", "two": "finished"}
    for run in ("one", "two"):
        lines = (site.folder / "runs" / "logs" / f"{run}.jsonl").read_text().splitlines()
        assert json.loads(lines[-1])["event"]["type"] == "RunFinished"
    with httpx.Client(base_url=site.ready["dashboard"], trust_env=False) as pages:
        listed = pages.get("/").text
        assert all(f'"{run}"' in html.unescape(listed).replace("\\", "") for run in ("one", "two"))
        assert "film-mood" in pages.get("/runs/two").text
        assert pages.get("/runs/three").status_code == 404
    # The same command shows the stored result, and the coordinator's own store has it too.
    assert json.loads(site.run("tune", "one.toml", "--coordinator", site.url, "--json")[1])["digest"] == one["digest"]
    assert json.loads(site.run("runs", "show", "two", "--json")[1])["result"]["digest"] == two["digest"]
    assert end(coordinator, signal.SIGTERM)[0] == 0
    for device in devices:
        assert end(device, signal.SIGINT)[0] == 0


@pytest.mark.timeout(600)
def test_a_coordinator_that_is_stopped_goes_on_where_it_was(site: Site) -> None:
    coordinator = site.coordinator()
    site.enrol("a"), site.enrol("b")
    follower = site.tune("long", 60, "--json", "--expect", "2")
    wait_until(lambda: site.rounds("long") > 3)
    code, out, err = site.run("tune", site.write_run("next", 3), "--coordinator", site.url, "--detach")
    assert (code, out, err) == (0, "run next: queued, 1 run before it\n", "")

    code, _, err = end(coordinator, signal.SIGTERM)
    assert (code, err) == (0, "")
    before = site.rounds("long")
    assert 0 < before < 60
    coordinator = site.coordinator()
    wait_until(lambda: site.rounds("long") > before + 2)
    coordinator.kill()  # without a word
    end(coordinator)
    assert site.rounds("long") < 60
    code, out, err = site.run("runs", "list", "--coordinator", site.url)
    assert (code, out) == (1, "")
    assert_one_line(err, site.url, "fedbpt coordinator")

    site.coordinator()
    code, out, _ = end(follower)
    assert code == 0
    resumed = json.loads(out)
    assert [device["reports"] for device in resumed["devices"]] == [61, 61]  # the selection is one more
    wait_until(lambda: site.states()["next"] == "finished")
    whole = json.loads(end(site.tune("whole", 60, "--json", "--expect", "2"))[1])
    assert (whole["rounds"], whole["digest"]) == (resumed["rounds"], resumed["digest"])


@pytest.mark.timeout(600)
def test_runs_are_cancelled_left_and_refused(site: Site) -> None:
    site.coordinator("--max-queued", "1", "--wait", "1")
    site.enrol("a")
    running = site.tune("running", 2000, "--json")
    wait_until(lambda: site.rounds("running") > 1)
    leaving = site.tune("running", 2000)
    assert leaving.stderr is not None
    leaving.stderr.readline()
    code, out, err = end(leaving, signal.SIGINT)
    assert (code, out) == (130, "")
    assert f"fedbpt runs cancel running --coordinator {site.url}" in err.splitlines()[-1]

    waiting = site.tune("waiting", 5, "--detach")
    assert end(waiting)[:2] == (0, "run waiting: queued, 1 run before it\n")
    for given, values in (
        ((site.write_run("third", 5),), ("the queue is full",)),
        ((site.write_run("running", 7),), ("run 'running' is running with another task or other settings",)),
    ):
        code, out, err = site.run("tune", *given, "--coordinator", site.url)
        assert (code, out) == (1, "")
        assert_one_line(err, *values)
    cancel = ("--coordinator", site.url)
    assert site.run("runs", "cancel", "waiting", *cancel)[:2] == (0, "run waiting: cancelled\n")
    assert site.run("runs", "cancel", "running", *cancel)[0] == 0
    code, out, err = end(running)
    assert (code, out) == (1, "")
    assert_one_line(err, "run 'running' was cancelled")
    assert site.states() == {"running": "cancelled", "waiting": "cancelled"}

    task = (site.folder / "mood.toml").read_text().replace("film-mood", "other-mood")
    (site.folder / "other.toml").write_text(task)
    code, out, err = site.run("tune", "--task", "other.toml", "--coordinator", site.url)
    assert (code, out) == (1, "")
    failed = err.splitlines()[-1]
    assert "0 of 1 devices with task 'other-mood' call in (a: it has rows of task 'film-mood'" in failed

    kept = site.rounds("running")
    code, out, _ = site.run("tune", site.write_run("running", 3), "--coordinator", site.url, "--json")
    assert (code, json.loads(out)["rounds"]) == (0, kept - 1)  # its rounds are more than the new budget
    for given, code, value in (
        (("--admin-token", "absent"), 2, "no admin token at absent"),
        (("--admin-token", "wrong"), 1, "--admin-token FILE"),
        (("--admin-token", "other.toml"), 2, "copy the file that `fedbpt coordinator` names"),
        (("--data", "a.jsonl"), 2, "--data cannot be combined with --coordinator"),
    ):
        (site.folder / "wrong").write_text("w" * 43)
        (site.folder / "wrong").chmod(0o600)
        (site.folder / "other.toml").chmod(0o600)
        found = site.run("tune", "running.toml", "--coordinator", site.url, *given)
        assert found[:2] == (code, "")
        assert_one_line(found[2], value)
