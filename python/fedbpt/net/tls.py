"""TLS settings from PEM files, and messages for certificate errors."""

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
    """TLS settings of a server or client. Without files, a server uses plain HTTP, a client trusts the system's CAs.

    ``cert`` and ``key``: this end's certificate. ``ca``: the only trusted CA. ``client_certs``: as a server, require a
    certificate signed by ``ca`` (mutual TLS). Raises `ConfigError` for an invalid combination or a missing file.
    """

    cert: Path | None = None
    key: Path | None = None
    ca: Path | None = None
    client_certs: bool = False

    def __post_init__(self) -> None:
        if (self.cert is None) != (self.key is None):
            missing = "--key" if self.key is None else "--cert"
            raise ConfigError("a certificate needs its key: give both --cert and --key", field=missing)
        if self.client_certs and (self.ca is None or self.cert is None):
            missing = "--ca" if self.ca is None else "--cert"
            raise ConfigError("client certificates need a CA and a certificate: --ca, --cert and --key", field=missing)
        for option, path in {"--cert": self.cert, "--key": self.key, "--ca": self.ca}.items():
            if path is not None and not path.is_file():
                raise ConfigError(f"no such file: {path}; `fedbpt certs init` makes certificates", field=option)

    @property
    def serves(self) -> bool:
        """Whether a server with these settings uses TLS."""
        return self.cert is not None

    def client_context(self) -> ssl.SSLContext:
        """The context of a client, which verifies the server's name and certificate. Raises `ConfigError`."""
        return self._loaded(ssl.Purpose.SERVER_AUTH)

    def server_options(self) -> dict[str, Any]:
        """Options for uvicorn. Raises `ConfigError` for files that are not PEM."""
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
                context.load_cert_chain(self.cert, self.key, password="")  # fail instead of prompting for one
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
            files = ", ".join(str(path) for path in (self.cert, self.key, self.ca) if path is not None)
            raise ConfigError(f"cannot use {files} for TLS: {getattr(error, 'reason', None) or error}") from error
        return context


# OpenSSL's X509_V_ERR_…
_NOT_YET_VALID = 9  # CERT_NOT_YET_VALID
_EXPIRED = 10  # CERT_HAS_EXPIRED
_OTHER_NAMES = (62, 64)  # HOSTNAME_MISMATCH, IP_ADDRESS_MISMATCH


def certificate_problem(error: BaseException) -> str:
    """Describe the certificate problem that caused a connection error, as a predicate to follow the peer's address.

    Empty if the cause is another one. For an expired certificate, or one not yet valid, it mentions this machine's
    clock, which may be wrong.
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
        return f"has a certificate for other names ({found.verify_message}): use one of those, or issue another"
    return f"has a certificate that is not trusted ({found.verify_message}): give the CA that signed it (--ca)"


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach ``host``."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def url_of(host: str, port: int, encrypted: bool) -> str:
    """Build a URL such as ``https://pi5:8401``."""
    return f"http{'s' if encrypted else ''}://{f'[{host}]' if ':' in host else host}:{port}"
