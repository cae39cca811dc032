"""Calls of a device to its coordinator: a verified connection, bounded responses, refusals as errors; enrolment."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Final, TypeVar

import httpx

from fedbpt.errors import ConfigError, CoordinatorRefusedError, FedbptError, WireError
from fedbpt.net import tokens
from fedbpt.net.bodies import retry_after
from fedbpt.net.proxies import proxy_of
from fedbpt.net.server import IDLE_S
from fedbpt.net.tls import Tls, certificate_problem, is_loopback
from fedbpt.net.tokens import Credentials
from fedbpt.protocol import codec
from fedbpt.protocol.polling import ENROL_PATH, MAX_ENVELOPE_BYTES, Enrolled, Enrolment
from fedbpt.protocol.rounds import ErrorReply
from fedbpt.protocol.specs import Message

M = TypeVar("M", bound=Message)

RESPONSE_S: Final = 20.0
"""Timeout of a response beyond the hold of a poll, seconds."""

ENROL_PAUSES_S: Final = (0.5, 10.0)
"""First and longest pause between attempts to enrol, seconds."""


def origin(url: str, allow_insecure: bool) -> str:
    """Check a coordinator's address and strip trailing slashes.

    Raises `ConfigError` for an invalid address, or one to which the token would be sent unencrypted.
    """
    try:
        found = httpx.URL(url.rstrip("/"))
    except (httpx.InvalidURL, UnicodeError) as error:
        raise _invalid(url) from error
    if found.scheme not in ("http", "https") or not found.host or found.userinfo or found.query:
        raise _invalid(url)
    if found.scheme == "http" and not (allow_insecure or is_loopback(found.host)):
        raise ConfigError(
            f"{url} is not encrypted and would expose the token: use https://, or --allow-insecure on a network"
            " you trust",
            field="coordinator",
        )
    return str(found)


def _invalid(url: str) -> ConfigError:
    return ConfigError(f"invalid coordinator address {url!r}: give one like https://host:8400", field="coordinator")


def client_options(url: str, tls: Tls) -> dict[str, Any]:
    """Options of an httpx client for ``url``, with the machine's proxies except for loopback."""
    address = httpx.URL(url)
    return {
        "base_url": url,
        "trust_env": False,
        "proxy": proxy_of(address),
        "verify": tls.client_context() if address.scheme == "https" else False,
        "headers": {"accept": codec.CONTENT_TYPE, "content-type": codec.CONTENT_TYPE, "user-agent": "fedbpt"},
        "timeout": RESPONSE_S,
        "limits": httpx.Limits(keepalive_expiry=IDLE_S),
    }


def accepted(response: httpx.Response, content: bytes) -> bytes:
    """``content`` if the response is 2xx; else raises `CoordinatorRefusedError`."""
    if response.is_success:
        return content
    try:
        refused = codec.decode(content, ErrorReply)
    except WireError as error:
        raise CoordinatorRefusedError(
            f"answered HTTP {response.status_code}, not as a fedbpt coordinator does: check its address",
            "not-a-coordinator",
            retry_after(response.headers),
        ) from error
    raise CoordinatorRefusedError(refused.message, refused.code, retry_after(response.headers))


def decoded(content: bytes, kind: type[M]) -> M:
    """Decode a message of the coordinator. Raises `WireError`."""
    return codec.decode(content, kind, MAX_ENVELOPE_BYTES)


def enrol(
    url: str,
    code: str,
    *,
    tls: Tls | None = None,
    allow_insecure: bool = False,
    tell: Callable[[str], None] = lambda _line: None,
) -> Credentials:
    """Exchange a one-time code for credentials. The token is generated here; only its SHA-256 is sent.

    Retries until the coordinator responds, and calls ``tell`` once with a line that says so.

    Raises:
        ConfigError: see `origin`.
        CoordinatorRefusedError: the code is unknown, used or expired.
        FedbptError: a certificate is not trusted.
    """
    url = origin(url, allow_insecure)
    secret = tokens.new_token()
    body = codec.encode(Enrolment(code=code.strip(), token_digest=tokens.digest(secret)))
    told = False
    pause_s = ENROL_PAUSES_S[0]
    with httpx.Client(**client_options(url, tls or Tls())) as http:
        while True:
            wait_s = pause_s
            pause_s = min(2 * pause_s, ENROL_PAUSES_S[1])
            try:
                response = http.post(ENROL_PATH, content=body)
                # A code can be sent again with the same token, so a lost response does no harm.
                device = decoded(accepted(response, response.content), Enrolled).device
                return Credentials(url, device, secret)
            except CoordinatorRefusedError as error:
                if not error.retry_after_s:
                    raise
                problem = str(error)
                wait_s = error.retry_after_s
            except httpx.TransportError as error:
                if refused := certificate_problem(error):
                    raise FedbptError(f"{url} {refused}") from error
                problem = str(error) or type(error).__name__
            if not told:
                told = True
                tell(f"waiting for the coordinator at {url} (fedbpt tune --listen): {problem}")
            time.sleep(wait_s)
