"""The curves of a stored run."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

from fedbpt.coordinator.monitoring.round_figures import evaluations_in, numbers_of
from fedbpt.runs.dev_figures import dev_points
from fedbpt.runs.settings import stored_settings
from fedbpt.runs.store import RunStore

Curve: TypeAlias = tuple[tuple[int, float], ...]
"""Pairs of evaluations so far and figure."""


class Curves(NamedTuple):
    """``losses``: mean loss of each round of the search, nats. ``dev``: accuracy or perplexity on development rows."""

    losses: Curve
    dev: Curve


def curves_of(store: RunStore, run: str) -> Curves:
    """The curves of ``run``, over all its sessions. Raises `StoreError` for an unknown run."""
    settings = stored_settings(store.get_run(run).settings)
    reached: dict[int, int] = {}
    losses = []
    evaluations = 0
    for closed in map(numbers_of, store.rounds(run)):
        if closed.purpose == "search":
            evaluations += evaluations_in(closed, settings)
            losses.append((evaluations, closed.loss))
        reached[closed.round] = evaluations
    history = {line.round: line.metrics for line in store.history(run)}
    points = dev_points(history, generates=settings.objective.loss == "nll")
    return Curves(tuple(losses), tuple((reached.get(point.round, 0), point.figure) for point in points))
