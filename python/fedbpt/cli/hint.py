"""Advice on a model that was loaded, for people."""

from __future__ import annotations

import typer

from fedbpt.native_scorer import NativeScorer


def print_hint(scorer: NativeScorer, shown: bool) -> None:
    """Print the scorer's hint, if it has one, on standard error. Not ``shown``: nothing is measured either."""
    if shown and scorer.hint:
        typer.echo(f"hint: {scorer.hint}", err=True)
