"""A certificate authority of one's own, for a fleet: `init` makes it, `issue` signs a certificate for one machine.

Keys are elliptic (P-256). A certificate serves both ends of a connection, since a device may be called or call in. By
the ``cryptography`` package (extra ``certs``), which only the machine that issues needs: import this module late.
"""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple, TypeAlias

from fedbpt.errors import ConfigError, MissingExtraError
from fedbpt.net.tokens import read_private, write_private

try:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import (
        Encoding,
        NoEncryption,
        PrivateFormat,
        load_pem_private_key,
    )
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
except ImportError as error:
    raise MissingExtraError("making certificates", "certs") from error

PrivateKey: TypeAlias = ec.EllipticCurvePrivateKey

CA_DAYS: Final = 3650
CERTIFICATE_DAYS: Final = 730
LEEWAY_DAYS: Final = 1
"""So much before its making is a certificate valid: a device's clock may be behind."""


class Pair(NamedTuple):
    """A certificate's file and its private key's, which only the owner can read."""

    cert: Path
    key: Path


def pair(folder: Path, name: str) -> Pair:
    """Where the certificate of ``name`` lies in ``folder``."""
    return Pair(folder / f"{name}.pem", folder / f"{name}.key")


def init(folder: Path) -> Pair:
    """Make the authority ``ca`` in ``folder``. Raises `ConfigError` where there is one: it is not replaced."""
    files = _new(folder, "ca")
    key = ec.generate_private_key(ec.SECP256R1())
    name = _name("fedbpt CA")
    made = _builder(name, name, key, key, CA_DAYS)
    made = made.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    _write(files, made.add_extension(_usage(authority=True), critical=True), key, key)
    return files


def issue(folder: Path, name: str, hosts: Sequence[str] = ()) -> Pair:
    """A certificate of the authority in ``folder`` for ``name``, reached as each of ``hosts`` (none: ``name``).

    Raises `ConfigError` where there is no authority, the certificate exists, or a host is none.
    """
    files, authority = _new(folder, name), pair(folder, "ca")
    issuer_key = load_pem_private_key(read_private(authority.key), password=None)
    if not isinstance(issuer_key, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"{authority.key} is no key that `fedbpt certs init` made")
    key = ec.generate_private_key(ec.SECP256R1())
    issuer = _in_time(authority.cert).subject
    made = _builder(_name(name), issuer, key, issuer_key, CERTIFICATE_DAYS)
    made = made.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    made = made.add_extension(_usage(authority=False), critical=True)
    both_ends = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
    made = made.add_extension(both_ends, critical=False)
    names = x509.SubjectAlternativeName([_host(host) for host in hosts or (name,)])
    _write(files, made.add_extension(names, critical=False), key, issuer_key)
    return files


def _in_time(path: Path) -> x509.Certificate:
    """The authority's certificate. Raises `ConfigError` where this machine's clock says that it is not valid now."""
    found, now = x509.load_pem_x509_certificate(path.read_bytes()), datetime.datetime.now(datetime.timezone.utc)
    if not found.not_valid_before_utc <= now <= found.not_valid_after_utc:
        raise ConfigError(
            f"{path} is valid from {found.not_valid_before_utc:%Y-%m-%d} to {found.not_valid_after_utc:%Y-%m-%d}, and "
            f"this machine's clock says {now:%Y-%m-%d}: set the clock if that is wrong, else make another authority"
        )
    return found


def _new(folder: Path, name: str) -> Pair:
    files = pair(folder, name)
    for path in files:
        if path.exists():
            raise ConfigError(f"{path} exists and is not replaced: choose another name or folder, or remove it first")
    return files


def _name(common: str) -> x509.Name:
    try:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])
    except ValueError as error:
        raise ConfigError(f"{common!r} cannot be a certificate's name: {error}") from error


def _builder(
    subject: x509.Name, issuer: x509.Name, key: PrivateKey, issuer_key: PrivateKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.timezone.utc)
    made = x509.CertificateBuilder(
        issuer_name=issuer,
        subject_name=subject,
        public_key=key.public_key(),
        serial_number=x509.random_serial_number(),
        not_valid_before=now - datetime.timedelta(days=LEEWAY_DAYS),
        not_valid_after=now + datetime.timedelta(days=days),
    )
    made = made.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    issuer_id = x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key())
    return made.add_extension(issuer_id, critical=False)


def _usage(authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not authority,
        key_cert_sign=authority,
        crl_sign=authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass  # a name, then
    try:
        return x509.DNSName(host)
    except ValueError as error:
        raise ConfigError(f"{host!r} is no host's name or address") from error


def _write(files: Pair, made: x509.CertificateBuilder, key: PrivateKey, issuer_key: PrivateKey) -> None:
    certificate = made.sign(issuer_key, hashes.SHA256()).public_bytes(Encoding.PEM)
    write_private(files.key, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    try:
        files.cert.write_bytes(certificate)
    except OSError as error:
        raise ConfigError(f"cannot write {files.cert}: {error.strerror or error}") from error
