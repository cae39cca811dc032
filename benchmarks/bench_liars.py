"""Effect of a device that lies, and what the protection against it costs honest fleets.

Devices have equal shares of the training rows; the last ``--liars`` of them lie in one of these ways:

search      the losses of the search are inverted: the worst candidate is praised
everything  as well the losses of the selection and of mixtures, gradients, label means of hidden states and the losses
            on held-back rows
wrong       all labels are shifted by one, so that all it sends is plausible, but wrong
million     as well it claims to have a million rows
loudest     all that it sends is as large and as harmful as bounds allow, but for the sums of states, which are honest

Then honest fleets with shares distributed by Dirichlet(α), and one in which each device has a single label
(``--single``). Each fleet runs with the protection (``check_devices``) and, with --both, without it. Runs share seed,
rows and engine. With --readouts only the readout without a prompt is fitted, which is what such runs mostly ship: rows
are read once, so that many fleets take little longer than one. Accuracy is measured on held-out rows: the test file's,
or with --split dev other rows of the training file, to choose defaults.

    python benchmarks/bench_liars.py --data DIR --both    # AG News; without --data, BBC News from its package
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
from bench_learning import FILES, read_rows, shots

import fedbpt
from fedbpt import tasks
from fedbpt.aggregation.layer_fit import MAX_RANK, LayerFit
from fedbpt.coordinator.clients.in_process import InProcessClient
from fedbpt.coordinator.federation import Federation
from fedbpt.coordinator.reports.round_reports import cap_reports
from fedbpt.coordinator.reports.vetting import leave_out
from fedbpt.device.device import Device
from fedbpt.device.layer_work import spread_folds
from fedbpt.engine.discriminant import assign_folds
from fedbpt.engine.layers import normalized, reading_layers
from fedbpt.errors import DownloadError, ModelNotFoundError
from fedbpt.objective.layer_sums import cross_result, sums_result
from fedbpt.objective.layer_view import LayerView, Views, read_views
from fedbpt.protocol.rounds import (
    N_FOLDS,
    CrossResult,
    CrossWork,
    DeviceInfo,
    EvaluateReport,
    EvaluateRequest,
    FitResult,
    FitWork,
    PooledResult,
    Reading,
    Result,
    RoundPlan,
    RoundReport,
    SelectResult,
    SumsResult,
    SumsWork,
    Work,
)
from fedbpt.protocol.seeding import generator
from fedbpt.protocol.specs import Array, LayerReadout, ObjectiveSpec, PromptSpec, Quantized
from fedbpt.runs.result import RunResult
from fedbpt.runs.settings import RunSettings
from fedbpt.runs.store import RunStore
from fedbpt.tasks.reading import reading_templates

CLAIMED = 10**6
KV_BYTES = 3 * 2**30
LIES = ("search", "everything", "wrong", "million", "loudest")
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
        asked = getattr(getattr(plan.work, "reading", plan.work), "max_rows", 0)
        return claiming(report, min(asked or CLAIMED, CLAIMED))


def claiming(report: RoundReport, n_rows: int) -> RoundReport:
    """``report`` as of ``n_rows``, with sums over rows that agree with them."""
    result = report.result
    if isinstance(result, SumsResult):
        times = max(n_rows // report.n_texts, 1)
        return msgspec.structs.replace(report, n_texts=times * report.n_texts, result=repeated(result, times))
    if isinstance(result, CrossResult | SelectResult):
        sums = result.loss_sums.numpy() * (n_rows / report.n_texts)
        result = msgspec.structs.replace(result, loss_sums=Array.of(sums, result.loss_sums.dtype))
    return msgspec.structs.replace(report, n_texts=n_rows, result=result)


def repeated(result: SumsResult, times: int) -> SumsResult:
    """The sums of each row so many times."""
    n_embd = result.centres.shape[1]
    factors = []
    for fold, own in zip(result.counts, np.split(result.factors.numpy(), np.cumsum(result.ranks)[:-1], 1), strict=True):
        rank = min(times * sum(fold) - sum(count > 0 for count in fold), MAX_RANK, n_embd)
        empty = np.zeros((len(own), rank - own.shape[1], n_embd))
        factors.append(np.concatenate([np.sqrt(times) * own, empty], axis=1))
    return msgspec.structs.replace(
        result,
        counts=tuple(tuple(times * count for count in fold) for fold in result.counts),
        ranks=tuple(own.shape[1] for own in factors),
        factors=Quantized.of(np.concatenate(factors, axis=1)),
    )


class Inverter(Device):
    """A device that turns what it sends into its opposite, a loss into one as far on the other side of its range.

    ``lie``: one of LIES. ``loudest`` multiplies differences of losses by a hundred, and is certain on held-back rows.
    """

    lie = "search"

    def run(
        self,
        plan: RoundPlan,
        progress: Callable[[int, int], None] = lambda _done, _total: None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> RoundReport:
        report = super().run(plan, progress, cancelled)
        by_gradient = isinstance(plan.work, FitWork) and plan.work.readout is not None
        return msgspec.structs.replace(report, result=turned(report.result, self.lie, by_gradient))

    def evaluate(
        self,
        request: EvaluateRequest,
        progress: Callable[[int, int], None] = lambda _done, _total: None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> EvaluateReport:
        report = super().evaluate(request, progress, cancelled)
        if self.lie == "search" or request.split != "held":
            return report
        losses = opposite(np.array(report.loss_sums), self.lie)
        squares = tuple(((losses - losses[0]) ** 2 / report.n).tolist()) if self.lie == "loudest" else None
        return msgspec.structs.replace(
            report, loss_sums=tuple(losses.tolist()), difference_squares=squares or report.difference_squares
        )


def turned(result: Result, lie: str, by_gradient: bool = True) -> Result:
    """The opposite of ``result``, as far as ``lie`` goes. ``by_gradient``: a `FitResult` has one, not moments."""
    if isinstance(result, PooledResult):
        return msgspec.structs.replace(result, losses=Array.of(opposite(result.losses.numpy(), lie), "<f4"))
    if lie == "search":
        return result
    if isinstance(result, SelectResult):
        return msgspec.structs.replace(result, loss_sums=Array.of(opposite(result.loss_sums.numpy(), lie)))
    if isinstance(result, FitResult) and by_gradient:
        return msgspec.structs.replace(result, means=Array.of(-result.means.numpy(), result.means.dtype))
    if isinstance(result, SumsResult) and lie == "everything":
        return msgspec.structs.replace(result, means=Quantized.of(-result.means.numpy()))
    if isinstance(result, CrossResult):
        return msgspec.structs.replace(result, loss_sums=Array.of(opposite(result.loss_sums.numpy(), lie), "<f4"))
    return result


def opposite(losses: np.ndarray, lie: str) -> np.ndarray:
    inverted = losses.max(axis=0) + losses.min(axis=0) - losses
    return np.asarray(100 * (inverted - inverted.min(axis=0)) if lie == "loudest" else inverted)


def fleets(
    args: argparse.Namespace, scorer: fedbpt.NativeScorer, train: list[Row], measured: list[Row], task: tasks.Task,
    seed: int, n_devices: int, say: Any,
) -> Iterator[tuple[str, list[Device]]]:  # fmt: skip
    """The (name, devices) of each fleet. The first device, which is honest, measures the result."""
    labels = [label for _, label in train]

    def honest(parts: Sequence[Sequence[int]]) -> list[Device]:
        shares = [[train[i] for i in part] for part in parts]
        return [
            Device(f"device-{i:02}", scorer, share, test_rows=measured if i == 0 else (), task=task)
            for i, share in enumerate(shares)
        ]

    parts = tasks.partition(labels, n_devices, seed=seed)
    trusted = honest(parts)
    yield "honest", trusted
    for lie in LIES:
        liars: list[Device] = []
        for i in range(n_devices - args.liars, n_devices):
            share = [train[row] for row in parts[i]]
            if lie in ("wrong", "million"):
                share = [(text, (label + 1) % len(task.labels)) for text, label in share]
            kind = {"wrong": Device, "million": Boaster}.get(lie, Inverter)
            liars.append(kind(f"liar-{i:02}", scorer, share, task=task))
            if isinstance(liars[-1], Inverter):
                liars[-1].lie = lie
        yield lie, [*trusted[: -args.liars], *liars]
    for alpha in args.dirichlet:
        skewed = tasks.partition(labels, n_devices, "dirichlet", alpha, seed)
        say(f"seed {seed}, Dirichlet({alpha:g}): {'+'.join(str(len(part)) for part in skewed)} rows")
        yield f"Dirichlet({alpha:g})", honest(skewed)
    if args.single:
        yield "single", honest(of_one_label(np.array(labels), n_devices, len(task.labels)))


def tuned(
    args: argparse.Namespace, task: tasks.Task, devices: Sequence[Device], seed: int, protected: bool
) -> RunResult:
    settings = RunSettings(
        rounds=args.rounds, seed=seed, popsize=16, prompt=PromptSpec(seed=seed), check_devices=protected,
        objective=ObjectiveSpec(max_text_tokens=task.max_text_tokens), select_rows=max(8, 64 // len(devices)),
        deadline_s=86400.0, quorum=1.0, stragglers=0.0, evaluate_every=0,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder, RunStore(Path(folder) / "runs.db") as store:
        clients = [InProcessClient(device) for device in devices]
        return Federation(clients, task, settings, settings.aggregator(), store, "bench").run()


def data(args: argparse.Namespace, seed: int, n_shots: int) -> tuple[list[Row], list[Row], list[Row]]:
    """Training rows, ``n_shots`` of each label; other rows of the training file; test rows."""
    if args.data is None:
        split = tasks.split_rows(tasks.bbc_news(), {"train": n_shots * 5, "dev": 300, "test": 600}, seed=0)
        return split["train"], split["dev"], split["test"]
    everything, test = (read_rows(args.data / name) for name in FILES[args.task])
    train, others = shots(everything, [n_shots], seed)
    return train, others, test


def measure(args: argparse.Namespace, scorer: fedbpt.NativeScorer, say: Any) -> Iterator[dict[str, Any]]:
    task = tasks.load("bbc-news" if args.data is None else args.task)
    for seed in args.seeds:
        train, others, test = data(args, seed, args.shots)
        measured = (others if args.split == "dev" else test)[: args.rows]
        found = ((n, *each) for n in args.devices for each in fleets(args, scorer, train, measured, task, seed, n, say))
        for n_devices, name, devices in found:
            if args.fleet and name not in args.fleet:
                continue
            for protected in (True, False) if args.both else (True,):
                result = tuned(args, task, devices, seed, protected)
                scores = {line: round(score.accuracy, 4) for line, score in result.scores("test").items()}
                shown = "  ".join(f"{line} {value:.3f}" for line, value in scores.items())
                how = "protected" if protected else "trusting"
                ships = f"ships {result.shipped or 'tuned'}, {result.seconds:.0f} s"
                say(f"seed {seed}, {n_devices} devices, {name}, {how}: {ships}: {shown}")
                yield {
                    "seed": seed, "devices": n_devices, "fleet": name, "protected": protected,
                    "shipped": result.shipped, "rounds": result.rounds, "seconds": result.seconds, **scores,
                }  # fmt: skip


# --- readouts only: rows are read once -------------------------------------------------------------------------------


class StatesDevice(NamedTuple):
    """What a fit asks of a device, from states that were read before. ``lie``: one of LIES, or ``""``."""

    name: str
    views: Views
    targets: np.ndarray
    folds: np.ndarray
    lie: str

    def report(self, work: Work, n_labels: int) -> RoundReport:
        result: Result
        if isinstance(work, SumsWork):
            result = sums_result(work, self.views, self.targets, self.folds, n_labels)
        else:
            assert isinstance(work, CrossWork)
            result = cross_result(work, self.views, self.targets, self.folds, np.ones(len(self.targets)))
        if self.lie in ("everything", "loudest"):
            result = turned(result, self.lie)
        report = RoundReport(
            run="bench", round=1, device=self.name, plan_digest="", result=result, n_texts=len(self.targets),
            evaluations=1, tokens=0, seconds=0.0, peak_rss_bytes=0,
        )  # fmt: skip
        return claiming(report, 512) if self.lie == "million" else report


def states_device(name: str, whole: Views, rows: np.ndarray, targets: np.ndarray, lie: str) -> StatesDevice:
    """A device with ``rows`` of ``whole``, whose label indices are ``targets``."""
    folds = spread_folds(assign_folds(targets, N_FOLDS, generator(0, "folds")), N_FOLDS, 0, name)
    return StatesDevice(name, Views(whole.states[rows], whole.words[rows]), targets, folds, lie)


def fitted(fit: LayerFit, devices: Sequence[StatesDevice], n_labels: int, protected: bool) -> tuple[LayerReadout, int]:
    """The readout, and how many devices are left out of it."""
    settings = RunSettings(check_devices=protected)
    out: set[str] = set()
    while not fit.done:
        reports = [device.report(fit.work(), n_labels) for device in devices if device.name not in out]
        reports, misled = leave_out(settings, fit, reports)
        out.update(misled)
        fit.update(cap_reports(reports, settings.row_cap))
    return fit.readout, len(out)


def accuracy_of(readout: LayerReadout, reading: Reading, views: Views, targets: np.ndarray) -> float:
    places = [0, *(1 + reading.templates.index(template) for template in readout.others)]
    logits = readout.bias.numpy() + np.einsum(
        "ntle,tlek->nk", normalized(views.states[:, places]), readout.weights.numpy()
    )
    for place, scale in zip(places, readout.word_scales.numpy(), strict=True):
        if scale:
            logits = logits + scale * views.words[:, place]
    return float((logits.argmax(axis=1) == targets).mean())


def measure_readouts(args: argparse.Namespace, scorer: fedbpt.NativeScorer, say: Any) -> Iterator[dict[str, Any]]:
    """Readouts without a prompt, under the task's templates and the general ones."""
    task = tasks.load("bbc-news" if args.data is None else args.task)
    n_labels = len(task.labels)
    selected, layers = task.templates[0], reading_layers(scorer.n_layer)
    reading = Reading(
        latent=Array.of(np.zeros(1)), templates=reading_templates(task.templates, selected, args.task != "sst-2"),
        layers=layers, n_word_views=len(task.templates), n_embd=scorer.n_embd,
    )  # fmt: skip
    views_of = [
        LayerView(scorer, template, task.labels if i < reading.n_word_views else (), task.max_text_tokens, layers)
        for i, template in enumerate((selected, *reading.templates))
    ]
    pool, others, test = data(args, 0, args.pool)
    measured = (others if args.split == "dev" else test)[: args.rows]
    whole = read(args.states, views_of, [text for text, _ in [*pool, *measured]])
    judged = Views(whole.states[len(pool) :], whole.words[len(pool) :])
    right = np.array([label for _, label in measured])
    of_pool = np.array([label for _, label in pool])
    for seed in args.seeds:
        order = generator(seed, "shots").permutation(len(pool))
        train = np.concatenate([order[of_pool[order] == label][: args.shots] for label in range(n_labels)])
        targets = of_pool[train]
        labels = targets.tolist()
        for n_devices in args.devices:
            fleets_of: dict[str, list[StatesDevice]] = {}
            parts = tasks.partition(labels, n_devices, seed=seed)
            for lie in ("", "everything", "wrong", "million", "loudest"):
                fleets_of[lie or "honest"] = made = []
                for i, part in enumerate(map(np.array, parts)):
                    lies = lie if i >= n_devices - args.liars else ""
                    own = (targets[part] + (lies in ("wrong", "million"))) % n_labels
                    made.append(states_device(f"{i:02}", whole, train[part], own, lies))
            for alpha in args.dirichlet:
                skewed = tasks.partition(labels, n_devices, "dirichlet", alpha, seed)
                fleets_of[f"Dirichlet({alpha:g})"] = [
                    states_device(f"{i:02}", whole, train[part], targets[part], "") for i, part in enumerate(skewed)
                ]
            if args.single:
                fleets_of["single"] = [
                    states_device(f"{i:02}", whole, train[part], targets[part], "")
                    for i, part in enumerate(of_one_label(targets, n_devices, n_labels))
                ]
            for name, devices in fleets_of.items():
                if args.fleet and name not in args.fleet:
                    continue
                for protected in (True, False) if args.both else (True,):
                    fit = LayerFit("probe", reading, n_labels, bound=protected)
                    readout, n_out = fitted(fit, devices, n_labels, protected)
                    accuracy = accuracy_of(readout, reading, judged, right)
                    how = "protected" if protected else "trusting"
                    say(f"seed {seed}, {n_devices} devices, {name}, {how}: {accuracy:.3f}, {n_out} left out")
                    yield {
                        "seed": seed, "devices": n_devices, "fleet": name, "protected": protected, "tuned": accuracy,
                        "left_out": n_out,
                    }  # fmt: skip


