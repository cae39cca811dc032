"""The command line: device and coordinator processes over real sockets, with a tiny GGUF model."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedbpt import Prompt
from fedbpt.runs.store import RunStore
from fedbpt.tasks import load, write_rows
from tests.integration.processes import Fleet, ready
from tests.native import tiny_gguf

pytestmark = pytest.mark.slow

TASK_FILE = """
name = "film-mood"
labels = ["negative", "positive"]
[[templates]]
pattern = "{text}\\nthe film is"
label_words = [" bad", " good"]
[[templates]]
pattern = "{text}\\nit was"
label_words = [" terrible", " great"]
"""
WORDS = ("bad terrible", "good great")


class Workshop:
    """A folder with a tiny model, a task, data and a run file, and processes that use it."""

    def __init__(self, folder: Path, fleet: Fleet) -> None:
        self.folder = folder
        self.fleet = fleet
        tiny_gguf.write(folder / "tiny.gguf", tiny_gguf.LLAMA)
        (folder / "mood.toml").write_text(TASK_FILE)
        labels = load(folder / "mood.toml").labels
        for name, first in (("a", 0), ("b", 20), ("test", 40)):
            rows = [(f"{WORDS[i % 2]} movie {i}", i % 2) for i in range(first, first + 20)]
            write_rows(folder / f"{name}.jsonl", rows, labels)

    def spawn(self, *arguments: object) -> subprocess.Popen[str]:
        return self.fleet.spawn("fedbpt", *arguments, cwd=self.folder)

    def run(self, *arguments: object, stdin: str = "") -> tuple[int, str, str]:
        """Run a command; returns exit code, standard output, standard error."""
        process = self.spawn(*arguments)
        out, err = process.communicate(stdin, timeout=60)
        return process.returncode, out, err

    def device(self, name: str, *more: object) -> subprocess.Popen[str]:
        return self.spawn(*self.device_arguments(name), *more)

    def device_arguments(self, name: str) -> list[str]:
        given = ["--data", f"{name}.jsonl", "--test", "test.jsonl", "--task", "mood.toml", "--name", name]
        return ["device", "--model", "tiny.gguf", *given, "--port", "0", "--threads", "1", "--json"]

    def devices(self) -> tuple[list[subprocess.Popen[str]], list[str]]:
        processes = [self.device("a"), self.device("b")]
        return processes, [ready(process) for process in processes]

    def run_file(self, urls: list[str], settings: str) -> None:
        head = f'run = "mood"\ntask = "mood.toml"\nmodel = "tiny.gguf"\ndevices = {json.dumps(urls)}\n'
        fixed = "popsize = 6\nprompt.d = 16\ndeadline_s = 20.0\ncalibrate = false\nobjective.readout_words = 0\n"
        (self.folder / "run.toml").write_text(f"{head}[settings]\n{fixed}{settings}\n")

    def wait_for_round(self, round: int) -> None:
        """Wait until the store has this many closed rounds of tuning."""
        wait_until(lambda: self._rounds() > round)  # the selection is one more

    def _rounds(self) -> int:
        path = self.folder / "runs" / "runs.db"
        if not path.is_file():
            return 0
        with RunStore(path) as store:
            found = store.find_run("mood")
            return 0 if found is None else found.n_rounds


def wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not true within {seconds:g} s"
        time.sleep(0.05)


def assert_one_line(err: str, *values: str) -> None:
    """``err`` is a one-line error of the command line that contains ``values``."""
    (line,) = err.splitlines()
    assert line.startswith("fedbpt: ")
    assert [value for value in values if value not in line] == [], line


@pytest.fixture
def workshop(tmp_path: Path, fleet: Fleet) -> Workshop:
    return Workshop(tmp_path, fleet)


def test_two_devices_tune_a_prompt_that_evaluates_better(workshop: Workshop) -> None:
    processes, urls = workshop.devices()
    workshop.run_file(urls, "rounds = 30")
    code, out, err = workshop.run("tune", "run.toml", "--json")
    assert (code, err) == (0, "")
    result: dict[str, Any] = json.loads(out)
    assert result["tuned_accuracy"] > result["zero_shot_accuracy"]
    assert (result["n"], result["rounds"], result["evaluations"]) == (40, 30, 180)
    assert [device["reports"] for device in result["devices"]] == [31, 31]
    assert result["bytes_up"] > 0 < result["bytes_down"]
    path = workshop.folder / "runs" / "mood.safetensors"
    assert (workshop.folder / result["prompt_path"]).samefile(path)

    arguments = ("evaluate", path, "--data", "test.jsonl", "--task", "mood.toml", "--model", "tiny.gguf", "--json")
    code, out, err = workshop.run(*arguments)
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["tuned"]["accuracy"] == result["tuned_accuracy"]
    assert found["zero_shot"]["accuracy"] == result["zero_shot_accuracy"]

    for process in processes:
        process.send_signal(signal.SIGINT)
    assert [process.wait(10) for process in processes] == [0, 0]
    assert [process.communicate()[1] for process in processes] == ["", ""]

    code, out, err = workshop.run("tune", "run.toml")  # finished: the devices are not needed
    assert code == 0
    assert "mood" in err
    assert {"180", "30"} <= set(re.findall(r"\d+", out))


@pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_prints_the_command_that_resumes_it(workshop: Workshop, which: signal.Signals) -> None:
    _, urls = workshop.devices()
    workshop.run_file(urls, "rounds = 100000")
    process = workshop.spawn("tune", "run.toml")
    workshop.wait_for_round(2)
    process.send_signal(which)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert err.splitlines()[-1].endswith("fedbpt tune run.toml")
    assert "Traceback" not in err
    closed = json.loads(workshop.run("runs", "show", "mood", "--json")[1])
    assert closed["status"] == "stopped"

    workshop.run_file(urls, f"rounds = {closed['n_rounds'] + 1}")
    code, out, err = workshop.run("tune", "run.toml")
    assert code == 0
    assert str(closed["n_rounds"] - 1) in re.findall(r"\d+", err)  # resumed rounds, but for the template selection
    assert str(closed["n_rounds"] + 1) in re.findall(r"\d+", out)


def test_a_killed_device_is_named_and_the_run_ends_with_the_other(workshop: Workshop) -> None:
    (_, victim), urls = workshop.devices()
    workshop.run_file(urls, "rounds = 0\nseconds = 8.0")
    process = workshop.spawn("tune", "run.toml")
    workshop.wait_for_round(2)
    victim.kill()
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0
    assert re.search(r"\bb\b", err)
    assert "20" in re.findall(r"\d+", out)  # held-out rows of the remaining device
    shown = json.loads(workshop.run("runs", "show", "mood", "--json")[1])
    lost = [name for line in shown["rounds"] for name in line["lost"]]
    assert "b" in lost


def test_a_plan_estimates_the_cost_and_refuses_impossible_budgets(workshop: Workshop) -> None:
    processes, urls = workshop.devices()
    workshop.run_file(urls, "rounds = 30")
    code, out, err = workshop.run("tune", "run.toml", "--plan", "--json")
    assert (code, err) == (0, "")
    cost: dict[str, Any] = json.loads(out)
    assert (cost["rounds"], cost["evaluations"]) == (30, 180)
    assert [device["name"] for device in cost["devices"]] == ["a", "b"]
    assert all(device["seconds"] > 0 and device["bytes_up"] > 0 for device in cost["devices"])
    assert not (workshop.folder / "runs").exists()  # nothing was done

    code, out, err = workshop.run("tune", "run.toml", "--plan")
    assert code == 0
    assert {"180", "30"} <= set(re.findall(r"\d+", out))

    workshop.run_file(urls, "rounds = 0\ntokens = 10")
    code, out, err = workshop.run("tune", "run.toml", "--plan")
    assert (code, out) == (2, "")
    assert_one_line(err, "tokens", "10")

    processes[1].send_signal(signal.SIGINT)
    processes[1].wait(timeout=30)
    code, out, err = workshop.run("tune", "run.toml", "--plan")
    assert (code, out) == (1, "")
    assert_one_line(err, urls[1].removeprefix("http://"))


def test_without_devices_nothing_starts(workshop: Workshop) -> None:
    workshop.run_file(["http://127.0.0.1:9"], "rounds = 3")
    code, out, err = workshop.run("tune", "run.toml", "--quiet")
    assert (code, out) == (1, "")
    assert_one_line(err, "127.0.0.1-9")


def test_a_device_of_another_model_is_refused_by_name(workshop: Workshop) -> None:
    tiny_gguf.write(workshop.folder / "other.gguf", tiny_gguf.QWEN2)
    processes = [workshop.device("a"), workshop.device("b", "--model", "other.gguf")]
    workshop.run_file([ready(process) for process in processes], "rounds = 3")
    code, _, err = workshop.run("tune", "run.toml", "--quiet")
    assert code == 1
    assert_one_line(err, "tiny", "other")


def test_a_device_of_another_task_takes_no_part_and_is_named(workshop: Workshop) -> None:
    turned = TASK_FILE.replace('["negative", "positive"]', '["positive", "negative"]')
    (workshop.folder / "turned.toml").write_text(turned)
    processes = [workshop.device("a"), workshop.device("b", "--task", "turned.toml")]
    workshop.run_file([ready(process) for process in processes], "rounds = 3")
    code, out, err = workshop.run("tune", "run.toml", "--plan")
    assert (code, out.count("127.0.0.1-"), "labels" in err) == (0, 0, True)
    code, _, err = workshop.run("tune", "run.toml")
    assert code == 0
    assert "film-mood" in err
    assert "labels" in err
    with RunStore(workshop.folder / "runs" / "runs.db") as store:
        assert [len(line.reported) for line in store.history("mood")] == [1, 1, 1, 1]
    code, out, _ = workshop.run("runs", "show", "mood", "--json")
    assert (code, json.loads(out)["result"]["n"]) == (0, 20)


def test_a_prompt_for_another_model_than_the_devices_is_refused_before_the_work(workshop: Workshop) -> None:
    tiny_gguf.write(workshop.folder / "other.gguf", tiny_gguf.QWEN2)
    workshop.run_file(workshop.devices()[1], "rounds = 100000")
    code, _, err = workshop.run("tune", "run.toml", "--quiet", "--model", "other.gguf")
    assert code == 1
    assert_one_line(err, "tiny", "other")


def test_a_port_in_use_is_one_line(workshop: Workshop) -> None:
    port = ready(workshop.device("a")).rsplit(":", 1)[1]
    process = workshop.device("b", "--port", port)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (1, "")
    assert_one_line(err, port)


def test_unusable_models_are_one_line(workshop: Workshop) -> None:
    tiny = workshop.folder / "tiny.gguf"
    tiny_gguf.write_truncated(workshop.folder / "short.gguf", tiny, 0.5)
    tiny_gguf.write_not_gguf(workshop.folder / "page.gguf")
    wrong = {"llama2-7b-q2_k": (2, "fedbpt models pull llama2-7b-q2_k"), "short.gguf": (1, "short.gguf")}
    wrong["page.gguf"] = (1, "page.gguf")
    processes = {name: workshop.device("a", "--model", name) for name in wrong}
    for name, (expected, value) in wrong.items():
        out, err = processes[name].communicate(timeout=30)
        assert (processes[name].returncode, out) == (expected, ""), name
        assert_one_line(err, value)


def test_a_device_ends_with_the_program_that_started_it(workshop: Workshop) -> None:
    process = workshop.device("a", "--until-eof")
    ready(process)
    assert process.poll() is None
    process.communicate(timeout=10)  # closes its standard input
    assert process.returncode == 0


@pytest.mark.timeout(900)
def test_the_demo_runs_end_to_end_on_the_smallest_model(tmp_path: Path, fleet: Fleet) -> None:
    process = fleet.spawn("fedbpt", "demo", "--quick", "--rounds", "4", "--json", "--out", "runs", cwd=tmp_path)
    out, err = process.communicate(timeout=800)
    assert (process.returncode, err) == (0, "")
    result: dict[str, Any] = json.loads(out)
    promised = "zero_shot_accuracy tuned_accuracy evaluations seconds bytes_up bytes_down peak_rss_bytes devices"
    assert {*promised.split(), "prompt_path"} <= set(result)
    assert result["evaluations"] == 64
    assert result["rounds"] == 4
    reports = [device["reports"] for device in result["devices"]]
    assert reports[0] > 5  # the search's rounds, the template's, and those that calibrate and fit the readout
    assert reports == 3 * reports[:1]
    assert all(device["bytes_up"] and device["peak_rss_bytes"] > 1e8 for device in result["devices"])
    assert 0.2 < result["zero_shot_accuracy"] <= 1
    prompt = Prompt.load(tmp_path / result["prompt_path"])
    assert (prompt.task_name, prompt.model_name) == ("bbc-news", "smollm2-135m")
