"""`EventFeed`: readers at any pace, and writers that never wait for them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from fedbpt.coordinator.monitoring.feed import EventFeed, Missed
from fedbpt.runs.event_log import Journal, Line
from fedbpt.runs.events import LateReport, StageBegan, TemplateSelected
from tests.unit.display.test_display import TEMPLATE, started


def event(round: int) -> LateReport:
    return LateReport(device="a", round=round)


@asynccontextmanager
async def open_feed(**limits: Any) -> AsyncIterator[tuple[EventFeed, Journal]]:
    feed = EventFeed(**limits)
    feed.open()
    yield feed, Journal(feed)
    feed.close()


def short(item: Line | Missed | None) -> Any:
    return item.entry.seq if isinstance(item, Line) else item


async def to_end(feed: EventFeed, after: str = "") -> list[Any]:
    feed.close()
    return [short(item) async for item in feed.read(after, 60)]


def in_loop(main: Callable[[], Any]) -> Any:
    return asyncio.run(main())


def test_a_reader_gets_old_and_new_lines_and_ends_with_the_feed() -> None:
    async def main() -> list[Any]:
        async with open_feed() as (feed, journal):
            journal(event(1))
            found = []
            async for item in feed.read("", 60):
                found.append(short(item))
                if len(found) == 1:
                    await asyncio.get_running_loop().run_in_executor(None, journal, event(2))  # the run's own thread
                if len(found) == 2:
                    journal(event(3))
                    feed.close()
            assert feed.n_readers == 0
            return found

    assert in_loop(main) == [1, 2, 3]


def test_a_reader_waits_until_another_thread_writes() -> None:
    async def main() -> list[Any]:
        async with open_feed() as (feed, journal):
            reading = asyncio.ensure_future(anext(feed.read("", 60)))
            while not feed.n_readers:
                await asyncio.sleep(0)
            await asyncio.get_running_loop().run_in_executor(None, journal, event(1))
            return [short(await reading)]

    assert in_loop(main) == [1]


def test_a_reader_that_returns_continues_after_its_last_line() -> None:
    async def main() -> list[list[Any]]:
        lines: list[Line] = []
        async with open_feed() as (feed, _):
            journal = Journal(feed, lambda line: lines.append(line) or "")
            for round in range(4):
                journal(event(round))
            sitting = lines[0].entry.sitting
            ids = (f"{sitting}-2", f"{sitting}-4", f"{sitting}-9", "0badcafe-2", "nonsense", f"{sitting}-", "-")
            return [await to_end(feed, after) for after in ids]

    everything = [1, 2, 3, 4]
    assert in_loop(main) == [[3, 4], [], [], everything, everything, everything, everything]


def test_a_slow_reader_is_told_what_it_missed_and_memory_stays_bounded() -> None:
    async def main() -> list[Any]:
        async with open_feed(keep_lines=3) as (feed, journal):
            journal(event(0))
            reader = feed.read("", 60)
            found = [short(await anext(reader))]
            for round in range(1, 10):
                journal(event(round))
            feed.close()
            found += [short(item) async for item in reader]
            assert len(feed._lines) == 3
            return found

    assert in_loop(main) == [1, Missed(6), 8, 9, 10]


def test_long_lines_are_bounded_by_their_bytes() -> None:
    async def main() -> list[Any]:
        async with open_feed(keep_bytes=400) as (feed, journal):
            for round in range(9):
                journal(LateReport(device="d" * 100, round=round))
            return await to_end(feed)

    assert in_loop(main) == [9]


def test_a_late_reader_gets_what_the_lines_that_are_left_need() -> None:
    async def main() -> list[list[Any]]:
        lines: list[Line] = []
        async with open_feed(keep_lines=2) as (feed, _):
            journal = Journal(feed, lambda line: lines.append(line) or "")
            journal(started())
            journal(TemplateSelected(template=TEMPLATE, index=0, losses=()))
            journal(StageBegan(stage="calibration"))
            journal(StageBegan(stage="search"))
            for round in range(6):
                journal(event(round))
            sitting = lines[0].entry.sitting
            return [await to_end(feed, f"{sitting}-{seq}") for seq in (0, 2, 4, 9)]

    left = [Missed(4), 9, 10]
    new, known = [1, 2, Missed(1), 4, *left], [Missed(1), 4, *left]
    assert in_loop(main) == [new, known, left, [10]]


def test_a_reader_gets_a_heartbeat_while_nothing_happens() -> None:
    async def main() -> Any:
        async with open_feed() as (feed, _):
            return await anext(feed.read("", 0.001))

    assert in_loop(main) is None


def test_a_feed_takes_lines_after_its_loop_has_ended() -> None:
    feed = EventFeed()

    async def main() -> None:
        feed.open()

    asyncio.run(main())
    feed._woken.add(asyncio.Event())  # a reader that was cut off
    Journal(feed)(event(1))
    assert len(feed._lines) == 1
