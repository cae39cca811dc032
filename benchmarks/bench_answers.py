"""Generated answers by a metric: a tuned prompt and a refined one, against what a person would try first.

Each task is a folder with task.toml (a task of target texts with a [generation]), train.jsonl and test.jsonl (text and
label). Prompts are tuned on the target texts of some training rows: one for the task's own template, and one for the
same after SHOWN other training rows; with --refine-s, they are then refined on the metric of the model's own answers
(`fedbpt.refine`). On other rows, their answers are measured beside those of the bare model, of the model with the same
SHOWN rows in its context, and the best constant answer: the peers, in the same run.

    python benchmarks/bench_answers.py --data DIR --seeds 3
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import msgspec

import fedbpt
from fedbpt.protocol.seeding import generator
from fedbpt.refining import moves
from fedbpt.tasks import Row, Task, read_task_rows, with_examples


def some(rows: list[Row], n: int, *path: str | int) -> list[Row]:
    """``n`` of the rows, drawn by ``path``."""
    order = generator(0, *map(str, path)).permutation(len(rows))
    return [rows[i] for i in order[:n]]


def measure(model: str, task: Task, folder: Path, given: argparse.Namespace, seed: int) -> dict[str, Any]:
    """The peers' lines, and what was tuned for each pattern."""
    drawn = some(read_task_rows(task, folder / "train.jsonl"), given.rows + given.shown, "train", seed)
    shown, train = drawn[: given.shown], drawn[given.shown :]
    test = some(read_task_rows(task, folder / "test.jsonl"), given.test_rows, "test")
    bare, after_rows = with_examples(msgspec.structs.replace(task, templates=task.templates[:1]), shown).templates
    scorer = fedbpt.load_model(model)
    plain = fedbpt.compare_answers(scorer, task, test, train=train, template=bare, n_examples=1)
    examples = fedbpt.compare_answers(scorer, task, test, template=after_rows).lines["zero_shot"]
    peers = {"zero_shot": plain.lines["zero_shot"], "examples": examples, "constant": plain.lines["constant"]}
    found: dict[str, Any] = {"seed": seed}
    for name, template in (("bare", bare), (f"{given.shown} rows shown", after_rows)):
        scorer = fedbpt.load_model(model)  # anew: its KV of texts would save the next pattern tokens
        chosen = msgspec.structs.replace(task, templates=(template,))
        place = fedbpt.PromptSpec(placement="layers", d=given.d, alpha=given.alpha, seed=seed)
        began = time.monotonic()
        budget = fedbpt.Budget(evaluations=given.evaluations)
        prompt = fedbpt.tune(scorer, chosen, train, budget=budget, prompt=place, seed=seed, show=False).prompt
        if moves(scorer, prompt) and given.refine_s:
            more = fedbpt.Budget(seconds=given.refine_s)
            prompt = fedbpt.refine(scorer, chosen, train, prompt, budget=more, seed=seed).prompt
        seconds = time.monotonic() - began
        tuned = fedbpt.compare_answers(scorer, chosen, test, prompt).lines["tuned"]
        lines = fedbpt.AnswerComparison(plain.metric, tuple(test), {**peers, "tuned": tuned}, len(shown))
        found[name] = {"seconds": seconds, **report(lines), "answers": lines.side_by_side()}
    return found


def report(found: fedbpt.AnswerComparison) -> dict[str, Any]:
    lines = {name: {"mean": line.mean, "distinct": line.distinct} for name, line in found.lines.items()}
    gains = {name: found.gain(name) for name in lines if name != "tuned"}
    return {"lines": lines, "gains": gains, "improved": found.improved, "verdict": found.verdict()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with a folder for each task")
    parser.add_argument("--tasks", nargs="*", help="names of folders; default: all")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=64, help="training rows")
    parser.add_argument("--shown", type=int, default=3, help="training rows that the other pattern shows")
    parser.add_argument("--test-rows", type=int, default=200)
    parser.add_argument("--evaluations", type=int, default=400, help="of the search on target texts")
    parser.add_argument("--refine-s", type=float, default=0.0, help="seconds of the search on the metric")
    parser.add_argument("--d", type=int, default=100)
    parser.add_argument("--alpha", type=float, default=0.5)
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    given = parser.parse_args()
    results: dict[str, list[dict[str, Any]]] = {}
    for name in given.tasks or sorted(path.parent.name for path in given.data.glob("*/task.toml")):
        task = fedbpt.tasks.load(given.data / name / "task.toml")
        for seed in range(given.seeds):
            found = measure(given.model, task, given.data / name, given, seed)
            results.setdefault(name, []).append(found)
            for pattern, each in found.items():
                if pattern != "seed":
                    figures = ", ".join(f"{key} {line['mean']:.3f}" for key, line in each["lines"].items())
                    how = f"pattern {pattern}, {each['seconds']:.0f} s"
                    print(f"{name}, seed {seed}, {how}: {figures}; {each['verdict']}", flush=True)
            if given.out:
                given.out.write_text(json.dumps(results, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
