"""Readouts from hidden states: what each choice in them is worth, on the same states.

For each task, states of the training rows and of test rows, which choose nothing, are read once. Then readouts are
fitted to them by the code of a run (`fedbpt.aggregation.layer_fit`), as a whole and with one choice changed, and, as
the naive way, logistic regression on the last layer under the first template.

Data: a folder for each task with train.csv and test.csv (columns text and label), as for bench_tasks.py.

    python benchmarks/bench_readers.py --data DIR --tasks trec --shots 16 64
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from bench_tasks import draw, read_rows
from peers import text_classifiers

import fedbpt
from fedbpt import tasks
from fedbpt.aggregation import layer_fit
from fedbpt.coordinator.layer_reading import MAX_WORD_BYTES
from fedbpt.engine.discriminant import assign_folds
from fedbpt.engine.layers import reading_layers
from fedbpt.objective.layer_sums import cross_result, sums_result
from fedbpt.objective.layer_view import LayerView, Views, read_views
from fedbpt.protocol import codec
from fedbpt.protocol.rounds import Reading, RoundReport, SumsWork
from fedbpt.protocol.specs import Array, LayerReadout
from fedbpt.tasks.reading import reading_templates

Floats = np.ndarray


def fit(views: Views, targets: Floats, devices: Sequence[Floats], reading: Reading) -> tuple[LayerReadout, int]:
    """The readout of the rows of ``devices``, places in ``targets``, and the most bytes that one of them sends."""
    n_labels = int(targets.max()) + 1
    found = layer_fit.LayerFit("probe", reading, n_labels)
    folds = [
        assign_folds(targets[own], reading.n_folds, np.random.default_rng(number)) for number, own in enumerate(devices)
    ]
    sent = [0] * len(devices)
    while not found.done:
        work = found.work()
        reports = []
        for number, own in enumerate(devices):
            mine = Views(views.states[own], views.words[own])
            result: Any
            if isinstance(work, SumsWork):
                result = sums_result(work, mine, targets[own], folds[number], n_labels)
            else:
                result = cross_result(work, mine, targets[own], folds[number], np.ones(len(own)))  # type: ignore[arg-type]
            sent[number] += len(codec.encode(result))
            reports.append(
                RoundReport(
                    run="bench",
                    round=1,
                    device=f"device-{number}",
                    plan_digest="",
                    result=result,
                    n_texts=len(own),
                    evaluations=1,
                    tokens=1,
                    seconds=1.0,
                    peak_rss_bytes=1,
                )
            )
        found.update(reports)
    return found.readout, max(sent)


def accuracy(readout: LayerReadout, reading: Reading, views: Views, targets: Floats) -> float:
    places = [0, *(1 + reading.templates.index(template) for template in readout.others)]
    logits = np.repeat(readout.bias.numpy()[None], len(targets), axis=0)
    for place, weights, scale in zip(places, readout.weights.numpy(), readout.word_scales.numpy(), strict=True):
        logits += np.einsum("nle,lek->nk", views.states[:, place].astype(np.float64), weights)
        if scale:
            logits += scale * views.words[:, place]
    return float((logits.argmax(axis=1) == targets).mean())


@contextmanager
def changed(name: str, value: Any) -> Any:
    before = getattr(layer_fit, name)
    setattr(layer_fit, name, value)
    try:
        yield
    finally:
        setattr(layer_fit, name, before)


def skewed(targets: Floats, n_devices: int, seed: int) -> list[Floats]:
    """Rows of devices with Dirichlet(0.1) shares of each label."""
    rng = np.random.default_rng(seed)
    owner = np.zeros(len(targets), dtype=int)
    for label in np.unique(targets):
        rows = np.flatnonzero(targets == label)
        owner[rows] = rng.choice(n_devices, len(rows), p=rng.dirichlet([0.1] * n_devices))
    return [np.flatnonzero(owner == device) for device in range(n_devices) if (owner == device).any()]


def part_of(views: Views, places: Sequence[int], layers: Sequence[int], words: bool = True) -> Views:
    """The views ``places``, which begin with those that score words, and the layers in these places."""
    states = views.states[:, places][:, :, layers]
    n_words = sum(place < views.words.shape[1] for place in places) if words else 0
    return Views(states, views.words[:, :n_words] if n_words else np.zeros((len(states), 0, 0)))


def reading_of(views: Views, templates: Sequence[Any], layers: Sequence[int]) -> Reading:
    n_word_views = views.words.shape[1] if views.words.size else 0
    return Reading(
        latent=Array.of(np.zeros(1)), templates=tuple(templates), layers=tuple(layers), n_word_views=n_word_views
    )


def measure(folder: Path, model: str, shots: Sequence[int], seeds: int, test_rows: int) -> None:
    train, test = read_rows(folder / "train.csv"), read_rows(folder / "test.csv")
    task = tasks.draft_task(folder / "train.csv").task
    label_of = {label: i for i, label in enumerate(task.labels)}
    scorer = fedbpt.load_model(model)
    layers = reading_layers(scorer.n_layer)
    templates = (task.templates[0], *reading_templates(task.templates, task.templates[0]))
    n_task = len(task.templates)
    scores = min(sum(len(word.encode()) for word in each.label_words) for each in task.templates) <= MAX_WORD_BYTES
    drawn = [draw(train, max(shots), seed) for seed in range(seeds)]
    known = sorted({row for rows in drawn for row in rows})
    place_of = {row: place for place, row in enumerate(known)}
    rows = known + test[:test_rows]
    targets = np.array([label_of[label] for _, label in rows])
    began = time.monotonic()
    limit = task.max_text_tokens
    read = [
        LayerView(scorer, template, task.labels if scores and i < n_task else (), limit, layers)
        for i, template in enumerate(templates)
    ]
    all_views = read_views(read, [text for text, _ in rows])
    print(f"{folder.name}: {len(rows)} texts under {len(templates)} templates in {time.monotonic() - began:.0f} s")
    every = list(range(len(templates)))
    last = len(layers) - 1
    variants: dict[str, dict[str, Any]] = {
        "as in a run": {},
        "the task's templates alone": {"places": every[:n_task]},
        "the last layer alone": {"layers": [last]},
        "the best reader alone": {"set": ("SOFTNESS", 1e-9)},
        "all readers alike": {"set": ("SOFTNESS", 1e9)},
        "λ 0.85 alone": {"set": ("SHRINKAGES", (0.85,))},
        "no label words": {"words": False},
        "at most 16 rows of a factor": {"set": ("MAX_RANK", 16)},
        "five skewed devices": {"devices": 5},
    }
    for shot in shots:
        figures: dict[str, list[float]] = {name: [] for name in variants}
        naive = []
        sent: dict[str, int] = {}
        for seed in range(seeds):
            mine = draw(drawn[seed], shot, seed)
            own = np.array([place_of[row] for row in mine])
            held = np.arange(len(known), len(rows))
            for name, what in variants.items():
                places, chosen = what.get("places", every), what.get("layers", list(range(len(layers))))
                views = part_of(all_views, places, chosen, what.get("words", True))
                reading = reading_of(views, [templates[place] for place in places[1:]], chosen)
                train_views = Views(views.states[own], views.words[own])
                devices = skewed(targets[own], what["devices"], seed) if "devices" in what else [np.arange(len(own))]
                with changed(*what.get("set", ("SOFTNESS", layer_fit.SOFTNESS))):
                    readout, n_bytes = fit(train_views, targets[own], devices, reading)
                sent[name] = max(sent.get(name, 0), n_bytes)
                test_views = Views(views.states[held], views.words[held])
                figures[name].append(accuracy(readout, reading, test_views, targets[held]))
            states = [all_views.states[which][:, 0, last].astype(np.float64) for which in (own, held)]
            mean, spread = states[0].mean(axis=0), states[0].std(axis=0) + 1e-6
            scaled = [(each - mean) / (spread * math.sqrt(each.shape[1])) for each in states]
            guessed = text_classifiers.logistic_regression(scaled[0], targets[own].tolist(), scaled[1])
            naive.append(float((np.asarray(guessed) == targets[held]).mean()))
        base = float(np.mean(naive))
        print(f"  {shot} rows a label, mean of {seeds} seeds, {len(held)} test rows")
        print(f"    {'logistic regression, last layer, first template':48s} {base:.3f}")
        for name, found in figures.items():
            ratio = np.mean(found) / base
            print(f"    {name:48s} {np.mean(found):.3f}  x{ratio:.2f}  {sent[name] / 1e3:6.0f} KB up a device")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of the tasks' folders; without it nothing is measured")
    parser.add_argument("--tasks", nargs="*", help="names of folders; all by default")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--shots", nargs="+", type=int, default=[16])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--test-rows", type=int, default=250)
    given = parser.parse_args()
    if given.data is None or not given.data.is_dir():
        print("skipped: needs --data, a folder with a folder for each task (train.csv, test.csv)")
        return
    for folder in sorted(given.data.iterdir()):
        if (folder / "train.csv").is_file() and (not given.tasks or folder.name in given.tasks):
            measure(folder, given.model, given.shots, given.seeds, given.test_rows)


if __name__ == "__main__":
    main()
