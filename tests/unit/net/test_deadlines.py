"""Timeouts of coroutines, which never lose a cancellation."""

from __future__ import annotations

import asyncio

import pytest

from fedbpt.net.deadlines import within


async def finished(value: int = 7) -> int:
    return value


async def endless(told: list[str]) -> None:
    try:
        await asyncio.sleep(1e6)
    except asyncio.CancelledError:
        told.append("cancelled")
        raise


def test_what_ends_in_time_returns_or_raises() -> None:
    async def fail() -> None:
        raise KeyError("mine")

    assert asyncio.run(within(60, finished())) == 7
    with pytest.raises(KeyError, match="mine"):
        asyncio.run(within(60, fail()))


def test_what_does_not_is_cancelled_before_the_time_out_is_raised() -> None:
    told: list[str] = []
    with pytest.raises(asyncio.TimeoutError):
        asyncio.run(within(0.01, endless(told)))
    assert told == ["cancelled"]


@pytest.mark.parametrize("ending", [True, False])
def test_a_cancellation_is_not_lost_even_as_the_work_ends(ending: bool) -> None:
    async def main() -> list[str]:
        event, told = asyncio.Event(), list[str]()

        async def work() -> None:
            try:
                await event.wait()
            finally:
                told.append("ended")

        outer = asyncio.ensure_future(within(60, work()))
        await asyncio.sleep(0.01)
        if ending:
            event.set()
            while not told:
                await asyncio.sleep(0)
        outer.cancel()  # in the same turn of the loop as the work's end
        with pytest.raises(asyncio.CancelledError):
            await outer
        return told

    assert asyncio.run(main()) == ["ended"]
