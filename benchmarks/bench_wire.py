"""Bytes of a round, compared with sending the optimiser object as FedBPT's reference implementation does.

Encodes one round's plan and report per device for each scheme, and pickles a `cma.CMAEvolutionStrategy` after one
generation, all with the same d. Needs no model. Run: ``python benchmarks/bench_wire.py``.
"""

from __future__ import annotations

import argparse
import json
import pickle

import cma
import msgspec
import numpy as np

from fedbpt.aggregation.fedavg import FedAvg
from fedbpt.aggregation.fedbpt import FedBPT
from fedbpt.aggregation.pooled import Pooled
from fedbpt.protocol import codec
from fedbpt.protocol.rounds import LocalResult, PooledResult, Result, RoundPlan, RoundReport, Work
from fedbpt.protocol.specs import Array, ObjectiveSpec, PromptSpec
from fedbpt.search.compact_plans import may_shorten, short_plan, short_report
from fedbpt.tasks import BUILTIN

TASK = BUILTIN["bbc-news"]


def plan_of(work: Work, d: int) -> RoundPlan:
    return RoundPlan(
        run="news",
        round=1,
        device="device-0",
        seed=1,
        model_fingerprint="sha256:" + 64 * "0",
        task=TASK.identity,
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

    d, popsize = args.d, args.popsize
    losses = PooledResult(losses=Array.of(np.linspace(0.5, 1.5, popsize), "<f4"))
    pooled = Pooled(d, popsize=popsize)
    pooled.update([report_of(losses, popsize)])  # so that the state has all its fields
    plan, answer = plan_of(pooled.work(1), d), report_of(losses, popsize)
    history = pooled.history()
    assert history is not None
    schemes: dict[str, tuple[RoundPlan, RoundReport]] = {
        "pooled, replayed": (short_plan(plan, history, 0), answer),
        "pooled, state": (plan, answer),
    }
    servers = {
        "fedavg": FedAvg(d, popsize=popsize),
        "fedbpt, diagonal": FedBPT(d, popsize=popsize, covariance="diagonal"),
        "fedbpt, full covariance": FedBPT(d, popsize=popsize),
    }
    for method, server in servers.items():
        work = server.work(0)
        plan = plan_of(work, d)
        result = LocalResult(mean=Array.of(np.linspace(-1, 1, d)), fitness=0.5, sigma_squares=8.0)
        schemes[f"{method}, mean"] = plan, report_of(result, popsize)
        if may_shorten(work):
            ranks = bytes(range(popsize)) * work.iterations
            whole = report_of(msgspec.structs.replace(result, ranks=ranks), popsize)
            schemes[f"{method}, ranks"] = plan, short_report(whole)
    peer = reference_bytes(d, popsize)
    results = []
    for scheme, (sent, reported) in schemes.items():
        down, up = len(codec.encode(sent)), len(codec.encode(reported))
        results.append({"scheme": scheme, "bytes_down": down, "bytes_up": up, "peer_bytes_down": peer})
        print(
            f"{scheme:30} down {down:9,} B  up {up:6,} B  {peer / down:8,.1f} times less down than the optimiser object"
        )
    print(json.dumps({"d": d, "popsize": popsize, "optimiser_object_bytes": peer, "results": results}))


if __name__ == "__main__":
    main()
