"""The devices of a run: those that are called at an address, and those that call in."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import msgspec

from fedbpt.checking import DECODE_ERRORS
from fedbpt.clients import DeviceClient, HttpClient, PostOffice
from fedbpt.coordinator import CoordinatorServer
from fedbpt.errors import ConfigError
from fedbpt.registry import DeviceRegistry
from fedbpt.tls import Tls
from fedbpt.tokens import read_private

RETURN_S: Final = 10.0
"""How long a run that is resumed waits for all of its devices: after a short break they call within seconds."""

LOOK_S: Final = 0.2
"""Pause between two looks at who calls in."""


@dataclass(frozen=True)
class Reach:
    """``addresses`` are called, with the tokens in the file ``tokens`` (TOML: "address" = "token").

    ``listen``: HOST:PORT where devices call in; None: nowhere. ``expect``: so many are waited for; None: all that are
    enrolled or invited.
    """

    addresses: Sequence[str]
    tokens: Path | None = None
    listen: str | None = None
    expect: int | None = None
    registry: Path = Path("runs/devices.db")
    tls: Tls | None = None
    allow_insecure: bool = False

    @contextmanager
    def clients(
        self, known: Sequence[str], finished: bool, tell: Callable[[str], None], quorum: float = 1.0
    ) -> Iterator[list[DeviceClient]]:
        """The devices, sorted by name among those that call in, so that who called first makes no difference.

        ``known``: devices of the run so far; those of them that are enrolled belong to it, present or not.
        ``finished``: the run is: nobody will be asked, and nobody is waited for. ``tell``: called with who is there,
        when that changes. ``quorum``: the share of them that a run needs: one that is resumed waits for the others a
        moment only, and finds them later.
        """
        secrets = _secrets(self.tokens)
        called: list[DeviceClient] = [
            HttpClient(address, token=secrets.get(address.rstrip("/")), tls=self.tls) for address in self.addresses
        ]
        if self.listen is None:
            yield called
            return
        host, port = host_and_port("--listen", self.listen)
        if finished:
            names = sorted({*known} - {client.name for client in called})
            yield [*called, *(PostOffice().client(name) for name in names)]
            return
        with DeviceRegistry(self.registry) as registry:
            with CoordinatorServer(registry, host, port, tls=self.tls, allow_insecure=self.allow_insecure) as server:
                enrolled = {line.device for line in registry.devices() if line.state == "enrolled"}
                mine = enrolled & set(known)
                calling = self._await(registry, server, tell, mine, math.ceil(quorum * len(mine)))
                names = sorted({*calling, *mine})
                yield [*called, *(server.client(name) for name in names)]

    def _await(
        self,
        registry: DeviceRegistry,
        server: CoordinatorServer,
        tell: Callable[[str], None],
        mine: set[str],
        needed: int,
    ) -> list[str]:
        """The devices that call in, once they are enough: all that are expected, or of a run that has ``mine`` already
        after a moment at least ``needed``.
        """
        expected = self.expect
        if expected is None:
            expected = sum(line.state != "revoked" for line in registry.devices())
            if not expected:
                raise ConfigError(f"no device may call in: `fedbpt devices invite NAME --registry {self.registry}`")
        before: list[str] | None = None
        began = time.monotonic()
        while True:
            present = server.present()
            if present != before:
                before = present
                names = ", ".join(present) or "none yet"
                tell(f"{len(present)} of {expected} devices call in at {server.url}: {names}")
            goes_on = mine and len(mine.intersection(present)) >= needed and time.monotonic() - began > RETURN_S
            if len(present) >= expected or goes_on:
                return present
            time.sleep(LOOK_S)


def host_and_port(option: str, given: str) -> tuple[str, int]:
    """What an ``option`` of the form HOST:PORT says. Raises `ConfigError`."""
    try:
        parts = urlsplit(f"//{given}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if not host or port is None or parts.path:
        raise ConfigError(f"{option} {given} is no HOST:PORT: give one like 127.0.0.1:8400")
    return host, port


def _secrets(path: Path | None) -> dict[str, str]:
    if path is None:
        return {}
    content = read_private(path)
    try:
        found = msgspec.toml.decode(content, type=dict[str, str])
    except DECODE_ERRORS as error:
        raise ConfigError(f'{path} is no file of tokens: lines like "https://pi5:8401" = "TOKEN"') from error
    return {address.rstrip("/"): token for address, token in found.items()}
