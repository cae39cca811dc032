"""The list of a coordinator's runs, each with a link to its page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from nicegui import ui

from fedbpt.dashboard.elements import page_frame
from fedbpt.runs.submission import Job

UPDATE_S: Final = 1.0
"""Interval between two updates, in seconds."""

_COLUMNS: Final = (
    ("run", "Run"),
    ("task", "Task"),
    ("method", "Method"),
    ("state", "State"),
    ("handed_in", "Handed in, UTC"),
    ("ended", "Ended, UTC"),
    ("detail", ""),
)

_RUN_CELL: Final = """
<q-td :props="props"><a :href="'/runs/' + encodeURIComponent(props.row.run)">{{ props.row.run }}</a></q-td>
"""


class RunsPage:
    """The list in one browser. ``jobs``: returns the runs; ``invitation``: see `fedbpt.dashboard.pages.RunPage`."""

    def __init__(self, jobs: Callable[[], Sequence[Job]], invitation: str | None) -> None:
        self._jobs = jobs
        with page_frame(invitation):
            ui.label("Runs").classes("title").props("role=heading aria-level=1")
            ui.element("div").classes("spring")
        with (
            ui.element("section").classes("panel"),
            ui.element("div").classes("scroller").props('tabindex=0 role="region" aria-label="All runs"'),
        ):
            columns = [{"name": name, "label": label, "field": name, "align": "left"} for name, label in _COLUMNS]
            self._table = ui.table(columns=columns, rows=[], row_key="run", pagination=0)
        self._table.props('flat hide-bottom wrap-cells :dense="Quasar.Screen.lt.md"')
        self._table.add_slot("body-cell-run", _RUN_CELL)
        self.update()
        ui.timer(UPDATE_S, self.update)

    def update(self) -> None:
        """Show changes. The running run and the queue come first, then those that are over, the latest first."""
        jobs = self._jobs()
        order = [job for job in jobs if not job.is_over] + [job for job in reversed(jobs) if job.is_over]
        rows = [_row(job) for job in order]
        if rows != self._table.rows:
            self._table.rows = rows


def _row(job: Job) -> dict[str, str]:
    state = f"{job.state}, {job.ahead} before it" if job.ahead else job.state
    return {
        "run": job.run,
        "task": job.task,
        "method": job.method,
        "state": state,
        "handed_in": job.handed_in[:19].replace("T", " "),
        "ended": job.ended[:19].replace("T", " "),
        "detail": job.detail,
    }
