"""Evaluations per second of a generation: the plan against the naive way, on the same model in the same run.

Naive: one text and one candidate a call, nothing shared. Plan: all candidates at once, the prompt's KV shared by the
texts (front) or the texts' KV kept between generations (cue). The two ways alternate; medians are printed.

    python benchmarks/bench_scoring.py --model smollm2-135m
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
from fedbpt.messages import Placement

WORDS = (
    "Stocks rose on Wall Street on Tuesday after the central bank said that it would keep rates where they are, "
    "while shares in Europe ended the day little changed as investors waited for figures on jobs and trade "
)


def texts_like_news(scorer: fedbpt.NativeScorer, n: int, n_tokens: int) -> list[np.ndarray]:
    """``n`` token sequences of ``n_tokens``, give or take a third."""
    ids = scorer.tokenize(WORDS * 8)
    rng = np.random.default_rng(0)
    lengths = rng.integers(n_tokens * 2 // 3, n_tokens * 4 // 3, n)
    return [ids[start : start + length] for start, length in zip(rng.integers(0, 80, n), lengths, strict=True)]


def seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def compare(
    scorer: fedbpt.NativeScorer, placement: Placement, n_prompt: int, n_texts: int, popsize: int, repeats: int
) -> dict[str, float]:
    """Medians of ``repeats`` alternated generations, as evaluations per second (a candidate on all texts is one)."""
    texts = texts_like_news(scorer, n_texts, 56)
    labels = scorer.tokenize(" World Sports Business Technology", add_bos=False)
    embeds = np.stack([scorer.token_embeddings(scorer.tokenize(WORDS)[:n_prompt])] * popsize)
    embeds += 0.01 * np.random.default_rng(1).standard_normal(embeds.shape).astype(np.float32)
    plan = scorer.compile(texts, labels, placement)

    def naive() -> None:
        for candidate in embeds:
            for text in texts:
                scorer.score_with_soft_prompt([text], candidate, labels, placement)

    plan.score(embeds)  # the texts' KV, once a data set
    times: dict[str, list[float]] = {"naive": [], "plan": []}
    for _ in range(repeats):
        times["naive"].append(seconds(naive))
        times["plan"].append(seconds(lambda: plan.score(embeds)))
    rates = {name: popsize / statistics.median(taken) for name, taken in times.items()}
    return {**rates, "ratio": rates["plan"] / rates["naive"]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    try:
        scorer = fedbpt.load_model(args.model, n_threads=args.threads)
    except ModelNotFoundError as error:
        print(f"skipped: {error}")
        return 0
    cases = {
        "front, 50 rows, 8 texts, 4 candidates": compare(scorer, "front", 50, 8, 4, args.repeats),
        "cue, 1 row, 8 texts, 16 candidates": compare(scorer, "cue", 1, 8, 16, args.repeats),
    }
    print(f"{scorer!r}; evaluations per second, median of {args.repeats}")
    for name, rates in cases.items():
        print(f"{name:40} naive {rates['naive']:8.2f}   plan {rates['plan']:8.2f}   ratio {rates['ratio']:6.1f}x")
    print(json.dumps({"model": scorer.name, "threads": scorer.n_threads, "cases": cases}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
