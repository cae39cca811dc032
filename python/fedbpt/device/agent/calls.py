"""How a device calls its coordinator: a verified connection, bounded answers, refusals as errors; and enrolment."""

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

ANSWER_S: Final = 20.0
"""How long the network and the coordinator may take for an answer, beyond a poll's hold."""

ENROL_PAUSES_S: Final = (0.5, 10.0)
"""Between two attempts to enrol: the first, and the longest."""


def origin(url: str, allow_insecure: bool) -> str:
    """``url`` as a coordinator's address. Raises `ConfigError` where it is none, or a token would go unencrypted."""
    try:
        found = httpx.URL(url.rstrip("/"))
    except (httpx.InvalidURL, UnicodeError) as error:
        raise ConfigError(f"{url!r} is no coordinator's address: give one like https://host:8400") from error
    if found.scheme not in ("http", "https") or not found.host or found.userinfo or found.query:
        raise ConfigError(f"{url!r} is no coordinator's address: give one like https://host:8400")
    if found.scheme == "http" and not (allow_insecure or is_loopback(found.host)):
        raise ConfigError(
            f"{url} is not encrypted, and this device's token would be seen: give https://, or allow it on a network"
            " you trust (--allow-insecure)"
        )
    return str(found)


def client_options(url: str, tls: Tls) -> dict[str, Any]:
    """httpx's options for calls to ``url``: through the machine's proxies, but for loopback."""
    address = httpx.URL(url)
    return {
        "base_url": url,
        "trust_env": False,
        "proxy": proxy_of(address),
        "verify": tls.client_context() if address.scheme == "https" else False,
        "headers": {"accept": codec.CONTENT_TYPE, "content-type": codec.CONTENT_TYPE, "user-agent": "fedbpt"},
        "timeout": ANSWER_S,
        "limits": httpx.Limits(keepalive_expiry=IDLE_S),
    }


def accepted(response: httpx.Response, content: bytes) -> bytes:
    """The body of a 2xx answer. Raises `CoordinatorRefusedError`; one without ``retry_after_s`` may be final."""
    if response.is_success:
        return content
    try:
        refused = codec.decode(content, ErrorReply)
    except WireError as error:
        raise CoordinatorRefusedError(
            f"answers {response.status_code} and not as a fedbpt coordinator does: is this its address?",
            "not-a-coordinator",
            retry_after(response.headers),
        ) from error
    raise CoordinatorRefusedError(refused.message, refused.code, retry_after(response.headers))


def decoded(content: bytes, kind: type[M]) -> M:
    """The coordinator's message. Raises `WireError`."""
    return codec.decode(content, kind, MAX_ENVELOPE_BYTES)


def enrol(
    url: str,
    code: str,
    *,
    tls: Tls | None = None,
    allow_insecure: bool = False,
    tell: Callable[[str], None] = lambda _line: None,
) -> Credentials:
    """Exchange a one-time code for credentials. The token is made here; only its SHA-256 is sent.

    Waits for a coordinator that does not answer, until it does, and ``tell``s so once.
    Raises `CoordinatorRefusedError` for a code that is unknown, used or expired, `FedbptError` where a certificate is
    not believed.
    """
    url = origin(url, allow_insecure)
    secret = tokens.new_token()
    body = codec.encode(Enrolment(code=code.strip(), token_digest=tokens.digest(secret)))
    told, pause_s = False, ENROL_PAUSES_S[0]
    with httpx.Client(**client_options(url, tls or Tls())) as http:
        while True:
            wait_s, pause_s = pause_s, min(2 * pause_s, ENROL_PAUSES_S[1])
            try:
                response = http.post(ENROL_PATH, content=body)
                # With the same token a code can be sent again: an answer that was lost costs nothing.
                device = decoded(accepted(response, response.content), Enrolled).device
                return Credentials(url, device, secret)
            except CoordinatorRefusedError as error:
                if not error.retry_after_s:
                    raise
                problem, wait_s = str(error), error.retry_after_s
            except httpx.TransportError as error:
                if refused := certificate_problem(error):
                    raise FedbptError(f"{url} {refused}") from error
                problem = str(error) or type(error).__name__
            if not told:
                told = True
                tell(f"waiting for the coordinator at {url} (fedbpt tune --listen): {problem}")
            time.sleep(wait_s)
