"""What a device proves itself with: the token that it calls in with, and the one that it asks of its callers."""

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
    """What to call ``coordinator`` with: kept from before, or got for ``code`` and kept; None: the device is called.

    ``path``: the file that it is kept in; None: the user's own. ``tell``: called with a line where the coordinator is
    waited for.
    """
    if coordinator is None:
        if code is not None:
            raise ConfigError("--enrol needs the coordinator's address: --coordinator https://HOST:PORT")
        return None
    from fedbpt.device.agent.calls import (  # with an HTTP client, which a device that is called does without
        enrol,
        origin,
    )

    url, path = origin(coordinator, allow_insecure), path or default_credentials()
    if code is not None:
        used = digest(plain_code(code)).hex()
        before = _readable(path)
        if before is not None and (before.coordinator, before.code_digest) == (url, used):
            return before  # the same command once more: the code is used up, by this device
        check_private(path)  # before the code is used up
        made = replace(enrol(url, code, tls=tls, allow_insecure=allow_insecure, tell=tell), code_digest=used)
        made.save(path)
        return made
    if not path.exists():
        raise ConfigError(
            f"this device is not enrolled ({path} is absent): get a code there by `fedbpt devices invite NAME`,"
            " and give it with --enrol CODE"
        )
    kept = Credentials.load(path)
    if kept.coordinator != url:
        raise ConfigError(
            f"the token in {path} is for {kept.coordinator}, not {url}: enrol there (--enrol CODE, --credentials FILE)"
        )
    return kept


def _readable(path: Path) -> Credentials | None:
    try:
        return Credentials.load(path)
    except ConfigError:  # absent or damaged: it is about to be replaced
        return None


def token_in(path: Path) -> str:
    """The token in ``path``, made if absent: the coordinator needs it too (`fedbpt tune --tokens`)."""
    if not path.exists():
        write_private(path, f"{new_token()}\n".encode())
    token = read_private(path).decode(errors="replace").strip()
    if not re.fullmatch(r"[\x21-\x7e]{16,}", token):
        raise ConfigError(f"{path} holds no token (16 or more ASCII characters): remove it, and one is made")
    return token
