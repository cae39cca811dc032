"""Stored runs as JSON-compatible data, for ``fedbpt runs --json`` and the monitor."""

from __future__ import annotations

from typing import Any

from fedbpt.protocol import codec
from fedbpt.runs.store import RoundHistory, RunStore, StoredRun
from fedbpt.tasks import BUILTIN, Task


def run_as_json(run: StoredRun) -> dict[str, Any]:
    """A run as ``fedbpt runs list`` shows it."""
    return {
        "run": run.run,
        "task": run.task,
        "model": run.model_name,
        "status": run.status,
        "n_rounds": run.n_rounds,
        "created": run.created,
        "updated": run.updated,
    }


def task_of_run(run: StoredRun) -> Task | None:
    """The task of a stored run; None if an earlier version stored only its name and it is not a built-in task.

    Raises `WireError` if the stored task is damaged.
    """
    return BUILTIN.get(run.task) if run.definition is None else codec.decode(run.definition, Task)


def round_as_json(line: RoundHistory) -> dict[str, Any]:
    """A round: which devices reported, which were lost and why, and its metrics."""
    return {
        "round": line.round,
        "closed": line.closed,
        "reported": list(line.reported),
        "late": list(line.late),
        "lost": dict(line.lost),
        "metrics": dict(line.metrics),
    }


def run_in_full(store: RunStore, run: StoredRun) -> dict[str, Any]:
    """A run with its rounds and the latest descriptions of its devices."""
    traffic = store.traffic(run.run)
    devices = [
        {"name": name, "info": info, **traffic[name]._asdict()}
        for name, info in store.devices(run.run).items()
        if name in traffic
    ]
    rounds = [round_as_json(line) for line in store.history(run.run)]
    return {**run_as_json(run), "rounds": rounds, "devices": devices}
