"""Scaling of the time with texts and candidates, and of time and memory with the number of earlier calls.

Slopes of log(time) over log(size) by least squares over three doublings, where 1 is linear, compared with one text and
one candidate per call. Then many calls on one plan, alternated with calls that compile the text again: the median time
of the last tenth relative to the second tenth (the first is warm-up), and the slope of the resident memory.

    python benchmarks/bench_scaling.py --calls 10000
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from workload import alternate, label_ids, log_slope, prompts, seconds, texts_like_news

import fedbpt
from fedbpt.errors import ModelNotFoundError
from fedbpt.machine.memory import memory_of_process
from fedbpt.protocol.specs import Placement

DOUBLINGS = (1, 2, 4, 8)
N_PROMPT: dict[Placement, int] = {"front": 50, "cue": 1}

Sizes = list[tuple[int, int]]


def naive(scorer: fedbpt.NativeScorer, placement: Placement, texts: Any, candidates: Any) -> None:
    labels = label_ids(scorer)
    for candidate in candidates:
        for text in texts:
            scorer.score_with_soft_prompt([text], candidate, labels, placement)


def slope(scorer: fedbpt.NativeScorer, placement: Placement, sizes: Sizes, repeats: int) -> dict[str, Any]:
    """Medians of a generation, and of single calls, at each size (texts, candidates), and their slopes."""
    labels = label_ids(scorer)
    runs: dict[str, Callable[[], object]] = {}
    for n_texts, n_candidates in sizes:
        texts = texts_like_news(scorer, n_texts)
        candidates = prompts(scorer, n_candidates, N_PROMPT[placement])
        plan = scorer.compile(texts, labels, placement)
        plan.score(candidates)  # warm up buffers and, in the cue, the texts' KV

        runs[f"plan {n_texts * n_candidates}"] = partial(plan.score, candidates)
        runs[f"naive {n_texts * n_candidates}"] = partial(naive, scorer, placement, texts, candidates)
    taken = list(alternate(runs, repeats).values())
    ways = {"plan": taken[0::2], "naive": taken[1::2]}
    doublings = [n_texts * n_candidates for n_texts, n_candidates in sizes]
    return {
        "sizes": sizes,
        "seconds": ways,
        "slope": {way: log_slope(doublings, times) for way, times in ways.items()},
    }


def many_calls(scorer: fedbpt.NativeScorer, n_calls: int) -> dict[str, Any]:
    """``n_calls`` of a plan's `score`, and as many one-shot calls: late over early median, bytes of RSS per call.

    The first tenth is warm-up, in which all buffers are allocated.
    """
    labels, texts, candidates = label_ids(scorer), texts_like_news(scorer, 8), prompts(scorer, 1, 1)
    plan = scorer.compile(texts, labels, "cue")
    times: dict[str, list[float]] = {"plan": [], "one-shot": []}
    rss = []
    for _ in range(n_calls):
        times["plan"].append(seconds(lambda: plan.score(candidates)))
        times["one-shot"].append(seconds(lambda: scorer.score_with_soft_prompt(texts[:1], candidates, labels, "cue")))
        rss.append(memory_of_process()["rss"])
    tenth = max(1, n_calls // 10)
    settled = rss[tenth:]
    return {
        "calls": n_calls,
        "late_over_early": {
            way: statistics.median(taken[-tenth:]) / statistics.median(taken[tenth : 2 * tenth])
            for way, taken in times.items()
        },
        "rss_bytes_per_call": float(np.polyfit(np.arange(len(settled)), settled, 1)[0]),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--texts", type=int, default=8, help="the smallest number; the largest is eight times that")
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--json", action="store_true", help="print only the JSON line")
    args = parser.parse_args()
    if args.calls < 20:
        parser.error("--calls must be at least 20")

    def say(text: str) -> None:
        if not args.json:
            print(text, flush=True)

    try:
        scorer = fedbpt.load_model(args.model, n_threads=args.threads)
    except ModelNotFoundError as error:
        say(f"skipped {args.model}: {error}")
        return 0
    say(f"{scorer!r}; medians of {args.repeats}")
    results: dict[str, Any] = {}
    by_texts: Sizes = [(n * args.texts, 1) for n in DOUBLINGS]
    cases: dict[str, tuple[Placement, Sizes]] = {
        "front, texts": ("front", by_texts),
        "front, candidates": ("front", [(args.texts, n) for n in DOUBLINGS]),
        "cue, texts": ("cue", by_texts),
        "cue, candidates": ("cue", [(args.texts, 2 * n) for n in DOUBLINGS]),
    }
    for name, (placement, sizes) in cases.items():
        results[name] = case = slope(scorer, placement, sizes, args.repeats)
        spelled = ", ".join(f"{taken:.3f}" for taken in case["seconds"]["plan"])
        say(f"{name:18} slope {case['slope']['plan']:5.2f} ({spelled} s)   naive {case['slope']['naive']:5.2f}")
    results["calls"] = calls = many_calls(scorer, args.calls)
    late = ", ".join(f"{way} {ratio:.3f}" for way, ratio in calls["late_over_early"].items())
    say(f"{args.calls} calls: late over early {late}; RSS {calls['rss_bytes_per_call']:+.1f} bytes a call")
    print(json.dumps({"model": scorer.name, "threads": scorer.n_threads, **results}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
