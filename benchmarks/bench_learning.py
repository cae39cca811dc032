"""Growth of accuracy with forward tokens and seconds, compared with baselines and other searches.

A run tunes on SHOTS rows per class, distributed over devices that share one engine, so seconds are of all devices. At
each budget the variants of the run are measured on held-out rows: the test file's, or with --split dev other rows of
the training file, to choose defaults. Searches:

pooled     the default; fedavg, fedbpt: as in `fedbpt tune`, in the cue, or with --placement in a middle layer
spsa       MeZO's estimate (Malladi et al. 2023, arXiv 2305.17333; Spall 1992) on the same prompt rows: two losses along
           a random direction per step, on the same mini-batches, with the same calibration
backprop   the true gradient, which devices cannot compute: Adam on the same prompt rows in PyTorch, with the same
           calibration; an evaluation is a step of three passes
reference  FedBPT's published settings: 50 tokens in front, d 500, λ 5, 8 iterations, 40 texts, perturbed ratio

Tasks are ag-news and sst-2, or a folder in --data with train.csv and test.csv (columns text and label), whose task is
drafted from train.csv as by `fedbpt tasks new`.

    python benchmarks/bench_learning.py --data DIR --task ag-news --model smollm2-135m --out learning
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from other_searches import backprop, calibrated, spsa
from peers import UnavailableError

import fedbpt
from fedbpt import tasks
from fedbpt.coordinator.clients.in_process import InProcessClient
from fedbpt.coordinator.federation import Federation
from fedbpt.device.device import Device
from fedbpt.errors import ModelNotFoundError
from fedbpt.objective.objective import Objective
from fedbpt.objective.readout import word_ids
from fedbpt.protocol.seeding import generator
from fedbpt.protocol.specs import Array, ObjectiveSpec, PromptSpec, Readout
from fedbpt.runs.result import Variants
from fedbpt.runs.settings import RunSettings
from fedbpt.runs.store import RunStore
from fedbpt.tasks.task import label_word_ids

Row = tuple[str, int]

FILES = {
    "ag-news": ("ag_news_train_5000.csv", "ag_news_test_3800.csv"),
    "sst-2": ("sst2_train_8000.tsv", "sst2_dev_436.tsv"),
}
SEARCHES = ("pooled", "fedavg", "fedbpt", "spsa", "backprop", "reference")
KV_BYTES = 7 * 2**30  # the KV of the measured rows is kept from budget to budget
STUDENT_95 = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776}
REFERENCE = PromptSpec(placement="front", n_prompt=50, d=500, alpha=1.0)


def read_rows(path: Path) -> list[Row]:
    """Rows of one of FILES: (text, label index)."""
    with path.open(encoding="utf-8", newline="") as lines:
        if path.suffix == ".tsv":
            rows = [line.rstrip("\r\n").split("\t") for line in lines]
            return [(text.strip(), int(label)) for label, text in rows[1:]]
        found: list[Row] = []
        for row in csv.reader(lines):
            if len(row) == 2 and row[1].isdigit():
                found.append((row[0], int(row[1])))
            elif len(row) == 3 and row[0].isdigit():  # the original format counts from 1
                found.append((f"{row[1]} {row[2]}", int(row[0]) - 1))
        return found


def task_and_rows(folder: Path, name: str) -> tuple[tasks.Task, list[Row], list[Row]] | None:
    """Task, training rows and test rows; None where ``folder`` has no such files."""
    files = [folder / file for file in FILES[name]] if name in FILES else []
    files = files or [folder / name / file for file in ("train.csv", "test.csv")]
    if not all(file.is_file() for file in files):
        return None
    if name in FILES:
        return tasks.load(name), read_rows(files[0]), read_rows(files[1])
    task = tasks.draft_task(files[0]).task
    train, test = ([(text, int(label)) for text, label in tasks.read_task_rows(task, file)] for file in files)
    return task, train, test


def shots(rows: Sequence[Row], per_class: Sequence[int], seed: int) -> tuple[list[Row], list[Row]]:
    """``shots`` rows of each label (the last number for further labels), and the others in random order."""
    order = generator(seed, "shots").permutation(len(rows))
    taken: dict[int, list[int]] = {}
    others = []
    for i in order:
        mine = taken.setdefault(rows[i][1], [])
        wanted = per_class[min(rows[i][1], len(per_class) - 1)]
        (mine if len(mine) < wanted else others).append(int(i))
    return [rows[i] for part in taken.values() for i in part], [rows[i] for i in others]


class Judge:
    """Accuracy on the measured rows, whose KV is kept, so that only a text's last tokens are computed again.

    It is also kept from seed to seed, as the readout words of all seeds are scored at once.
    """

    def __init__(
        self, scorer: fedbpt.NativeScorer, task: tasks.Task, rows: Sequence[Row], seeds: Sequence[int], n_words: int
    ) -> None:
        self.scorer, self.task, self.rows, self.seeds, self.n_words = scorer, task, rows, seeds, n_words
        self._made: tuple[tuple[fedbpt.Template, str], Objective] | None = None
        self._plain: dict[tuple[fedbpt.Template, bytes], np.ndarray] = {}

    def accuracies(
        self, template: fedbpt.Template, settings: RunSettings, lines: Variants, others: Sequence[fedbpt.Template]
    ) -> dict[str, dict[str, float]]:
        objective = self._objective(template, settings)
        plain = [self._without_prompt(other, objective) for other in others]
        mine = Objective(self.scorer, template, self.task.labels, self.rows[:1], settings.objective, settings.prompt)
        readouts = [None if readout is None else self._widened(readout, settings) for _, readout in lines.values()]
        figures: dict[str, dict[str, float]] = {}
        for which, embeds in mine.prompts(np.stack([latent for latent, _ in lines.values()])):
            found = objective.evaluate(embeds, readouts=[readouts[i] for i in which], others=plain)
            for i, accuracy, loss in zip(which, found.accuracy, found.loss_sums, strict=True):
                figures[list(lines)[i]] = {"accuracy": accuracy, "loss": loss / found.n}
        return {name: figures[name] for name in lines}

    def accuracy(
        self, template: fedbpt.Template, settings: RunSettings, embeds: np.ndarray, readout: Readout | None
    ) -> dict[str, float]:
        """Accuracy of one prompt's rows [n_prompt, n_embd]; ``readout``: only a bias."""
        found = self._objective(template, settings).evaluate(embeds[None], readouts=[readout])
        return {"accuracy": found.accuracy[0], "loss": found.loss_sums[0] / found.n}

    def _objective(self, template: fedbpt.Template, settings: RunSettings) -> Objective:
        key = (template, settings.prompt.placement)
        if self._made is None or self._made[0] != key:
            self._made = None  # free its KV before the next is computed
            ids = np.concatenate(label_word_ids(self.scorer, template, self.task.labels))
            words = [word_ids(self.scorer.n_vocab, self.n_words, seed, ids) for seed in self.seeds]
            spec = ObjectiveSpec(max_text_tokens=self.task.max_text_tokens)
            place = msgspec.structs.replace(settings.prompt, d=1)
            made = Objective(
                self.scorer, template, self.task.labels, self.rows, spec, place, words=np.concatenate(words)
            )
            self._made = key, made
        return self._made[1]

    def _without_prompt(self, other: fedbpt.Template, like: Objective) -> np.ndarray:
        """Logits of the measured rows for the words of ``like``."""
        key = other, like.word_ids.tobytes()
        if key not in self._plain:
            made = Objective(
                self.scorer, other, self.task.labels, self.rows, like.spec, like.prompt, keep_kv=False,
                words=like.word_ids,
            )  # fmt: skip
            self._plain[key] = made.logits(made.zero_shot_embeds(), np.arange(len(self.rows)))
        return self._plain[key]

    def _widened(self, readout: Readout, settings: RunSettings) -> Readout:
        """The readout with rows of zeros for other seeds' words."""
        first = 1 + self.seeds.index(settings.prompt.seed) * self.n_words

        def wide(given: Array) -> Array:
            own = given.numpy()
            weights = np.zeros((1 + len(self.seeds) * self.n_words, own.shape[1]))
            weights[0], weights[first : first + len(own) - 1] = own[0], own[1:]
            return Array.of(weights)

        return Readout(weights=wide(readout.weights), others=tuple(wide(other) for other in readout.others))


