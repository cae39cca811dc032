"""Generated answers by a metric: a tuned prompt and a refined one, against what a person would try first.

Each task is a folder with task.toml (a task of target texts with a [generation]), train.jsonl and test.jsonl (text and
label). The run may use the task's own template, or the same after SHOWN training rows, whichever is better by the
metric, and tunes a prompt on the target texts of the other training rows; with --refine-s, the prompt is then refined
on the metric of the model's own answers (`fedbpt.refine`). On other rows, its answers are measured beside those of the
bare model, of the model with the same SHOWN rows in its context, and the best constant answer: the peers, in the same
run.

    python benchmarks/bench_answers.py --data DIR --seeds 3
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import fedbpt
from fedbpt.answering import AnswerLine, best_constant, generation_of
from fedbpt.metrics import metric_named, rewards_of
from fedbpt.protocol.seeding import generator
from fedbpt.refining import moves
from fedbpt.tasks import Row, Task, read_task_rows, with_examples


def some(rows: list[Row], n: int, *path: str | int) -> list[Row]:
    """``n`` of the rows, drawn by ``path``."""
    order = generator(0, *map(str, path)).permutation(len(rows))
    return [rows[i] for i in order[:n]]


def measure(model: str, task: Task, folder: Path, given: argparse.Namespace, seed: int) -> dict[str, Any]:
    scorer = fedbpt.load_model(model)  # anew: its KV of texts would save the next seed tokens
    drawn = some(read_task_rows(task, folder / "train.jsonl"), given.rows + given.shown, "train", seed)
    shown, train = drawn[: given.shown], drawn[given.shown :]
    test = some(read_task_rows(task, folder / "test.jsonl"), given.test_rows, "test")
    both = with_examples(task, shown)
    bare, after_rows = both.templates[0], both.templates[len(task.templates)]
    plain = fedbpt.compare_answers(scorer, task, test, template=bare)
    examples = fedbpt.compare_answers(scorer, task, test, template=after_rows)
    measured = metric_named(generation_of(task).metric)
    constant = best_constant(measured, train)
    same = AnswerLine((constant,) * len(test), rewards_of(measured, test, [constant] * len(test)).values, 0)
    peers = {"zero_shot": plain.lines["zero_shot"], "examples": examples.lines["zero_shot"], "constant": same}

    def beside_peers(prompt: fedbpt.Prompt) -> fedbpt.AnswerComparison:
        tuned = fedbpt.compare_answers(scorer, both, test, prompt).lines["tuned"]
        return fedbpt.AnswerComparison(plain.metric, tuple(test), {**peers, "tuned": tuned}, len(shown))

    place = fedbpt.PromptSpec(placement="layers", d=given.d, alpha=given.alpha, seed=seed)
    began = time.monotonic()
    budget = fedbpt.Budget(evaluations=given.evaluations)
    result = fedbpt.tune(scorer, both, train, budget=budget, prompt=place, seed=seed, show=False)
    prompt = result.prompt
    found: dict[str, Any] = {"seed": seed, "tuned_s": time.monotonic() - began, "refined_s": 0.0}
    found["template"] = "bare" if prompt.template == bare else f"{given.shown} rows shown"
    lines = beside_peers(prompt)
    found["tuned"] = report(lines)
    if moves(scorer, prompt) and given.refine_s:
        began = time.monotonic()
        refined = fedbpt.refine(scorer, both, train, prompt, budget=fedbpt.Budget(seconds=given.refine_s), seed=seed)
        found |= {"refined_s": time.monotonic() - began, "held": [refined.before, refined.after]}
        found["refined"] = report(beside_peers(refined.prompt))
    found["answers"] = lines.side_by_side()
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
    parser.add_argument("--shown", type=int, default=3, help="training rows that the other template shows")
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
            for step in ("tuned", "refined"):
                if step in found:
                    lines = found[step]["lines"]
                    figures = ", ".join(f"{key} {line['mean']:.3f}" for key, line in lines.items())
                    seconds = found[f"{step}_s"]
                    how = f"{step} in {seconds:.0f} s, {found['template']}"
                    print(f"{name}, seed {seed}, {how}: {figures}; {found[step]['verdict']}", flush=True)
            if given.out:
                given.out.write_text(json.dumps(results, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
