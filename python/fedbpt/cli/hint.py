"""Advice about a loaded model, on standard error."""

from __future__ import annotations

from fedbpt.engine.native_scorer import NativeScorer
from fedbpt.plain_text import echo
from fedbpt.tasks import Task, word_notes


def print_hint(scorer: NativeScorer, shown: bool, task: Task | None = None) -> None:
    """Print the scorer's notes and hint, and notes on the token cost of ``task``'s label words, to standard error.

    Without ``shown``, nothing is measured or printed.
    """
    if not shown:
        return
    for note in scorer.notes:
        echo(f"note: {note}", err=True)
    for hint in [scorer.hint, *(word_notes(scorer, task) if task else [])]:
        if hint:
            echo(f"hint: {hint}", err=True)
