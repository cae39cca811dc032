"""`RunStore`: rounds, reports and metrics of all runs in one SQLite file, to resume runs and to show their history.

A round is one transaction, written when it closes: after a crash it is complete or absent. WAL with
``synchronous=FULL``: committed data survives a power cut. Reports are stored as their wire bytes.
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
from fedbpt.protocol.names import SUM
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
    """A run in the store. ``settings``, ``result`` and ``definition`` (of the task) are wire bytes.

    ``definition`` None: an earlier version stored only the task's name. ``identity``: digest of what must be equal to
    resume the run. ``rows``: digest of the rows of a run on one machine; else empty.
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
    """A closed round, to replay. ``reports``: those that were used, in order of device names."""

    round: int
    work_digest: str
    state_digest: str
    reports: tuple[RoundReport, ...]


class Traffic(NamedTuple):
    """Traffic of one device over all sessions of a run, in bytes of message bodies, and its peak memory."""

    bytes_up: int
    bytes_down: int
    peak_rss_bytes: int


class RoundHistory(NamedTuple):
    """A round as ``fedbpt runs show`` lists it."""

    round: int
    closed: str
    reported: tuple[str, ...]
    late: tuple[str, ...]
    lost: Mapping[str, str]
    metrics: Mapping[str, float]


class RunStore(Database):
    """The run database at ``path``, created with its folder if absent; None: in memory. Thread-safe.

    Raises:
        StoreError: the file cannot be opened, read or written, is not a run database, or is of another version.
    """

    WHAT = "run database"

    def __init__(self, path: str | Path | None) -> None:
        self._held: set[str] = set()
        super().__init__(path)

    @contextmanager
    def held(self, run: str) -> Iterator[None]:
        """Lock ``run`` against other processes and other store objects within the block. Reentrant.

        Raises `StoreError` if it is locked already.
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
        """Create ``run``. Raises `StoreError` if a run of this name exists."""
        now = _now()
        with self._transaction() as db:
            if db.execute("SELECT 1 FROM runs WHERE run = ?", (run,)).fetchone():
                raise StoreError(f"run {run!r} already exists in {self.path}: choose another name", field="run")
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
        left_out: Mapping[str, str] | None = None,
    ) -> None:
        """Close ``round`` with the reports that were used, in one transaction. Raises `StoreError` if it is closed.

        ``left_out``: devices that are not asked any more from this round on, and why. The reasons are for people; who
        is left out is a metric of the round (`left_out_in`), which no later loss can hide.
        """
        now = _now()
        with self._transaction() as db:
            db.execute("INSERT INTO rounds VALUES (?, ?, ?, ?, ?)", (run, round, now, work_digest, state_digest))
            db.executemany(
                "INSERT INTO reports VALUES (?, ?, ?, 0, ?)",
                [(run, round, report.device, codec.encode(report)) for report in reports],
            )
            reasons = left_out or {}
            self._write_metrics(db, run, round, {**metrics, **{f"{_LEFT_OUT}{device}": 1.0 for device in reasons}})
            self._write_losses(db, run, round, reasons, now)
            self._write_traffic(db, run, traffic or {})
            db.execute("UPDATE runs SET updated = ? WHERE run = ?", (now, run))
            db.execute("DELETE FROM runs WHERE run = ?", (_aside(run),))

    def record_late(self, run: str, report: RoundReport) -> None:
        """Store a report that arrived after its round had closed; it is never replayed. A duplicate is ignored."""
        with self._transaction() as db:
            db.execute(
                "INSERT OR IGNORE INTO reports VALUES (?, ?, ?, 1, ?)",
                (run, report.round, report.device, codec.encode(report)),
            )

    def record_losses(self, run: str, round: int, reasons: Mapping[str, str]) -> None:
        """Store which devices were lost in ``round``, and why, in one transaction."""
        with self._transaction() as db:
            self._write_losses(db, run, round, reasons, _now())

    def record_devices(self, run: str, infos: Mapping[str, DeviceInfo]) -> None:
        """Store the latest descriptions of devices, in one transaction."""
        with self._transaction() as db:
            db.executemany(
                "INSERT INTO devices (run, device, info) VALUES (?, ?, ?)"
                " ON CONFLICT (run, device) DO UPDATE SET info = excluded.info",
                [(run, device, codec.encode(info)) for device, info in infos.items()],
            )

    def record_metrics(self, run: str, round: int, metrics: Mapping[str, float]) -> None:
        """Add metrics to a round (of an evaluation after it); a metric of the same name is replaced."""
        with self._transaction() as db:
            self._write_metrics(db, run, round, metrics)

    def record_task(self, run: str, definition: bytes, rows: str = "") -> None:
        """Store the task of ``run``, as of its latest session. ``rows``: a digest, see `StoredRun`."""
        with self._transaction() as db:
            db.execute("INSERT OR REPLACE INTO tasks VALUES (?, ?, ?)", (run, definition, rows))

    def add_devices(self, run: str, devices: Sequence[str]) -> None:
        """Add devices of a later session of ``run``; known ones are unchanged."""
        with self._transaction() as db:
            rows = [(run, device) for device in devices]
            db.executemany("INSERT OR IGNORE INTO devices (run, device) VALUES (?, ?)", rows)

    def record_addresses(self, run: str, addresses: Mapping[str, str]) -> None:
        """Store the addresses of devices of ``run``, by name, in one transaction."""
        with self._transaction() as db:
            rows = [(address, run, device) for device, address in addresses.items()]
            db.executemany("UPDATE devices SET address = ? WHERE run = ? AND device = ?", rows)

    def record_settings(self, run: str, settings: bytes, identity: str) -> None:
        """Store the settings of a later session of ``run``, whose budget, or version of ``identity``, may differ."""
        with self._transaction() as db:
            db.execute("UPDATE runs SET settings = ?, identity = ? WHERE run = ?", (settings, identity, run))

    def set_status(
        self,
        run: str,
        status: RunStatus,
        result: bytes | None = None,
        traffic: Mapping[str, Traffic] | None = None,
    ) -> None:
        """Set the status of ``run`` and, unless None, its ``result``."""
        with self._transaction() as db:
            db.execute(
                "UPDATE runs SET status = ?, updated = ?, result = coalesce(?, result) WHERE run = ?",
                (status, _now(), result, run),
            )
            if status == "finished":
                db.execute("DELETE FROM runs WHERE run = ?", (_aside(run),))
            self._write_traffic(db, run, traffic or {})

    def delete_run(self, run: str) -> None:
        """Delete ``run`` and all its data, if it exists."""
        with self._transaction() as db:
            db.execute("DELETE FROM runs WHERE run = ?", (run,))

    def set_aside(self, run: str) -> None:
        """Rename ``run``, if it exists, to ``run~``, to make its name available to a new run.

        It is deleted when the new run closes its first round; until then `restore` undoes this.
        """
        with self._transaction() as db:
            self._rename(db, run, _aside(run))

    def restore(self, run: str) -> None:
        """Undo `set_aside` unless a round has closed since, and delete the run that took the name."""
        with self._transaction() as db:
            if db.execute("SELECT 1 FROM runs WHERE run = ?", (_aside(run),)).fetchone():
                db.execute("DELETE FROM runs WHERE run = ?", (run,))
                self._rename(db, _aside(run), run)

    # --- reading -------------------------------------------------------------------------------------------------

    def list_runs(self) -> list[StoredRun]:
        """All runs, newest first."""
        return [StoredRun(*row) for row in self._query(f"{_SELECT_RUN} ORDER BY created DESC, run")]

    def find_run(self, run: str) -> StoredRun | None:
        """The run of this name, or None."""
        rows = self._query(f"{_SELECT_RUN} WHERE run = ?", run)
        return StoredRun(*rows[0]) if rows else None

    def get_run(self, run: str) -> StoredRun:
        """The run of this name. Raises `StoreError` if there is none."""
        found = self.find_run(run)
        if found is None:
            raise StoreError(f"there is no run {run!r} in {self.path}: `fedbpt runs list` shows the runs", field="run")
        return found

    def rounds(self, run: str, since: int = 0) -> Iterator[StoredRound]:
        """The closed rounds of ``run`` from ``since`` on, in order, with the reports that were used."""
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
        """The traffic of each device of ``run``."""
        rows = self._query("SELECT device, bytes_up, bytes_down, peak_rss_bytes FROM devices WHERE run = ?", run)
        return {device: Traffic(up, down, peak) for device, up, down, peak in rows}

    def devices(self, run: str) -> dict[str, DeviceInfo | None]:
        """The latest description of each device of ``run``; None for one that never responded."""
        rows = self._query("SELECT device, info FROM devices WHERE run = ? ORDER BY device", run)
        return {device: codec.decode(info, DeviceInfo) if info else None for device, info in rows}

    def addresses(self, run: str) -> dict[str, str]:
        """The last address of each device of ``run``; empty for one that polls."""
        return dict(self._query("SELECT device, address FROM devices WHERE run = ? ORDER BY device", run))

    def history(self, run: str, since: int = 0) -> list[RoundHistory]:
        """The rounds from ``since`` on, in order, including those with only metrics or lost devices."""
        self.get_run(run)
        where = "WHERE run = ? AND round >= ?"
        closed = dict(self._query(f"SELECT round, closed FROM rounds {where}", run, since))
        reported: dict[int, dict[bool, list[str]]] = {}
        for round, device, late in self._query(
            f"SELECT round, device, late FROM reports {where} ORDER BY device", run, since
        ):
            names = self._devices_of_sum(run, round) if device == SUM else [device]
            reported.setdefault(round, {}).setdefault(bool(late), []).extend(names)
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

    def _devices_of_sum(self, run: str, round: int) -> list[str]:
        bodies = self._query("SELECT body FROM reports WHERE run = ? AND round = ? AND device = ?", run, round, SUM)
        found = codec.decode(bodies[0][0], RoundReport).devices
        return list(found) if found else [SUM]

    # --- internal ------------------------------------------------------------------------------------------------

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
                    f"{self.path} is not a run database of version {SCHEMA_VERSION} or earlier: choose another file"
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
    def _write_losses(db: sqlite3.Connection, run: str, round: int, reasons: Mapping[str, str], now: str) -> None:
        rows = [(run, round, device, reason, now) for device, reason in reasons.items()]
        db.executemany("INSERT INTO losses VALUES (?, ?, ?, ?, ?)", rows)

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


_LEFT_OUT: Final = "left_out/"
"""Before a device's name: metric of a closed round, from which on the device is left out."""


def left_out_in(metrics: Mapping[str, float]) -> list[str]:
    """The devices that the round with these ``metrics`` left out, and that are not asked any more."""
    return [name.removeprefix(_LEFT_OUT) for name in metrics if name.startswith(_LEFT_OUT)]


def _aside(run: str) -> str:
    return f"{run}~"  # not a valid name of a run


def _now() -> str:
    # Only for people: no decision depends on the wall clock.
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