def settings_of(args: argparse.Namespace, task: tasks.Task, seed: int, budget: int) -> RunSettings:
    if args.search == "reference":
        objective = ObjectiveSpec(batch_size=40, perturb=0.5, readout_words=0, max_text_tokens=task.max_text_tokens)
        return RunSettings(
            rounds=0, evaluations=budget, method="fedbpt", prompt=msgspec.structs.replace(REFERENCE, seed=seed),
            objective=objective, popsize=5, iterations=8, seed=seed, calibrate=False, deadline_s=86400.0,
        )  # fmt: skip
    objective = ObjectiveSpec(
        batch_size=args.batch, max_text_tokens=task.max_text_tokens, readout_words=args.words, loss=args.loss
    )
    return RunSettings(
        rounds=0, evaluations=budget, method=args.search, seed=seed, popsize=args.popsize, objective=objective,
        prompt=PromptSpec(seed=seed, d=args.d, alpha=args.alpha, n_prompt=args.n_prompt, placement=args.placement),
        iterations=args.iterations, readout="words",
        ensemble=args.ensemble, baselines=args.baselines and args.words > 0, balanced=args.balanced,
        select_rows=max(8, 64 // args.devices), deadline_s=86400.0, quorum=1.0,
    )  # fmt: skip


def federated(
    args: argparse.Namespace, scorer: fedbpt.NativeScorer, task: tasks.Task, train: list[Row], seed: int, judge: Judge
) -> Iterator[dict[str, Any]]:
    """The results at each budget; a run continues from one to the next."""
    labels = [label for _, label in train]
    parts = tasks.partition(labels, args.devices, "dirichlet" if args.devices > 1 else "iid", args.dirichlet, seed)
    devices = [Device(f"device-{i}", scorer, [train[row] for row in part], task=task) for i, part in enumerate(parts)]
    with tempfile.TemporaryDirectory() as folder, RunStore(Path(folder) / "runs.db") as store:
        for budget in args.evaluations:
            settings = settings_of(args, task, seed, budget)
            clients = [InProcessClient(device) for device in devices]
            federation = Federation(clients, task, settings, settings.aggregator(), store, "bench")
            result = federation.run()
            yield {
                "evaluations": result.evaluations,
                "tokens": result.tokens,
                "seconds": result.seconds,
                "bytes_up": max(device.bytes_up for device in result.devices),
                "rounds": result.rounds,
                "template": result.template.pattern,
                "lines": judge.accuracies(
                    result.template,
                    msgspec.structs.replace(settings, prompt=result.prompt),
                    result.variants(),
                    result.others,
                ),
            }


def single_device(
    args: argparse.Namespace, scorer: fedbpt.NativeScorer, task: tasks.Task, train: list[Row], seed: int, judge: Judge
) -> Iterator[dict[str, Any]]:
    """SPSA or back-propagation, on one device."""
    settings = settings_of(argparse.Namespace(**{**vars(args), "search": "pooled"}), task, seed, args.popsize)
    objective, bias = calibrated(scorer, task, train, settings)
    zero = judge.accuracy(objective.template, settings, objective.zero_shot_embeds()[0], None)
    spsa_points = spsa(args, objective, settings)
    for point in spsa_points if args.search == "spsa" else backprop(args, objective, train, settings):
        prompt = judge.accuracy(objective.template, settings, point.pop("rows"), bias)
        lines = {"zero_shot": zero, "prompt": prompt}
        yield {**point, "bytes_up": 0, "template": objective.template.pattern, "lines": lines}


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half of Student's 95 % interval over seeds (NaN for one)."""
    n = len(values)
    half = STUDENT_95.get(n, 1.96) * float(np.std(values, ddof=1)) / np.sqrt(n) if n > 1 else float("nan")
    return float(np.mean(values)), half


def table(points: Sequence[dict[str, Any]], say: Any) -> None:
    """Print a line for each budget: means over seeds."""
    names = list(points[0]["lines"])
    say(f"{'evaluations':>11} {'tokens':>9} {'seconds':>7}  " + "  ".join(f"{name:>15}" for name in names))
    for number in sorted({point["step"] for point in points}):
        mine = [point for point in points if point["step"] == number]
        cells = []
        for name in names:
            mean, half = interval([point["lines"][name]["accuracy"] for point in mine])
            cells.append(f"{mean:.4f} ± {half:.4f}")
        figures = [float(np.mean([point[key] for point in mine])) for key in ("evaluations", "tokens", "seconds")]
        say(f"{figures[0]:11.0f} {figures[1]:9.0f} {figures[2]:7.1f}  " + "  ".join(f"{cell:>15}" for cell in cells))
    say(f"bytes up, the busiest device: {max(point['bytes_up'] for point in points):,}")


def plot(points: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """Plot accuracy against forward tokens and seconds, a curve for each variant, and a thin one for each seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    steps = sorted({point["step"] for point in points})
    for colour, name in enumerate(points[0]["lines"]):
        for axes, key in zip(panels, ("tokens", "seconds"), strict=True):
            by_step = [[point for point in points if point["step"] == step] for step in steps]
            x = [np.mean([point[key] for point in mine]) for mine in by_step]
            y = [[point["lines"][name]["accuracy"] for point in mine] for mine in by_step]
            axes.plot(x, np.mean(y, axis=1), marker=".", color=f"C{colour}", label=name)
            axes.fill_between(x, np.min(y, axis=1), np.max(y, axis=1), color=f"C{colour}", alpha=0.15, linewidth=0)
            axes.set(xlabel="forward tokens" if key == "tokens" else "seconds")
    panels[0].set(ylabel="accuracy", title=title)
    panels[1].legend(fontsize="small")
    figure.savefig(path)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, help="folder with " + ", ".join(name for pair in FILES.values() for name in pair)
    )
    parser.add_argument("--task", default="ag-news", help=f"{', '.join(FILES)}, or a folder in --data")
    parser.add_argument("--model", default="smollm2-135m", help="name or GGUF file")
    parser.add_argument(
        "--search", choices=["pooled", "fedavg", "fedbpt", "spsa", "backprop", "reference"], default="pooled"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--shots", type=int, nargs="+", default=[64], help="training rows per class, or of the first, the second, …"
    )
    parser.add_argument("--balanced", action="store_true", help="weight losses so that labels count equally")
    parser.add_argument("--evaluations", type=int, nargs="+", default=[400, 1600, 3200])
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--dirichlet", type=float, default=0.1, help="skew of the devices' labels")
    parser.add_argument("--split", choices=["test", "dev"], default="test")
    parser.add_argument("--rows", type=int, default=0, help="measured rows; 0: all of the test file, 600 of dev")
    parser.add_argument(
        "--words", type=int, default=ObjectiveSpec().readout_words, help="words of the readout; 0: none"
    )
    parser.add_argument("--batch", type=int, default=ObjectiveSpec().batch_size)
    parser.add_argument("--popsize", type=int, default=16)
    parser.add_argument("--iterations", type=int, default=8, help="iterations of local search in fedavg and fedbpt")
    parser.add_argument("--d", type=int, default=PromptSpec().d)
    parser.add_argument("--alpha", type=float, default=PromptSpec().alpha)
    parser.add_argument("--n-prompt", type=int, default=1)
    parser.add_argument("--placement", choices=["cue", "front", "first", "layer"], default="cue")
    parser.add_argument(
        "--baselines", action=argparse.BooleanOptionalAction, default=True, help="also fit a linear probe"
    )
    parser.add_argument(
        "--ensemble", type=int, default=RunSettings().ensemble, help="templates whose readouts are averaged"
    )
    parser.add_argument("--loss", default="cross_entropy")
    parser.add_argument("--rate", type=float, default=0.3, help="step size of spsa, or of backprop in std(E)")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, help="folder for the JSON and the plot")
    parser.add_argument("--json", action="store_true", help="print only the JSON line")
    args = parser.parse_args()
    if args.placement != "cue" and args.search in ("spsa", "backprop"):
        parser.error(f"--search {args.search} only searches in the cue: leave out --placement")
    if args.search in ("fedbpt", "reference") and args.devices < 2:
        parser.error(f"--search {args.search} needs --devices 2 or more")
    return args


def main() -> int:
    args = parsed()

    def say(text: str) -> None:
        if not args.json:
            print(text, flush=True)

    found_task = None if args.data is None else task_and_rows(args.data, args.task)
    if found_task is None:
        files = FILES.get(args.task, (f"{args.task}/train.csv", f"{args.task}/test.csv"))
        say(f"skipped: give --data, a folder with {' and '.join(files)}")
        return 0
    task, everything, test = found_task
    try:
        scorer = fedbpt.load_model(args.model, n_threads=args.threads, kv_budget_bytes=KV_BYTES)
    except ModelNotFoundError as error:
        say(f"skipped {args.model}: {error}")
        return 0
    points: list[dict[str, Any]] = []
    judge: Judge | None = None
    for seed in args.seeds:
        train, others = shots(everything, args.shots, seed)
        if judge is None or args.split == "dev":
            measured = others[: args.rows or 600] if args.split == "dev" else test[: args.rows or None]
            judge = Judge(scorer, task, measured, args.seeds, args.words)
        run = single_device if args.search in ("spsa", "backprop") else federated
        for step, point in enumerate(run(args, scorer, task, train, seed, judge)):
            points.append({"seed": seed, "step": step, **point})
            shown = "  ".join(f"{name} {line['accuracy']:.4f}" for name, line in point["lines"].items())
            spent = f"{point['evaluations']} evaluations, {point['seconds']:.1f} s"
            say(f"seed {seed}: {spent}, {point['template']!r}: {shown}")
    title = f"{args.task}, {scorer.name}, {args.search}, {args.devices} devices, {len(judge.rows) if judge else 0} rows"
    say(title)
    table(points, say)
    found = {"title": title, "settings": {key: str(value) for key, value in vars(args).items()}, "points": points}
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        name = f"{args.task}-{scorer.name}-{args.search}-{args.devices}"
        (args.out / f"{name}.json").write_text(json.dumps(found))
        plot(points, title, args.out / f"{name}.svg")
    print(json.dumps({"title": title, "n_points": len(points)}) if args.out is not None else json.dumps(found))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UnavailableError as error:
        print(f"skipped: {error}")
