"""Metrics of evaluations on dev rows, as stored with a run, and the curve that they form.

All points of a curve are of the same rows: those of the devices that took part in every evaluation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

from fedbpt.protocol.rounds import EvaluateReport
from fedbpt.runs.result import BASELINES, NO_SCORE, Score, perplexity

Metrics = Mapping[str, float]

FINAL: Final = "dev_final"
"""Metric that marks the evaluation of the result, on which no decision was based."""

UNJUDGED: Final = "dev_unjudged"
"""Metric that marks an evaluation of a mean that was judged before: only its readout is new."""

DEV_SECONDS: Final = "dev_seconds"
"""Metric: duration of an evaluation, with the fit of its readout."""


LOOK_GAIN: Final = "look_gain"
"""Metric of an interim look: nats a held-out row by which the search is ahead of the readout without prompt."""

LOOKS_DONE: Final = "looks_done"
"""Metric: number of interim looks that are done or missed after this one."""


class DevPoint(NamedTuple):
    """One evaluation. ``figure``: accuracy (0 to 1) or perplexity; losses in nats; ``zero_shot`` None: not measured."""

    round: int
    n: int
    figure: float
    loss: float
    zero_shot: float | None
    zero_shot_loss: float | None


def scores_of(names: Sequence[str], reports: Mapping[str, EvaluateReport]) -> dict[str, Score]:
    """Scores summed over devices, by name; ``names``: the evaluated variants, in the order of the reports."""
    return {name: sum((Score.of(report, i) for report in reports.values()), NO_SCORE) for i, name in enumerate(names)}


def metrics_of(names: Sequence[str], reports: Mapping[str, EvaluateReport], generates: bool) -> dict[str, float]:
    """The metrics to store of an evaluation of the variants ``names``: of all variants, and by device of zero-shot
    and tuned.
    """
    figure = "perplexity" if generates else "accuracy"
    scores = scores_of(names, reports)
    found = {"dev_n": float(scores["tuned"].n)}
    for name, score in scores.items():
        found |= _of_variant(score, figure, name)
    for device, report in reports.items():
        found[f"dev_n/{device}"] = float(report.n)
        for name in set(scores) & {"zero_shot", "tuned"}:
            own = _of_variant(Score.of(report, list(names).index(name)), figure, name)
            found |= {f"{metric}/{device}": value for metric, value in own.items()}
    return found


def _of_variant(score: Score, figure: str, name: str) -> dict[str, float]:
    end = "" if name == "tuned" else f"_{name}"
    return {f"dev_{figure}{end}": getattr(score, figure), f"dev_loss{end}": score.loss}


def judged_loss(metrics: Metrics) -> float | None:
    """The loss with which an evaluation judged the search's mean, nats; None if the round had no evaluation.

    Earlier versions stored one loss, that of the calibrated prompt.
    """
    decided = FINAL not in metrics and UNJUDGED not in metrics
    return metrics.get("judged_loss", metrics.get("dev_loss") if decided else None)


def dev_points(history: Mapping[int, Metrics], generates: bool) -> list[DevPoint]:
    """The evaluations of a run, in order. ``history``: the metrics of each round, ``metric`` and ``metric/device``."""
    figure = "perplexity" if generates else "accuracy"
    rounds = [round for round in sorted(history) if f"dev_{figure}" in history[round]]
    if not rounds:
        return []
    there = [{name.partition("/")[2] for name in history[round] if name.startswith("dev_n/")} for round in rounds]
    common = set.intersection(*there)
    points = []
    for round, devices in zip(rounds, there, strict=True):
        metrics = history[round]
        if common and devices != common:
            points.append(_over(round, metrics, sorted(common), figure))
        else:
            overall = metrics[f"dev_{figure}"], metrics["dev_loss"]
            zero_shot = metrics.get(f"dev_{figure}_zero_shot"), metrics.get("dev_loss_zero_shot")
            points.append(DevPoint(round, int(metrics.get("dev_n", 0)), *overall, *zero_shot))
    first = points[0]
    if first.round == 0 and not any(there):  # by an earlier version, which measured zero-shot once
        points = [point._replace(zero_shot=first.figure, zero_shot_loss=first.loss) for point in points]
    return points


def _over(round: int, metrics: Metrics, devices: Sequence[str], figure: str) -> DevPoint:
    counts = [metrics[f"dev_n/{device}"] for device in devices]

    def mean(metric: str) -> float:
        values = [metrics[f"{metric}/{device}"] for device in devices]
        return sum(count * value for count, value in zip(counts, values, strict=True)) / sum(counts)

    loss = mean("dev_loss")
    if f"dev_loss_zero_shot/{devices[0]}" not in metrics:
        figure_of_all = perplexity(loss) if figure == "perplexity" else mean("dev_accuracy")
        return DevPoint(round, int(sum(counts)), figure_of_all, loss, None, None)
    zero_shot_loss = mean("dev_loss_zero_shot")
    if figure == "perplexity":
        return DevPoint(round, int(sum(counts)), perplexity(loss), loss, perplexity(zero_shot_loss), zero_shot_loss)
    return DevPoint(round, int(sum(counts)), mean("dev_accuracy"), loss, mean("dev_accuracy_zero_shot"), zero_shot_loss)


def stages_of(metrics: Metrics, generates: bool) -> dict[str, float]:
    """The figures of an evaluation by variant, as far as known; ``zero_shot`` first, ``tuned`` last."""
    figure = "perplexity" if generates else "accuracy"
    names = {"zero_shot": "_zero_shot", **{name: f"_{name}" for name in BASELINES}, "tuned": ""}
    found = {name: metrics.get(f"dev_{figure}{end}") for name, end in names.items()}
    return {name: value for name, value in found.items() if value is not None}
