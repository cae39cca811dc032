"""A device's tokens: the one with which it calls in, and the one that it requires from its callers."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from fedbpt.errors import ConfigError
from fedbpt.net.tls import Tls
from fedbpt.net.tokens import (
    Credentials,
    check_private,
    default_credentials,
    digest,
    new_token,
    plain_code,
    read_private,
    write_private,
)


def credentials_for(
    coordinator: str | None,
    code: str | None,
    path: Path | None,
    tls: Tls,
    allow_insecure: bool,
    tell: Callable[[str], None] = lambda _line: None,
) -> Credentials | None:
    """Credentials for calling ``coordinator``, stored or obtained with ``code``; None without a coordinator.

    Args:
        coordinator: its address; None: the device does not call in.
        code: an invitation code; None: load stored credentials.
        path: the file of credentials; None: the user's default.
        tell: called with a line while waiting for the coordinator.

    Raises:
        ConfigError: the device is not enrolled, or at another coordinator.
    """
    if coordinator is None:
        if code is not None:
            raise ConfigError(
                "--enrol needs the coordinator's address: --coordinator https://HOST:PORT", field="--enrol"
            )
        return None
    # Imported here because it loads an HTTP client, which a device that is called does not need.
    from fedbpt.device.agent.calls import enrol, origin

    url = origin(coordinator, allow_insecure)
    path = path or default_credentials()
    if code is not None:
        code_digest = digest(plain_code(code)).hex()
        previous = _load_if_valid(path)
        if previous is not None and (previous.coordinator, previous.code_digest) == (url, code_digest):
            return previous  # the command is repeated: this device has used the code already
        check_private(path)  # fail before the code is used
        made = replace(enrol(url, code, tls=tls, allow_insecure=allow_insecure, tell=tell), code_digest=code_digest)
        made.save(path)
        return made
    if not path.exists():
        raise ConfigError(
            f"this device is not enrolled ({path} does not exist): run `fedbpt devices invite NAME` on the coordinator"
            " and give its code with --enrol CODE",
            field="--enrol",
        )
    stored = Credentials.load(path)
    if stored.coordinator != url:
        raise ConfigError(
            f"the token in {path} is for {stored.coordinator}, not {url}: enrol there (--enrol CODE,"
            " --credentials FILE)",
            field="--credentials",
        )
    return stored


def _load_if_valid(path: Path) -> Credentials | None:
    try:
        return Credentials.load(path)
    except ConfigError:  # absent or damaged: it will be replaced
        return None


def token_in(path: Path) -> str:
    """Read the token in ``path``, or create it if absent. The coordinator needs it too (`fedbpt tune --tokens`)."""
    if not path.exists():
        write_private(path, f"{new_token()}\n".encode())
    return known_token(path, "delete it to have one created")


def known_token(path: Path, advice: str) -> str:
    """Read the token in ``path``. ``advice``: what to do if there is none in it."""
    token = read_private(path).decode(errors="replace").strip()
    if not re.fullmatch(r"[\x21-\x7e]{16,}", token):
        raise ConfigError(f"{path} holds no token (16 or more ASCII characters): {advice}")
    return token
