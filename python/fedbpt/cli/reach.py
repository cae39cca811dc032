"""Clients for the devices of a run: those called at an address, and those that call in."""

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
from fedbpt.coordinator.devices.drafting import RETURN_S
from fedbpt.coordinator.devices.enrolment import DeviceRegistry
from fedbpt.coordinator.service.server import CoordinatorServer
from fedbpt.errors import ConfigError, DeviceError, WireError
from fedbpt.net.tls import Tls
from fedbpt.net.tokens import read_private
from fedbpt.protocol.names import check_names

NAME_S: Final = 1.0
"""How long to retry asking a device for its name, in seconds, before naming it after its address."""

POLL_S: Final = 0.2
"""Interval between two checks of which devices call in, in seconds."""


@dataclass(frozen=True)
class Reach:
    """How to reach the devices of a run.

    Args:
        addresses: devices to call.
        tokens: a TOML file of their tokens: "address" = "token".
        listen: HOST:PORT where devices call in; None: they cannot.
        expect: number of devices to wait for; None: all that are enrolled or invited.
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
        """The devices' clients: first those called, in the given order, then those that call in, sorted by name.

        A device that is called has the name that it reports; if two report the same, both are named after their
        addresses.

        Args:
            known: the run's devices so far, by name, with their address (empty: they call in). A device at a known
                address keeps its name; enrolled devices among these belong to the run, present or not.
            finished: the run is finished, so no device is contacted or waited for.
            tell: called with a line about the devices present, whenever they change.
            quorum: the share of devices that a run needs: a resumed run waits only `RETURN_S` for the others.
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

        plain = [url.rstrip("/") for url in self.addresses]
        twice = [url for url, n in Counter(plain).items() if n > 1]
        if twice:
            raise ConfigError(f"device {twice[0]} is given twice: give each once", field="--device")
        by_address = [client(url) for url in plain]
        check_names([each.name for each in by_address], "device")
        before = {address: name for name, address in known.items() if address}
        names = {each.url: each.name if each.name in known else before.get(each.url, "") for each in by_address}
        unknown = [url for url, name in names.items() if not name]
        if unknown and not finished:
            clients = [client(url, retry_s=NAME_S) for url in unknown]
            names |= dict(zip(unknown, asyncio.run(_own_names(clients)), strict=True))
        uses = Counter([*names.values(), *(name for name, address in known.items() if not address)])
        return [client(each.url, name=names[each.url] if uses[names[each.url]] == 1 else None) for each in by_address]

    def _await(
        self,
        registry: DeviceRegistry,
        server: CoordinatorServer,
        tell: Callable[[str], None],
        mine: set[str],
        needed: int,
    ) -> list[str]:
        """Wait for all expected devices, or `RETURN_S` for at least ``needed`` of a resumed run's ``mine``.

        Returns the names of the devices present. Raises `ConfigError` if none is expected.
        """
        expected = self.expect
        if expected is None:
            expected = sum(line.state != "revoked" for line in registry.devices())
            if not expected:
                raise ConfigError(
                    f"no device is invited or enrolled: run `fedbpt devices invite NAME --registry {self.registry}`",
                    field="--listen",
                )
        before: list[str] | None = None
        began = time.monotonic()
        while True:
            present = server.present()
            if present != before:
                before = present
                names = ", ".join(present) or "none yet"
                tell(f"{len(present)} of {expected} devices connected to {server.url}: {names}")
            can_resume = mine and len(mine.intersection(present)) >= needed and time.monotonic() - began > RETURN_S
            if len(present) >= expected or can_resume:
                return present
            time.sleep(POLL_S)


async def _own_names(clients: Sequence[HttpClient]) -> list[str]:
    """The name that each device reports; empty if it does not respond."""

    async def ask(client: HttpClient) -> str:
        try:
            return (await client.status()).name
        except (DeviceError, WireError):
            return ""  # the run will report the error, and retry
        finally:
            await client.aclose()

    return list(await asyncio.gather(*map(ask, clients)))


def host_and_port(option: str, given: str) -> tuple[str, int]:
    """Parse the value of an ``option`` of the form HOST:PORT. Raises `ConfigError`."""
    try:
        parts = urlsplit(f"//{given}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if not host or port is None or parts.path:
        raise ConfigError(f"{option} {given}: expected HOST:PORT, for example 127.0.0.1:8400", field=option)
    return host, port


def _secrets(path: Path | None) -> dict[str, str]:
    if path is None:
        return {}
    content = read_private(path)
    try:
        found = msgspec.toml.decode(content, type=dict[str, str])
    except DECODE_ERRORS as error:
        raise ConfigError(
            f'{path} is not a file of tokens: expected TOML lines like "https://pi5:8401" = "TOKEN"', field="--tokens"
        ) from error
    return {address.rstrip("/"): token for address, token in found.items()}
