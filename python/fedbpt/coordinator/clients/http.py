"""`HttpClient`: a device that runs an HTTP server (`fedbpt.device.agent.http`)."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable

import httpx

from fedbpt.coordinator.clients.remote import ANSWER_S, POLL_S, RETRY_S, RemoteDevice
from fedbpt.coordinator.clients.transport import IN_REACH, NoReplyError, Response
from fedbpt.errors import ConfigError, WireError
from fedbpt.net.bodies import retry_after
from fedbpt.net.deadlines import within
from fedbpt.net.server import IDLE_S
from fedbpt.net.tls import Tls, certificate_problem, is_loopback
from fedbpt.protocol import codec
from fedbpt.protocol.polling import Method


class HttpClient(RemoteDevice):
    """Reaches the device at ``url``, such as ``http://pi5:8401``. See `DeviceClient` for the methods.

    Args:
        name: the coordinator's name for the device; None: host and port (``pi5-8401``). Give one where the address
            may change between the sittings of a run.
        retry_s, answer_s, poll_s: see `RemoteDevice`.
        token: the secret that the device asks for; never sent over plain HTTP beyond loopback.
        tls: for an https address, whom to believe and what to show.
    """

    def __init__(
        self,
        url: str,
        name: str | None = None,
        retry_s: float = RETRY_S,
        answer_s: float = ANSWER_S,
        *,
        token: str | None = None,
        tls: Tls | None = None,
        poll_s: float = POLL_S,
    ) -> None:
        transport = HttpTransport(url, token, tls, answer_s, min(answer_s, max(retry_s, 1.0)))
        super().__init__(transport, name or transport.name, retry_s, answer_s, poll_s)
        self.url = transport.where


class HttpTransport:
    """Requests over HTTP to ``url``. See `Transport`.

    Args:
        token, tls: as for `HttpClient`.
        answer_s, connect_s: how long a reply may take beyond what `send` is given, and a connection, seconds.
    """

    holds_plans = False

    def __init__(self, url: str, token: str | None, tls: Tls | None, answer_s: float, connect_s: float) -> None:
        try:
            self._url = httpx.URL(url.rstrip("/"))
        except (httpx.InvalidURL, UnicodeError) as error:
            raise ConfigError(f"{url!r} is no device address: give one like http://pi5:8401") from error
        if self._url.scheme not in ("http", "https") or not self._url.host or self._url.userinfo:
            raise ConfigError(f"{url!r} is no device address: give one like http://pi5:8401")
        if token and self._url.scheme == "http" and not is_loopback(self._url.host):
            raise ConfigError(f"a token is not sent to {url} unencrypted: serve the device with TLS, and give https://")
        self.where = str(self._url)
        self._token, self._tls, self._answer_s, self._connect_s = token, tls, answer_s, connect_s
        self._verify = (tls or Tls()).client_context() if self._url.scheme == "https" else False
        self._http: httpx.AsyncClient | None = None

    @property
    def name(self) -> str:
        """What a device at this address is called where nobody names it."""
        port = f"-{self._url.port}" if self._url.port else ""
        return re.sub(r"[^A-Za-z0-9._-]", "-", f"{self._url.host}{port}").lstrip("._-") or "device"

    async def send(
        self,
        method: Method,
        path: str,
        body: bytes | None,
        read_s: float,
        taken: Callable[[], None] = lambda: None,  # noqa: ARG002 - it has it when it replies
    ) -> Response:
        try:
            return await self._sent(method, path, body, read_s)
        except (httpx.TransportError, httpx.InvalidURL, asyncio.TimeoutError) as error:
            begun = isinstance(error, httpx.ReadError | httpx.RemoteProtocolError)
            reason = certificate_problem(error) or f"{_explain(error)}: {IN_REACH}"
            raise NoReplyError(reason, begun=begun) from error

    async def _sent(self, method: Method, path: str, body: bytes | None, read_s: float) -> Response:
        if self._http is None:
            self._http = httpx.AsyncClient(
                # The machine's proxies are for the web, not for a device on the local network.
                trust_env=False,
                verify=self._verify,
                headers={
                    "accept": codec.CONTENT_TYPE,
                    "accept-encoding": "identity",
                    "user-agent": "fedbpt",
                    **({"authorization": f"Bearer {self._token}"} if self._token else {}),
                },
                limits=httpx.Limits(max_connections=8, max_keepalive_connections=2, keepalive_expiry=IDLE_S),
            )
        headers = {"content-type": codec.CONTENT_TYPE} if body is not None else {}
        timeout = httpx.Timeout(self._answer_s, read=read_s, connect=self._connect_s)
        url = self.where.rstrip("/") + path
        async with self._http.stream(method, url, content=body, headers=headers, timeout=timeout) as response:
            # The time-outs above are for each read; a device that drips bytes must not hold the coordinator.
            content = await within(read_s + self._answer_s, _whole_body(response))
        kind = response.headers.get("content-type", "")
        return Response(response.status_code, kind, content, retry_after(response.headers))

    async def answers(self, timeout_s: float) -> bool:
        try:
            await within(timeout_s, self.send("GET", "/healthz", None, timeout_s))
        except (NoReplyError, asyncio.TimeoutError, WireError):
            return False
        return True

    async def aclose(self) -> None:
        if self._http is not None:
            http, self._http = self._http, None
            await http.aclose()

    def twin(self) -> HttpTransport:
        return HttpTransport(self.where, self._token, self._tls, self._answer_s, self._connect_s)


async def _whole_body(response: httpx.Response) -> bytes:
    content = bytearray()
    async for chunk in response.aiter_raw():
        content += chunk
        if len(content) > codec.MAX_BODY_BYTES:
            raise WireError(f"it sent a body over the limit of {codec.MAX_BODY_BYTES} bytes")
    return bytes(content)


def _explain(error: Exception) -> str:
    if isinstance(error, httpx.TimeoutException | asyncio.TimeoutError):
        return "does not answer"
    if isinstance(error, httpx.ConnectError):
        return "cannot be reached"
    return f"broke the connection ({type(error).__name__})"
