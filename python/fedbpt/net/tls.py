"""TLS from PEM files, and where plain HTTP is allowed: on loopback, or on a network said to be trusted."""

from __future__ import annotations

import ipaddress
import ssl
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from fedbpt.errors import ConfigError


@dataclass(frozen=True)
class Tls:
    """One end of a TLS connection. Without files: a server speaks plain HTTP, a client believes the system's CAs.

    ``cert`` and ``key``: what this end shows. ``ca``: the only CA that is believed. ``client_certs``: as a server, ask
    for a certificate of ``ca`` (mutual TLS). Raises `ConfigError` for what does not fit together or cannot be read.
    """

    cert: Path | None = None
    key: Path | None = None
    ca: Path | None = None
    client_certs: bool = False

    def __post_init__(self) -> None:
        if (self.cert is None) != (self.key is None):
            raise ConfigError("a certificate and its key go together: give both --cert and --key")
        if self.client_certs and (self.ca is None or self.cert is None):
            raise ConfigError("asking for client certificates needs a CA and a certificate: --ca, --cert and --key")
        for path in (self.cert, self.key, self.ca):
            if path is not None and not path.is_file():
                raise ConfigError(f"no such file: {path}; `fedbpt certs init` makes certificates")

    @property
    def serves(self) -> bool:
        """Whether a server with this speaks TLS."""
        return self.cert is not None

    def client_context(self) -> ssl.SSLContext:
        """For a client: verifies the server's name and certificate."""
        return self._loaded(ssl.Purpose.SERVER_AUTH)

    def server_options(self) -> dict[str, Any]:
        """uvicorn's options; files that are no PEM are refused here and not when the server starts."""
        if not self.serves:
            return {}
        self._loaded(ssl.Purpose.CLIENT_AUTH)
        options: dict[str, Any] = {"ssl_certfile": str(self.cert), "ssl_keyfile": str(self.key)}
        if self.client_certs:
            options |= {"ssl_ca_certs": str(self.ca), "ssl_cert_reqs": ssl.CERT_REQUIRED}
        return options

    def _loaded(self, purpose: ssl.Purpose) -> ssl.SSLContext:
        try:
            context = ssl.create_default_context(purpose, cafile=self.ca)
            if self.cert is not None:
                context.load_cert_chain(self.cert, self.key, password="")  # no prompt for one: it is refused
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
            files = ", ".join(str(path) for path in (self.cert, self.key, self.ca) if path is not None)
            raise ConfigError(f"cannot use {files} for TLS: {getattr(error, 'reason', None) or error}") from error
        return context


# of OpenSSL's X509_V_ERR_…: CERT_NOT_YET_VALID, CERT_HAS_EXPIRED; HOSTNAME_MISMATCH and IP_ADDRESS_MISMATCH
_NOT_YET_VALID, _EXPIRED, _OTHER_NAMES = 9, 10, (62, 64)


def certificate_problem(error: BaseException) -> str:
    """What is the matter with a certificate where that ended a connection, as a line that goes on from its address;
    empty: it was something else. A certificate that is out of its time may mean a clock that is wrong, and says so.
    """
    found: BaseException | None = error
    while found is not None and not isinstance(found, ssl.SSLCertVerificationError):
        found = found.__cause__ or found.__context__
    if found is None:
        return ""
    today = f"by this machine's clock, which says {datetime.now(timezone.utc):%Y-%m-%d}"
    if found.verify_code == _NOT_YET_VALID:
        return f"has a certificate that is not valid yet {today}: set the clock right"
    if found.verify_code == _EXPIRED:
        return f"has a certificate that has expired {today}: set the clock if that is wrong, else renew the certificate"
    if found.verify_code in _OTHER_NAMES:
        return f"has a certificate for other names ({found.verify_message}): call it by one of those, or issue another"
    return f"has a certificate that is not believed ({found.verify_message}): give the CA that signed it (--ca)"


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach ``host``."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def url_of(host: str, port: int, encrypted: bool) -> str:
    """Such as ``https://pi5:8401``."""
    return f"http{'s' if encrypted else ''}://{f'[{host}]' if ':' in host else host}:{port}"
