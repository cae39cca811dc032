"""The tables and the page of ``fedbpt runs report``."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from typing import Any

from rich.table import Table

from fedbpt.coordinator.monitoring.run_report import Measured, RunReport, Spent
from fedbpt.display.console import human_bytes
from fedbpt.display.plain_console import PlainConsole
from fedbpt.html_tables import html_table

_RESOURCES = {
    "bytes_up": "bytes from devices",
    "seconds": "seconds",
    "tokens": "forward tokens of all devices",
    "joules": "joules of all devices",
}

_STYLE = "body{font:15px system-ui;margin:2em;max-width:60em}table{margin:1em 0}th,td{padding:.2em 1em .2em 0}"


def amount(resource: str, value: float) -> str:
    """``value`` of a resource, with its unit."""
    if resource.startswith("bytes"):
        return human_bytes(int(value))
    return f"{value:,.0f}" if value >= 100 or resource == "tokens" else f"{value:.3g}"


def figure_of(report: RunReport, point: Measured | None) -> str:
    """An evaluation's figure, or a dash."""
    if point is None:
        return "-"
    return f"{point.figure:.2f}" if report.generates else f"{point.figure:.3f}"


def sections(report: RunReport) -> Iterator[tuple[str, Sequence[str], Sequence[tuple[str, ...]]]]:
    """(title, headings, rows) of each question."""
    name = "perplexity" if report.generates else "accuracy"
    rows: list[tuple[str, ...]] = [
        (_RESOURCES[each.resource], amount(each.resource, each.budget), figure_of(report, each.best))
        for each in report.budgets
    ]
    yield f"Quality under a budget: best {name} on development rows", ("resource", "budget", name), rows
    if report.target is not None:
        reached = report.reached
        title = f"Cost to {name} {report.target:g}"
        yield title, ("resource", "spent"), _costs(reached.spent) if reached else [("not reached", "")]
    yield (
        "Cost of the whole run",
        ("resource", "spent"),
        [
            *_costs(report.total),
            ("memory of the busiest device", human_bytes(report.peak_rss_bytes)),
        ],
    )
    faults = report.faults
    missing = max(faults.expected - faults.counted, 0)
    share = f" ({missing / faults.expected:.1%})" if faults.expected else ""
    lines = [
        ("reports that are missing", f"{missing:,} of {faults.expected:,}{share}"),
        ("reports that came too late", f"{faults.late:,}"),
        ("seconds of rounds that were given up", f"{faults.left_out_seconds:.3g}"),
        *((f"{device} was lost", f"{n} times; last: {why}") for device, (n, why) in faults.lost.items()),
    ]
    yield "Robustness: what faults cost", ("", ""), lines


def _costs(spent: Spent) -> list[tuple[str, ...]]:
    named = {**_RESOURCES, "evaluations": "evaluations", "bytes_down": "bytes to devices"}
    found = [(name, getattr(spent, resource), resource) for resource, name in named.items()]
    return [(name, amount(resource, value)) for name, value, resource in found if value is not None]


def print_report(report: RunReport) -> None:
    """Print the report as tables."""
    console = PlainConsole()
    if not report.points:
        console.print("no evaluations on development rows: give devices some (--dev) to see quality", markup=False)
    for title, headings, rows in sections(report):
        table = Table(title=title, title_justify="left", box=None)
        for heading in headings:
            table.add_column(heading)
        for row in rows:
            table.add_row(*row)
        console.print(table)


def report_page(report: RunReport) -> str:
    """The report as an HTML page."""
    title = f"Run {report.run}: {report.task} on {report.model}"
    body = "".join(html_table(heading, [("", *names[1:]), *rows]) for heading, names, rows in sections(report))
    name = "perplexity" if report.generates else "accuracy"
    curve = [
        (f"round {point.round}", figure_of(report, point), f"{point.n} rows", amount("seconds", point.spent.seconds))
        for point in report.points
    ]
    body += html_table("Evaluations on development rows", [("", name, "", "seconds"), *curve]) if curve else ""
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body><h1>{html.escape(title)}</h1>{body}</body></html>'


def report_json(report: RunReport) -> dict[str, Any]:
    """The report for programs."""

    def point(found: Measured | None) -> dict[str, Any] | None:
        return None if found is None else {**found._asdict(), "spent": found.spent._asdict()}

    faults = report.faults
    return {
        **report._asdict(),
        "points": [point(each) for each in report.points],
        "budgets": [{**each._asdict(), "best": point(each.best)} for each in report.budgets],
        "total": report.total._asdict(),
        "reached": point(report.reached),
        "faults": {
            **faults._asdict(),
            "lost": {name: {"times": n, "reason": why} for name, (n, why) in faults.lost.items()},
        },
    }
