"""`Membership`: how a device takes part in secure aggregation, as its owner decides."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import msgspec

from fedbpt.checking import DECODE_ERRORS
from fedbpt.errors import ConfigError
from fedbpt.protocol.codec import digest
from fedbpt.protocol.rounds import EvaluateRequest, RoundPlan

IDENTITY_BYTES: Final = 32
"""Length of an Ed25519 public key."""


@dataclass(frozen=True)
class Membership:
    """What a device's owner decides.

    Attributes:
        identity: the Ed25519 private key by which other devices know this one; None: a new one at each start.
        trusted: public identities of the devices whose keys are accepted, by name; None: the coordinator is trusted to
            pass on the devices' own keys.
        only: results leave this device masked only; a run that is not secure is refused.
    """

    identity: bytes | None = field(default=None, repr=False)
    trusted: Mapping[str, bytes] | None = None
    only: bool = False


def asked_of_all(asked: RoundPlan | EvaluateRequest) -> str:
    """Digest of all that the devices of a sum are asked alike; only names and deadlines differ."""
    common = msgspec.structs.replace(asked, device="all", deadline_s=1.0) if isinstance(asked, RoundPlan) else asked
    return digest(common)


def read_trusted(path: Path) -> dict[str, bytes]:
    """Read a TOML file of public identities in base64, by device name. Raises `ConfigError`."""
    try:
        found = msgspec.toml.decode(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}", field="--trust") from error
    except DECODE_ERRORS as error:
        raise ConfigError(f"{path} is not valid TOML: {error}", field="--trust") from error
    trusted = {}
    for name, text in found.items():
        try:
            trusted[name] = base64.b64decode(text, validate=True)
        except (TypeError, ValueError, binascii.Error):
            trusted[name] = b""
        if len(trusted[name]) != IDENTITY_BYTES:
            raise ConfigError(
                f'{path}: {name} is no identity: copy the line that its device prints, {name} = "…"', field="--trust"
            )
    return trusted


def identity_line(name: str, identity: bytes) -> str:
    """A line of that file."""
    return f'"{name}" = "{base64.b64encode(identity).decode()}"'
