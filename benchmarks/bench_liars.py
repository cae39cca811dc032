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
rows and engine. Accuracy is measured on held-out rows: the test file's, or with --split dev other rows of the training
file, to choose defaults.

    python benchmarks/bench_liars.py --data DIR --both    # AG News; without --data, BBC News from its package
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
from bench_learning import FILES, read_rows, shots

import fedbpt
from fedbpt import tasks
from fedbpt.aggregation.layer_fit import MAX_RANK
from fedbpt.coordinator.clients.in_process import InProcessClient
from fedbpt.coordinator.federation import Federation
from fedbpt.device.device import Device
from fedbpt.errors import DownloadError, ModelNotFoundError
from fedbpt.protocol.rounds import (
    CrossResult,
    DeviceInfo,
    EvaluateReport,
    EvaluateRequest,
    FitResult,
    FitWork,
    PooledResult,
    Result,
    RoundPlan,
    RoundReport,
    SelectResult,
    SumsResult,
)
from fedbpt.protocol.specs import Array, ObjectiveSpec, PromptSpec, Quantized
from fedbpt.runs.result import RunResult
from fedbpt.runs.settings import RunSettings
from fedbpt.runs.store import RunStore

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
        return msgspec.structs.replace(report, result=self._turned(report.result, plan))

    def evaluate(
        self,
        request: EvaluateRequest,
        progress: Callable[[int, int], None] = lambda _done, _total: None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> EvaluateReport:
        report = super().evaluate(request, progress, cancelled)
        if self.lie == "search" or request.split != "held":
            return report
        losses = self._opposite(np.array(report.loss_sums))
        squares = tuple(((losses - losses[0]) ** 2 / report.n).tolist()) if self.lie == "loudest" else None
        return msgspec.structs.replace(
            report, loss_sums=tuple(losses.tolist()), difference_squares=squares or report.difference_squares
        )

    def _turned(self, result: Result, plan: RoundPlan) -> Result:
        if isinstance(result, PooledResult):
            return msgspec.structs.replace(result, losses=Array.of(self._opposite(result.losses.numpy()), "<f4"))
        if self.lie == "search":
            return result
        if isinstance(result, SelectResult):
            return msgspec.structs.replace(result, loss_sums=Array.of(self._opposite(result.loss_sums.numpy())))
        if isinstance(result, FitResult) and isinstance(plan.work, FitWork) and plan.work.readout is not None:
            return msgspec.structs.replace(result, means=Array.of(-result.means.numpy(), result.means.dtype))
        if isinstance(result, SumsResult) and self.lie == "everything":
            return msgspec.structs.replace(result, means=Quantized.of(-result.means.numpy()))
        if isinstance(result, CrossResult):
            return msgspec.structs.replace(result, loss_sums=Array.of(self._opposite(result.loss_sums.numpy()), "<f4"))
        return result

    def _opposite(self, losses: np.ndarray) -> np.ndarray:
        turned = losses.max(axis=0) + losses.min(axis=0) - losses
        if self.lie == "loudest":
            turned = 100 * (turned - turned.min(axis=0))
        return np.asarray(turned)


def fleets(
    args: argparse.Namespace, scorer: fedbpt.NativeScorer, train: list[Row], measured: list[Row], task: tasks.Task,
    seed: int, say: Any,
) -> Iterator[tuple[str, list[Device]]]:  # fmt: skip
    """The (name, devices) of each fleet. The first device, which is honest, measures the result."""
    labels = [label for _, label in train]

    def honest(parts: Sequence[Sequence[int]]) -> list[Device]:
        shares = [[train[i] for i in part] for part in parts]
        return [
            Device(f"device-{i:02}", scorer, share, test_rows=measured if i == 0 else (), task=task)
            for i, share in enumerate(shares)
        ]

    parts = tasks.partition(labels, args.devices, seed=seed)
    trusted = honest(parts)
    yield "honest", trusted
    for lie in LIES:
        liars: list[Device] = []
        for i in range(args.devices - args.liars, args.devices):
            share = [train[row] for row in parts[i]]
            if lie in ("wrong", "million"):
                share = [(text, (label + 1) % len(task.labels)) for text, label in share]
            kind = {"wrong": Device, "million": Boaster}.get(lie, Inverter)
            liars.append(kind(f"liar-{i:02}", scorer, share, task=task))
            if isinstance(liars[-1], Inverter):
                liars[-1].lie = lie
        yield lie, [*trusted[: -args.liars], *liars]
    for alpha in args.dirichlet:
        skewed = tasks.partition(labels, args.devices, "dirichlet", alpha, seed)
        say(f"seed {seed}, Dirichlet({alpha:g}): {'+'.join(str(len(part)) for part in skewed)} rows")
        yield f"Dirichlet({alpha:g})", honest(skewed)
    if args.single:
        of_label = [np.flatnonzero(np.array(labels) == device % len(task.labels)) for device in range(args.devices)]
        yield "single", honest([rows[i // len(task.labels) :: -(-args.devices // len(task.labels))]
                                for i, rows in enumerate(of_label)])  # fmt: skip


def tuned(
    args: argparse.Namespace, task: tasks.Task, devices: Sequence[Device], seed: int, protected: bool
) -> RunResult:
    settings = RunSettings(
        rounds=args.rounds, seed=seed, popsize=16, prompt=PromptSpec(seed=seed), check_devices=protected,
        objective=ObjectiveSpec(max_text_tokens=task.max_text_tokens), select_rows=max(8, 64 // args.devices),
        deadline_s=86400.0, quorum=1.0, stragglers=0.0, evaluate_every=0,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder, RunStore(Path(folder) / "runs.db") as store:
        clients = [InProcessClient(device) for device in devices]
        return Federation(clients, task, settings, settings.aggregator(), store, "bench").run()


def data(args: argparse.Namespace, seed: int) -> tuple[list[Row], list[Row], list[Row]]:
    """Training rows, other rows of the training file, test rows."""
    if args.data is None:
        split = tasks.split_rows(tasks.bbc_news(), {"train": args.shots * 5, "dev": 600, "test": 900}, seed=0)
        return split["train"], split["dev"], split["test"]
    everything, test = (read_rows(args.data / name) for name in FILES[args.task])
    train, others = shots(everything, [args.shots], seed)
    return train, others, test


def measure(args: argparse.Namespace, scorer: fedbpt.NativeScorer, say: Any) -> Iterator[dict[str, Any]]:
    task = tasks.load("bbc-news" if args.data is None else args.task)
    for seed in args.seeds:
        train, others, test = data(args, seed)
        measured = (others if args.split == "dev" else test)[: args.rows]
        for name, devices in fleets(args, scorer, train, measured, task, seed, say):
            if args.fleet and name not in args.fleet:
                continue
            for protected in (True, False) if args.both else (True,):
                result = tuned(args, task, devices, seed, protected)
                scores = {line: round(score.accuracy, 4) for line, score in result.scores("test").items()}
                shown = "  ".join(f"{line} {value:.3f}" for line, value in scores.items())
                how = "protected" if protected else "trusting"
                say(f"seed {seed}, {name}, {how}: ships {result.shipped or 'tuned'}, {result.seconds:.0f} s: {shown}")
                yield {
                    "seed": seed, "fleet": name, "protected": protected, "shipped": result.shipped,
                    "rounds": result.rounds, "seconds": result.seconds, **scores,
                }  # fmt: skip


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with the files of --task; default: BBC News")
    parser.add_argument("--task", choices=list(FILES), default="ag-news")
    parser.add_argument("--model", default="smollm2-135m", help="name or GGUF file")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--devices", type=int, default=5)
    parser.add_argument("--liars", type=int, default=1)
    parser.add_argument("--shots", type=int, default=64, help="training rows per class")
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
        points = list(measure(args, scorer, say))
    except (ModelNotFoundError, DownloadError, FileNotFoundError) as error:
        say(f"skipped: {error}")
        return 0
    for fleet, protected in dict.fromkeys((point["fleet"], point["protected"]) for point in points):
        mine = [point["tuned"] for point in points if (point["fleet"], point["protected"]) == (fleet, protected)]
        how = "protected" if protected else "trusting"
        say(f"{fleet:>30}, {how}: tuned {np.mean(mine):.3f} of {len(mine)} seeds")
    print(json.dumps({"bench": "liars", "rounds": args.rounds, "devices": args.devices, "points": points}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
