"""`RunStore`: every run's rounds, reports and metrics in one SQLite file; the log to resume from, and the history.

A round is one transaction, written when it closes: after a crash it is there with all its reports, or not at all.
WAL with ``synchronous=FULL``: what was committed survives a power cut. Reports are kept as their wire bytes, so
replaying them is decoding them.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, TypeAlias

from fedbpt.errors import StoreError, WireError
from fedbpt.protocol import codec
from fedbpt.protocol.rounds import DeviceInfo, RoundReport
from fedbpt.runs.database import Database
from fedbpt.runs.run_lock import sole_worker

SCHEMA_VERSION: Final = 2

_SCHEMA: Final = """
CREATE TABLE runs (
    run TEXT PRIMARY KEY, created TEXT NOT NULL, updated TEXT NOT NULL, status TEXT NOT NULL, task TEXT NOT NULL,
    model_fingerprint TEXT NOT NULL, model_name TEXT NOT NULL, identity TEXT NOT NULL,
    settings BLOB NOT NULL, result BLOB
);
CREATE TABLE devices (
    run TEXT NOT NULL REFERENCES runs ON DELETE CASCADE, device TEXT NOT NULL, info BLOB,
    bytes_up INTEGER NOT NULL DEFAULT 0, bytes_down INTEGER NOT NULL DEFAULT 0,
    peak_rss_bytes INTEGER NOT NULL DEFAULT 0, address TEXT NOT NULL DEFAULT '', PRIMARY KEY (run, device)
);
CREATE TABLE rounds (
    run TEXT NOT NULL REFERENCES runs ON DELETE CASCADE, round INTEGER NOT NULL, closed TEXT NOT NULL,
    work_digest TEXT NOT NULL, state_digest TEXT NOT NULL, PRIMARY KEY (run, round)
);
CREATE TABLE reports (
    run TEXT NOT NULL, round INTEGER NOT NULL, device TEXT NOT NULL, late INTEGER NOT NULL, body BLOB NOT NULL,
    PRIMARY KEY (run, round, device), FOREIGN KEY (run, round) REFERENCES rounds ON DELETE CASCADE
);
CREATE TABLE losses (
    run TEXT NOT NULL REFERENCES runs ON DELETE CASCADE, round INTEGER NOT NULL, device TEXT NOT NULL,
    reason TEXT NOT NULL, at TEXT NOT NULL
);
CREATE TABLE metrics (
    run TEXT NOT NULL REFERENCES runs ON DELETE CASCADE, round INTEGER NOT NULL, name TEXT NOT NULL,
    value REAL NOT NULL, PRIMARY KEY (run, round, name)
);
"""

_TASKS: Final = """
CREATE TABLE tasks (
    run TEXT PRIMARY KEY REFERENCES runs ON DELETE CASCADE, body BLOB NOT NULL, rows_digest TEXT NOT NULL
)
"""
_FROM_VERSION_1: Final = (_TASKS, "ALTER TABLE devices ADD COLUMN address TEXT NOT NULL DEFAULT ''")

RunStatus: TypeAlias = Literal["running", "stopped", "finished"]


class StoredRun(NamedTuple):
    """One row of ``fedbpt runs list``. ``settings`` and ``result`` are wire bytes (`fedbpt.runs.settings`), and so is
    ``definition``, of the task (None: an earlier version began the run, and kept the task's name alone);
    ``identity`` is a digest of what must be the same to resume it; ``rows`` one of the rows where the run was of one
    machine, else empty.
    """

    run: str
    created: str
    updated: str
    status: RunStatus
    task: str
    model_fingerprint: str
    model_name: str
    identity: str
    settings: bytes
    result: bytes | None
    n_rounds: int
    definition: bytes | None
    rows: str


class StoredRound(NamedTuple):
    """What is needed to replay one closed round. ``reports`` are those that were used, by device name."""

    round: int
    work_digest: str
    state_digest: str
    reports: tuple[RoundReport, ...]


class Traffic(NamedTuple):
    """What one device has cost so far, over all sittings of a run; bytes of message bodies."""

    bytes_up: int
    bytes_down: int
    peak_rss_bytes: int


class RoundHistory(NamedTuple):
    """One line of ``fedbpt runs show``."""

    round: int
    closed: str
    reported: tuple[str, ...]
    late: tuple[str, ...]
    lost: Mapping[str, str]
    metrics: Mapping[str, float]


class RunStore(Database):
    """The run database at ``path`` (made with its folder if absent; None: in memory). Safe to use from several threads.

    Raises:
        StoreError: the file cannot be opened, is not a run database, is of another version, or a write failed.
    """

    WHAT = "run database"

    def __init__(self, path: str | Path | None) -> None:
        self._held: set[str] = set()
        super().__init__(path)

    @contextmanager
    def held(self, run: str) -> Iterator[None]:
        """Keep every other process, and every other store object, from working on ``run`` meanwhile; it may be nested.

        Raises `StoreError` where one works on it already.
        """
        if self.in_memory or run in self._held:
            yield
            return
        with sole_worker(self.path, run):
            self._held.add(run)
            try:
                yield
            finally:
                self._held.remove(run)

    # --- writing -------------------------------------------------------------------------------------------------

    def create_run(
        self,
        run: str,
        *,
        task: str,
        model_fingerprint: str,
        model_name: str,
        identity: str,
        settings: bytes,
        devices: Sequence[str],
    ) -> None:
        """Begin ``run``; raises `StoreError` where there is one of this name."""
        now = _now()
        with self._transaction() as db:
            if db.execute("SELECT 1 FROM runs WHERE run = ?", (run,)).fetchone():
                raise StoreError(f"run {run!r} already exists in {self.path}: choose another name")
            db.execute(
                "INSERT INTO runs VALUES (?, ?, ?, 'running', ?, ?, ?, ?, ?, NULL)",
                (run, now, now, task, model_fingerprint, model_name, identity, settings),
            )
            db.executemany("INSERT INTO devices (run, device) VALUES (?, ?)", [(run, device) for device in devices])

    def commit_round(
        self,
        run: str,
        round: int,
        *,
        work_digest: str,
        state_digest: str,
        reports: Sequence[RoundReport],
        metrics: Mapping[str, float],
        traffic: Mapping[str, Traffic] | None = None,
    ) -> None:
        """Close ``round`` with the reports that were used, in one transaction. A round closes once."""
        now = _now()
        with self._transaction() as db:
            db.execute("INSERT INTO rounds VALUES (?, ?, ?, ?, ?)", (run, round, now, work_digest, state_digest))
            db.executemany(
                "INSERT INTO reports VALUES (?, ?, ?, 0, ?)",
                [(run, round, report.device, codec.encode(report)) for report in reports],
            )
            self._write_metrics(db, run, round, metrics)
            self._write_traffic(db, run, traffic or {})
            db.execute("UPDATE runs SET updated = ? WHERE run = ?", (now, run))
            db.execute("DELETE FROM runs WHERE run = ?", (_aside(run),))

    def record_late(self, run: str, report: RoundReport) -> None:
        """Keep a report that came after its round had closed; it is never replayed. Twice is once."""
        with self._transaction() as db:
            db.execute(
                "INSERT OR IGNORE INTO reports VALUES (?, ?, ?, 1, ?)",
                (run, report.round, report.device, codec.encode(report)),
            )

    def record_losses(self, run: str, round: int, reasons: Mapping[str, str]) -> None:
        """Note which devices were lost in ``round``, and why, in one transaction."""
        now = _now()
        with self._transaction() as db:
            rows = [(run, round, device, reason, now) for device, reason in reasons.items()]
            db.executemany("INSERT INTO losses VALUES (?, ?, ?, ?, ?)", rows)

    def record_devices(self, run: str, infos: Mapping[str, DeviceInfo]) -> None:
        """Keep what devices said of themselves last, in one transaction."""
        with self._transaction() as db:
            db.executemany(
                "INSERT INTO devices (run, device, info) VALUES (?, ?, ?)"
                " ON CONFLICT (run, device) DO UPDATE SET info = excluded.info",
                [(run, device, codec.encode(info)) for device, info in infos.items()],
            )

    def record_metrics(self, run: str, round: int, metrics: Mapping[str, float]) -> None:
        """Add figures to a round (an evaluation after it); a figure of the same name is replaced."""
        with self._transaction() as db:
            self._write_metrics(db, run, round, metrics)

    def record_task(self, run: str, definition: bytes, rows: str = "") -> None:
        """The task of ``run``, as it is given to its latest sitting. ``rows``: a digest, see `StoredRun`."""
        with self._transaction() as db:
            db.execute("INSERT OR REPLACE INTO tasks VALUES (?, ?, ?)", (run, definition, rows))

    def add_devices(self, run: str, devices: Sequence[str]) -> None:
        """Devices that a later sitting of ``run`` brings; known ones stay as they are."""
        with self._transaction() as db:
            rows = [(run, device) for device in devices]
            db.executemany("INSERT OR IGNORE INTO devices (run, device) VALUES (?, ?)", rows)

    def record_addresses(self, run: str, addresses: Mapping[str, str]) -> None:
        """Where devices of ``run`` are called, by name; in one transaction."""
        with self._transaction() as db:
            rows = [(address, run, device) for device, address in addresses.items()]
            db.executemany("UPDATE devices SET address = ? WHERE run = ? AND device = ?", rows)

    def record_settings(self, run: str, settings: bytes, identity: str) -> None:
        """The settings of a later sitting of ``run``: its budget may have changed, and ``identity`` may say more."""
        with self._transaction() as db:
            db.execute("UPDATE runs SET settings = ?, identity = ? WHERE run = ?", (settings, identity, run))

    def set_status(
        self,
        run: str,
        status: RunStatus,
        result: bytes | None = None,
        traffic: Mapping[str, Traffic] | None = None,
    ) -> None:
        """Mark ``run``; a ``result`` is kept with it."""
        with self._transaction() as db:
            db.execute(
                "UPDATE runs SET status = ?, updated = ?, result = coalesce(?, result) WHERE run = ?",
                (status, _now(), result, run),
            )
            if status == "finished":
                db.execute("DELETE FROM runs WHERE run = ?", (_aside(run),))
            self._write_traffic(db, run, traffic or {})

    def delete_run(self, run: str) -> None:
        """Forget ``run`` and everything under it; no such run is no error."""
        with self._transaction() as db:
            db.execute("DELETE FROM runs WHERE run = ?", (run,))

    def set_aside(self, run: str) -> None:
        """Make room for another run of the name ``run``, which is forgotten when that one closes its first round.

        Until then `restore` brings it back, and it is listed as ``run~``. No such run is no error.
        """
        with self._transaction() as db:
            self._rename(db, run, _aside(run))

    def restore(self, run: str) -> None:
        """Undo `set_aside` where no round has been closed since, and forget what was begun in its place."""
        with self._transaction() as db:
            if db.execute("SELECT 1 FROM runs WHERE run = ?", (_aside(run),)).fetchone():
                db.execute("DELETE FROM runs WHERE run = ?", (run,))
                self._rename(db, _aside(run), run)

    # --- reading -------------------------------------------------------------------------------------------------

    def list_runs(self) -> list[StoredRun]:
        """All runs, the latest first."""
        return [StoredRun(*row) for row in self._query(f"{_SELECT_RUN} ORDER BY created DESC, run")]

    def find_run(self, run: str) -> StoredRun | None:
        """The run of this name, or None."""
        rows = self._query(f"{_SELECT_RUN} WHERE run = ?", run)
        return StoredRun(*rows[0]) if rows else None

    def get_run(self, run: str) -> StoredRun:
        """The run of this name; raises `StoreError` where there is none."""
        found = self.find_run(run)
        if found is None:
            raise StoreError(f"no run {run!r} in {self.path}: `fedbpt runs list` shows what there is")
        return found

    def rounds(self, run: str, since: int = 0) -> Iterator[StoredRound]:
        """The closed rounds of ``run`` from ``since`` on, in order, with the reports that were used: to replay."""
        for round, work, state in self._query(
            "SELECT round, work_digest, state_digest FROM rounds WHERE run = ? AND round >= ? ORDER BY round",
            run,
            since,
        ):
            bodies = self._query(
                "SELECT body FROM reports WHERE run = ? AND round = ? AND NOT late ORDER BY device", run, round
            )
            try:
                reports = tuple(codec.decode(body, RoundReport) for (body,) in bodies)
            except WireError as error:
                raise StoreError(f"round {round} of run {run!r} in {self.path} is damaged: {error}") from error
            yield StoredRound(round, work, state, reports)

    def traffic(self, run: str) -> dict[str, Traffic]:
        """What each device of ``run`` has cost so far."""
        rows = self._query("SELECT device, bytes_up, bytes_down, peak_rss_bytes FROM devices WHERE run = ?", run)
        return {device: Traffic(up, down, peak) for device, up, down, peak in rows}

    def devices(self, run: str) -> dict[str, DeviceInfo | None]:
        """What each device of ``run`` said of itself last; None for one that never answered."""
        rows = self._query("SELECT device, info FROM devices WHERE run = ? ORDER BY device", run)
        return {device: codec.decode(info, DeviceInfo) if info else None for device, info in rows}

    def addresses(self, run: str) -> dict[str, str]:
        """Where each device of ``run`` was called last; empty for one that calls in."""
        return dict(self._query("SELECT device, address FROM devices WHERE run = ? ORDER BY device", run))

    def history(self, run: str, since: int = 0) -> list[RoundHistory]:
        """One entry a round from ``since`` on, in order; rounds that only have metrics or losses are among them."""
        self.get_run(run)
        where = "WHERE run = ? AND round >= ?"
        closed = dict(self._query(f"SELECT round, closed FROM rounds {where}", run, since))
        reported: dict[int, dict[bool, list[str]]] = {}
        for round, device, late in self._query(
            f"SELECT round, device, late FROM reports {where} ORDER BY device", run, since
        ):
            reported.setdefault(round, {}).setdefault(bool(late), []).append(device)
        metrics: dict[int, dict[str, float]] = {}
        for round, name, value in self._query(f"SELECT round, name, value FROM metrics {where}", run, since):
            metrics.setdefault(round, {})[name] = value
        losses: dict[int, dict[str, str]] = {}
        for round, device, reason in self._query(f"SELECT round, device, reason FROM losses {where}", run, since):
            losses.setdefault(round, {})[device] = reason
        return [
            RoundHistory(
                round=round,
                closed=closed.get(round, ""),
                reported=tuple(reported.get(round, {}).get(False, ())),
                late=tuple(reported.get(round, {}).get(True, ())),
                lost=losses.get(round, {}),
                metrics=metrics.get(round, {}),
            )
            for round in sorted({*closed, *metrics, *losses})
        ]

    # --- inside --------------------------------------------------------------------------------------------------

    def _prepare(self) -> None:
        try:
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
            self._db.execute("PRAGMA foreign_keys = ON")
        except sqlite3.Error as error:
            raise StoreError(f"{self.path} is not a run database: {error}") from error
        with self._transaction() as db:
            (version,) = db.execute("PRAGMA user_version").fetchone()
            tables = {name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            if version == SCHEMA_VERSION and "runs" in tables:
                return
            if version == 0 and not tables:
                statements = [*_SCHEMA.split(";"), _TASKS]
            elif version == 1 and "runs" in tables:
                statements = [*_FROM_VERSION_1]
            else:
                raise StoreError(
                    f"{self.path} is not a run database of version {SCHEMA_VERSION} or before: choose another file"
                )
            for statement in statements:
                db.execute(statement)
            db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")

    def _query(self, sql: str, *values: object) -> list[Any]:
        with self._reading() as db:
            return db.execute(sql, values).fetchall()

    @staticmethod
    def _rename(db: sqlite3.Connection, run: str, name: str) -> None:
        db.execute("PRAGMA defer_foreign_keys = ON")  # until the transaction ends
        for table in ("runs", "tasks", "devices", "rounds", "reports", "losses", "metrics"):
            db.execute(f"UPDATE {table} SET run = ? WHERE run = ?", (name, run))

    @staticmethod
    def _write_metrics(db: sqlite3.Connection, run: str, round: int, metrics: Mapping[str, float]) -> None:
        rows = [(run, round, name, float(value)) for name, value in metrics.items()]
        db.executemany("INSERT OR REPLACE INTO metrics VALUES (?, ?, ?, ?)", rows)

    @staticmethod
    def _write_traffic(db: sqlite3.Connection, run: str, traffic: Mapping[str, Traffic]) -> None:
        rows = [(*cost, run, device) for device, cost in traffic.items()]
        db.executemany(
            "UPDATE devices SET bytes_up = ?, bytes_down = ?, peak_rss_bytes = ? WHERE run = ? AND device = ?", rows
        )


_SELECT_RUN: Final = (
    "SELECT run, created, updated, status, task, model_fingerprint, model_name, identity, settings, result,"
    " (SELECT count(*) FROM rounds WHERE rounds.run = runs.run),"
    " (SELECT body FROM tasks WHERE tasks.run = runs.run),"
    " coalesce((SELECT rows_digest FROM tasks WHERE tasks.run = runs.run), '') FROM runs"
)


def _aside(run: str) -> str:
    return f"{run}~"  # no run can be called so by its user


def _now() -> str:
    # For people only: nothing is decided by the wall clock.
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
