"""`RunQueue`: the runs that were handed to a coordinator, in one SQLite file, in order.

It is separate from the run store, which has the rounds and results: a run that is waiting has none yet.
"""

from __future__ import annotations

from datetime import datetime, timezone
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from fedbpt.errors import CoordinatorRefusedError, StoreError, WireError
from fedbpt.protocol import codec
from fedbpt.runs.database import Database
from fedbpt.runs.settings import RunSettings
from fedbpt.runs.submission import Job, JobState, Submission

SCHEMA_VERSION: Final = 1
_APPLICATION_ID: Final = 0x46425155  # distinguishes the file from a run store and a device registry

KEPT: Final = 200
"""Runs that are over and still listed; older ones are in the run store only."""

_SCHEMA: Final = """
CREATE TABLE jobs (
    place INTEGER PRIMARY KEY AUTOINCREMENT, run TEXT UNIQUE NOT NULL, task TEXT NOT NULL, method TEXT NOT NULL,
    state TEXT NOT NULL, fresh INTEGER NOT NULL, submission BLOB NOT NULL,
    handed_in TEXT NOT NULL, ended TEXT NOT NULL, detail TEXT NOT NULL
)
"""


class Quota(NamedTuple):
    """Limits of what may be handed in; None: no limit.

    ``queued``: number of runs that wait. ``evaluations``, ``tokens``, ``seconds``: upper bounds of the run's own budget
    (`RunSettings`). ``bytes``: sent and received by all devices of a run, after which it is stopped.
    """

    queued: int = 16
    evaluations: int | None = None
    tokens: int | None = None
    seconds: float | None = None
    bytes: int | None = None

    def check(self, settings: RunSettings) -> None:
        """Raise `CoordinatorRefusedError` (``over-quota``) if a run of these settings may cost more."""
        for name in ("evaluations", "tokens", "seconds"):
            most, wanted = getattr(self, name), getattr(settings, name)
            if most is not None and not 0 < wanted <= most:
                has = f"{wanted:g}" if wanted else "no limit"
                raise CoordinatorRefusedError(
                    f"this coordinator allows a run at most {most:g} {name}, and this one has {has}: set {name} to at"
                    f" most {most:g}",
                    "over-quota",
                )


DEFAULT_QUOTA: Final = Quota()


