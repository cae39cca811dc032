"""What differential privacy costs in accuracy: readouts from noisy sums at several ε, beside no privacy.

For each task and seed, devices of this process share training rows. On the same rows and test rows:

zero-shot    the model with its label words
readout      the readout without a prompt of a run without privacy
ε …          a private run: the readout from noisy sums, each device with its own noise
ε …, summed  the same with secure aggregation: devices share the noise of one sum
search       the naive way, and what private runs did before: a search on noisy losses without a readout, at ε 4

Noise multipliers are the smallest whose ε, by the accountant of a run, is not above the given one. What the model makes
of a text is kept from run to run, so that seconds are no figure here.

    python benchmarks/bench_privacy.py --data DIR --tasks trec --seeds 1   # DIR/trec/train.csv, DIR/trec/test.csv
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from bench_tasks import draw, read_rows

import fedbpt
from fedbpt import tasks
from fedbpt.coordinator.clients.in_process import InProcessClient
from fedbpt.coordinator.federation import Federation
from fedbpt.device.device import Device
from fedbpt.errors import DownloadError, MissingExtraError, ModelNotFoundError
from fedbpt.objective.layer_view import LayerReader, LayerView
from fedbpt.protocol.seeding import generator
from fedbpt.protocol.specs import LayerReadout, ObjectiveSpec, PrivacySpec
from fedbpt.runs.result import RunResult
from fedbpt.runs.settings import RunSettings
from fedbpt.runs.store import RunStore

DELTA = 1e-5
NAIVE_EPSILON = 4.0


def smallest_noise(epsilon: float, epsilon_of: Callable[[float], float]) -> float:
    """The smallest noise multiplier, to 1 %, whose ε is not above ``epsilon``."""
    low, high = 0.05, 200.0
    while high / low > 1.01:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if epsilon_of(middle) > epsilon else (low, middle)
    return high


def readout_noise(epsilon: float) -> float:
    def epsilon_of(noise: float) -> float:
        settings = RunSettings(privacy=PrivacySpec(readout_noise=noise, delta=DELTA))
        return settings.epsilon(1, 1, 0, readouts=1) or 0.0

    return smallest_noise(epsilon, epsilon_of)


def search_settings(epsilon: float, n_templates: int, n_rows: int, **common: Any) -> RunSettings:
    """A private search that spends ``epsilon`` on a device with ``n_rows``."""
    words = {"objective": ObjectiveSpec(max_text_tokens=common.pop("max_text_tokens"), readout_words=0)}

    def settings(noise: float) -> RunSettings:
        privacy = PrivacySpec(clip=0.3, noise_multiplier=noise, delta=DELTA)
        return RunSettings(**common, **words, calibrate=False, privacy=privacy)

    noise = smallest_noise(epsilon, lambda z: settings(z).epsilon(n_templates, n_rows, common["rounds"]) or 0.0)
    return settings(noise)


def remember_readings() -> None:
    """Keep the states and scores of each text under each template."""
    read = LayerView.read
    known: dict[tuple[Any, ...], tuple[Any, Any]] = {}

    def remembered(view: LayerView, texts: Sequence[str]) -> tuple[Any, Any]:
        of_view = (view.template, view.scores_words, view._layers, view._embeds.tobytes())
        if missing := [text for text in dict.fromkeys(texts) if (of_view, text) not in known]:
            known.update({(of_view, text): found for text, *found in zip(missing, *read(view, missing), strict=True)})
        found = [known[of_view, text] for text in texts]
        return np.stack([states for states, _ in found]), np.stack([words for _, words in found])

    LayerView.read = remembered  # type: ignore[method-assign]


def run(devices: Sequence[Device], task: fedbpt.Task, settings: RunSettings, name: str) -> RunResult:
    with tempfile.TemporaryDirectory() as folder, RunStore(Path(folder) / "runs.db") as store:
        clients = [InProcessClient(device) for device in devices]
        return Federation(clients, task, settings, settings.aggregator(), store, name).run()


def score(readout: LayerReadout, result: RunResult, scorer: fedbpt.Scorer, task: fedbpt.Task, rows: Any) -> Any:
    """Right answers [n] of a readout, and of the label words alone under the run's template."""
    texts, targets = [text for text, _ in rows], np.array([label for _, label in rows])
    limit = task.max_text_tokens
    logits = LayerReader(readout, scorer, result.template, task.labels, limit).logits(texts)
    _, words = LayerView(scorer, result.template, task.labels, limit, readout.layers).read(texts)
    return logits.argmax(axis=1) == targets, words.argmax(axis=1) == targets


