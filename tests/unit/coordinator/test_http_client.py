"""The HTTP client against unreachable servers, servers that are not devices, and misbehaving ones."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

import pytest

from fedbpt.coordinator.clients import HttpClient
from fedbpt.errors import (
    ConfigError,
    DeviceRefusedError,
    DeviceTimeoutError,
    DeviceUnreachableError,
    FedbptError,
    WireError,
)
from fedbpt.protocol import codec
from fedbpt.protocol.rounds import RoundProgress
from tests.support.raises import raises


def ask(
    answer: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
    retry_s: float,
    response_s: float = 5,
) -> None:
    """Request the status of a server that handles every connection with ``answer``."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.readuntil(b"\r\n\r\n")
            await answer(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            return
        finally:
            writer.close()

    async def main() -> None:
        server = await asyncio.start_server(handle, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        client = HttpClient(f"http://127.0.0.1:{port}", retry_s=retry_s, response_s=response_s)
        try:
            await client.status()
        finally:
            await client.aclose()
            server.close()
            await server.wait_closed()

    asyncio.run(asyncio.wait_for(main(), 10))


def reply(status: str, body: bytes, content_type: str = codec.CONTENT_TYPE, length: int | None = None) -> bytes:
    size = len(body) if length is None else length
    return f"HTTP/1.1 {status}\r\ncontent-type: {content_type}\r\ncontent-length: {size}\r\n\r\n".encode() + body


@pytest.mark.parametrize(
    ("bytes_back", "error", "value"),
    [
        (b"", DeviceUnreachableError, "http://127.0.0.1:"),
        (b"SSH-2.0-OpenSSH\r\n", DeviceUnreachableError, "http://127.0.0.1:"),
        (reply("200 OK", b"\x80", length=50), DeviceUnreachableError, "http://127.0.0.1:"),
        (reply("503 Busy", b""), DeviceUnreachableError, "503"),
        (reply("200 OK", b"<html>", "text/html"), DeviceRefusedError, "http://127.0.0.1:"),
        (reply("404 Not Found", b"<html>", "text/html"), DeviceRefusedError, "http://127.0.0.1:"),
        (reply("302 Found", b""), DeviceRefusedError, "http://127.0.0.1:"),
        (reply("200 OK", b"\x80"), WireError, "DeviceInfo"),
    ],
)
def test_an_invalid_response_is_an_error_with_the_address(
    bytes_back: bytes, error: type[FedbptError], value: str
) -> None:
    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(bytes_back)
        await writer.drain()

    with raises(error) as caught:
        ask(answer, retry_s=0.2)
    assert value in str(caught.value)
    assert getattr(caught.value, "code", "not-a-device") == "not-a-device"


def test_an_endless_body_is_refused_at_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec, "MAX_BODY_BYTES", 10_000)

    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 1000000000\r\n\r\n")
        while True:
            writer.write(b"\0" * 4096)
            await writer.drain()

    with raises(WireError, limit=10_000):
        ask(answer, retry_s=0.2)


def test_a_device_that_sends_too_slowly_times_out() -> None:
    async def drip(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n")
        while not writer.is_closing():
            writer.write(b"\0")
            await writer.drain()
            await asyncio.sleep(0.05)

    began = time.monotonic()
    with raises(DeviceUnreachableError):
        ask(drip, retry_s=0.5, response_s=0.2)
    assert time.monotonic() - began < 3


def test_a_broken_connection_is_retried() -> None:
    calls: list[int] = []

    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        calls.append(1)
        if len(calls) > 1:
            writer.write(reply("404 Not Found", b""))
            await writer.drain()

    with pytest.raises(DeviceRefusedError):
        ask(answer, retry_s=2)
    assert len(calls) == 2


def test_retry_after_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    sleep = asyncio.sleep

    async def note(seconds: float) -> None:
        waits.append(seconds)
        await sleep(0)

    calls: list[int] = []

    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        calls.append(1)
        busy = b"HTTP/1.1 429 Too Many\r\nretry-after: 3\r\ncontent-length: 0\r\n\r\n"
        writer.write(busy if len(calls) == 1 else reply("404 Not Found", b""))
        await writer.drain()

    monkeypatch.setattr("fedbpt.coordinator.clients.http.asyncio.sleep", note)
    with pytest.raises(DeviceRefusedError):
        ask(answer, retry_s=5)
    assert waits == [3.0]
    calls.clear()
    with raises(DeviceUnreachableError) as caught:
        ask(answer, retry_s=2)  # less than Retry-After
    assert "429" in str(caught.value)


def test_a_token_is_not_sent_unencrypted_beyond_loopback() -> None:
    for url in ("http://pi5:8401", "http://192.0.2.1:8401"):
        with raises(ConfigError, field="token"):
            HttpClient(url, token="secret")
    HttpClient("http://127.0.0.1:8401", token="secret")
    assert "secret" not in repr(HttpClient("https://pi5:8401", token="secret"))


def test_an_unreachable_device_is_named_with_its_address() -> None:
    async def main() -> None:
        client = HttpClient("http://127.0.0.1:9", retry_s=0.3)
        try:
            with pytest.raises(DeviceUnreachableError) as caught:
                await client.status()
            assert caught.value.device == "127.0.0.1-9"
            assert "http://127.0.0.1:9" in caught.value.reason
        finally:
            await client.aclose()

    asyncio.run(main())


@pytest.mark.parametrize(
    "url", ["", "pi5:8401", "ftp://pi5", "http://", "http://pi5:port", "http://user:word@pi5:8401"]
)
def test_an_invalid_address_is_refused(url: str) -> None:
    with raises(ConfigError, field="url"):
        HttpClient(url)


def test_a_device_is_named_after_its_host_and_port() -> None:
    assert HttpClient("http://pi5:8401/").name == "pi5-8401"
    assert HttpClient("http://[::1]:8401").name == "1-8401"
    assert HttpClient("http://pi5:8401", name="kitchen").name == "kitchen"


def test_polls_that_are_not_held_are_spaced() -> None:
    asked = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        progress = codec.encode(RoundProgress(run="r", round=1, state="running", done=1, total=2))
        while True:
            try:
                await reader.readuntil(b"\r\n\r\n")
            except (ConnectionError, asyncio.IncompleteReadError):
                break
            asked.append(1)
            writer.write(reply("202 Accepted", progress))
            await writer.drain()
        writer.close()

    async def main() -> None:
        server = await asyncio.start_server(handle, "127.0.0.1", 0)
        client = HttpClient(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        with pytest.raises(DeviceTimeoutError):
            await client.wait("r", 1, timeout_s=1.2)
        await client.aclose()
        server.close()

    asyncio.run(asyncio.wait_for(main(), 30))
    assert 1 < len(asked) <= 5