class RunQueue(Database):
    """The queue at ``path`` (created with its folder if absent). Safe to use from several threads.

    Raises:
        StoreError: the file cannot be opened, is not a queue, or a write failed.
    """

    WHAT = "queue of runs"

    def __init__(self, path: str | Path, quota: Quota = DEFAULT_QUOTA) -> None:
        self.quota = quota
        super().__init__(path)

    def add(self, submission: Submission) -> None:
        """Put a run at the end. The same task and settings again change nothing while the run is queued or runs.

        Raises:
            CoordinatorRefusedError: ``conflict``: a run of this name waits or runs, with another task or settings, or
                is to start over, which the one that waits or runs is not;
                ``too-many``: the queue is full; ``over-quota``.
        """
        self.quota.check(submission.settings)
        with self._transaction() as db:
            row = "SELECT state, submission, fresh FROM jobs WHERE run = ?"
            found = db.execute(row, (submission.run,)).fetchone()
            if found is not None and found[0] in ("queued", "running"):
                is_same = _plain(codec.decode(found[1], Submission)) == _plain(submission)
                if is_same and submission.fresh and not found[2]:
                    raise CoordinatorRefusedError(
                        f"run {submission.run!r} is {found[0]} already: follow it without --fresh, or cancel it first"
                        f" (fedbpt runs cancel {submission.run})",
                        "conflict",
                    )
                if is_same:
                    return
                raise CoordinatorRefusedError(
                    f"run {submission.run!r} is {found[0]} with another task or other settings: choose another"
                    f" name, or cancel it first (fedbpt runs cancel {submission.run})",
                    "conflict",
                )
            (waiting,) = db.execute("SELECT count(*) FROM jobs WHERE state = 'queued'").fetchone()
            if waiting >= self.quota.queued:
                raise CoordinatorRefusedError(
                    f"the queue is full ({waiting} runs wait, which is its limit): try again when one has ended, or"
                    " cancel one (fedbpt runs cancel NAME)",
                    "too-many",
                )
            db.execute("DELETE FROM jobs WHERE run = ?", (submission.run,))
            db.execute(
                "INSERT INTO jobs (run, task, method, state, fresh, submission, handed_in, ended, detail)"
                " VALUES (?, ?, ?, 'queued', ?, ?, ?, '', '')",
                (
                    submission.run,
                    submission.task.name,
                    submission.settings.method,
                    submission.fresh,
                    codec.encode(submission),
                    _now(),
                ),
            )

    def take(self) -> Submission | None:
        """The next run, which is then running: one that ran when the coordinator was stopped, or the first that waits.

        None: there is none.
        """
        while True:
            with self._transaction() as db:
                found = db.execute(
                    "SELECT run, submission, fresh FROM jobs WHERE state IN ('running', 'queued')"
                    " ORDER BY state = 'queued', place LIMIT 1"
                ).fetchone()
                if found is None:
                    return None
                run, body, fresh = found
                db.execute("UPDATE jobs SET state = 'running' WHERE run = ?", (run,))
            try:
                return msgspec.structs.replace(codec.decode(body, Submission), fresh=bool(fresh))
            except WireError as error:
                self.end(run, "failed", f"another version of fedbpt has stored it: hand it in again ({error})")

    def begun(self, run: str) -> None:
        """Record that ``run`` has replaced the stored one: if it is taken again, it is resumed."""
        with self._transaction() as db:
            db.execute("UPDATE jobs SET fresh = 0 WHERE run = ?", (run,))

    def end(self, run: str, state: JobState, detail: str = "") -> None:
        """Record that ``run`` is over."""
        with self._transaction() as db:
            db.execute("UPDATE jobs SET state = ?, ended = ?, detail = ? WHERE run = ?", (state, _now(), detail, run))
            db.execute(
                "DELETE FROM jobs WHERE state NOT IN ('queued', 'running') AND place NOT IN"
                f" (SELECT place FROM jobs WHERE state NOT IN ('queued', 'running') ORDER BY ended DESC LIMIT {KEPT})"
            )

    def cancel_queued(self, run: str) -> bool:
        """Take ``run`` out of the queue; False: it does not wait there."""
        with self._transaction() as db:
            changed = db.execute(
                "UPDATE jobs SET state = 'cancelled', ended = ? WHERE run = ? AND state = 'queued'", (_now(), run)
            ).rowcount
        return bool(changed)

    def jobs(self) -> list[Job]:
        """All runs: those that are over by the time of their end, then the running ones, then the queue."""
        with self._reading() as db:
            rows = db.execute(
                "SELECT run, task, method, state, handed_in, ended, detail FROM jobs ORDER BY"
                " CASE state WHEN 'running' THEN 1 WHEN 'queued' THEN 2 ELSE 0 END, ended, place"
            ).fetchall()
        ahead = 0
        found = []
        for run, task, method, state, handed_in, ended, detail in rows:
            job = Job(
                run=run,
                task=task,
                method=method,
                state=state,
                ahead=ahead if state == "queued" else 0,
                detail=detail,
                handed_in=handed_in,
                ended=ended,
            )
            found.append(job)
            ahead += not job.is_over
        return found

    def job(self, run: str) -> Job:
        """One run. Raises `CoordinatorRefusedError` (``unknown-run``)."""
        found = [job for job in self.jobs() if job.run == run]
        if not found:
            raise CoordinatorRefusedError(
                f"no run {run!r} was handed to this coordinator: list the runs with `fedbpt runs list --coordinator`",
                "unknown-run",
            )
        return found[0]

    def _prepare(self) -> None:
        with self._transaction() as db:
            (ours,) = db.execute("PRAGMA application_id").fetchone()
            (version,) = db.execute("PRAGMA user_version").fetchone()
            if not db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                db.execute(_SCHEMA)
                db.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
                db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
            elif (ours, version) != (_APPLICATION_ID, SCHEMA_VERSION):
                raise StoreError(f"{self.path} is not a queue of runs of version {SCHEMA_VERSION}: choose another file")


def _plain(submission: Submission) -> Submission:
    """``submission`` without what only matters when it begins."""
    return msgspec.structs.replace(submission, model_fingerprint="", expect=None, fresh=False)


def _now() -> str:
    # Only for people, and for the order of what is over.
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")
