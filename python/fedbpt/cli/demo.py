"""``fedbpt demo``: a complete run on this machine, with three device processes, HTTP and real news."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from rich.text import Text

from fedbpt import models, tasks
from fedbpt.api import make_prompt
from fedbpt.cli.hint import print_hint
from fedbpt.cli.models import progress_bar
from fedbpt.cli.observe import Observers
from fedbpt.cli.options import AsJson, Dashboard, Quiet, print_json, status_printer
from fedbpt.cli.reach import host_and_port
from fedbpt.cli.report import print_result, result_as_json
from fedbpt.coordinator.clients.http import HttpClient
from fedbpt.coordinator.federation import Federation
from fedbpt.dashboard.comparison import Comparison, models_of_run, questions_of
from fedbpt.dashboard.examples import Verdict
from fedbpt.display.console import RunDisplay
from fedbpt.display.plain_console import PlainConsole
from fedbpt.engine.native_scorer import load_model
from fedbpt.errors import FedbptError
from fedbpt.machine.files import write_whole
from fedbpt.machine.info import physical_cores
from fedbpt.net.tls import is_loopback
from fedbpt.net.tokens import new_token
from fedbpt.plain_text import plain
from fedbpt.protocol.specs import ObjectiveSpec, PromptSpec
from fedbpt.runs.events import Event, RoundClosed
from fedbpt.runs.result import RunResult
from fedbpt.runs.settings import RunSettings
from fedbpt.runs.store import RunStore
from fedbpt.tasks import Row, Task

RUN = "demo"
TASK = "bbc-news"
ROWS = {"test": 600, "dev": 150, "train": 320}
QUICK_ROWS = {"test": 60, "dev": 15, "train": 60}
SKEW = 0.5
"""Dirichlet α of the label shares: most devices lack a label or two."""
READY_S = 120.0
"""How long a device process may take to start, in seconds."""
EXAMPLES = 2
"""Number of examples to print."""


class Example(NamedTuple):
    """A held-out text that only the tuned model classifies correctly."""

    text: str
    label: str
    original: str

    @classmethod
    def of(cls, found: Verdict) -> Example:
        return cls(found.row.text, found.row.expected, found.original)


def demo(
    model: Annotated[str, typer.Option("--model", "-m", help="A catalogue name, or a .gguf file.")] = "smollm2-135m",
    devices: Annotated[int, typer.Option(min=1, max=16, help="Device processes.")] = 3,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of tuning; one generation each.")] = 25,
    quick: Annotated[bool, typer.Option("--quick", help="Use a tenth of the rows, to check that it works.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the split, the search and all other randomness.")] = 0,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the data, the run and the prompt.")] = Path(
        "runs"
    ),
    dashboard: Dashboard = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Tune a model on BBC News over three device processes on this machine, and show the gain in accuracy.

    After Ctrl-C, the same command resumes the run. Once finished, it starts a new one.

    Example: fedbpt demo --rounds 100 --json
    """
    shown = not (quiet or as_json)
    shared = dashboard is not None and not is_loopback(host_and_port("--dashboard", dashboard)[0])
    task = tasks.load(TASK)
    with progress_bar(model, shown) as progress:
        path = models.pull(model, progress) if model in models.CATALOGUE else models.locate(model)
    with progress_bar("BBC News", shown) as progress:
        rows = [(task.clip(text), label) for text, label in tasks.bbc_news(progress=progress)]
    splits = tasks.split_rows(rows, QUICK_ROWS if quick else ROWS, seed)
    folder = out / f"demo-{seed}"
    settings = _settings(task, rounds, seed)
    parameters = {"model": models.fingerprint(path), "devices": devices, "rows": "quick" if quick else "all"}

    with ExitStack() as stack:
        store = stack.enter_context(RunStore(folder / "runs.db"))
        working = stack.enter_context(ExitStack())
        working.enter_context(store.held(RUN))
        saved = folder / "prompt.safetensors"
        record = _Record(folder / "demo.json", parameters)
        fresh = not record.is_interrupted()
        files = _write_data(folder / "data", task, splits, devices, seed)
        # Unencrypted is acceptable here: the news are public, and the shared link gives no control over the run.
        secret = new_token() if shared else None
        observers = Observers(dashboard=dashboard, dashboard_secret=secret, allow_insecure=shared)
        tell = status_printer(not (shown or shared))  # a link with a new token is printed even with --quiet
        if shared:
            tell("the dashboard is served unencrypted on this network; its links carry new tokens")
        watch = stack.enter_context(observers.watching(store.path, RUN, tell))
        with RunDisplay(shown) as display:
            urls = stack.enter_context(_device_processes(path, files, task))
            clients = [HttpClient(url, name) for name, url in urls.items()]
            watch.meet(clients)

            def on_event(event: Event) -> None:
                for observer in (record, display, watch):
                    observer(event)

            aggregator = settings.aggregator()
            federation = Federation(clients, task, settings, aggregator, store, RUN, on_event, observers.control, fresh)
            result = federation.run()

        scorer = load_model(model)
        make_prompt(scorer, task, result).save(saved)
        record.write(ended=True)
        questions = questions_of(task, files[0]["test"])
        comparison = Comparison(lambda: models_of_run(scorer, task, result), task.labels, questions, watch.devices)
        watch.compare(comparison)
        examples = islice(comparison.examples.find("gained"), EXAMPLES)
        _report(result, saved, map(Example.of, examples), folder, as_json)
        print_hint(scorer, shown)
        working.close()
        watch.wait_for_pages(status_printer(not shown))


