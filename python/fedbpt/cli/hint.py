"""Advice on a model that was loaded, for people."""

from __future__ import annotations

from fedbpt.engine.native_scorer import NativeScorer
from fedbpt.plain_text import echo
from fedbpt.tasks import Task, word_notes


def print_hint(scorer: NativeScorer, shown: bool, task: Task | None = None) -> None:
    """Print the scorer's notes and its hint, and what ``task``'s label words cost it, on standard error.

    Not ``shown``: nothing is measured either.
    """
    if not shown:
        return
    for note in scorer.notes:
        echo(f"note: {note}", err=True)
    for hint in [scorer.hint, *(word_notes(scorer, task) if task else [])]:
        if hint:
            echo(f"hint: {hint}", err=True)
