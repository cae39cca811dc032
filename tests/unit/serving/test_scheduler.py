"""The order of computation: several texts at a time, requests round-robin where more wait."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator
from functools import partial

import pytest

from fedbpt.engine.text_generator import Placed
from fedbpt.engine.text_stream import SLICE, FinishReason, Generation, Piece
from fedbpt.errors import FedbptError, InputError, ScoringInterrupted
from fedbpt.serving.scheduler import MAX_REQUESTS, Job, Scheduler, Ticket
from tests.support.toy_generator import PLACES, ToyGenerator, ToyStream
from tests.support.toy_scorer import ToyScorer

Scene = Callable[[Scheduler, ToyScorer], Coroutine[None, None, None]]


def play(scene: Scene) -> None:
    """Run ``scene`` with a generator that waits until ``pace`` is set."""

    async def act() -> None:
        scheduler, scorer = Scheduler(), ToyScorer()
        scorer.generator.pace.clear()
        try:
            await scene(scheduler, scorer)
        finally:
            scorer.generator.pace.set()
            assert await asyncio.to_thread(scheduler.close)
        assert scorer.generator.n_open == 0

    asyncio.run(act())


def begin(scorer: ToyScorer, text: str, n: int) -> Generation:
    return Generation(scorer.generator, Placed(scorer.tokenize(text)), max_tokens=n)


def submit(scheduler: Scheduler, scorer: ToyScorer, *texts: str, n: int = 3) -> Ticket:
    return scheduler.submit([partial(begin, scorer, text, n) for text in texts])


async def read(job: Job) -> str:
    await job.started()
    return "".join([piece.text async for piece in job.pieces()])


def alone(text: str, n: int) -> str:
    return "".join(piece.text for piece in begin(ToyScorer(), text, n))


def order(scorer: ToyScorer) -> str:
    """The first letters of the texts, in the order in which they were opened."""
    return "".join(chr(placed.ids[1]) for placed in scorer.generator.opened)


def test_a_request_with_many_prompts_takes_turns_with_others() -> None:
    async def scene(scheduler: Scheduler, scorer: ToyScorer) -> None:
        many, one, two = (
            submit(scheduler, scorer, *"abcdef"),
            submit(scheduler, scorer, "x"),
            submit(scheduler, scorer, "y", "z"),
        )
        scorer.generator.pace.set()
        assert await read(one.jobs[0]) == alone("x", 3)
        assert [await read(job) for job in two.jobs] == [alone(text, 3) for text in "yz"]
        assert [await read(job) for job in many.jobs] == [alone(text, 3) for text in "abcdef"]
        assert order(scorer) == "axybzcdef"

    play(scene)


def test_a_long_completion_takes_turns_with_others_and_is_the_same() -> None:
    async def scene(scheduler: Scheduler, scorer: ToyScorer) -> None:
        long, others = (
            submit(scheduler, scorer, "a", n=3 * SLICE),
            [submit(scheduler, scorer, text, n=SLICE + 1) for text in "xy"],
        )
        scorer.generator.pace.set()
        assert [await read(ticket.jobs[0]) for ticket in others] == [alone(text, SLICE + 1) for text in "xy"]
        assert await read(long.jobs[0]) == alone("a", 3 * SLICE)
        assert order(scorer) == "axy"

    play(scene)


def test_more_long_completions_than_places_take_turns_and_are_the_same() -> None:
    async def scene(scheduler: Scheduler, scorer: ToyScorer) -> None:
        texts = "abcdef"
        assert len(texts) > PLACES
        tickets = [submit(scheduler, scorer, text, n=2 * SLICE + 1) for text in texts]
        scorer.generator.pace.set()
        found = await asyncio.gather(*(read(ticket.jobs[0]) for ticket in tickets))
        assert list(found) == [alone(text, 2 * SLICE + 1) for text in texts]
        assert order(scorer)[: len(texts)] == texts  # the last ones do not wait for the end of the first

    play(scene)


def test_texts_that_do_not_fit_into_the_context_together_take_turns() -> None:
    async def scene(scheduler: Scheduler, scorer: ToyScorer) -> None:
        texts = [letter * (scorer.n_ctx // 2) for letter in "abc"]
        tickets = [submit(scheduler, scorer, text, n=SLICE + 5) for text in texts]
        scorer.generator.pace.set()
        open_at_once = []

        async def watch(job: Job) -> str:
            await job.started()
            pieces = []
            async for piece in job.pieces():
                open_at_once.append(scorer.generator.n_open)
                pieces.append(piece.text)
            return "".join(pieces)

        found = await asyncio.gather(*(watch(ticket.jobs[0]) for ticket in tickets))
        assert list(found) == [alone(text, SLICE + 5) for text in texts]
        assert max(open_at_once) <= 2  # one, and one that is found not to fit

    play(scene)


def test_a_single_request_is_not_paused() -> None:
    async def scene(scheduler: Scheduler, scorer: ToyScorer) -> None:
        scorer.generator.pace.set()
        ticket = submit(scheduler, scorer, "a", n=5 * SLICE)
        assert await read(ticket.jobs[0]) == alone("a", 5 * SLICE)
        assert order(scorer) == "a"

    play(scene)


def test_closed_requests_are_not_computed() -> None:
    async def scene(scheduler: Scheduler, scorer: ToyScorer) -> None:
        first, second, third = (
            submit(scheduler, scorer, *"abc", n=400),
            submit(scheduler, scorer, "x"),
            submit(scheduler, scorer, "y"),
        )
        await first.jobs[0].started()
        for ticket in (first, second):
            ticket.close()
            ticket.close()
        scorer.generator.pace.set()
        assert await read(third.jobs[0]) == alone("y", 3)
        assert "c" not in order(scorer)
        with pytest.raises(ScoringInterrupted):
            await read(first.jobs[0])
        for job in (*first.jobs[1:], second.jobs[0]):  # were they begun before they were closed?
            with pytest.raises(FedbptError):
                await read(job)

    play(scene)


def test_a_completion_that_fails_does_not_affect_others() -> None:
    async def scene(scheduler: Scheduler, scorer: ToyScorer) -> None:
        scorer.generator.pace.set()
        ticket = submit(scheduler, scorer, "a", "x" * 600, "b")
        assert await read(ticket.jobs[0]) == alone("a", 3)
        with pytest.raises(InputError):
            await ticket.jobs[1].started()
        assert await read(ticket.jobs[2]) == alone("b", 3)

    play(scene)


def test_a_request_counts_until_its_ticket_is_closed() -> None:
    async def scene(scheduler: Scheduler, scorer: ToyScorer) -> None:
        scorer.generator.pace.set()
        tickets = [submit(scheduler, scorer, "a", "b") for _ in range(MAX_REQUESTS)]
        for ticket in tickets:
            for job in ticket.jobs:
                await read(job)
        assert scheduler.is_full  # what was computed is not sent yet
        tickets[0].close()
        assert not scheduler.is_full

    play(scene)


def test_work_resumes_after_an_idle_time() -> None:
    async def scene(scheduler: Scheduler, scorer: ToyScorer) -> None:
        scorer.generator.pace.set()
        for _ in range(50):  # each may find the thread just about to stop
            assert await read(submit(scheduler, scorer, "a", n=1).jobs[0]) == alone("a", 1)
        assert threading.active_count() < 20

    play(scene)


def test_an_unexpected_error_ends_the_texts_but_not_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene(scheduler: Scheduler, scorer: ToyScorer) -> None:
        def fail(*_: object) -> None:
            raise RuntimeError("the memory is full")

        with monkeypatch.context() as patched:
            patched.setattr(ToyGenerator, "next_all", fail)
            patched.setattr(ToyStream, "next", fail)
            tickets = [submit(scheduler, scorer, text) for text in "ab"]
            scorer.generator.pace.set()
            for ticket in tickets:
                with pytest.raises(RuntimeError, match="memory"):
                    await asyncio.wait_for(read(ticket.jobs[0]), 10)
        assert scorer.generator.n_open == 0
        assert await read(submit(scheduler, scorer, "c").jobs[0]) == alone("c", 3)

    play(scene)


class Label:
    """A completion that is computed when it is begun, as a label is."""

    n_prompt, n_tokens = 1, 1
    finish_reason: FinishReason | None = "stop"

    def __init__(self) -> None:
        self._pieces = iter([Piece("label", None)])

    def __iter__(self) -> Iterator[Piece]:
        return self._pieces

    def __next__(self) -> Piece:
        return next(self._pieces)

    def cancel(self) -> None: ...

    def pause(self) -> None: ...

    def close(self) -> None: ...


def test_labels_and_texts_take_turns() -> None:
    async def scene(scheduler: Scheduler, scorer: ToyScorer) -> None:
        text = submit(scheduler, scorer, "a", n=20)
        await text.jobs[0].started()
        begun_at = []

        def label() -> Label:
            begun_at.append(scorer.generator.n_tokens)
            return Label()

        labels = scheduler.submit([label] * 10)
        scorer.generator.pace.set()
        assert [await read(job) for job in labels.jobs] == ["label"] * 10
        assert "".join([piece.text async for piece in text.jobs[0].pieces()]) == alone("a", 20)
        assert len(set(begun_at)) == 10  # a token of the text between two labels

    play(scene)
