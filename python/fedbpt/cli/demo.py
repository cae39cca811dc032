"""``fedbpt demo``: the whole path on this machine. Three device processes, a coordinator, real HTTP, real news."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import msgspec
import numpy as np
import typer
from rich.console import Console

from fedbpt import models, tasks
from fedbpt.api import aggregator_for, evaluate, make_prompt
from fedbpt.cli.models import progress_bar
from fedbpt.cli.options import AsJson, Quiet
from fedbpt.cli.report import print_result, result_as_json
from fedbpt.clients.http import HttpClient
from fedbpt.display import RunDisplay
from fedbpt.errors import ConfigError, FedbptError
from fedbpt.federation import Federation
from fedbpt.messages import ObjectiveSpec, PromptSpec
from fedbpt.native_scorer import load_model, physical_cores
from fedbpt.prompt import Prompt
from fedbpt.runs import RunResult, RunSettings
from fedbpt.scorer import Scorer
from fedbpt.store import RunStore
from fedbpt.tasks import Row, Task

TASK = "bbc-news"
ROWS = {"test": 600, "dev": 150, "train": 320}
QUICK_ROWS = {"test": 60, "dev": 15, "train": 60}
SKEW = 0.5  # Dirichlet α of the label shares: most devices lack a label or two
READY_S = 120.0


class Example(NamedTuple):
    """A held-out text that the tuned model gets right and the original does not."""

    text: str
    label: str
    original: str


def demo(
    model: Annotated[str, typer.Option("--model", "-m", help="A catalogue name, or a .gguf file.")] = "smollm2-135m",
    devices: Annotated[int, typer.Option(min=1, max=16, help="Device processes.")] = 3,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of tuning; one generation each.")] = 200,
    quick: Annotated[bool, typer.Option("--quick", help="A tenth of the rows: does it work here?")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of the split, the search and everything else random.")] = 0,
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the data, the run and the prompt go.")] = Path("runs"),
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Tune a real model on real news over three device processes on this machine, and show what it gained.

    Example: fedbpt demo --rounds 50 --json
    """
    shown = not (quiet or as_json)
    task = tasks.load(TASK)
    with progress_bar(model, shown) as progress:
        path = models.pull(model, progress) if model in models.CATALOGUE else models.locate(model)
    with progress_bar("BBC News", shown) as progress:
        rows = [(task.clip(text), label) for text, label in tasks.bbc_news(progress=progress)]
    splits = tasks.split_rows(rows, QUICK_ROWS if quick else ROWS, seed)
    folder = out / f"demo-{seed}"
    files = _write_data(folder / "data", task, splits, devices, seed)
    settings = _settings(task, rounds, seed)

    with _device_processes(path, files, task) as urls:
        clients = [HttpClient(url, name) for name, url in urls.items()]
        with RunStore(folder / "runs.db") as store, RunDisplay(shown) as display:
            run = Federation(clients, task, settings, aggregator_for(settings), store, "demo", display)
            result = run.run()

    scorer = load_model(path)
    prompt = make_prompt(scorer, task, result)
    saved = prompt.save(folder / "prompt.safetensors")
    examples = _examples(scorer, task, splits["test"], prompt)
    if as_json:
        found = {**result_as_json(result, saved), "examples": [example._asdict() for example in examples]}
        typer.echo(msgspec.json.encode(found).decode())
    else:
        _print(result, saved, examples, task, folder)


def _settings(task: Task, rounds: int, seed: int) -> RunSettings:
    return RunSettings(
        rounds=rounds,
        prompt=PromptSpec(seed=seed),
        objective=ObjectiveSpec(max_text_tokens=task.max_text_tokens),
        popsize=16,
        seed=seed,
        select_rows=32,
        deadline_s=300.0,
        evaluate_every=20,
    )


def _write_data(
    folder: Path, task: Task, splits: dict[str, list[Row]], devices: int, seed: int
) -> list[dict[str, Path]]:
    """Each device's files: skewed shares of the training rows, even shares of the held-out ones."""
    for split, part in splits.items():
        scheme: Any = "dirichlet" if split == "train" else "iid"
        tasks.write_partition(folder / split, part, task.labels, devices, scheme, SKEW, seed, min_rows=8)
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
            command += ["--name", name, "--port", "0", "--threads", str(threads)]
            processes[name] = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
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
        raise FedbptError(f"{name} did not start: {reason}")
    return str(json.loads(line)["ready"]["url"])


def _examples(scorer: Scorer, task: Task, rows: Sequence[Row], prompt: Prompt, wanted: int = 2) -> list[Example]:
    """The first held-out rows that only the tuned model gets right; looks no further than it must."""
    found: list[Example] = []
    for start in range(0, len(rows), 64):
        part = rows[start : start + 64]
        before = evaluate(scorer, task, part, template=prompt.template).predictions
        after = evaluate(scorer, task, part, prompt).predictions
        truth = np.array([label for _, label in part])
        for i in np.flatnonzero((after == truth) & (before != truth)).tolist():
            found.append(Example(part[i][0], task.labels[truth[i]], task.labels[before[i]]))
            if len(found) == wanted:
                return found
    return found


def _print(result: RunResult, saved: Path, examples: Sequence[Example], task: Task, folder: Path) -> None:
    if result.task != task.name:
        raise ConfigError(f"{folder} holds a run of {result.task}: choose another --out")
    print_result(result, saved)
    console = Console()
    for example in examples:
        console.print(f"\n[dim]{example.text}[/]", soft_wrap=False)
        console.print(f"  original model: [red]{example.original}[/]   tuned: [green]{example.label}[/] (right)")
    console.print(f"\nrun: fedbpt runs show demo --store {folder / 'runs.db'}", soft_wrap=True)