class _Record:
    """A file of the stored demo's parameters and whether it ended, to decide between resuming and starting over."""

    def __init__(self, path: Path, parameters: dict[str, Any]) -> None:
        self._path = path
        self._parameters = parameters

    def is_interrupted(self) -> bool:
        """Whether the stored demo has the same parameters and did not end."""
        return self._path.exists() and self._path.read_text() == self._text(ended=False)

    def __call__(self, event: Event) -> None:
        if isinstance(event, RoundClosed):  # from now on the stored run is this demo's
            self.write(ended=False)

    def write(self, ended: bool) -> None:
        write_whole({self._path: self._text(ended).encode()})

    def _text(self, ended: bool) -> str:
        return json.dumps({**self._parameters, "ended": ended})


def _settings(task: Task, rounds: int, seed: int) -> RunSettings:
    return RunSettings(
        rounds=rounds,
        prompt=PromptSpec(seed=seed),
        objective=ObjectiveSpec(max_text_tokens=task.max_text_tokens),
        popsize=16,
        seed=seed,
        select_rows=32,
        deadline_s=300.0,
        evaluate_every=50,
    )


def _write_data(
    folder: Path, task: Task, splits: dict[str, list[Row]], devices: int, seed: int
) -> list[dict[str, Path]]:
    """Write each device's files: label-skewed shares of the training rows, iid shares of the held-out rows."""
    for split, part in splits.items():
        scheme: Any = "dirichlet" if split == "train" else "iid"
        min_rows = max(1, min(8, len(part) // (2 * devices)))
        tasks.write_partition(folder / split, part, task.labels, devices, scheme, SKEW, seed, min_rows=min_rows)
    return [{split: folder / split / f"device-{i}.jsonl" for split in splits} for i in range(devices)]


@contextmanager
def _device_processes(model: Path, files: Sequence[dict[str, Path]], task: Task) -> Iterator[dict[str, str]]:
    """Run a ``fedbpt device`` for each share within the block. Yields addresses by name."""
    threads = max(1, physical_cores() // len(files))
    processes: dict[str, subprocess.Popen[str]] = {}
    try:
        for i, share in enumerate(files):
            name = f"device-{i}"
            command = [sys.executable, "-m", "fedbpt", "device", "--model", str(model), "--task", task.name, "--json"]
            command += ["--data", str(share["train"]), "--dev", str(share["dev"]), "--test", str(share["test"])]
            command += ["--name", name, "--port", "0", "--threads", str(threads), "--until-eof"]
            # In a new session, because Ctrl-C is for the coordinator, which then ends its devices. If it is killed,
            # their standard input closes, which ends them.
            processes[name] = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
        yield {name: _address(name, process) for name, process in processes.items()}
    finally:
        for process in processes.values():
            process.terminate()
        for process in processes.values():
            try:
                process.communicate(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()


def _address(name: str, process: subprocess.Popen[str]) -> str:
    """Wait for the line in which a device prints its address."""
    timer = threading.Timer(READY_S, process.kill)
    timer.start()
    began = time.monotonic()
    line = process.stdout.readline() if process.stdout else ""
    timer.cancel()
    if not line:
        _, error = process.communicate()
        reason = (error.strip().splitlines() or [f"no output within {time.monotonic() - began:.0f} s"])[-1]
        raise FedbptError(f"{name} did not start: {reason.removeprefix('fedbpt: ')}")
    return str(json.loads(line)["ready"]["url"])


def _report(result: RunResult, saved: Path, examples: Iterable[Example], folder: Path, as_json: bool) -> None:
    if as_json:
        found = {**result_as_json(result, saved), "examples": [example._asdict() for example in examples]}
        print_json(found)
        return
    print_result(result, saved)  # before the examples, which are computed lazily and may take a while
    console = PlainConsole()
    for example in examples:
        console.print(f"\n{example.text}", style="dim", highlight=False)
        original = (plain(example.original), "red")
        tuned = (plain(example.label), "green")
        console.print(Text.assemble("  original model: ", original, "   tuned: ", tuned, " (correct)"))
    console.print(f"\nrun: fedbpt runs show demo --store {folder / 'runs.db'}", soft_wrap=True)
