"""Target texts: shifts at all layers against a row in the cue, and the model as it is, at equal evaluations.

The task: the model's own next word after "{text}\\nThis article is about" shall be the label of a news text. Tuned by
the likelihood of the target alone; measured on other rows by perplexity, and by exact match of the greedy answer. The
shifts are then added at every token, as llama.cpp adds them if they are exported as a control vector: perplexity of the
target, and of the texts themselves, against the model as it is.

Data: a folder with agnews/train.csv and agnews/test.csv (columns text and label).

    python benchmarks/bench_shifts.py --data DIR --seeds 3
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from bench_tasks import Row, read_rows

import fedbpt
from fedbpt.engine.text_generator import Sampling
from fedbpt.protocol.seeding import generator
from fedbpt.protocol.specs import Template
from fedbpt.side_by_side.sides import Side, SideBySide

PATTERN = "{text}\nThis article is about"
METHODS = {
    "row in the cue": fedbpt.PromptSpec(),
    "shifts at all layers": fedbpt.PromptSpec(placement="layers", d=100),
}


def answers(pair: SideBySide, rows: Sequence[Row], side: Side) -> list[str]:
    """The greedy next token after each text."""
    found = []
    for text, _ in rows:
        pieces = pair.generation(text, side, Sampling(), max_tokens=1)
        found.append("".join(piece.text for piece in pieces))
    return found


def figures(said: Sequence[str], rows: Sequence[Row]) -> dict[str, float]:
    """Exact match, and the share of the commonest answer: 1 for a prompt that says the same to every text."""
    right = sum(answer == target for answer, (_, target) in zip(said, rows, strict=True))
    return {"exact_match": right / len(rows), "commonest": Counter(said).most_common(1)[0][1] / len(rows)}


def at_every_token(scorer: fedbpt.NativeScorer, rows: np.ndarray, data: Sequence[Row]) -> dict[str, float]:
    """Perplexity of targets and texts, with shifts ``rows`` [n_layer, n_embd] at all tokens."""
    vector = rows.copy()
    vector[0] = 0.0  # llama.cpp has no vector for the output of layer 0
    sums = {"target": 0.0, "text": 0.0}
    lengths = dict.fromkeys(sums, 0)
    for text, target in data:
        first, *ids = scorer.tokenize(text)[:128].tolist()
        cue = scorer.tokenize(PATTERN.removeprefix("{text}"), add_bos=False).tolist()
        end = scorer.tokenize(target, add_bos=False).tolist()
        follow = [[ids, ids + cue, ids + cue + end]]
        found = scorer.compile([[first]], [], "layers", continuations=follow, keep_kv=False).score(vector[None])[0, 0]
        for name, value, length in (("text", found[0], len(ids)), ("target", found[2] - found[1], len(end))):
            sums[name] -= float(value)
            lengths[name] += length
    return {name: math.exp(sums[name] / lengths[name]) for name in sums}


def measure(
    model: str, train: Sequence[Row], test: Sequence[Row], given: argparse.Namespace, seed: int
) -> dict[str, dict[str, Any]]:
    task = fedbpt.Task(name="words", templates=(Template(pattern=PATTERN, label_words=()),))
    found: dict[str, dict[str, Any]] = {}
    for name, prompt in METHODS.items():
        scorer = fedbpt.load_model(model)  # anew: its KV of texts would save the next method tokens
        budget = fedbpt.Budget(evaluations=given.evaluations)
        result = fedbpt.tune(scorer, task, train, test=test, budget=budget, prompt=prompt, seed=seed, show=False)
        pair = SideBySide(scorer, result.prompt, task)
        scores = result.run.scores("test")
        if not found:
            zero = scores["zero_shot"].perplexity
            found["no prompt"] = {**figures(answers(pair, test, "original"), test), "perplexity": zero}
        found[name] = {
            **figures(answers(pair, test, "tuned"), test),
            "perplexity": scores["tuned"].perplexity,
            "tokens": result.run.tokens,
            "seconds": result.run.seconds,
        }
        if prompt.placement == "layers" and not result.run.is_not_better:
            found[name]["every_token"] = at_every_token(scorer, result.prompt.rows, test[:50])
            found["no prompt"]["every_token"] = at_every_token(scorer, 0 * result.prompt.rows, test[:50])
    return found


def mean_of(values: Sequence[Any]) -> Any:
    """Of numbers, or of dicts of numbers by key."""
    if isinstance(values[0], dict):
        return {key: mean_of([each[key] for each in values]) for key in values[0]}
    return statistics.fmean(values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with agnews/train.csv and agnews/test.csv")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--evaluations", type=int, default=800)
    parser.add_argument("--rows", type=int, default=64, help="training rows")
    parser.add_argument("--test-rows", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="the closing JSON line alone")
    given = parser.parse_args()
    if given.data is None or not (given.data / "agnews" / "train.csv").is_file():
        print("skipped: --data DIR names no folder with agnews/train.csv and agnews/test.csv")
        return
    train, test = (
        [(text, f" {label}") for text, label in read_rows(given.data / "agnews" / f"{part}.csv")]
        for part in ("train", "test")
    )
    test = test[: given.test_rows]
    runs = []
    for seed in range(given.seeds):
        chosen = generator(seed, "shifts").permutation(len(train))[: given.rows]
        runs.append(measure(given.model, [train[i] for i in chosen], test, given, seed))
    means = {
        name: {figure: mean_of([run[name][figure] for run in runs]) for figure in values}
        for name, values in runs[0].items()
    }
    if not given.json:
        print(f"{given.rows} rows, {given.evaluations} evaluations, {given.seeds} seeds, {len(test)} test rows")
        print(f"{'':22} {'exact match':>12} {'commonest':>10} {'perplexity':>11} {'tokens':>8} {'seconds':>8}")
        for name, values in means.items():
            costs = f"{values['tokens']:8,.0f} {values['seconds']:8.1f}" if "tokens" in values else ""
            match, commonest, perplexity = (values[each] for each in ("exact_match", "commonest", "perplexity"))
            print(f"{name:22} {match:12.3f} {commonest:10.2f} {perplexity:11.1f} {costs}")
        before, after = (means[name].get("every_token", {}) for name in ("no prompt", "shifts at all layers"))
        for what in after:
            print(f"shifts at every token, perplexity of the {what}: {after[what]:.1f}, without {before[what]:.1f}")
        row, shifts = (means[name]["exact_match"] for name in METHODS)
        print(f"exact match of shifts over the row: {shifts / row if row else float('inf'):.1f} times")
    print(json.dumps({"benchmark": "shifts", "model": given.model, "means": means, "runs": runs}))


if __name__ == "__main__":
    main()
