"""Whose answer is computed when: requests by turns, whatever their lengths, and only one text open at a time."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from functools import partial

import pytest

from fedbpt.engine.text_generator import Placed
from fedbpt.engine.text_stream import SLICE, Generation
from fedbpt.errors import FedbptError, InputError, ScoringInterrupted
from fedbpt.serving.desk import MAX_REQUESTS, Desk, Job, Ticket
from tests.support.toy_scorer import ToyScorer

Scene = Callable[[Desk, ToyScorer], Coroutine[None, None, None]]


def play(scene: Scene) -> None:
    """With a generator that waits until ``pace`` is set."""

    async def act() -> None:
        desk, scorer = Desk(), ToyScorer()
        scorer.generator.pace.clear()
        try:
            await scene(desk, scorer)
        finally:
            scorer.generator.pace.set()
            assert await asyncio.to_thread(desk.close)
        assert scorer.generator.n_open == 0

    asyncio.run(act())


def begin(scorer: ToyScorer, text: str, n: int) -> Generation:
    return Generation(scorer.generator, Placed(scorer.tokenize(text)), max_tokens=n)


def take(desk: Desk, scorer: ToyScorer, *texts: str, n: int = 3) -> Ticket:
    return desk.take([partial(begin, scorer, text, n) for text in texts])


async def read(job: Job) -> str:
    await job.begun()
    return "".join([piece.text async for piece in job.pieces()])


def alone(text: str, n: int) -> str:
    return "".join(piece.text for piece in begin(ToyScorer(), text, n))


def order(scorer: ToyScorer) -> str:
    """The first letters of the texts, as they were opened."""
    return "".join(chr(placed.ids[1]) for placed in scorer.generator.opened)


def test_a_request_with_many_prompts_takes_turns_with_others() -> None:
    async def scene(desk: Desk, scorer: ToyScorer) -> None:
        many, one, two = take(desk, scorer, *"abcdef"), take(desk, scorer, "x"), take(desk, scorer, "y", "z")
        scorer.generator.pace.set()
        assert await read(one.jobs[0]) == alone("x", 3)
        assert [await read(job) for job in two.jobs] == [alone(text, 3) for text in "yz"]
        assert [await read(job) for job in many.jobs] == [alone(text, 3) for text in "abcdef"]
        assert order(scorer) == "axybzcdef"

    play(scene)


def test_a_long_answer_takes_turns_with_others_and_is_the_same() -> None:
    async def scene(desk: Desk, scorer: ToyScorer) -> None:
        long, others = take(desk, scorer, "a", n=3 * SLICE), [take(desk, scorer, text, n=SLICE + 1) for text in "xy"]
        scorer.generator.pace.set()
        assert [await read(ticket.jobs[0]) for ticket in others] == [alone(text, SLICE + 1) for text in "xy"]
        assert await read(long.jobs[0]) == alone("a", 3 * SLICE)
        assert order(scorer) == "axyaxya"

    play(scene)


def test_one_alone_is_not_paused() -> None:
    async def scene(desk: Desk, scorer: ToyScorer) -> None:
        scorer.generator.pace.set()
        ticket = take(desk, scorer, "a", n=5 * SLICE)
        assert await read(ticket.jobs[0]) == alone("a", 5 * SLICE)
        assert order(scorer) == "a"

    play(scene)


def test_what_nobody_waits_for_is_not_computed() -> None:
    async def scene(desk: Desk, scorer: ToyScorer) -> None:
        first, second, third = take(desk, scorer, *"abc", n=400), take(desk, scorer, "x"), take(desk, scorer, "y")
        await first.jobs[0].begun()
        for ticket in (first, second):
            ticket.close()
            ticket.close()
        scorer.generator.pace.set()
        assert await read(third.jobs[0]) == alone("y", 3)
        assert order(scorer) == "ay"
        with pytest.raises(ScoringInterrupted):
            _ = [piece async for piece in first.jobs[0].pieces()]
        with pytest.raises(FedbptError):
            await second.jobs[0].begun()

    play(scene)


def test_an_answer_that_fails_leaves_the_others_their_turns() -> None:
    async def scene(desk: Desk, scorer: ToyScorer) -> None:
        scorer.generator.pace.set()
        ticket = take(desk, scorer, "a", "x" * 600, "b")
        assert await read(ticket.jobs[0]) == alone("a", 3)
        with pytest.raises(InputError):
            await ticket.jobs[1].begun()
        assert await read(ticket.jobs[2]) == alone("b", 3)

    play(scene)


def test_a_place_is_held_until_the_ticket_is_closed() -> None:
    async def scene(desk: Desk, scorer: ToyScorer) -> None:
        scorer.generator.pace.set()
        tickets = [take(desk, scorer, "a", "b") for _ in range(MAX_REQUESTS)]
        for ticket in tickets:
            for job in ticket.jobs:
                await read(job)
        assert desk.is_full  # what was computed is not sent yet
        tickets[0].close()
        assert not desk.is_full

    play(scene)


def test_work_goes_on_after_a_rest() -> None:
    async def scene(desk: Desk, scorer: ToyScorer) -> None:
        scorer.generator.pace.set()
        for _ in range(50):  # each may find the thread just about to stop
            assert await read(take(desk, scorer, "a", n=1).jobs[0]) == alone("a", 1)
        assert threading.active_count() < 20

    play(scene)
