"""Slots: few at the same time, and nobody waits for one that is slow."""

from __future__ import annotations

import asyncio

from fedbpt.coordinator.slots import Slots


def test_as_many_as_allowed_have_a_turn_and_the_next_comes_when_one_ends() -> None:
    async def main() -> list[str]:
        slots, said = Slots(at_once=2, max_hold_s=60.0), []
        doors = {name: asyncio.Event() for name in "abc"}

        async def go(name: str) -> None:
            async with slots.acquire():
                said.append(name)
                await doors[name].wait()

        going = [asyncio.ensure_future(go(name)) for name in "abc"]
        await asyncio.sleep(0.05)
        said.append("-")
        doors["b"].set()
        await asyncio.sleep(0.05)
        for door in doors.values():
            door.set()
        await asyncio.gather(*going)
        return said

    assert asyncio.run(main()) == ["a", "b", "-", "c"]


def test_a_turn_ends_early_by_what_it_was_given_and_only_once() -> None:
    async def main() -> None:
        slots = Slots(at_once=1, max_hold_s=60.0)
        async with slots.acquire() as release:
            release()
            release()
            async with slots.acquire():
                waiting = asyncio.ensure_future(slots.acquire().__aenter__())
                await asyncio.sleep(0.05)
                assert not waiting.done()
            await waiting

    asyncio.run(asyncio.wait_for(main(), 10))


def test_who_takes_long_holds_up_nobody() -> None:
    async def main() -> None:
        slots = Slots(at_once=1, max_hold_s=0.05)
        async with slots.acquire(), slots.acquire(), slots.acquire():
            pass

    asyncio.run(asyncio.wait_for(main(), 10))


def test_a_turn_that_ends_with_an_error_is_free_again() -> None:
    async def main() -> None:
        slots = Slots(at_once=1, max_hold_s=60.0)
        for _ in range(3):
            try:
                async with slots.acquire():
                    raise KeyError
            except KeyError:
                continue

    asyncio.run(asyncio.wait_for(main(), 10))
