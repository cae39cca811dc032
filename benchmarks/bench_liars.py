"""Effect of a device that lies about its number of rows, and cost of the cap on it for honest fleets.

Devices have equal shares of the training rows. One is a liar: its labels are all shifted by one, so that its losses are
plausible but wrong, and it claims to have a million rows. Then honest fleets with shares distributed by Dirichlet(α).
Each fleet runs without the cap and with each ``--cap``; runs share seed, rows and engine. Accuracy is measured on
held-out rows: the test file's, or with --split dev other rows of the training file, to choose defaults.

    python benchmarks/bench_liars.py --data DIR     # AG News; without --data, BBC News from its package
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from bench_learning import FILES, Judge, read_rows, shots

import fedbpt
from fedbpt import tasks
from fedbpt.coordinator.clients.in_process import InProcessClient
from fedbpt.coordinator.federation import Federation
from fedbpt.device.device import Device
from fedbpt.errors import DownloadError, ModelNotFoundError
from fedbpt.protocol.rounds import DeviceInfo, RoundPlan, RoundReport
from fedbpt.protocol.specs import ObjectiveSpec, PromptSpec
from fedbpt.runs.result import RunResult
from fedbpt.runs.settings import RunSettings
from fedbpt.runs.store import RunStore

CLAIMED = 10**6
KV_BYTES = 3 * 2**30
Row = tuple[str, int]


class Boaster(Device):
    """A device that claims a million rows, and reports as many as a plan allows."""

    def info(self) -> DeviceInfo:
        return msgspec.structs.replace(super().info(), n_train=CLAIMED)

    def run(
        self,
        plan: RoundPlan,
        progress: Callable[[int, int], None] = lambda _done, _total: None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> RoundReport:
        report = super().run(plan, progress, cancelled)
        asked = getattr(plan.work, "max_rows", 0)
        return msgspec.structs.replace(report, n_texts=min(asked or CLAIMED, CLAIMED))


def fleets(
    args: argparse.Namespace, scorer: fedbpt.NativeScorer, train: list[Row], task: tasks.Task, seed: int, say: Any
) -> Iterator[tuple[str, list[Device]]]:
    """The (name, devices) of each fleet; devices keep their texts' KV from run to run."""
    labels = [label for _, label in train]
    shares = [[train[i] for i in part] for part in tasks.partition(labels, args.devices, seed=seed)]
    wrong = [(text, (label + 1) % len(task.labels)) for text, label in shares[-1]]
    honest = [Device(f"device-{i}", scorer, share, task=task) for i, share in enumerate(shares)]
    yield "honest", honest
    yield "wrong labels", [*honest[:-1], Device("liar", scorer, wrong, task=task)]
    yield "wrong labels and a million rows", [*honest[:-1], Boaster("liar", scorer, wrong, task=task)]
    for alpha in args.dirichlet:
        parts = tasks.partition(labels, args.devices, "dirichlet", alpha, seed)
        sizes = "+".join(str(len(part)) for part in parts)
        shares = [[train[i] for i in part] for part in parts]
        skewed = [Device(f"device-{i}", scorer, share, task=task) for i, share in enumerate(shares)]
        say(f"seed {seed}, Dirichlet({alpha:g}): {sizes} rows")
        yield f"Dirichlet({alpha:g})", skewed


def tuned(
    args: argparse.Namespace, task: tasks.Task, devices: Sequence[Device], seed: int, cap: float
) -> tuple[RunSettings, RunResult]:
    settings = RunSettings(
        rounds=args.rounds, seed=seed, popsize=16, prompt=PromptSpec(seed=seed), row_cap=cap,
        objective=ObjectiveSpec(max_text_tokens=task.max_text_tokens), select_rows=max(8, 64 // args.devices),
        deadline_s=86400.0, quorum=1.0, stragglers=0.0,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder, RunStore(Path(folder) / "runs.db") as store:
        clients = [InProcessClient(device) for device in devices]
        return settings, Federation(clients, task, settings, settings.aggregator(), store, "bench").run()


def data(args: argparse.Namespace, seed: int) -> tuple[list[Row], list[Row], list[Row]]:
    """Training rows, other rows of the training file, test rows."""
    if args.data is None:
        split = tasks.split_rows(tasks.bbc_news(), {"train": args.shots * 5, "dev": 600, "test": 900}, seed=0)
        return split["train"], split["dev"], split["test"]
    everything, test = (read_rows(args.data / name) for name in FILES["ag-news"])
    train, others = shots(everything, [args.shots], seed)
    return train, others, test


def measure(args: argparse.Namespace, scorer: fedbpt.NativeScorer, say: Any) -> Iterator[dict[str, Any]]:
    task = tasks.load("bbc-news" if args.data is None else "ag-news")
    for seed in args.seeds:
        train, others, test = data(args, seed)
        measured = (others if args.split == "dev" else test)[: args.rows]
        judge = Judge(scorer, task, measured, [seed], ObjectiveSpec().readout_words)
        for name, devices in fleets(args, scorer, train, task, seed, say):
            if args.fleet and not any(name.startswith(wanted) for wanted in args.fleet):
                continue
            for cap in (0.0,) if name == "honest" else (0.0, *args.cap):  # with equal shares a cap has no effect
                settings, result = tuned(args, task, devices, seed, cap)
                lines = judge.accuracies(result.template, settings, result.variants(), result.others)
                accuracy = {line: figures["accuracy"] for line, figures in lines.items()}
                shown = "  ".join(f"{line} {value:.3f}" for line, value in accuracy.items())
                say(f"seed {seed}, {name}, {f'cap {cap:g}' if cap else 'no cap'}: {shown}")
                yield {"seed": seed, "fleet": name, "cap": cap, **accuracy}


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help=f"folder with {' and '.join(FILES['ag-news'])}; default: BBC News")
    parser.add_argument("--model", default="smollm2-135m", help="name or GGUF file")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--devices", type=int, default=5)
    parser.add_argument("--shots", type=int, default=64, help="training rows per class")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--cap", type=float, nargs="*", default=[RunSettings().row_cap])
    parser.add_argument("--dirichlet", type=float, nargs="*", default=[0.1, 0.5])
    parser.add_argument("--fleet", nargs="*", default=[], help="only fleets whose names start with one of these")
    parser.add_argument("--split", choices=["test", "dev"], default="test")
    parser.add_argument("--rows", type=int, default=600, help="measured rows")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", action="store_true", help="print only the JSON line")
    return parser.parse_args()


def main() -> int:
    args = parsed()

    def say(text: str) -> None:
        if not args.json:
            print(text, flush=True)

    try:
        scorer = fedbpt.load_model(args.model, n_threads=args.threads, kv_budget_bytes=KV_BYTES)
        points = list(measure(args, scorer, say))
    except (ModelNotFoundError, DownloadError, FileNotFoundError) as error:
        say(f"skipped: {error}")
        return 0
    for fleet, cap in dict.fromkeys((point["fleet"], point["cap"]) for point in points):
        mine = [point["tuned"] for point in points if (point["fleet"], point["cap"]) == (fleet, cap)]
        say(f"{fleet:>30}, cap {cap:g}: tuned {np.mean(mine):.3f} of {len(mine)} seeds")
    print(json.dumps({"bench": "liars", "rounds": args.rounds, "points": points}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
