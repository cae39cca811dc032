"""`Slots`: a limited number at a time, without waiting for slow holders."""

from __future__ import annotations

import asyncio

from fedbpt.coordinator.devices.slots import Slots


def test_slots_are_limited_and_freed_in_order() -> None:
    async def main() -> list[str]:
        slots, said = Slots(at_once=2, max_hold_s=60.0), []
        events = {name: asyncio.Event() for name in "abc"}

        async def go(name: str) -> None:
            async with slots.acquire():
                said.append(name)
                await events[name].wait()

        going = [asyncio.ensure_future(go(name)) for name in "abc"]
        await asyncio.sleep(0.05)
        said.append("-")
        events["b"].set()
        await asyncio.sleep(0.05)
        for event in events.values():
            event.set()
        await asyncio.gather(*going)
        return said

    assert asyncio.run(main()) == ["a", "b", "-", "c"]


def test_a_slot_is_released_early_and_only_once() -> None:
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


def test_a_slot_held_for_too_long_is_released() -> None:
    async def main() -> None:
        slots = Slots(at_once=1, max_hold_s=0.05)
        async with slots.acquire(), slots.acquire(), slots.acquire():
            pass

    asyncio.run(asyncio.wait_for(main(), 10))


def test_a_slot_is_released_after_an_error() -> None:
    async def main() -> None:
        slots = Slots(at_once=1, max_hold_s=60.0)
        for _ in range(3):
            try:
                async with slots.acquire():
                    raise KeyError
            except KeyError:
                continue

    asyncio.run(asyncio.wait_for(main(), 10))
