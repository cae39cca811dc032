"""The command line, in this process: help, errors, results. Real processes are in `tests.integration`."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
from typer.main import get_command

import fedbpt
from fedbpt import ObjectiveSpec, Prompt, PromptSpec, cli
from fedbpt.bench.measurement import Measurement, measure, measure_threads
from fedbpt.cli import bench as bench_command
from fedbpt.cli import evaluate as evaluate_command
from fedbpt.cli import runs as runs_command
from fedbpt.cli import tune as tune_command
from fedbpt.coordinator.clients.in_process import InProcessClient
from fedbpt.coordinator.federation import Federation
from fedbpt.device.device import Device
from fedbpt.errors import FedbptError
from fedbpt.runs.result import RunResult
from fedbpt.runs.settings import RunSettings
from fedbpt.runs.store import RunStore
from fedbpt.tasks import write_rows
from tests.support.toy_scorer import ToyScorer
from tests.support.toy_task import TASK, TASK_FILE, rows
from tests.unit.runs.test_store import as_of_version_1


class Answer(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Answer]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: object) -> Answer:
        with pytest.raises(SystemExit) as caught:
            cli.main([str(argument) for argument in arguments])
        assert isinstance(caught.value.code, int)
        return Answer(caught.value.code, *capfd.readouterr())

    return call


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEDBPT_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture
def toy_model(monkeypatch: pytest.MonkeyPatch) -> None:
    for command in (bench_command, evaluate_command, runs_command):
        monkeypatch.setattr(command, "load_model", lambda *_args, **_options: ToyScorer())


# --- help ------------------------------------------------------------------------------------------------------------


def commands() -> Iterator[tuple[str, Any]]:
    """Every command with its full name, groups included."""

    def walk(command: Any, name: str) -> Iterator[tuple[str, Any]]:
        yield name, command
        for word, below in getattr(command, "commands", {}).items():
            yield from walk(below, f"{name} {word}")

    return walk(get_command(cli.make_app()), "fedbpt")


COMMANDS = dict(commands())
LEAVES = {name: command for name, command in COMMANDS.items() if not hasattr(command, "commands")}


def test_all_commands_exist() -> None:
    words = ["demo", "device", "tune", "coordinator", "evaluate", "chat", "serve", "export", "import"]
    words += ["bench"]
    words += ["models list", "models pull", "models path", "models rm", "models check", "models requantize"]
    words += ["tasks new"]
    words += ["certs init", "certs issue", "devices invite", "devices list", "devices revoke"]
    words += [
        "runs list",
        "runs show",
        "runs report",
        "runs export",
        "runs replay",
        "runs scalars",
        "runs cancel",
        "runs delete",
        "dashboard",
    ]
    assert set(LEAVES) == {f"fedbpt {word}" for word in words}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_and_group_has_help_with_an_example(name: str, run: Run) -> None:
    example = "fedbpt demo" if name == "fedbpt" else name
    assert f"Example: {example}" in COMMANDS[name].help
    answer = run(*name.split()[1:], "--help")
    assert answer.code == 0
    assert "Example: fedbpt" in answer.out


@pytest.mark.parametrize("name", COMMANDS)
def test_h_is_short_for_help_everywhere(name: str, run: Run) -> None:
    words = name.split()[1:]
    assert run(*words, "-h") == run(*words, "--help")


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("fedbpt mod", {"models"}),
        ("fedbpt models p", {"pull", "path"}),
        ("fedbpt models list --j", {"--json"}),
        ("fedbpt serve --mod", {"--model"}),
    ],
)
def test_a_shell_can_complete_commands(
    typed: str, offered: set[str], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("_FEDBPT_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", typed)
    monkeypatch.setenv("COMP_CWORD", str(len(typed.split()) - 1))
    code, out, err = run()
    assert (code, set(out.split()), err) == (0, offered, "")


def test_the_completion_script_can_be_shown(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shellingham.detect_shell", lambda *_: ("bash", "/bin/bash"))  # tests may run without a shell
    code, out, _ = run("--show-completion")
    assert code == 0
    assert "_FEDBPT_COMPLETE=complete_bash" in out


@pytest.mark.parametrize("name", LEAVES)
def test_every_command_has_json_and_quiet_and_help_on_each_option(name: str) -> None:
    parameters = LEAVES[name].params
    options = [option for parameter in parameters for option in parameter.opts]
    assert {"--json", "--quiet", "-q"} <= set(options)
    assert [parameter.name for parameter in parameters if not parameter.help] == []


@pytest.mark.parametrize("group", [(), ("models",), ("tasks",), ("runs",), ("certs",), ("devices",)])
def test_a_group_without_a_command_shows_its_help(group: tuple[str, ...], run: Run) -> None:
    assert run(*group) == run(*group, "--help")


def test_version(run: Run) -> None:
    assert run("--version") == (0, f"fedbpt {fedbpt.__version__}\n", "")


# --- errors ----------------------------------------------------------------------------------------------------------

DEVICE = ("device", "--task", "ag-news", "--model")


@pytest.mark.parametrize(
    ("arguments", "code", "named"),
    [
        (("bogus",), 2, "`fedbpt --help`"),
        (("tune",), 2, "fedbpt tune run.toml"),
        (("tune", "--model", "x", "--data", "rows.jsonl"), 2, "--task"),
        (("tune", "--task", "sst-2", "--data", "rows.jsonl"), 2, "--model"),
        (("tune", "--task", "bogus", "--model", "x", "--data", "rows.jsonl"), 2, "'bogus'"),
        (("tune", "--task", "sst-2", "--model", "x", "--data", "absent.csv"), 2, "absent.csv"),
        (("tune", "--task", "sst-2", "--model", "x", "--data", "a", "--device", "http://pi5"), 2, "--device"),
        (("tune", "--task", "sst-2", "--model", "x", "--data", "a", "--listen", "0.0.0.0:1"), 2, "--listen"),
        (("tune", "run.toml", "--data", "a", "--model", "x", "--seed", "1"), 2, "--seed"),
        (("tune", "run.toml", "--device", "http://pi5", "--task", "sst-2"), 2, "--task"),
        (("tune", "run.toml", "--data", "a"), 2, "--model"),
        (("tune", "run.toml", "--test", "a"), 2, "--test"),
        (("demo", "--bogus"), 2, "--bogus"),
        (("demo", "--devices", "0"), 2, "'--devices'"),
        (("demo", "--devices", "many"), 2, "'--devices'"),
        (("demo", "--model", "bogus"), 2, "'bogus'"),
        (("tune", "absent.toml"), 2, "absent.toml"),
        (("tune", "run.toml"), 2, "--device"),
        (("tune", "run.toml", "--device", "pi5"), 2, "'pi5'"),
        (("tune", "run.toml", "--device", "http://127.0.0.1:9", "--out", "p"), 2, "--model"),
        (("tune", "run.toml", "--device", "http://127.0.0.1:9", "--device", "http://127.0.0.1:9/"), 2, "twice"),
        (
            ("tune", "run.toml", "--device", "http://127.0.0.1:9", "--model", "smollm2-135m"),
            2,
            "fedbpt models pull smollm2-135m",
        ),
        (("evaluate", "absent", "--data", "rows.jsonl"), 1, "absent"),
        (("evaluate", "run.toml", "--data", "rows.jsonl"), 1, "run.toml"),
        ((*DEVICE, "smollm2-135m", "--data", "absent.jsonl"), 2, "absent.jsonl"),
        ((*DEVICE, "smollm2-135m", "--data", "empty.jsonl"), 2, "empty.jsonl"),
        ((*DEVICE, "smollm2-135m", "--data", "news.jsonl"), 2, "`fedbpt models pull smollm2-135m`"),
        ((*DEVICE, "absent.gguf", "--data", "news.jsonl"), 2, "absent.gguf"),
        ((*DEVICE, "news.jsonl", "--data", "news.jsonl"), 1, "news.jsonl"),
        ((*DEVICE, ".", "--data", "news.jsonl"), 2, "fedbpt: ."),
        (("device", "--model", "x", "--data", "news.jsonl", "--task", "chess"), 2, "'chess'"),
        (("device", "--model", "x", "--data", "news.jsonl", "--task", "ag-news", "--max-epsilon", "0"), 2, "epsilon"),
        ((*DEVICE, "x", "--data", "news.jsonl", "--max-epsilon", "4"), 2, "--state FILE"),
        ((*DEVICE, "x", "--data", "news.jsonl", "--port", "99999"), 2, "'--port'"),
        ((*DEVICE, "x", "--data", "news.jsonl", "--name", "a b"), 2, "'a b'"),
        (("models", "path", "smollm2-135m"), 2, "fedbpt models pull smollm2-135m"),
        (("models", "pull", "bogus"), 2, "'bogus'"),
        (("models", "requantize", "smollm2-135m", "q4_0"), 2, "fedbpt models pull smollm2-135m"),
        (("models", "requantize", "news.jsonl", "q9"), 2, "q2_k"),
        (("models", "requantize", "news.jsonl", "q4_0"), 1, "news.jsonl"),
        (("models", "requantize", "news.jsonl", "q4_0", "--out", "empty.jsonl"), 2, "empty.jsonl"),
        (("models", "requantize", "news.jsonl", "q4_0", "--out", "news.jsonl", "--force"), 2, "news.jsonl"),
        (("models", "requantize", "news.jsonl", "q4_0", "--out", "absent/x.gguf"), 1, "absent/x.gguf"),
        (("bench", "-m", "bogus"), 2, "'bogus'"),
        (("bench", "-m", "absent.gguf"), 2, "absent.gguf"),
        (("bench", "-m", "news.jsonl"), 1, "news.jsonl"),
        (("bench", "--compare", "absent.json", "news.jsonl"), 2, "absent.json"),
        (("bench", "--compare", "news.jsonl", "news.jsonl"), 2, "news.jsonl"),
        (("bench", "-m", "news.jsonl", "--threads", "0"), 2, "'--threads'"),
        (("runs", "list"), 1, "runs/runs.db"),
        (("tune", "run.toml", "--listen", "8400"), 2, "--listen 8400"),
        (("tune", "run.toml", "--listen", "pi5:http"), 2, "--listen pi5:http"),
        (("tune", "run.toml", "--device", "http://127.0.0.1:9", "--monitor", "8400"), 2, "--monitor 8400"),
        (("tune", "run.toml", "--device", "http://127.0.0.1:9", "--monitor", "0.0.0.0:0"), 2, "--monitor-token"),
        (("tune", "run.toml", "--device", "http://127.0.0.1:9", "--monitor-token", "t"), 2, "--monitor-token"),
        (("tune", "run.toml", "--device", "http://127.0.0.1:9", "--log", "."), 2, "Is a directory"),
        (("tune", "run.toml", "--listen", "127.0.0.1:0"), 2, "fedbpt devices invite NAME"),
        (("tune", "run.toml", "--listen", "0.0.0.0:0"), 2, "--cert"),
        (("tune", "run.toml", "--listen", "127.0.0.1:0", "--expect", "0"), 2, "'--expect'"),
        (("tune", "run.toml", "--device", "http://127.0.0.1:9", "--cert", "run.toml"), 2, "--key"),
        (("tune", "run.toml", "--device", "https://127.0.0.1:9", "--ca", "absent.pem"), 2, "absent.pem"),
        (("tune", "run.toml", "--device", "https://127.0.0.1:9", "--ca", "run.toml"), 2, "run.toml"),
        (("tune", "run.toml", "--device", "http://127.0.0.1:9", "--tokens", "run.toml"), 2, "chmod 600 run.toml"),
        (("tune", "run.toml", "--device", "http://127.0.0.1:9", "--tokens", "absent"), 2, "absent"),
        ((*DEVICE, "x", "--data", "news.jsonl", "--coordinator", "http://c.example"), 2, "http://c.example"),
        ((*DEVICE, "x", "--data", "news.jsonl", "--coordinator", "https://c.example"), 2, "--enrol CODE"),
        ((*DEVICE, "x", "--data", "news.jsonl", "--enrol", "CODE"), 2, "--coordinator https://HOST:PORT"),
        ((*DEVICE, "x", "--data", "news.jsonl", "--token-file", "run.toml"), 2, "chmod 600 run.toml"),
        (("devices", "list"), 1, "runs/devices.db"),
        (("devices", "list", "--registry", "run.toml"), 1, "run.toml"),
        (("devices", "invite", "a b"), 2, "'a b'"),
        (("devices", "invite", "a", "--minutes", "0"), 2, "'--minutes'"),
        (("devices", "revoke", "a"), 1, "runs/devices.db"),
        (("certs", "issue", "pi5"), 2, "certs/ca.key"),
        (("certs", "init", "--dir", "run.toml"), 2, "run.toml"),
        (("runs", "list", "--store", "run.toml"), 1, "run.toml"),
    ],
)
def test_a_wrong_command_is_one_line_and_its_exit_code(
    arguments: tuple[str, ...], code: int, named: str, run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDBPT_CREDENTIALS", "credentials.json")
    (folder / "run.toml").write_text('task = "ag-news"')
    (folder / "empty.jsonl").touch()
    (folder / "news.jsonl").write_text('{"text": "a match", "label": "Sports"}\n')
    answer = run(*arguments)
    assert answer.code == code
    assert answer.out == ""
    assert named in answer.err
    assert answer.err.startswith("fedbpt: ")
    assert len(answer.err.splitlines()) == 1
    assert "Traceback" not in answer.err


@pytest.mark.parametrize("arguments", [("--debug", "tune", "absent.toml"), ("tune", "absent.toml", "--debug")])
def test_debug_shows_the_traceback(arguments: tuple[str, ...]) -> None:
    with pytest.raises(FedbptError, match=r"absent\.toml"):
        cli.main(arguments)


def test_a_folder_that_cannot_be_made_is_one_line(run: Run, folder: Path) -> None:
    (folder / "file").touch()
    (folder / "run.toml").write_text('task = "ag-news"\ndevices = ["http://127.0.0.1:9"]\nmodel = "x.gguf"')
    answer = run("tune", "run.toml", "--out", "file/prompt")
    assert (answer.code, answer.err) == (1, "fedbpt: file: File exists\n")


def test_a_bug_is_one_line_that_names_debug(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune_command, "load_config", lambda _path: 1 // 0)
    answer = run("tune", "run.toml")
    assert answer.code == 1
    assert "unexpected ZeroDivisionError" in answer.err
    assert "--debug" in answer.err
    assert len(answer.err.splitlines()) == 1


@pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_prints_the_command_that_resumes_it(
    which: signal.Signals, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune_command, "load_config", lambda _path: signal.raise_signal(which))
    before = signal.getsignal(signal.SIGTERM)
    answer = run("tune", "my run.toml", "--fresh", "--quiet")
    assert (answer.code, answer.out, answer.err.count("\n")) == (130, "", 1)
    assert answer.err.endswith(": fedbpt tune 'my run.toml' --fresh --quiet\n")
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_command_that_cannot_be_resumed_prints_only_that_it_stopped(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(_path: Path) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(Prompt, "load", interrupt)
    assert run("evaluate", "p", "--data", "d") == (130, "", "fedbpt: stopped\n")


# --- runs and evaluate, on a toy run ---------------------------------------------------------------------------------


@pytest.fixture
def stored(folder: Path) -> RunResult:
    """A finished run ``toy`` of two devices and a stopped one ``half``, in the default store."""
    settings = RunSettings(
        rounds=3, popsize=6, prompt=PromptSpec(d=4), evaluate_every=1,
        calibrate=False, objective=ObjectiveSpec(readout_words=0),
    )  # fmt: skip

    def federation(name: str, store: RunStore, on_event: Callable[[Any], None] = lambda _event: None) -> Federation:
        shares = {"a": (rows(8), rows(4, 20), rows(6, 40)), "b": (rows(9, 60), rows(3, 80), rows(5, 90))}
        clients = [InProcessClient(Device(device, ToyScorer(), *share, task=TASK)) for device, share in shares.items()]
        return Federation(clients, TASK, settings, settings.aggregator(), store, name, on_event)

    def stop(event: Any) -> None:
        if getattr(event, "round", 0) == 2:
            raise KeyboardInterrupt

    with RunStore(folder / "runs" / "runs.db") as store:
        result = federation("toy", store).run()
        with pytest.raises(KeyboardInterrupt):
            federation("half", store, stop).run()
    (folder / "mood.toml").write_text(TASK_FILE)
    write_rows(folder / "rows.jsonl", rows(12), TASK.labels)
    return result


def test_runs_list(stored: RunResult, run: Run) -> None:
    listed = json.loads(run("runs", "list", "--json").out)
    assert {line["run"]: (line["status"], line["task"]) for line in listed} == {
        "half": ("stopped", "toy-mood"),
        "toy": ("finished", "toy-mood"),
    }
    assert sorted(run("runs", "list", "--quiet").out.split()) == ["half", "toy"]
    assert f"{stored.tuned.accuracy:.3f}" in run("runs", "list").out


def test_runs_show_of_a_finished_run(stored: RunResult, run: Run) -> None:
    shown = json.loads(run("runs", "show", "toy", "--json").out)
    assert shown["result"]["tuned_accuracy"] == stored.tuned.accuracy
    assert shown["result"]["n"] == 11
    assert [line["round"] for line in shown["rounds"]] == [0, 1, 2, 3]
    assert shown["rounds"][1]["reported"] == ["a", "b"]
    text = run("runs", "show", "toy").out
    assert ": 11 test rows" in text
    assert "18 evaluations in 3 rounds" in text
    assert text.startswith(run("runs", "show", "toy", "--quiet").out)


@pytest.mark.usefixtures("stored")
def test_runs_show_of_a_stopped_run_has_its_status(run: Run) -> None:
    assert run("runs", "show", "half").out.startswith("run half is stopped after ")
    assert json.loads(run("runs", "show", "half", "--json").out)["result"] is None


@pytest.mark.usefixtures("stored", "toy_model")
def test_an_exported_prompt_can_be_evaluated(run: Run, folder: Path) -> None:
    out = folder / "new" / "p.safetensors"
    arguments = ("runs", "export", "toy", "--model", "toy", "--out", out)
    assert run(*arguments) == (0, f"{out}\n", "")
    assert json.loads(run(*arguments, "--json").out) == {"run": "toy", "prompt_path": str(out)}
    evaluated = ("evaluate", out, "--data", "rows.jsonl", "--model", "toy")
    found = json.loads(run(*evaluated, "--json").out)
    assert set(found) == {"zero_shot", "tuned"}
    assert found["tuned"]["n"] == len(found["tuned"]["predictions"]) == 12
    assert run(*evaluated, "--quiet").out == f"{found['tuned']['accuracy']:.4f}\n"
    assert "toy-mood on toy, 12 rows" in run(*evaluated).out
    assert run(*evaluated, "--task", "mood.toml") == run(*evaluated)


@pytest.mark.usefixtures("stored", "toy_model")
def test_hints_about_the_model_go_to_standard_error(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run("runs", "export", "toy", "-m", "toy", "-o", "p")
    evaluated = ("evaluate", "p", "--data", "rows.jsonl", "--model", "toy")
    assert run(*evaluated).err == ""
    monkeypatch.setattr(ToyScorer, "hint", "try another format")
    assert run(*evaluated).err == "hint: try another format\n"
    assert run(*evaluated, "--quiet").err == ""
    assert run(*evaluated, "--json").err == ""


@pytest.mark.usefixtures("stored", "toy_model")
@pytest.mark.parametrize(
    ("arguments", "code", "named"),
    [
        (("runs", "show", "absent"), 1, "'absent'"),
        (("runs", "export", "absent", "-m", "toy", "-o", "p"), 1, "'absent'"),
        (("runs", "export", "half", "-m", "toy", "-o", "p"), 2, "half is stopped"),
        (("runs", "export", "toy", "-m", "toy", "-o", "p", "-t", "sst-2"), 2, "sst-2"),
        (("runs", "replay", "absent"), 1, "'absent'"),
        (("runs", "replay", "toy", "-t", "ag-news"), 2, "ag-news"),
        (("dashboard", "toy", "-t", "ag-news"), 2, "ag-news"),
        (("dashboard", "half", "--votes", "v.jsonl"), 2, "half"),
        (("dashboard", "toy", "-t", "mood.toml", "--votes", "v.csv"), 2, "v.csv"),
        (("runs", "scalars", "absent", "-o", "boards"), 1, "'absent'"),
        (("runs", "scalars", "toy", "-o", "mood.toml"), 2, "mood.toml/toy"),
        (("evaluate", "toy.safetensors", "--data", "rows.jsonl"), 2, "--model"),
        (("evaluate", "toy.safetensors", "--data", "rows.jsonl", "-t", "ag-news", "-m", "toy"), 2, "ag-news"),
        (("evaluate", "toy.safetensors", "--data", "mood.toml", "-t", "mood.toml", "-m", "toy"), 2, "mood.toml"),
    ],
)
def test_wrong_use_of_stored_runs_is_one_line(arguments: tuple[str, ...], code: int, named: str, run: Run) -> None:
    run("runs", "export", "toy", "-m", "toy", "-o", "toy.safetensors")
    answer = run(*arguments)
    assert answer.code == code, answer
    assert named in answer.err
    assert len(answer.err.splitlines()) == 1


@pytest.mark.usefixtures("stored")
def test_a_prompt_cannot_be_made_with_another_model(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs_command, "load_model", lambda _model: ToyScorer(seed=1, name="other"))
    answer = run("runs", "export", "toy", "-m", "x", "-o", "p")
    assert answer.code == 1
    assert "not other" in answer.err
    assert not Path("p").exists()


@pytest.mark.usefixtures("stored")
def test_a_run_can_be_deleted_unless_it_is_running(run: Run, folder: Path) -> None:
    assert run("runs", "delete", "half").code == 0
    assert run("runs", "list", "--quiet").out == "toy\n"
    with RunStore(folder / "runs" / "runs.db") as store:
        store.set_status("toy", "running")
    refused = run("runs", "delete", "toy")
    assert (refused.code, refused.out, len(refused.err.splitlines())) == (2, "", 1)
    assert json.loads(run("runs", "show", "toy", "--json").out)["n_rounds"] == 4
    assert json.loads(run("runs", "delete", "toy", "--force", "--json").out) == {"run": "toy", "n_rounds": 4}
    assert run("runs", "list", "--quiet").out == ""
    assert run("runs", "delete", "toy").code == 1


@pytest.mark.usefixtures("stored", "toy_model")
def test_a_run_of_an_earlier_version_needs_its_task(run: Run, folder: Path) -> None:
    as_of_version_1(folder / "runs" / "runs.db")
    for command in (("runs", "export", "toy", "-m", "toy", "-o", "p"), ("runs", "replay", "toy")):
        answer = run(*command)
        assert (answer.code, answer.out, len(answer.err.splitlines())) == (2, "", 1)
        assert "--task" in answer.err
        assert run(*command, "--task", "mood.toml").code == 0
    assert Prompt.load("p").task == TASK


# --- bench -----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("toy_model")
def test_bench(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_command, "measure", partial(measure, seconds=0.0))
    monkeypatch.setattr(bench_command, "measure_threads", partial(measure_threads, counts=[1], seconds=0.0))
    monkeypatch.setattr(ToyScorer, "hint", "try another format")
    code, out, err = run("bench", "-m", "toy")
    assert code == 0
    assert "toy (100 % f32), numpy, threads: 1" in out
    for line in ("1 text of 512 tokens", "16 prompts of 1 on 8 texts", "2 prompts of 50 on 8 texts", "memory: weights"):
        assert line in out
    assert err.splitlines()[-1] == "hint: try another format"
    assert run("bench", "-m", "toy", "--quiet").err == ""

    code, out, err = run("bench", "-m", "toy", "--json")
    assert (code, err) == (0, "")
    found = msgspec.json.decode(out, type=Measurement)
    assert found.cue.evaluations_per_second > 0
    assert found.hint == "try another format"
    assert found.projection is not None
    assert (found.projection.rounds, found.best_threads) == (40, found.threads[0].n_threads)

    (folder / "a.json").write_text(out)
    assert run("bench", "--compare", "a.json", "a.json").out.count(" 1.00 \n") > 20
    ratios = json.loads(run("bench", "--compare", "a.json", "a.json", "--json").out)
    assert (set(ratios["ratios"].values()), ratios["notes"]) == ({1.0}, [])


@pytest.mark.usefixtures("toy_model")
def test_bench_fetches_a_model_of_the_catalogue(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    pulled: list[str] = []
    monkeypatch.setattr(bench_command.models, "pull", lambda name, _progress: pulled.append(name))
    monkeypatch.setattr(bench_command, "measure", partial(measure, seconds=0.0))
    assert run("bench", "--quick", "--json").code == 0
    assert pulled == ["smollm2-135m"]
