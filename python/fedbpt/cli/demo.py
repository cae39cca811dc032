"""``fedbpt demo``: the whole path on this machine. Three device processes, a coordinator, real HTTP, real news."""

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
from fedbpt.cli.options import AsJson, Dashboard, Quiet, print_json, teller
from fedbpt.cli.reach import host_and_port
from fedbpt.cli.report import print_result, result_as_json
from fedbpt.coordinator.clients.http import HttpClient
from fedbpt.coordinator.federation import Federation
from fedbpt.dashboard.comparing import Comparison, comparing, questions_of
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
SKEW = 0.5  # Dirichlet α of the label shares: most devices lack a label or two
READY_S = 120.0
EXAMPLES = 2
"""So many are printed."""


class Example(NamedTuple):
    """A held-out text that the tuned model gets right and the original does not."""

    text: str
    label: str
    original: str

    @classmethod
    def of(cls, found: Verdict) -> Example:
        return cls(found.row.text, found.row.answer, found.original)


def demo(
    model: Annotated[str, typer.Option("--model", "-m", help="A catalogue name, or a .gguf file.")] = "smollm2-135m",
    devices: Annotated[int, typer.Option(min=1, max=16, help="Device processes.")] = 3,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of tuning; one generation each.")] = 100,
    quick: Annotated[bool, typer.Option("--quick", help="A tenth of the rows: does it work here?")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of the split, the search and everything else random.")] = 0,
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the data, the run and the prompt go.")] = Path("runs"),
    dashboard: Dashboard = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Tune a real model on real news over three device processes on this machine, and show what it gained.

    Stopped by Ctrl-C, the same command goes on where it stood; after that, it runs anew.

    Example: fedbpt demo --rounds 50 --json
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
    asked = {"model": models.fingerprint(path), "devices": devices, "rows": "quick" if quick else "all"}

    with ExitStack() as stack:
        store = stack.enter_context(RunStore(folder / "runs.db"))
        working = stack.enter_context(ExitStack())
        working.enter_context(store.held(RUN))
        saved, record = folder / "prompt.safetensors", _Record(folder / "demo.json", asked)
        fresh = not record.tells_of_interruption()
        files = _write_data(folder / "data", task, splits, devices, seed)
        # Public news, and nobody who watches can steer: a network that others hear is no risk.
        secret = new_token() if shared else None
        observers = Observers(dashboard=dashboard, dashboard_secret=secret, allow_insecure=shared)
        tell = teller(not (shown or shared))  # a link with a new token is told in any case
        if shared:
            tell("the dashboard is shown to this network without encryption: public news, by links with new tokens")
        watch = stack.enter_context(observers.watching(store.path, RUN, tell))
        with RunDisplay(shown) as display:
            urls = stack.enter_context(_device_processes(path, files, task))
            clients = [HttpClient(url, name) for name, url in urls.items()]
            watch.meet(clients)

            def hear(event: Event) -> None:
                for listen in (record, display, watch):
                    listen(event)

            aggregator = settings.aggregator()
            federation = Federation(clients, task, settings, aggregator, store, RUN, hear, observers.control, fresh)
            result = federation.run()

        scorer = load_model(model)
        make_prompt(scorer, task, result).save(saved)
        record.write(ended=True)
        questions = questions_of(task, files[0]["test"])
        comparison = Comparison(lambda: comparing(scorer, task, result), task.labels, questions, watch.devices)
        watch.compare(comparison)
        examples = islice(comparison.examples.find("gained"), EXAMPLES)
        _report(result, saved, map(Example.of, examples), folder, as_json)
        print_hint(scorer, shown)
        working.close()
        watch.linger(teller(not shown))


class _Record:
    """Remembers what the stored demo was asked for, and whether it ended: one that did not goes on, others run anew."""

    def __init__(self, path: Path, asked: dict[str, Any]) -> None:
        self._path = path
        self._asked = asked

    def tells_of_interruption(self) -> bool:
        return self._path.exists() and self._path.read_text() == self._text(ended=False)

    def __call__(self, event: Event) -> None:
        if isinstance(event, RoundClosed):  # from now on this demo's run is the stored one
            self.write(ended=False)

    def write(self, ended: bool) -> None:
        write_whole({self._path: self._text(ended).encode()})

    def _text(self, ended: bool) -> str:
        return json.dumps({**self._asked, "ended": ended})


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
    """Each device's files: skewed shares of the training rows, even shares of the held-out ones."""
    for split, part in splits.items():
        scheme: Any = "dirichlet" if split == "train" else "iid"
        least = max(1, min(8, len(part) // (2 * devices)))  # rows that even the poorest device has
        tasks.write_partition(folder / split, part, task.labels, devices, scheme, SKEW, seed, min_rows=least)
    return [{split: folder / split / f"device-{i}.jsonl" for split in splits} for i in range(devices)]


@contextmanager
def _device_processes(model: Path, files: Sequence[dict[str, Path]], task: Task) -> Iterator[dict[str, str]]:
    """Start one ``fedbpt device`` a share; name → address. They end with the block."""
    threads = max(1, physical_cores() // len(files))
    processes: dict[str, subprocess.Popen[str]] = {}
    try:
        for i, share in enumerate(files):
            name = f"device-{i}"
            command = [sys.executable, "-m", "fedbpt", "device", "--model", str(model), "--task", task.name, "--json"]
            command += ["--data", str(share["train"]), "--dev", str(share["dev"]), "--test", str(share["test"])]
            command += ["--name", name, "--port", "0", "--threads", str(threads), "--until-eof"]
            # A session of its own: Ctrl-C is for the coordinator, which then ends its devices. Should it be killed,
            # their standard input ends, and so do they.
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
    """Wait for the line in which a device says where it serves."""
    timer = threading.Timer(READY_S, process.kill)
    timer.start()
    began = time.monotonic()
    line = process.stdout.readline() if process.stdout else ""
    timer.cancel()
    if not line:
        _, error = process.communicate()
        reason = (error.strip().splitlines() or [f"no answer in {time.monotonic() - began:.0f} s"])[-1]
        raise FedbptError(f"{name} did not start: {reason.removeprefix('fedbpt: ')}")
    return str(json.loads(line)["ready"]["url"])


def _report(result: RunResult, saved: Path, examples: Iterable[Example], folder: Path, as_json: bool) -> None:
    if as_json:
        found = {**result_as_json(result, saved), "examples": [example._asdict() for example in examples]}
        print_json(found)
        return
    print_result(result, saved)  # before the examples, which take a while on a busy machine
    console = PlainConsole()
    for example in examples:
        console.print(f"\n{example.text}", style="dim", highlight=False)
        said = (plain(example.original), "red"), "   tuned: ", (plain(example.label), "green"), " (right)"
        console.print(Text.assemble("  original model: ", *said))
    console.print(f"\nrun: fedbpt runs show demo --store {folder / 'runs.db'}", soft_wrap=True)
