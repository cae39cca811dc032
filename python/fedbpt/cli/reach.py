"""The devices of a run: those that are called at an address, and those that call in."""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import msgspec

from fedbpt.checking import DECODE_ERRORS
from fedbpt.coordinator.clients import DeviceClient, HttpClient, PostOffice
from fedbpt.coordinator.enrolment import DeviceRegistry
from fedbpt.coordinator.server import CoordinatorServer
from fedbpt.errors import ConfigError, DeviceError, WireError
from fedbpt.net.tls import Tls
from fedbpt.net.tokens import read_private
from fedbpt.protocol.names import check_names

RETURN_S: Final = 10.0
"""How long a run that is resumed waits for all of its devices: after a short break they call within seconds."""

NAME_S: Final = 1.0
"""How long a device is tried to be asked for its name; later it has the one that its address makes."""

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
        self, known: Mapping[str, str], finished: bool, tell: Callable[[str], None], quorum: float = 1.0
    ) -> Iterator[list[DeviceClient]]:
        """The devices, sorted by name among those that call in, so that who called first makes no difference.

        A device that is called has the name that it calls itself, but for names that two have: these are called by
        their addresses.
        ``known``: devices of the run so far, with where they were called (empty: they call in): a device that is called
        there again keeps its name. Those of them that are enrolled belong to the run, present or not.
        ``finished``: the run is: nobody will be asked, and nobody is waited for. ``tell``: called with who is there,
        when that changes. ``quorum``: the share of them that a run needs: one that is resumed waits for the others a
        moment only, and finds them later.
        """
        called: list[DeviceClient] = [*self._called(known, finished)] if self.addresses else []
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

    def _called(self, known: Mapping[str, str], finished: bool) -> list[HttpClient]:
        secrets = _secrets(self.tokens)

        def client(url: str, **options: Any) -> HttpClient:
            return HttpClient(url, token=secrets.get(url.rstrip("/")), tls=self.tls, **options)

        by_address = [client(url) for url in self.addresses]
        check_names([each.name for each in by_address], "device")
        before = {address: name for name, address in known.items() if address}
        names = {each.url: each.name if each.name in known else before.get(each.url, "") for each in by_address}
        unknown = [url for url, name in names.items() if not name]
        if unknown and not finished:
            asked = [client(url, retry_s=NAME_S) for url in unknown]
            names |= dict(zip(unknown, asyncio.run(_own_names(asked)), strict=True))
        taken = Counter([*names.values(), *(name for name, address in known.items() if not address)])
        return [client(each.url, name=names[each.url] if taken[names[each.url]] == 1 else None) for each in by_address]

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


async def _own_names(clients: Sequence[HttpClient]) -> list[str]:
    """What each device calls itself; empty where it does not answer."""

    async def ask(client: HttpClient) -> str:
        try:
            return (await client.status()).name
        except (DeviceError, WireError):
            return ""  # the run says what is the matter, and looks for it
        finally:
            await client.aclose()

    return list(await asyncio.gather(*map(ask, clients)))


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
