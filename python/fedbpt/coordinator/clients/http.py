"""`HttpClient`: a device that runs an HTTP server (`fedbpt.device.agent.http`)."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable

import httpx

from fedbpt.coordinator.clients.remote import RemoteDevice
from fedbpt.coordinator.clients.requests import POLL_S, RESPONSE_S, RETRY_S
from fedbpt.coordinator.clients.transport import IN_REACH, NoResponseError, Response
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
        name: the coordinator's name for the device; None: host and port (``pi5-8401``). Give one if the address may
            change between the sessions of a run.
        retry_s, response_s, poll_s: see `TransportClient`.
        token: the device's secret; not sent unencrypted beyond loopback.
        tls: for https: the CA to trust, and the certificate to show.

    Raises:
        ConfigError: an invalid address; a token without https beyond loopback.
    """

    def __init__(
        self,
        url: str,
        name: str | None = None,
        retry_s: float = RETRY_S,
        response_s: float = RESPONSE_S,
        *,
        token: str | None = None,
        tls: Tls | None = None,
        poll_s: float = POLL_S,
    ) -> None:
        transport = HttpTransport(url, token, tls, response_s, min(response_s, max(retry_s, 1.0)))
        super().__init__(transport, name or transport.name, retry_s, response_s, poll_s)
        self.url = transport.where


class HttpTransport:
    """Requests over HTTP to ``url``. See `Transport`.

    Args:
        token, tls: as for `HttpClient`.
        response_s: how long a response may take beyond the time-out of `send`, seconds.
        connect_s: how long a connection may take, seconds.
    """

    holds_plans = False
    sends_short = True

    def __init__(self, url: str, token: str | None, tls: Tls | None, response_s: float, connect_s: float) -> None:
        self._url = _address(url)
        if token and self._url.scheme == "http" and not is_loopback(self._url.host):
            raise ConfigError(
                f"a token is not sent unencrypted to {url}: serve the device with TLS and give https://", field="token"
            )
        self.where = str(self._url)
        self._token = token
        self._tls = tls
        self._response_s = response_s
        self._connect_s = connect_s
        self._verify = (tls or Tls()).client_context() if self._url.scheme == "https" else False
        self._http: httpx.AsyncClient | None = None

    @property
    def name(self) -> str:
        """The default name of a device at this address."""
        port = f"-{self._url.port}" if self._url.port else ""
        return re.sub(r"[^A-Za-z0-9._-]", "-", f"{self._url.host}{port}").lstrip("._-") or "device"

    async def send(
        self,
        method: Method,
        path: str,
        body: bytes | None,
        timeout_s: float,
        delivered: Callable[[], None] = lambda: None,  # noqa: ARG002 - the response says so
    ) -> Response:
        try:
            return await self._send(method, path, body, timeout_s)
        except (httpx.TransportError, httpx.InvalidURL, asyncio.TimeoutError) as error:
            begun = isinstance(error, httpx.ReadError | httpx.RemoteProtocolError)
            reason = certificate_problem(error) or f"{_explain(error)}: {IN_REACH}"
            raise NoResponseError(reason, begun=begun) from error

    async def _send(self, method: Method, path: str, body: bytes | None, timeout_s: float) -> Response:
        if self._http is None:
            self._http = httpx.AsyncClient(
                # The machine's proxies are for the web, not for devices on the local network.
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
        timeout = httpx.Timeout(self._response_s, read=timeout_s, connect=self._connect_s)
        url = self.where.rstrip("/") + path
        async with self._http.stream(method, url, content=body, headers=headers, timeout=timeout) as response:
            # The time-outs above are for each read; a device that sends slowly must not hold up the coordinator.
            content = await within(timeout_s + self._response_s, _read_body(response))
        content_type = response.headers.get("content-type", "")
        return Response(response.status_code, content_type, content, retry_after(response.headers))

    async def responds(self, timeout_s: float) -> bool:
        try:
            await within(timeout_s, self.send("GET", "/healthz", None, timeout_s))
        except (NoResponseError, asyncio.TimeoutError, WireError):
            return False
        return True

    async def aclose(self) -> None:
        if self._http is not None:
            http, self._http = self._http, None
            await http.aclose()

    def twin(self) -> HttpTransport:
        return HttpTransport(self.where, self._token, self._tls, self._response_s, self._connect_s)


def _address(url: str) -> httpx.URL:
    try:
        address = httpx.URL(url.rstrip("/"))
    except (httpx.InvalidURL, UnicodeError) as error:
        raise _invalid(url) from error
    if address.scheme not in ("http", "https") or not address.host or address.userinfo:
        raise _invalid(url)
    return address


def _invalid(url: str) -> ConfigError:
    return ConfigError(f"invalid device address {url!r}: give one like http://pi5:8401", field="url")


async def _read_body(response: httpx.Response) -> bytes:
    content = bytearray()
    async for chunk in response.aiter_raw():
        content += chunk
        if len(content) > codec.MAX_BODY_BYTES:
            raise WireError(
                f"the response is over the limit of {codec.MAX_BODY_BYTES} bytes", limit=codec.MAX_BODY_BYTES
            )
    return bytes(content)


def _explain(error: Exception) -> str:
    if isinstance(error, httpx.TimeoutException | asyncio.TimeoutError):
        return "does not respond"
    if isinstance(error, httpx.ConnectError):
        return "cannot be reached"
    return f"broke the connection ({type(error).__name__})"
