"""The coordinator's HTTP routes: devices enrol, poll their mailboxes, post replies. Bodies: `fedbpt.net.bodies`."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Final

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from fedbpt.coordinator.clients.mailbox import Mailbox, PostOffice
from fedbpt.coordinator.devices.enrolment import DeviceRegistry
from fedbpt.errors import CoordinatorRefusedError
from fedbpt.net import tokens
from fedbpt.net.auth import wrong_name
from fedbpt.net.bodies import EXCEPTION_HANDLERS, read, reply
from fedbpt.net.rate_limit import RateLimit
from fedbpt.protocol.polling import (
    ENROL_PATH,
    MAX_ENVELOPE_BYTES,
    PACED_HEADER,
    POLL_PATH,
    REPLY_PATH,
    Enrolled,
    Enrolment,
    Poll,
    Reply,
)

MAX_WAIT_S: Final = 60.0
"""Longest hold of a poll."""

DEVICE_LIMIT: Final = (100.0, 400)
"""Requests of one device: per second, and burst. It sends two for each request of ours: honest work stays below."""

GUESS_LIMIT: Final = (1.0, 20)
"""Enrolments, and requests without a valid token, of one address: per second, and burst."""

SMALL_BODY_BYTES: Final = 16 * 2**10
"""Largest poll or enrolment."""


def build_app(
    registry: DeviceRegistry,
    office: PostOffice,
    device_limit: tuple[float, int] = DEVICE_LIMIT,
    guess_limit: tuple[float, int] = GUESS_LIMIT,
    host: str | None = None,
    more: Sequence[Route] = (),
) -> Starlette:
    """The routes, as an ASGI application. ``office`` belongs to the event loop that runs it.

    ``host``: requests without a token must name this host; None: any host. ``more``: other routes, such as those of
    `fedbpt.coordinator.service.run_routes`.
    """
    routes = _Routes(registry, office, RateLimit(*device_limit), RateLimit(*guess_limit), host)
    return Starlette(
        routes=[
            Route(ENROL_PATH, routes.enrol, methods=["POST"]),
            Route(POLL_PATH, routes.poll, methods=["POST"]),
            Route(REPLY_PATH, routes.take_reply, methods=["POST"]),
            Route("/healthz", routes.healthz, methods=["GET"]),
            *more,
        ],
        exception_handlers=EXCEPTION_HANDLERS,
        lifespan=routes.lifespan,
    )


class _Routes:
    def __init__(
        self, registry: DeviceRegistry, office: PostOffice, devices: RateLimit, guesses: RateLimit, host: str | None
    ) -> None:
        self._registry = registry
        self._office = office
        self._devices = devices
        self._guesses = guesses
        self._host = host

    @asynccontextmanager
    async def lifespan(self, _app: Starlette) -> AsyncIterator[None]:
        self._office.open()
        yield
        self._office.close()

    async def enrol(self, request: Request) -> Response:
        self._check_name(request)
        _limit(self._guesses, _address(request))
        enrolment = await read(request, Enrolment, SMALL_BODY_BYTES)
        return reply(request, Enrolled(device=self._registry.enrol(enrolment.code, enrolment.token_digest)))

    async def poll(self, request: Request) -> Response:
        device = self._authenticate(request)
        poll = await read(request, Poll, SMALL_BODY_BYTES)
        box = self._office.box(device)
        if PACED_HEADER in request.headers and box.is_idle and not poll.holding:
            pause_s = math.ceil(self._office.pause_s(device))
            if pause_s:
                return await self._send_away(request, box, pause_s)
        delivery = asyncio.ensure_future(box.poll(poll.holding, min(poll.wait_s, MAX_WAIT_S)))
        gone = asyncio.ensure_future(request.receive())  # after the body, the only message is a disconnection
        try:
            await asyncio.wait([delivery, gone], return_when=asyncio.FIRST_COMPLETED)
            if not delivery.done():
                return Response(status_code=400)
            return reply(request, msgspec.structs.replace(await delivery, wait_s=self._office.poll_s))
        finally:
            gone.cancel()
            delivery.cancel()

    async def _send_away(self, request: Request, box: Mailbox, pause_s: int) -> Response:
        """Respond that there is no work, and when to call again."""
        nothing = msgspec.structs.replace(await box.poll((), 0.0), wait_s=self._office.poll_s)
        box.pause(pause_s)
        return reply(request, nothing, headers={"retry-after": str(pause_s)})

    async def take_reply(self, request: Request) -> Response:
        device = self._authenticate(request)
        posted = await read(request, Reply, MAX_ENVELOPE_BYTES)
        self._office.box(device).take_reply(request.path_params["id"], posted)
        return Response(status_code=204)

    async def healthz(self, request: Request) -> Response:
        self._check_name(request)
        return PlainTextResponse("ok\n")

    def _check_name(self, request: Request) -> None:
        """Raise `CoordinatorRefusedError` if a request without a token names another host (DNS rebinding)."""
        if self._host is not None and (problem := wrong_name(request, self._host)):
            raise CoordinatorRefusedError(problem, "wrong-host")

    def _authenticate(self, request: Request) -> str:
        """The device that calls, within its rate limit; addresses that guess tokens have one too."""
        try:
            device = self._registry.authenticate(tokens.bearer(request.headers))
        except CoordinatorRefusedError:
            self._check_name(request)
            _limit(self._guesses, _address(request))
            raise
        _limit(self._devices, device)
        return device


def _address(request: Request) -> str:
    return request.client.host if request.client else ""


def _limit(limit: RateLimit, key: str) -> None:
    wait_s = limit.take(key)
    if wait_s:
        raise CoordinatorRefusedError(f"too many requests: try again in {math.ceil(wait_s)} s", "too-many", wait_s)
