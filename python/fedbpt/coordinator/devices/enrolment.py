"""`DeviceRegistry`: the devices that may call in, in one SQLite file: invitations, digests of tokens, revocations.

It is separate from the run store, which may be shown and shared, and holds no secrets (`fedbpt.net.tokens`). Commands
and a running coordinator may use it at the same time; every request reads it, so a revocation takes effect at once.
"""

from __future__ import annotations

import hmac
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Final, Literal, NamedTuple

import msgspec

from fedbpt.decoders import from_builtins
from fedbpt.errors import ConfigError, CoordinatorRefusedError, StoreError
from fedbpt.net import tokens
from fedbpt.protocol.specs import Name
from fedbpt.runs.database import Database

SCHEMA_VERSION: Final = 1
_APPLICATION_ID: Final = 0x46425054  # distinguishes the file from a run store

INVITATION_S: Final = 3600.0
"""How long a code is valid, seconds."""

_SCHEMA: Final = """
CREATE TABLE devices (
    device TEXT PRIMARY KEY, token_digest BLOB NOT NULL, enrolled TEXT NOT NULL, revoked TEXT
);
CREATE TABLE invitations (
    device TEXT PRIMARY KEY, code_digest BLOB NOT NULL, expires REAL NOT NULL, token_digest BLOB
);
"""


class Enrolment(NamedTuple):
    """One line of ``fedbpt devices list``. ``since``: ISO 8601; empty for a device that is only invited."""

    device: str
    state: Literal["invited", "enrolled", "revoked"]
    since: str


def check_device_name(text: str) -> None:
    """Raise `ConfigError` unless ``text`` is a valid device name."""
    try:
        from_builtins(text, Name)
    except msgspec.ValidationError as error:
        raise ConfigError(
            f"invalid device name {text!r}: use letters, digits and ._- (at most 128)", field="device"
        ) from error


class DeviceRegistry(Database):
    """The registry at ``path`` (created with its folder if absent). Safe to use from several threads.

    ``clock``: seconds since 1970, for the expiry of codes.

    Raises:
        StoreError: the file cannot be opened, is not a registry, or a write failed.
    """

    WHAT = "device registry"

    def __init__(self, path: str | Path, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        super().__init__(path)

    # --- for the operator ----------------------------------------------------------------------------------------

    def invite(self, device: str, valid_s: float = INVITATION_S) -> str:
        """A one-time code for enrolling ``device``, valid for ``valid_s`` seconds; it replaces an older one.

        An enrolled device keeps its token until the code is used. Raises `ConfigError` for an invalid name.
        """
        check_device_name(device)
        code = tokens.new_code()
        with self._transaction() as db:
            db.execute(
                "INSERT OR REPLACE INTO invitations VALUES (?, ?, ?, NULL)",
                (device, tokens.digest(tokens.plain_code(code)), self._clock() + valid_s),
            )
        return code

    def revoke(self, device: str) -> None:
        """Refuse ``device``, and void its invitation. Raises `ConfigError` for an unknown device."""
        with self._transaction() as db:
            invited = db.execute("DELETE FROM invitations WHERE device = ?", (device,)).rowcount
            changed = db.execute(
                "UPDATE devices SET revoked = coalesce(revoked, ?) WHERE device = ?", (self._today(), device)
            ).rowcount
        if not invited + changed:
            raise ConfigError(
                f"no device {device!r} in {self.path}: list them with `fedbpt devices list`", field="device"
            )

    def devices(self) -> list[Enrolment]:
        """The enrolled, revoked and invited devices, by name."""
        with self._reading() as db:
            rows = db.execute("SELECT device, enrolled, revoked FROM devices").fetchall()
            open_codes = db.execute(
                "SELECT device FROM invitations WHERE token_digest IS NULL AND expires > ?", (self._clock(),)
            ).fetchall()
        found = {
            device: Enrolment(device, "revoked" if revoked else "enrolled", revoked or enrolled)
            for device, enrolled, revoked in rows
        }
        for (device,) in open_codes:
            if device not in found or found[device].state == "revoked":
                found[device] = Enrolment(device, "invited", "")
        return [found[device] for device in sorted(found)]

    # --- for the coordinator's server ----------------------------------------------------------------------------

    def enrol(self, code: str, token_digest: bytes) -> str:
        """Use ``code`` for a token with this SHA-256; returns the device's name. May be repeated with the same token.

        Raises:
            CoordinatorRefusedError: ``bad-code``: unknown, expired or used.
        """
        given = tokens.digest(tokens.plain_code(code))
        now = self._clock()
        with self._transaction() as db:
            device = ""
            for name, stored, expires, used_for in db.execute("SELECT * FROM invitations").fetchall():
                fresh = used_for is None or hmac.compare_digest(used_for, token_digest)
                if hmac.compare_digest(stored, given) and expires > now and fresh:
                    device = name
            if not device:
                raise CoordinatorRefusedError(
                    "the code is unknown, used or expired: ask for another (`fedbpt devices invite NAME`)", "bad-code"
                )
            db.execute("UPDATE invitations SET token_digest = ? WHERE device = ?", (token_digest, device))
            db.execute("INSERT OR REPLACE INTO devices VALUES (?, ?, ?, NULL)", (device, token_digest, self._today()))
        return device

    def authenticate(self, bearer: str) -> str:
        """The device with the token ``bearer``.

        Raises:
            CoordinatorRefusedError: ``unauthorized``, for whatever reason.
        """
        device, secret = tokens.split(bearer)
        with self._reading() as db:
            row = db.execute(
                "SELECT token_digest FROM devices WHERE device = ? AND revoked IS NULL", (device,)
            ).fetchone()
        if not tokens.matches(secret, row[0] if row else bytes(32)):
            raise CoordinatorRefusedError(
                "this device's token was revoked or replaced: enrol the device again",
                "unauthorized",
            )
        return device

    # --- inside --------------------------------------------------------------------------------------------------

    def _prepare(self) -> None:
        with self._transaction() as db:
            (ours,) = db.execute("PRAGMA application_id").fetchone()
            (version,) = db.execute("PRAGMA user_version").fetchone()
            if not db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                for statement in _SCHEMA.split(";"):
                    db.execute(statement)
                db.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
                db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
            elif (ours, version) != (_APPLICATION_ID, SCHEMA_VERSION):
                raise StoreError(
                    f"{self.path} is not a device registry of version {SCHEMA_VERSION}: choose another file"
                )

    def _today(self) -> str:
        return datetime.fromtimestamp(self._clock(), timezone.utc).isoformat(timespec="seconds")
