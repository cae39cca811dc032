"""Advice on a model that was loaded, for people."""

from __future__ import annotations

import typer

from fedbpt.native_scorer import NativeScorer
from fedbpt.tasks import Task, word_notes


def print_hint(scorer: NativeScorer, shown: bool, task: Task | None = None) -> None:
    """Print the scorer's hint, if it has one, and what ``task``'s label words cost it, on standard error.

    Not ``shown``: nothing is measured either.
    """
    if not shown:
        return
    for hint in [scorer.hint, *(word_notes(scorer, task) if task else [])]:
        if hint:
            typer.echo(f"hint: {hint}", err=True)
