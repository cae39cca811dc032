"""What does a race save, beside scoring everything, on populations that CMA-ES proposes while it tunes?

A search tunes on mini-batches of a data set, told the losses of full scoring. At some of its generations the same
population is raced on the same mini-batch (`Objective.race`, a better half of popsize // 2); the two ways alternate.
The texts' KV and their loss without prompt, which a race orders them by, are there before the clock starts; what the
latter cost is printed.

    python benchmarks/bench_racing.py --data ag_news_train.csv --task ag-news
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np

import fedbpt
from fedbpt.errors import ModelNotFoundError
from fedbpt.objective.objective import Objective
from fedbpt.protocol.messages import Template
from fedbpt.protocol.seeding import generator
from fedbpt.search.cma_es import CmaSearch
from fedbpt.tasks import to_rows
from fedbpt.tasks.rows import Row, batch_indices

POPSIZE = 16
MU = POPSIZE // 2
TEMPLATE_ROWS = 32


def timed(objective: Objective, run: Callable[[], object]) -> tuple[float, int]:
    """Seconds and forward tokens."""
    tokens, began = objective.tokens, time.perf_counter()
    run()
    return time.perf_counter() - began, objective.tokens - tokens


def compare(
    objective: Objective, embeds: np.ndarray, rows: np.ndarray, full: np.ndarray, repeats: int
) -> dict[str, float]:
    """One population on one mini-batch, raced and scored in full; ``full`` [k]: losses, for which KV was made."""
    before = objective.tokens
    found = objective.race(embeds, rows, n_better=MU)  # keeps what orders the texts
    first = objective.tokens - before
    everything, raced = [], []
    for _ in range(repeats):
        everything.append(timed(objective, lambda: objective.losses(embeds, rows)))
        raced.append(timed(objective, lambda: objective.race(embeds, rows, n_better=MU)))
    best, right = np.argsort(found.losses, kind="stable"), np.argsort(full, kind="stable")
    finished = found.n_scored == len(rows)
    return {
        "evaluations_saved": 1 - float(found.n_scored.mean()) / len(rows),
        "tokens": everything[0][1],
        "tokens_raced": raced[0][1],
        "tokens_of_order": first - raced[0][1],
        "seconds": statistics.median(seconds for seconds, _ in everything),
        "seconds_raced": statistics.median(seconds for seconds, _ in raced),
        "same_set": float(set(best[:MU]) == set(right[:MU])),
        "same_order": float(np.array_equal(best[:MU], right[:MU])),
        "rank_correlation": float(np.corrcoef(np.argsort(best), np.argsort(right))[0, 1]),
        "largest_difference": float(np.abs(found.losses - full)[finished].max()),
    }


def best_template(scorer: fedbpt.NativeScorer, task: fedbpt.Task, rows: list[Row]) -> Template:
    """The one of lowest zero-shot loss, as a run selects it."""

    def loss(template: Template) -> float:
        objective = Objective(
            scorer, template, task.labels, rows, fedbpt.ObjectiveSpec(), fedbpt.PromptSpec(d=1), keep_kv=False
        )
        return objective.evaluate(objective.zero_shot_embeds()).loss_sums[0]

    return min(task.templates, key=loss)


def races(objective: Objective, batch: int, seed: int, generations: list[int], repeats: int) -> list[dict[str, float]]:
    """One search on mini-batches of ``batch`` rows; a comparison at each of ``generations``."""
    search = CmaSearch(objective.prompt.d, objective.prompt.sigma0, POPSIZE, seed)
    measured = []
    for generation in range(1, max(generations) + 1):
        embeds = objective.embeds(search.ask())
        rows = batch_indices(len(objective), batch, generator(seed, "batch", batch, generation))
        losses = objective.losses(embeds, rows)
        if generation in generations:
            measured.append({"generation": generation, **compare(objective, embeds, rows, losses, repeats)})
        search.tell(losses)
    return measured


def summary(cases: list[dict[str, float]]) -> dict[str, float]:
    total = {name: sum(case[name] for case in cases) for name in cases[0]}
    return {
        "populations": len(cases),
        "evaluations_saved": total["evaluations_saved"] / len(cases),
        "tokens_saved": 1 - total["tokens_raced"] / total["tokens"],
        "tokens_of_order": total["tokens_of_order"] / total["tokens"],
        "seconds_saved": 1 - total["seconds_raced"] / total["seconds"],
        "same_set": total["same_set"] / len(cases),
        "same_order": total["same_order"] / len(cases),
        "rank_correlation": total["rank_correlation"] / len(cases),
        "largest_difference": max(case["largest_difference"] for case in cases),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="labelled rows, as `fedbpt tune` reads them")
    parser.add_argument("--task", default="ag-news")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--placement", choices=["cue", "front"], default="cue")
    parser.add_argument("--n-prompt", type=int, default=1)
    parser.add_argument("--rows", type=int, default=256, help="rows to draw mini-batches from; their KV should fit")
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 24, 64, 128])
    parser.add_argument("--generations", type=int, nargs="+", default=[1, 5, 20])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    try:
        scorer = fedbpt.load_model(args.model, n_threads=args.threads)
    except ModelNotFoundError as error:
        print(f"skipped: {error}")
        return 0
    task = fedbpt.tasks.load(args.task)
    data = to_rows(args.data, task)
    template = best_template(scorer, task, data[:TEMPLATE_ROWS])
    cases: dict[int, list[dict[str, float]]] = {batch: [] for batch in args.batches}
    for seed in range(args.seeds):
        chosen = batch_indices(len(data), args.rows, generator(seed, "rows"))
        prompt = fedbpt.PromptSpec(n_prompt=args.n_prompt, placement=args.placement, seed=seed)
        rows = [data[i] for i in chosen]
        objective = Objective(scorer, template, task.labels, rows, fedbpt.ObjectiveSpec(), prompt)
        for batch in args.batches:
            cases[batch] += races(objective, batch, seed, args.generations, args.repeats)
    print(f"{scorer!r}; {args.placement}, {args.n_prompt} rows; {POPSIZE} candidates; generations {args.generations}")
    summaries = {batch: summary(found) for batch, found in cases.items()}
    for batch, found in summaries.items():
        print(
            f"mini-batch {batch:4}: saves {found['tokens_saved']:.1%} of tokens, {found['seconds_saved']:.1%} of time; "
            f"better half the same {found['same_set']:.0%}, in order {found['same_order']:.0%}; "
            f"all ranks r = {found['rank_correlation']:.3f}; to order the texts, once: {found['tokens_of_order']:.1%}"
        )
    settings = {"model": scorer.name, "threads": scorer.n_threads, "placement": args.placement}
    print(json.dumps({**settings, "n_prompt": args.n_prompt, "summaries": summaries, "cases": cases}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
