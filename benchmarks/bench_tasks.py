"""Does it beat what a user would pick instead? Several tasks, few rows a class, all methods on the same rows.

For each task, number of rows a class and seed, every method learns from the same training rows and labels the same test
rows, which chose nothing. Each runs in a process of its own, so that its peak memory is its own:

texts     `fedbpt.calibrate` on the training texts without their labels
fedbpt    `fedbpt.tune` with its defaults, on a task drafted from the file (`fedbpt tasks new`); its variants too
tfidf     TF-IDF and logistic regression
minilm    sentence embeddings (all-MiniLM-L6-v2) and logistic regression
examples  as many training examples of each label as fit into the context of the same model
probe     logistic regression on the same model's last state (`fedbpt.features`)
layers    the same on its default layers
lora      LoRA by PEFT on the same model's weights

Data: a folder for each task with train.csv and test.csv (columns text and label).

    python benchmarks/bench_tasks.py --data DIR --shots 16 64 --seeds 3 --out tasks
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from peers import UnavailableError, text_classifiers

import fedbpt
from fedbpt import tasks
from fedbpt.errors import FedbptError
from fedbpt.machine.info import physical_cores
from fedbpt.protocol.seeding import generator

Row = tuple[str, str]

METHODS = ("texts", "fedbpt", "tfidf", "minilm", "examples", "probe", "layers", "lora")
STUDENT_95 = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776}
CONTEXT = 1024  # tokens of examples at most: more cost time, and a model of 135M gains nothing by them


def read_rows(path: Path) -> list[Row]:
    """(text, label) of each row."""
    with path.open(encoding="utf-8", newline="") as lines:
        return [(row["text"], row["label"]) for row in csv.DictReader(lines)]


def draw(rows: Sequence[Row], per_label: int, seed: int) -> list[Row]:
    """At most ``per_label`` rows of each label, in random order."""
    taken: dict[str, int] = {}
    drawn = []
    for i in generator(seed, "tasks").permutation(len(rows)):
        label = rows[i][1]
        if taken.get(label, 0) < per_label:
            taken[label] = taken.get(label, 0) + 1
            drawn.append(rows[i])
    return drawn


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("text", "label"))
        writer.writerows(rows)


def measure(method: str, folder: Path, model: str) -> dict[str, Any]:
    """In a process of its own: learn from train.csv in ``folder``, label test.csv."""
    began = time.monotonic()
    if method == "fedbpt":
        return {**tuned(folder, model), "seconds": time.monotonic() - began}
    task = tasks.draft_task(folder / "train.csv").task
    if method == "texts":
        return {**calibrated(task, folder, model), "seconds": time.monotonic() - began}
    label_of = {label: i for i, label in enumerate(task.labels)}
    train = [(text, label_of[label]) for text, label in read_rows(folder / "train.csv")]
    test = [(text, label_of[label]) for text, label in read_rows(folder / "test.csv")]
    texts = [text for text, _ in test]
    template = task.templates[0]
    cue = template.pattern.removeprefix("{text}")
    if method == "tfidf":
        found = text_classifiers.tfidf(train, texts)
    elif method == "minilm":
        found = text_classifiers.sentence_embeddings(train, texts)
    elif method == "lora":
        file = fedbpt.models.locate(model)
        found = text_classifiers.lora(file, physical_cores(), cue, template.label_words)(train, texts)
    elif method == "examples":
        found = with_examples(fedbpt.load_model(model), train, texts, cue, template.label_words)
    else:
        found = probe(fedbpt.load_model(model), train, texts, cue, method == "layers")
    right = sum(int(guess) == label for guess, (_, label) in zip(found, test, strict=True))
    return {"accuracy": {method: right / len(test)}, "n": len(test), "seconds": time.monotonic() - began}


def tuned(folder: Path, model: str) -> dict[str, Any]:
    """Accuracy of every line of a run with the defaults."""
    task = tasks.draft_task(folder / "train.csv").task
    result = fedbpt.tune(fedbpt.load_model(model), task, folder / "train.csv", test=folder / "test.csv", show=False)
    scores = result.run.scores("test")
    figures = {"fedbpt" if name == "tuned" else f"fedbpt: {name}": each.accuracy for name, each in scores.items()}
    return {
        "accuracy": figures,
        "n": scores["tuned"].n,
        "tuning_seconds": result.run.seconds,
        "bytes_up": sum(device.bytes_up for device in result.run.devices),
        "bytes_down": sum(device.bytes_down for device in result.run.devices),
    }


def calibrated(task: tasks.Task, folder: Path, model: str) -> dict[str, Any]:
    """Accuracy without a label: the model as it is, and calibrated on texts."""
    scorer = fedbpt.load_model(model)
    prompt = fedbpt.calibrate(scorer, task, [text for text, _ in read_rows(folder / "train.csv")])
    test = folder / "test.csv"
    plain, found = (fedbpt.evaluate(scorer, task, test, which) for which in (None, prompt))
    return {"accuracy": {"texts: zero_shot": plain.accuracy, "texts": found.accuracy}, "n": found.n}


def probe(
    scorer: fedbpt.NativeScorer, train: Sequence[tuple[str, int]], texts: Sequence[str], cue: str, every: bool
) -> Any:
    """Logistic regression on states; ``every``: of the default layers, else of the last."""
    layers = None if every else (scorer.n_layer - 1,)
    known = fedbpt.features(scorer, [text for text, _ in train], layers, cue)
    mean, spread = known.mean(axis=0), known.std(axis=0) + 1e-6
    unknown = fedbpt.features(scorer, texts, layers, cue)
    scaled = [(states - mean) / (spread * math.sqrt(known.shape[1])) for states in (known, unknown)]
    return text_classifiers.logistic_regression(scaled[0], [label for _, label in train], scaled[1])


def with_examples(
    scorer: fedbpt.NativeScorer,
    train: Sequence[tuple[str, int]],
    texts: Sequence[str],
    cue: str,
    words: Sequence[str],
) -> list[int]:
    """The label whose word is likeliest after examples: as many of each label as fit, then the text and the cue."""
    by_label: dict[int, list[str]] = {}
    for text, label in train:
        by_label.setdefault(label, []).append(text)
    prefix = scorer.tokenize("")
    for turn in range(max(map(len, by_label.values()))):
        more = "".join(f"{own[turn]}{cue}{words[label]}\n\n" for label, own in by_label.items() if turn < len(own))
        longer = np.concatenate([prefix, scorer.tokenize(more, add_bos=False)])
        if len(longer) > min(CONTEXT, scorer.n_ctx_train - 256):
            break
        prefix = longer
    ids = [scorer.tokenize(text, add_bos=False)[:128] for text in texts]
    follow = [scorer.tokenize(word, add_bos=False) for word in words]
    no_prompt = np.zeros((1, 0, scorer.n_embd), np.float32)
    found: list[int] = []
    for start in range(0, len(ids), 32):
        part = ids[start : start + 32]
        plan = scorer.compile(
            part, prefix=prefix, cue=scorer.tokenize(cue, add_bos=False), continuations=[follow] * len(part)
        )
        found.extend(plan.score(no_prompt)[0].argmax(axis=1).tolist())
    return found


def run_method(method: str, folder: Path, model: str) -> dict[str, Any]:
    """`measure` in a child process, and its peak memory; ``{"skipped": why}`` where it cannot run here."""
    command = [sys.executable, __file__, "--measure", method, str(folder), model]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "TQDM_DISABLE": "1"})
    if done.returncode:
        return {"skipped": done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit {done.returncode}"}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def interval(values: Sequence[float]) -> str:
    """Mean and 95 % interval over seeds (Student)."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return f"{mean:.3f}"
    half = STUDENT_95.get(len(values), 1.96) * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean:.3f} ± {half:.3f}"


