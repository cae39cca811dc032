"""Generated answers by a metric: a tuned prompt and a refined one, against what a person would try first.

Each task is a folder with task.toml (a task of target texts with a [generation]), train.jsonl and test.jsonl (text and
label). Prompts are tuned on the target texts of some training rows; with --refine-s, they are then refined on the
metric of the model's own answers (`fedbpt.refine`). On other rows, their answers are measured beside those of the bare
model, of the model with SHOWN other rows in its context, and the best constant answer: the peers, in the same run. At
the end, what an answer costs: the tokens read for it, and its seconds, for texts that come one by one. Patterns:

bare    the task's own template
shown   the same after the SHOWN rows of the peer
chosen  what the run selects by the metric: the task's template, or one of SETS sets of SHOWN rows out of a pool of
        SHOWN + POOL (`fedbpt.tasks.with_examples`)

With --targets votes nobody writes the training rows' targets: the model answers each text twice with the SHOWN rows in
its context, greedily and sampled, and a simulated person chooses the better answer by the metric, but with probability
ERRORS the other one. Texts whose answers are worth the same are left out.

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
from fedbpt.answering import generation_of
from fedbpt.engine.text_generator import GREEDY, Sampling
from fedbpt.engine.text_stream import Generation, place
from fedbpt.metrics import metric_named, rewards_of
from fedbpt.protocol.seeding import generator
from fedbpt.refining import moves
from fedbpt.tasks import Row, Task, read_task_rows, with_examples

COST_ROWS = 20


def some(rows: list[Row], n: int, *path: str | int) -> list[Row]:
    """``n`` of the rows, drawn by ``path``."""
    order = generator(0, *map(str, path)).permutation(len(rows))
    return [rows[i] for i in order[:n]]


def cost(
    scorer: fedbpt.NativeScorer,
    task: Task,
    rows: list[Row],
    template: fedbpt.Template,
    prompt: fedbpt.Prompt | None = None,
    keeps_kv: bool = True,
) -> dict[str, float]:
    """Mean tokens read and seconds of an answer, after a first one that computes what all texts begin with.

    ``keeps_kv`` False: as if each text were the first one.
    """
    how = generation_of(task)
    n_read = n_said = 0
    seconds = 0.0
    for i, (text, _) in enumerate(rows):
        if not (keeps_kv and i):
            scorer.__dict__.pop("generator", None)  # with its KV
        placed = place(
            scorer, template, str(text), task.max_text_tokens, prompt and prompt.rows, prompt and prompt.spec
        )
        began = time.monotonic()
        with Generation(scorer.generator, placed, GREEDY, how.max_tokens, how.stop) as answer:
            for _ in answer:
                pass
        if i or not keeps_kv:
            seconds += time.monotonic() - began
            n_read += answer.n_prompt - answer.n_reused
            n_said += answer.n_tokens
    n = len(rows) - keeps_kv
    return {"read": n_read / n, "said": n_said / n, "seconds": seconds / n}


def chosen_answers(
    scorer: fedbpt.NativeScorer, task: Task, rows: list[Row], template: fedbpt.Template, errors: float, seed: int
) -> list[Row]:
    """The texts of ``rows`` with what a simulated person chose of two answers."""
    metric = metric_named(generation_of(task).metric)
    ways = (GREEDY, Sampling(0.7, seed=seed))
    replies = [fedbpt.answers(scorer, task, rows, template=template, sampling=way) for way in ways]
    values = [rewards_of(metric, rows, own).values for own in replies]
    errs = generator(seed, "votes").random(len(rows)) < errors
    found: list[Row] = []
    for i, (text, _) in enumerate(rows):
        better = int((values[1][i] > values[0][i]) != errs[i])
        if values[0][i] != values[1][i] and replies[better][i]:
            found.append((text, replies[better][i]))
    return found


def measure(model: str, task: Task, folder: Path, given: argparse.Namespace, seed: int) -> dict[str, Any]:
    """The peers' lines, and what was tuned for each pattern."""
    drawn = some(read_task_rows(task, folder / "train.jsonl"), given.rows + given.shown + given.pool, "train", seed)
    shown, train = drawn[: given.shown], drawn[given.shown : given.shown + given.rows]
    pool = [*shown, *drawn[given.shown + given.rows :]]
    test = some(read_task_rows(task, folder / "test.jsonl"), given.test_rows, "test")
    bare, after_rows = with_examples(msgspec.structs.replace(task, templates=task.templates[:1]), shown).templates
    scorer = fedbpt.load_model(model)
    rows = train
    if given.targets == "votes":
        rows = chosen_answers(scorer, task, train, after_rows, given.errors, seed)
    plain = fedbpt.compare_answers(scorer, task, test, train=train, template=bare, n_examples=1)
    examples = fedbpt.compare_answers(scorer, task, test, template=after_rows).lines["zero_shot"]
    peers = {"zero_shot": plain.lines["zero_shot"], "examples": examples, "constant": plain.lines["constant"]}
    patterns: dict[str, Any] = {}
    costs = {
        "untuned, bare": cost(scorer, task, test[:COST_ROWS], bare),
        f"untuned, {given.shown} rows shown": cost(scorer, task, test[:COST_ROWS], after_rows),
        f"untuned, {given.shown} rows shown, read anew": cost(
            scorer, task, test[:COST_ROWS], after_rows, keeps_kv=False
        ),
    }
    for pattern in given.patterns:
        name = pattern if pattern != "shown" else f"{given.shown} rows shown"
        templates = (bare,) if pattern == "bare" else (after_rows,)
        if pattern == "chosen":
            one = msgspec.structs.replace(task, templates=task.templates[:1])
            templates = with_examples(one, pool, n=given.shown, sets=given.sets, seed=seed).templates
        scorer = fedbpt.load_model(model)  # anew: its KV of texts would save the next pattern tokens
        chosen = msgspec.structs.replace(task, templates=templates)
        place = fedbpt.PromptSpec(placement="layers", d=given.d, alpha=given.alpha, seed=seed)
        began = time.monotonic()
        budget = fedbpt.Budget(evaluations=given.evaluations)
        prompt = fedbpt.tune(scorer, chosen, rows, budget=budget, prompt=place, seed=seed, show=False).prompt
        if moves(scorer, prompt) and given.refine_s:
            more = fedbpt.Budget(seconds=given.refine_s)
            prompt = fedbpt.refine(scorer, chosen, rows, prompt, budget=more, seed=seed).prompt
        seconds = time.monotonic() - began
        tuned = fedbpt.compare_answers(scorer, chosen, test, prompt).lines["tuned"]
        lines = fedbpt.AnswerComparison(plain.metric, tuple(test), {**peers, "tuned": tuned}, len(shown))
        untuned = fedbpt.compare_answers(scorer, chosen, test, template=prompt.template).lines["zero_shot"].mean
        patterns[name] = {
            "seconds": seconds,
            "selected": untuned,
            **report(lines),
            "answers": lines.side_by_side(),
        }
        costs[f"tuned, {name}"] = cost(scorer, chosen, test[:COST_ROWS], prompt.template, prompt)
    return {"seed": seed, "rows": len(rows), "patterns": patterns, "costs": costs}


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
    parser.add_argument("--targets", choices=["written", "votes"], default="written")
    parser.add_argument("--errors", type=float, default=0.2, help="probability that a vote is for the worse answer")
    parser.add_argument("--patterns", nargs="+", choices=["bare", "shown", "chosen"], default=["shown", "chosen"])
    parser.add_argument("--pool", type=int, default=9, help="further rows that may be shown")
    parser.add_argument("--sets", type=int, default=8, help="sets of shown rows to choose from")
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
            for pattern, each in found["patterns"].items():
                figures = ", ".join(f"{key} {line['mean']:.3f}" for key, line in each["lines"].items())
                how = (
                    f"pattern {pattern}, {found['rows']} rows, {each['seconds']:.0f} s, untuned {each['selected']:.3f}"
                )
                print(f"{name}, seed {seed}, {how}: {figures}; {each['verdict']}", flush=True)
            anew = f"untuned, {given.shown} rows shown, read anew"
            for way, each in found["costs"].items():
                ratio = each["seconds"] / found["costs"][anew]["seconds"]
                figures = f"{each['read']:.0f} tokens read, {each['said']:.1f} said, {1000 * each['seconds']:.0f} ms"
                print(f"{name}, seed {seed}, an answer {way}: {figures}, {ratio:.2f} of anew", flush=True)
            if given.out:
                given.out.write_text(json.dumps(results, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
