"""Advice on a model that was loaded, for people."""

from __future__ import annotations

from fedbpt.native_scorer import NativeScorer
from fedbpt.plain_text import echo


def print_hint(scorer: NativeScorer, shown: bool) -> None:
    """Print the scorer's notes and its hint on standard error. Not ``shown``: nothing is measured either."""
    for note in scorer.notes if shown else ():
        echo(f"note: {note}", err=True)
    if shown and scorer.hint:
        echo(f"hint: {scorer.hint}", err=True)
