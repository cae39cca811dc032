"""Advice on a model that was loaded, for people."""

from __future__ import annotations

from fedbpt.native_scorer import NativeScorer
from fedbpt.plain_text import echo


def print_hint(scorer: NativeScorer, shown: bool) -> None:
    """Print the scorer's hint, if it has one, on standard error. Not ``shown``: nothing is measured either."""
    if shown and scorer.hint:
        echo(f"hint: {scorer.hint}", err=True)
