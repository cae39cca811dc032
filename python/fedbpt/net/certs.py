"""A private certificate authority for a fleet: `init` creates it, `issue` signs a certificate for a machine.

Keys are P-256. Certificates are for servers and clients, as a device may be either. Needs the ``cryptography`` package
(extra ``certs``), which only the issuing machine has: import this module late.
"""

from __future__ import annotations

import datetime
import ipaddress
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Final, NamedTuple, TypeAlias

from fedbpt.errors import ConfigError, MissingExtraError
from fedbpt.machine.files import write_whole
from fedbpt.net.tokens import read_private

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
"""Days by which a certificate's validity begins early, as a device's clock may be behind."""


class Pair(NamedTuple):
    """The files of a certificate and of its private key, which only the owner can read."""

    cert: Path
    key: Path


def pair(folder: Path, name: str) -> Pair:
    """The paths of the certificate ``name`` in ``folder``."""
    return Pair(folder / f"{name}.pem", folder / f"{name}.key")


class _Authority(NamedTuple):
    name: x509.Name
    key: PrivateKey


def init(folder: Path, issued: Mapping[str, Sequence[str]] = MappingProxyType({})) -> Pair:
    """Create the authority ``ca`` in ``folder``, and certificates by name for hosts, as `issue` does: all or none.

    Raises `ConfigError` if one of the files exists, or a host is invalid.
    """
    files = {name: _new(folder, name) for name in ("ca", *issued)}
    authority = _Authority(_name("fedbpt CA"), ec.generate_private_key(ec.SECP256R1()))
    made = _builder(authority.name, authority, authority.key, CA_DAYS)
    made = made.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    contents = _signed(files["ca"], made.add_extension(_usage(authority=True), critical=True), authority.key, authority)
    for name, hosts in issued.items():
        contents |= _issued(files[name], authority, name, hosts)
    _write(contents)
    return files["ca"]


def issue(folder: Path, name: str, hosts: Sequence[str] = ()) -> Pair:
    """Issue the certificate ``name`` for ``hosts`` (default: ``name``), signed by the authority in ``folder``.

    Raises `ConfigError` if there is no authority, the certificate exists, or a host is invalid.
    """
    files = _new(folder, name)
    authority = pair(folder, "ca")
    content = read_private(authority.key)
    try:
        issuer_key = load_pem_private_key(content, password=None)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{authority.key} is not a key from `fedbpt certs init`") from error
    if not isinstance(issuer_key, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"{authority.key} is not a key from `fedbpt certs init`")
    _write(_issued(files, _Authority(_in_time(authority.cert).subject, issuer_key), name, hosts))
    return files


def _issued(files: Pair, authority: _Authority, name: str, hosts: Sequence[str]) -> dict[Path, bytes]:
    key = ec.generate_private_key(ec.SECP256R1())
    made = _builder(_name(name), authority, key, CERTIFICATE_DAYS)
    made = made.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    made = made.add_extension(_usage(authority=False), critical=True)
    both_ends = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
    made = made.add_extension(both_ends, critical=False)
    names = x509.SubjectAlternativeName([_host(host) for host in hosts or (name,)])
    return _signed(files, made.add_extension(names, critical=False), key, authority)


def _in_time(path: Path) -> x509.Certificate:
    """Read the authority's certificate. Raises `ConfigError` if it is not valid now by this machine's clock."""
    try:
        found = x509.load_pem_x509_certificate(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not a certificate from `fedbpt certs init`") from error
    now = datetime.datetime.now(datetime.timezone.utc)
    if not found.not_valid_before_utc <= now <= found.not_valid_after_utc:
        raise ConfigError(
            f"{path} is valid from {found.not_valid_before_utc:%Y-%m-%d} to {found.not_valid_after_utc:%Y-%m-%d}, and "
            f"this machine's clock says {now:%Y-%m-%d}: set the clock if that is wrong, else create a new authority"
        )
    return found


def _new(folder: Path, name: str) -> Pair:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
        raise ConfigError(
            f"invalid certificate name {name!r}: use letters, digits and ._- (at most 64)", field="name", limit=64
        )
    files = pair(folder, name)
    for path in files:
        if path.exists():
            raise ConfigError(f"{path} exists: choose another name or folder, or remove it first")
    return files


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _builder(subject: x509.Name, authority: _Authority, key: PrivateKey, days: int) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.timezone.utc)
    made = x509.CertificateBuilder(
        issuer_name=authority.name,
        subject_name=subject,
        public_key=key.public_key(),
        serial_number=x509.random_serial_number(),
        not_valid_before=now - datetime.timedelta(days=LEEWAY_DAYS),
        not_valid_after=now + datetime.timedelta(days=days),
    )
    made = made.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    issuer_id = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key())
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


def is_host(text: str) -> bool:
    """Whether ``text`` is a valid host name in a certificate."""
    return len(text) <= 253 and re.fullmatch(r"(\*\.)?([A-Za-z0-9_-]{1,63}\.)*[A-Za-z0-9_-]{1,63}", text) is not None


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass  # not an address
    if not is_host(host):
        raise ConfigError(
            f"invalid host {host!r}: give a name or an address, without http:// and without a port", field="host"
        )
    return x509.DNSName(host)


def _signed(files: Pair, made: x509.CertificateBuilder, key: PrivateKey, authority: _Authority) -> dict[Path, bytes]:
    """The contents of the files of a signed certificate."""
    return {
        files.key: key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
        files.cert: made.sign(authority.key, hashes.SHA256()).public_bytes(Encoding.PEM),
    }


def _write(contents: Mapping[Path, bytes]) -> None:
    try:
        next(iter(contents)).parent.mkdir(parents=True, exist_ok=True)
        write_whole(contents, private=[path for path in contents if path.suffix == ".key"])
    except OSError as error:
        raise ConfigError(f"cannot write {error.filename}: {error.strerror or error}") from error
