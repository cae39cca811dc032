"""Secrets: a device's token, the one-time code that it is enrolled by, and the private files that they lie in.

Both are random: 32 bytes and 10 bytes. Only their SHA-256 is stored where they are checked. That suffices, no slow
password hash is needed: against 256 bits, or 80 that expire within the hour, guessing is hopeless at any speed.
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
from fedbpt.errors import ConfigError
from fedbpt.machine.files import write_whole
from fedbpt.machine.folders import config_folder

TOKEN_BYTES: Final = 32
CODE_BYTES: Final = 10

_SEPARATOR: Final = "~"  # in a bearer token, between device and secret; no name holds it


def new_token() -> str:
    """A secret of 32 random bytes, as text."""
    return secrets.token_urlsafe(TOKEN_BYTES)


def new_code() -> str:
    """A one-time code for people to type: ``K7QF-2M4P-XW3A-TZ6L``."""
    text = base64.b32encode(secrets.token_bytes(CODE_BYTES)).decode()
    return "-".join(text[i : i + 4] for i in range(0, len(text), 4))


def watch_token(token: str) -> str:
    """For those who may look but not steer; made of the operator's ``token``, which does not follow from it."""
    made = hmac.new(token.encode(), b"fedbpt: watch", hashlib.sha256).digest()
    return base64.urlsafe_b64encode(made[:16]).decode().rstrip("=")  # short, for a QR code


def plain_code(typed: str) -> str:
    """The code that was meant: without blanks and dashes, in capitals."""
    return re.sub(r"[\s-]", "", typed).upper()


def digest(secret: str) -> bytes:
    """What is stored of ``secret``: its SHA-256, 32 bytes."""
    return hashlib.sha256(secret.encode()).digest()


def matches(secret: str, stored: bytes) -> bool:
    """Whether ``stored`` is the digest of ``secret``, in constant time."""
    return hmac.compare_digest(digest(secret), stored)


def bearer(headers: Mapping[str, str]) -> str:
    """The token of an ``Authorization`` header; empty where there is none."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


def split(token: str) -> tuple[str, str]:
    """Device and secret of a bearer token (`Credentials.bearer`)."""
    device, _, secret = token.partition(_SEPARATOR)
    return device, secret


@dataclass(frozen=True)
class Credentials:
    """What an enrolled device keeps: whom it calls, its name there, and its token's secret.

    ``code_digest``: of the code that it was enrolled by, hex, by which the same command enrols it once.
    """

    coordinator: str
    device: str
    secret: str = field(repr=False)
    code_digest: str = field(default="", repr=False)

    @property
    def bearer(self) -> str:
        return f"{self.device}{_SEPARATOR}{self.secret}"

    def save(self, path: Path) -> None:
        """Write the file, for its owner alone (0600)."""
        write_private(path, msgspec.json.encode(self))

    @classmethod
    def load(cls, path: Path) -> Credentials:
        """Raises `ConfigError` where the file is absent, damaged, or open to others."""
        content = read_private(path)
        try:
            return msgspec.json.decode(content, type=cls)
        except DECODE_ERRORS as error:
            raise ConfigError(f"{path} holds no device's credentials: enrol the device again (--enrol)") from error


def default_credentials() -> Path:
    """``$FEDBPT_CREDENTIALS``, else a file in the user's configuration folder."""
    if chosen := os.environ.get("FEDBPT_CREDENTIALS"):
        return Path(chosen)
    return config_folder("say where the token is kept (--credentials FILE)") / "fedbpt" / "credentials.json"


def write_private(path: Path, content: bytes) -> None:
    """Replace ``path`` by a file that only its owner can read, whole or not at all."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole({path: content}, private=[path])
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror or error}") from error


def check_private(path: Path) -> None:
    """Raises `ConfigError` where `write_private` could not write ``path``."""
    probe = path.with_name(f".{path.name}.{os.getpid()}")
    write_private(probe, b"")
    probe.unlink()
    if path.is_dir():
        raise ConfigError(f"cannot write {path}: {os.strerror(errno.EISDIR)}")


def read_private(path: Path) -> bytes:
    """The content of a secret's file. Raises `ConfigError` where it is absent, or others may read it."""
    try:
        mode, content = path.stat().st_mode, path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from error
    if os.name == "posix" and mode & 0o077:
        raise ConfigError(f"others may read the secret in {path}: chmod 600 {path}")
    return content
