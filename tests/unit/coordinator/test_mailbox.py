"""The mailbox: which requests are delivered when, and which replies are accepted."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from fedbpt.coordinator.clients import mailbox
from fedbpt.coordinator.clients.mailbox import Mailbox, PostOffice
from fedbpt.coordinator.clients.transport import NoResponseError
from fedbpt.errors import CoordinatorRefusedError
from fedbpt.protocol import codec
from fedbpt.protocol.polling import Reply, Request
from tests.support.raises import raises

REPLY = Reply(status=200, content_type=codec.CONTENT_TYPE, body=b"yes")
OTHER = Reply(status=200, content_type=codec.CONTENT_TYPE, body=b"no")


def request(number: int, body: bytes = b"") -> Request:
    return Request(id=f"{number:032x}", method="POST", path="/v1/status", body=body)


def play(scene: Callable[[Mailbox], Awaitable[None]]) -> None:
    async def main() -> None:
        await asyncio.wait_for(scene(Mailbox("a")), 20)

    asyncio.run(main())


async def put(box: Mailbox, *requests: Request, timeout_s: float = 10.0) -> list[asyncio.Future[Reply]]:
    """Put requests into the mailbox of a device that has just called."""
    await box.poll((), 0.0)
    waiting = [asyncio.ensure_future(box.exchange(request, timeout_s)) for request in requests]
    await asyncio.sleep(0)
    return waiting


def test_an_open_poll_gets_a_request_at_once_and_its_reply_goes_back() -> None:
    async def scene(box: Mailbox) -> None:
        polling = asyncio.ensure_future(box.poll((), 10.0))
        await asyncio.sleep(0)
        waiting = asyncio.ensure_future(box.exchange(request(1), 10.0))
        assert (await polling).requests == (request(1),)
        box.take_reply(request(1).id, REPLY)
        assert await waiting == REPLY
        assert (await box.poll((), 0.0)).requests == ()

    play(scene)


def test_requests_come_in_order_and_held_ones_are_not_delivered_again() -> None:
    async def scene(box: Mailbox) -> None:
        await put(box, request(2), request(1))
        assert (await box.poll((), 0.0)).requests == (request(2), request(1))
        assert (await box.poll((request(2).id,), 0.0)).requests == (request(1),)
        held = (request(1).id, request(2).id, "f" * 32)  # the last: of a coordinator before its restart
        assert (await box.poll(held, 0.0)).requests == ()

    play(scene)


def test_requests_lost_on_the_way_or_by_a_restart_are_delivered_again() -> None:
    async def scene(box: Mailbox) -> None:
        await put(box, request(1))
        for _ in range(3):
            assert (await box.poll((), 0.0)).requests == (request(1),)

    play(scene)


def test_a_delivery_is_at_most_a_body_but_never_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec, "MAX_BODY_BYTES", 100)

    async def scene(box: Mailbox) -> None:
        await put(box, request(1, b"x" * 100), request(2, b"x" * 60), request(3, b"x" * 40), request(4, b"x"))
        assert [r.id[-1] for r in (await box.poll((), 0.0)).requests] == ["1"]
        assert [r.id[-1] for r in (await box.poll((request(1).id,), 0.0)).requests] == ["2", "3"]

    play(scene)


def test_a_repeated_reply_is_accepted_and_a_different_one_is_a_conflict() -> None:
    async def scene(box: Mailbox) -> None:
        (waiting,) = await put(box, request(1))
        box.take_reply(request(1).id, REPLY)
        box.take_reply(request(1).id, REPLY)
        with pytest.raises(CoordinatorRefusedError) as refused:
            box.take_reply(request(1).id, OTHER)
        assert refused.value.code == "conflict"
        assert await waiting == REPLY
        box.take_reply(request(1).id, REPLY)

    play(scene)


def test_a_reply_that_nobody_waits_for_is_refused() -> None:
    async def scene(box: Mailbox) -> None:
        (waiting,) = await put(box, request(1))
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        for id in (request(1).id, request(2).id):
            with pytest.raises(CoordinatorRefusedError) as refused:
                box.take_reply(id, REPLY)
            assert refused.value.code == "unknown-request"

    play(scene)


def test_a_newer_poll_supersedes_an_older_one() -> None:
    async def scene(box: Mailbox) -> None:
        older = asyncio.ensure_future(box.poll((), 10.0))
        await asyncio.sleep(0)
        newer = asyncio.ensure_future(box.poll((), 10.0))
        with raises(CoordinatorRefusedError, code="superseded"):
            await older
        await asyncio.sleep(0)
        waiting = asyncio.ensure_future(box.exchange(request(1), 10.0))
        assert (await newer).requests == (request(1),)
        waiting.cancel()

    play(scene)


def test_the_end_of_a_superseded_poll_does_not_forget_when_the_device_is_to_call() -> None:
    async def scene(box: Mailbox) -> None:
        older = asyncio.ensure_future(box.poll((), 10.0))
        await asyncio.sleep(0)
        await box.poll((), 0.0)
        box.pause(300.0)
        with raises(CoordinatorRefusedError, code="superseded"):
            await older
        assert box.due_s > 200.0

    play(scene)


def test_a_device_that_never_called_is_out_of_reach_at_once() -> None:
    async def scene(box: Mailbox) -> None:
        assert not box.present
        with pytest.raises(NoResponseError):
            await box.exchange(request(1), 10.0)

    play(scene)


def test_a_device_that_stops_calling_is_out_of_reach_and_its_requests_fail(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scene(box: Mailbox) -> None:
        monkeypatch.setattr(mailbox, "ABSENT_S", 0.5)
        held, waiting = await put(box, request(1)), []
        await box.poll((), 0.0)
        waiting = [*held, asyncio.ensure_future(box.exchange(request(2), 10.0))]
        await asyncio.sleep(0)
        assert box.present
        outcomes = await asyncio.gather(*waiting, return_exceptions=True)
        assert [outcome.begun for outcome in outcomes] == [True, False]
        assert not box.present

    play(scene)


def test_a_device_that_polls_but_does_not_reply_times_out() -> None:
    async def scene(box: Mailbox) -> None:
        polling = asyncio.ensure_future(box.poll((request(1).id,), 10.0))
        await asyncio.sleep(0)
        with pytest.raises(NoResponseError):
            await box.exchange(request(1), 0.0)
        polling.cancel()

    play(scene)


def test_a_closed_mailbox_ends_its_poll_and_says_when_to_call_again() -> None:
    async def scene(box: Mailbox) -> None:
        polling = asyncio.ensure_future(box.poll((), 10.0))
        await asyncio.sleep(0)
        box.close()
        with pytest.raises(CoordinatorRefusedError) as refused:
            await polling
        assert (refused.value.code, refused.value.retry_after_s) == ("stopping", mailbox.STOPPING_S)
        assert not box.present

    play(scene)


def test_a_post_office_that_does_not_run_reaches_no_device() -> None:
    async def main() -> None:
        with pytest.raises(NoResponseError):
            await PostOffice().exchange("a", request(1), 1.0)
        office = PostOffice()
        office.open()
        office.close()
        with pytest.raises(NoResponseError):
            await office.exchange("a", request(1), 1.0)
        assert not office.box("a").present

    asyncio.run(main())


def test_a_device_that_was_told_to_call_later_is_present_until_then(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(mailbox, "_now", lambda: now)

    async def scene(box: Mailbox) -> None:
        nonlocal now
        await box.poll((), 0.0)
        box.pause(300.0)
        now += 299.0
        assert (box.present, box.silent_s, box.due_s) == (True, 0.0, 1.0)
        now += 1.0 + mailbox.ABSENT_S
        assert (box.present, box.silent_s, box.due_s) == (False, mailbox.ABSENT_S, 0.0)

    play(scene)


def test_a_request_waits_until_a_paced_device_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene(box: Mailbox) -> None:
        monkeypatch.setattr(mailbox, "ABSENT_S", 0.2)
        await box.poll((), 0.0)
        box.pause(0.5)
        waiting = asyncio.ensure_future(box.exchange(request(1), 0.1))
        await asyncio.sleep(0.3)  # beyond its time limit, which only begins when the device is due
        assert not box.is_idle
        assert (await box.poll((), 0.0)).requests == (request(1),)
        box.take_reply(request(1).id, REPLY)
        assert await waiting == REPLY
        assert box.is_idle

    play(scene)


def test_a_paced_device_that_does_not_call_is_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene(box: Mailbox) -> None:
        monkeypatch.setattr(mailbox, "ABSENT_S", 0.1)
        await box.poll((), 0.0)
        box.pause(0.2)
        with pytest.raises(NoResponseError, match="does not call in"):
            await box.exchange(request(1), 10.0)

    play(scene)


def test_of_several_runs_the_one_that_needs_a_device_first_paces_it() -> None:
    office = PostOffice()
    assert office.pause_s("a") == 0.0
    office.pace("one", lambda device: 30.0 if device in "ab" else float("inf"))
    office.pace("other", lambda device: 20.0 if device == "a" else float("inf"))
    assert [office.pause_s(device) for device in "abc"] == [20.0, 30.0, 0.0]
    office.pace("one", None)
    assert [office.pause_s(device) for device in "abc"] == [20.0, 0.0, 0.0]


def test_the_devices_of_a_large_fleet_are_told_to_call_later_even_without_a_run() -> None:
    office = PostOffice()
    for i in range(6250):
        office.box(f"d{i}")
    assert office.pause_s("d1") == 0.0
    for i in range(6250, 12500):
        office.box(f"d{i}")
    pauses = [office.pause_s("d1") for _ in range(200)]
    assert 56.25 <= min(pauses) < 65.0 < 85.0 < max(pauses) <= 93.75
    office.pace("r", lambda device: 0.0 if device == "d1" else float("inf"))
    assert office.pause_s("d1") == 0.0
    assert office.pause_s("d2") > 0.0