def measure(folder: Path, args: argparse.Namespace, say: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    scorer = fedbpt.load_model(args.model)
    train, test = read_rows(folder / "train.csv"), read_rows(folder / "test.csv")
    task = tasks.draft_task(folder / "train.csv").task
    test = [test[i] for i in generator(0, "test").permutation(len(test))[: args.test_rows]]
    figures: dict[str, list[float]] = defaultdict(list)
    for seed in range(args.seeds):
        rows, measured = (tasks.to_rows(part, task) for part in (draw(train, args.shots, seed), test))
        parts = [list(range(i, len(rows), args.devices)) for i in range(args.devices)]
        common: dict[str, Any] = {"seed": seed, "popsize": 16, "evaluate_every": 0, "deadline_s": 86400.0}
        objective = {"objective": ObjectiveSpec(max_text_tokens=task.max_text_tokens)}
        settings = {"readout": RunSettings(rounds=0, tokens=1, **common, **objective)}  # spent before the search
        for epsilon in args.epsilons:
            privacy = PrivacySpec(readout_noise=readout_noise(epsilon), delta=DELTA)
            for secure in (False, True):
                name = f"ε {epsilon:g}{', summed' * secure}"
                settings[name] = RunSettings(rounds=1, **common, **objective, privacy=privacy, secure=secure)
        devices = [  # of all runs, so that rows are read once
            Device(f"device-{i}", scorer, [rows[j] for j in part], task=task) for i, part in enumerate(parts)
        ]
        for number, (name, chosen) in enumerate(settings.items()):
            result = run(devices, task, chosen, f"bench-{number}")
            right, plain = score(result.layer_fits["probe"], result, scorer, task, measured)
            figures[name].append(float(right.mean()))
            if name == "readout":
                figures["zero-shot"].append(float(plain.mean()))
            spent = "" if result.epsilon is None else f", ε {result.epsilon:.2f}"
            up = max(device.bytes_up for device in result.devices) / 1e6
            say(f"  seed {seed} {name}: {right.mean():.3f}{spent}, {up:.2f} MB up")
        if seed < args.searches:
            chosen = search_settings(
                NAIVE_EPSILON, len(task.templates), min(map(len, parts)),
                rounds=args.rounds, max_text_tokens=task.max_text_tokens, **common,
            )  # fmt: skip
            devices = [
                Device(f"device-{i}", scorer, [rows[j] for j in part], test_rows=measured[i :: args.devices], task=task)
                for i, part in enumerate(parts)
            ]
            result = run(devices, task, chosen, "search")
            figures[f"search ε {NAIVE_EPSILON:g}"].append(result.tuned.accuracy)
            say(f"  seed {seed} search: {result.tuned.accuracy:.3f}, ε {result.epsilon:.2f}")
    means = {name: statistics.fmean(each) for name, each in figures.items()}
    say(
        f"{folder.name}, {args.shots} rows a label, {args.devices} devices: "
        + ", ".join(f"{name} {mean:.3f}" for name, mean in means.items())
    )
    yield {"task": folder.name, "shots": args.shots, "devices": args.devices, **figures}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of the tasks' folders; without it nothing is measured")
    parser.add_argument("--tasks", nargs="*", help="names of folders; all by default")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--epsilons", type=float, nargs="+", default=[1.0, 4.0, 8.0])
    parser.add_argument("--devices", type=int, default=4)
    parser.add_argument("--shots", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--searches", type=int, default=1, help="seeds that the naive way is measured with")
    parser.add_argument("--rounds", type=int, default=25, help="of the naive way")
    parser.add_argument("--test-rows", type=int, default=300)
    parser.add_argument("--json", action="store_true", help="print only the JSON line")
    args = parser.parse_args()

    def say(text: str) -> None:
        if not args.json:
            print(text, flush=True)

    points: list[dict[str, Any]] = []
    remember_readings()
    try:
        folders = sorted(args.data.iterdir()) if args.data is not None else []
        for folder in folders:
            if (folder / "train.csv").is_file() and (not args.tasks or folder.name in args.tasks):
                points += measure(folder, args, say)
        if not points:
            say("skipped: needs --data, a folder with a folder for each task (train.csv, test.csv)")
    except (MissingExtraError, ModelNotFoundError, DownloadError, FileNotFoundError) as error:
        say(f"skipped: {error}")
    print(json.dumps({"bench": "privacy", "points": points}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
