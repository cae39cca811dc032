"""How many bytes does a round cost, beside shipping the optimiser itself as FedBPT's reference implementation does?

Encodes one round's plan and report per device for each method, and pickles a `cma.CMAEvolutionStrategy` after one
generation, all at the same d. Needs no model. Run: ``python benchmarks/bench_wire.py``.
"""

from __future__ import annotations

import argparse
import json
import pickle

import cma
import numpy as np

from fedbpt import wire
from fedbpt.aggregation import FedAvg, FedBPT, Pooled
from fedbpt.messages import (
    Array,
    LocalResult,
    ObjectiveSpec,
    PooledResult,
    PromptSpec,
    Result,
    RoundPlan,
    RoundReport,
    Work,
)
from fedbpt.tasks import BUILTIN

TASK = BUILTIN["bbc-news"]


def plan_of(work: Work, d: int) -> RoundPlan:
    return RoundPlan(
        run="news",
        round=1,
        device="device-0",
        seed=1,
        model_fingerprint="sha256:" + 64 * "0",
        labels=TASK.labels,
        template=TASK.templates[0],
        prompt=PromptSpec(d=d),
        objective=ObjectiveSpec(),
        work=work,
    )


def report_of(result: Result, evaluations: int) -> RoundReport:
    return RoundReport(
        run="news",
        round=1,
        device="device-0",
        plan_digest=32 * "0",
        result=result,
        n_texts=8,
        evaluations=evaluations,
        tokens=8 * evaluations,
        seconds=1.25,
        peak_rss_bytes=300_000_000,
    )


def reference_bytes(d: int, popsize: int) -> int:
    """The pickled optimiser object after one generation."""
    search = cma.CMAEvolutionStrategy(np.zeros(d), 1.0, {"popsize": popsize, "seed": 1, "verbose": -9})
    search.tell(search.ask(), list(range(popsize)))
    return len(pickle.dumps(search))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--d", type=int, default=500, help="dimension of the latent")
    parser.add_argument("--popsize", type=int, default=16)
    args = parser.parse_args()

    losses = PooledResult(losses=Array.of(np.linspace(0.5, 1.5, args.popsize)))
    local = LocalResult(mean=Array.of(np.linspace(-1, 1, args.d)), fitness=0.5, sigma_squares=8.0)
    pooled = Pooled(args.d, popsize=args.popsize)
    pooled.update([report_of(losses, args.popsize)])  # so that the state carries all that it ever does
    works: dict[str, tuple[Work, Result]] = {
        "pooled": (pooled.work(1), losses),
        "fedavg": (FedAvg(args.d).work(0), local),
        "fedbpt, diagonal": (FedBPT(args.d, covariance="diagonal").work(0), local),
        "fedbpt, full covariance": (FedBPT(args.d).work(0), local),
    }
    peer = reference_bytes(args.d, args.popsize)
    results = []
    for method, (work, result) in works.items():
        down, up = len(wire.encode(plan_of(work, args.d))), len(wire.encode(report_of(result, args.popsize)))
        results.append({"method": method, "bytes_down": down, "bytes_up": up, "peer_bytes_down": peer})
        print(
            f"{method:24} down {down:9,} B  up {up:6,} B  {peer / down:8,.1f} times less down than the optimiser object"
        )
    print(json.dumps({"d": args.d, "popsize": args.popsize, "optimiser_object_bytes": peer, "results": results}))


if __name__ == "__main__":
    main()
