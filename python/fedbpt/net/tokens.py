"""Secrets: device tokens, one-time enrolment codes, and the private files that hold them.

They are random: 32 bytes and 10 bytes. The side that checks them stores only their SHA-256. A slow password hash is not
needed: 256 bits, or 80 bits that expire within the hour, cannot be guessed at any speed.
"""

from __future__ import annotations

import base64
import errno
import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import msgspec

from fedbpt.checking import DECODE_ERRORS
from fedbpt.decoders import from_json
from fedbpt.errors import ConfigError
from fedbpt.machine.files import write_whole
from fedbpt.machine.folders import config_folder

TOKEN_BYTES: Final = 32
CODE_BYTES: Final = 10

_SEPARATOR: Final = "~"  # between device and secret in a bearer token; not allowed in names


def new_token() -> str:
    """Generate a secret of 32 random bytes, as text."""
    return secrets.token_urlsafe(TOKEN_BYTES)


def new_code() -> str:
    """Generate a one-time code that is easy to type: ``K7QF-2M4P-XW3A-TZ6L``."""
    text = base64.b32encode(secrets.token_bytes(CODE_BYTES)).decode()
    return "-".join(text[i : i + 4] for i in range(0, len(text), 4))


def watch_token(token: str) -> str:
    """Derive the read-only token from the operator's ``token``, which cannot be computed from it."""
    derived = hmac.new(token.encode(), b"fedbpt: watch", hashlib.sha256).digest()
    return base64.urlsafe_b64encode(derived[:16]).decode().rstrip("=")  # short, for a QR code


def plain_code(typed: str) -> str:
    """Normalise a typed code: no white space or dashes, upper case."""
    return re.sub(r"[\s-]", "", typed).upper()


def digest(secret: str) -> bytes:
    """The stored form of ``secret``: its SHA-256, 32 bytes."""
    return hashlib.sha256(secret.encode()).digest()


def matches(secret: str, stored: bytes) -> bool:
    """Whether ``stored`` is the digest of ``secret``, in constant time."""
    return hmac.compare_digest(digest(secret), stored)


def bearer(headers: Mapping[str, str]) -> str:
    """The token of an ``Authorization: Bearer`` header; empty if there is none."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


def split(token: str) -> tuple[str, str]:
    """Split a bearer token (`Credentials.bearer`) into device and secret."""
    device, _, secret = token.partition(_SEPARATOR)
    return device, secret


@dataclass(frozen=True)
class Credentials:
    """An enrolled device's credentials: the coordinator's URL, the device's name there, and its token's secret.

    ``code_digest``: of the code that it was enrolled with, hexadecimal, so that repeating the command does not enrol it
    again.
    """

    coordinator: str
    device: str
    secret: str = field(repr=False)
    code_digest: str = field(default="", repr=False)

    @property
    def bearer(self) -> str:
        return f"{self.device}{_SEPARATOR}{self.secret}"

    def save(self, path: Path) -> None:
        """Write the credentials to ``path`` with mode 0600."""
        write_private(path, msgspec.json.encode(self))

    @classmethod
    def load(cls, path: Path) -> Credentials:
        """Read credentials. Raises `ConfigError` if the file is missing, damaged, or readable by others."""
        content = read_private(path)
        try:
            return from_json(content, cls)
        except DECODE_ERRORS as error:
            raise ConfigError(f"invalid credentials in {path}: enrol the device again (--enrol)") from error


def default_credentials() -> Path:
    """The path ``$FEDBPT_CREDENTIALS``, or a file in the user's configuration folder."""
    if chosen := os.environ.get("FEDBPT_CREDENTIALS"):
        return Path(chosen)
    return config_folder("give a file for the token (--credentials FILE)") / "fedbpt" / "credentials.json"


def write_private(path: Path, content: bytes) -> None:
    """Write a file that only its owner can read, atomically. Raises `ConfigError`."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole({path: content}, private=[path])
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror or error}") from error


def check_private(path: Path) -> None:
    """Raise `ConfigError` if `write_private` could not write ``path``."""
    probe = path.with_name(f".{path.name}.{os.getpid()}")
    write_private(probe, b"")
    probe.unlink()
    if path.is_dir():
        raise ConfigError(f"cannot write {path}: {os.strerror(errno.EISDIR)}")


def read_private(path: Path) -> bytes:
    """Read a file that holds a secret. Raises `ConfigError` if it is missing, or readable by other users."""
    try:
        mode = path.stat().st_mode
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from error
    if os.name == "posix" and mode & 0o077:
        raise ConfigError(f"the secret in {path} is readable by other users: chmod 600 {path}")
    return content