def read(path: Path | None, views: Sequence[LayerView], texts: Sequence[str]) -> Views:
    """What ``views`` read of ``texts``; kept in ``path``, and taken from it if it is there."""
    if path is not None and path.is_file():
        kept = np.load(path)
        found = Views(kept["states"], kept["words"])
        if found.states.shape[:2] != (len(texts), len(views)):
            raise SystemExit(f"{path} holds other rows or templates: remove it, or give another --states")
        return found
    found = read_views(views, texts)
    if path is not None:
        np.savez(path, states=found.states, words=found.words)
    return found


def of_one_label(targets: np.ndarray, n_devices: int, n_labels: int) -> list[np.ndarray]:
    """The rows of each device, of one label."""
    per_label = -(-n_devices // n_labels)
    return [np.flatnonzero(targets == i % n_labels)[i // n_labels :: per_label] for i in range(n_devices)]


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with the files of --task; default: BBC News")
    parser.add_argument("--task", choices=list(FILES), default="ag-news")
    parser.add_argument("--model", default="smollm2-135m", help="name or GGUF file")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--devices", type=int, nargs="+", default=[5])
    parser.add_argument("--readouts", action="store_true", help="only readouts without a prompt; rows are read once")
    parser.add_argument("--liars", type=int, default=1)
    parser.add_argument("--shots", type=int, default=64, help="training rows per class")
    parser.add_argument("--pool", type=int, default=150, help="with --readouts: rows per class that seeds draw from")
    parser.add_argument(
        "--states", type=Path, help="with --readouts: .npz file that keeps what was read, for more runs"
    )
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--both", action="store_true", help="also without the protection")
    parser.add_argument("--dirichlet", type=float, nargs="*", default=[0.1, 0.5])
    parser.add_argument("--single", action="store_true", help="also a fleet whose devices have one label each")
    parser.add_argument("--fleet", nargs="*", default=[], help="only fleets of these names")
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
        points = list((measure_readouts if args.readouts else measure)(args, scorer, say))
    except (ModelNotFoundError, DownloadError, FileNotFoundError) as error:
        say(f"skipped: {error}")
        return 0
    keys = "devices", "fleet", "protected"
    for which in dict.fromkeys(tuple(point[key] for key in keys) for point in points):
        mine = [point["tuned"] for point in points if tuple(point[key] for key in keys) == which]
        how = "protected" if which[2] else "trusting"
        say(f"{which[0]:>3} devices, {which[1]:>15}, {how}: {np.mean(mine):.3f} of {len(mine)} seeds")
    print(json.dumps({"bench": "liars", "rounds": args.rounds, "points": points}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
