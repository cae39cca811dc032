"""Advice on a model that was loaded, for people."""

from __future__ import annotations

import typer

from fedbpt.native_scorer import NativeScorer


def print_hint(scorer: NativeScorer, shown: bool) -> None:
    """Print the scorer's notes and its hint on standard error. Not ``shown``: nothing is measured either."""
    for note in scorer.notes if shown else ():
        typer.echo(f"note: {note}", err=True)
    if shown and scorer.hint:
        typer.echo(f"hint: {scorer.hint}", err=True)