def table(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """One line a method: accuracy, seconds, memory, bytes."""
    lines = [f"{'':24} {'accuracy':>16} {'seconds':>9} {'peak MB':>8} {'KB up':>7}"]
    for method, runs in found.items():
        skipped = [run["skipped"] for run in runs if "skipped" in run]
        if skipped:
            lines.append(f"{method:24} skipped: {skipped[0]}")
            continue
        for name in runs[0]["accuracy"]:
            own = name == method
            seconds = statistics.fmean(run["seconds"] for run in runs)
            memory = max(run["peak_rss_bytes"] for run in runs) / 1e6
            up = f"{max(run['bytes_up'] for run in runs) / 1e3:7.0f}" if own and "bytes_up" in runs[0] else ""
            costs = f"{seconds:9.1f} {memory:8.0f} {up}" if own else ""
            lines.append(f"{name:24} {interval([run['accuracy'][name] for run in runs]):>16} {costs}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with a folder for each task")
    parser.add_argument("--tasks", nargs="+", help="some of them (default: all)")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--shots", type=int, nargs="+", default=[16, 64], help="training rows a class")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--test-rows", type=int, default=500)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--out", type=Path, help="a file for all figures, a JSON line each")
    parser.add_argument("--json", action="store_true", help="the closing JSON line alone")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        method, folder, model = given.measure
        try:
            found = measure(method, Path(folder), model)
        except (UnavailableError, FedbptError) as error:
            sys.exit(str(error))
        found["peak_rss_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps(found))
        return
    if given.data is None or not given.data.is_dir():
        print("skipped: --data DIR names no folder with a folder for each task (train.csv and test.csv)")
        return
    chosen = given.tasks or sorted(path.parent.name for path in given.data.glob("*/train.csv"))
    summary: dict[str, dict[str, float]] = {}
    for name in chosen:
        train, test = (read_rows(given.data / name / f"{part}.csv") for part in ("train", "test"))
        test = [test[i] for i in generator(0, "test").permutation(len(test))[: given.test_rows]]
        for shots in given.shots:
            found: dict[str, list[dict[str, Any]]] = {method: [] for method in given.methods}
            for seed in range(given.seeds):
                with tempfile.TemporaryDirectory() as folder:
                    write_rows(Path(folder) / "train.csv", draw(train, shots, seed))
                    write_rows(Path(folder) / "test.csv", test)
                    for method in given.methods:
                        one = run_method(method, Path(folder), given.model)
                        found[method].append(one)
                        if given.out:
                            with given.out.open("a", encoding="utf-8") as file:
                                line = {"task": name, "shots": shots, "seed": seed, "method": method, **one}
                                file.write(json.dumps(line) + "\n")
            if not given.json:
                print(f"\n{name}, {shots} rows a class, {given.seeds} seeds, {len(test)} test rows\n{table(found)}")
            summary[f"{name}-{shots}"] = {
                which: statistics.fmean(run["accuracy"][which] for run in runs)
                for runs in found.values()
                if not any("skipped" in run for run in runs)
                for which in runs[0]["accuracy"]
            }
    print(json.dumps({"benchmark": "tasks", "model": given.model, "accuracy": summary}))


if __name__ == "__main__":
    main()
