"""The contract of every `DeviceClient`, whatever its transport."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from fedbpt.coordinator.clients import DeviceClient, HttpClient, InProcessClient
from fedbpt.coordinator.devices.slots import Slots
from fedbpt.device.agent import AgentService
from fedbpt.device.agent.server import AgentServer
from fedbpt.errors import DataError, DeviceFailedError, DeviceRefusedError, DeviceTimeoutError, InputError
from fedbpt.protocol import codec
from fedbpt.protocol.questions import Answer, Question
from fedbpt.protocol.rounds import EvaluateRequest, PooledWork, RoundPlan, RoundProgress, SearchState
from fedbpt.protocol.specs import Array, ObjectiveSpec, PromptSpec, Template
from fedbpt.protocol.task_identity import TaskIdentity
from tests.support.caller import called_by
from tests.support.fake_device import FINGERPRINT, TOY, FakeDevice
from tests.support.raises import raises

TEMPLATE = Template(pattern="{text} It was", label_words=(" bad", " good"))


def plan(**changes: Any) -> RoundPlan:
    made = RoundPlan(
        run="r",
        round=1,
        device="a",
        seed=0,
        model_fingerprint=FINGERPRINT,
        task=TOY,
        labels=("x", "y"),
        template=TEMPLATE,
        prompt=PromptSpec(d=3),
        objective=ObjectiveSpec(),
        work=PooledWork(state=SearchState(mean=Array.of(np.zeros(3)), sigma=1.0), generation=0, popsize=4),
    )
    return msgspec.structs.replace(made, **changes)


def request(**changes: Any) -> EvaluateRequest:
    made = EvaluateRequest(
        model_fingerprint=FINGERPRINT,
        task=TOY,
        labels=("x", "y"),
        template=TEMPLATE,
        prompt=PromptSpec(d=3),
        objective=ObjectiveSpec(),
        latents=Array.of(np.array([np.zeros(3), np.ones(3)])),
    )
    return msgspec.structs.replace(made, **changes)


@pytest.fixture
def device() -> FakeDevice:
    return FakeDevice("a")


@pytest.fixture(params=["in_process", "http", "mailbox"])
def make_client(
    request: pytest.FixtureRequest, device: FakeDevice, tmp_path: Path
) -> Iterator[Callable[[], DeviceClient]]:
    if request.param == "in_process":
        yield lambda: InProcessClient(device)
        return
    if request.param == "mailbox":
        with called_by(tmp_path, device) as coordinator:
            yield lambda: coordinator.client("a")
        return
    with AgentServer(AgentService(device)) as server:
        yield lambda: HttpClient(server.url, name="a")


def play(make_client: Callable[[], DeviceClient], scene: Callable[[DeviceClient], Awaitable[None]]) -> DeviceClient:
    @asynccontextmanager
    async def opened() -> AsyncIterator[DeviceClient]:
        client = make_client()
        try:
            yield client
        finally:
            await client.aclose()

    async def main() -> DeviceClient:
        async with opened() as client:
            await asyncio.wait_for(scene(client), 20)
            return client

    return asyncio.run(main())


def test_status_is_what_the_device_says(make_client, device):
    async def scene(client):
        assert await client.status() == device.info()

    assert play(make_client, scene).name == "a"


def test_a_round_is_accepted_at_once_and_its_report_awaited(make_client, device):
    device.slow_s = 1.0

    async def scene(client):
        began = time.monotonic()
        await client.start(plan())
        assert (await client.status()).busy
        report = await client.wait("r", 1)
        assert time.monotonic() - began >= 1.0
        assert report.plan_digest == codec.digest(plan())
        assert not (await client.status()).busy

    play(make_client, scene)


def test_the_same_plan_again_gives_the_same_report_without_working_twice(make_client, device):
    async def scene(client):
        await client.start(plan())
        await client.start(plan())
        first = await client.wait("r", 1)
        await client.start(plan())
        assert await client.wait("r", 1) == first

    play(make_client, scene)
    assert len(device.plans) == 1


def test_another_plan_for_the_same_round_is_a_conflict(make_client, device):
    async def scene(client):
        for _ in range(2):
            await client.start(plan())
            with raises(DeviceRefusedError, code="conflict"):
                await client.start(plan(seed=1))
            await client.wait("r", 1)

    play(make_client, scene)
    assert len(device.plans) == 1


def test_a_plan_for_another_model_is_refused_by_name(make_client):
    async def scene(client):
        for ask, message in ((client.start, plan()), (client.evaluate, request())):
            with raises(DeviceRefusedError, code="wrong-model") as caught:
                await ask(msgspec.structs.replace(message, model_fingerprint="sha256:other"))
            assert "sha256:other" in str(caught.value)

    play(make_client, scene)


def test_work_for_another_task_is_refused_by_name(make_client, device):
    async def scene(client):
        for ask in (client.start, client.work):
            with raises(DeviceRefusedError, code="wrong-task") as caught:
                await ask(plan(task=TaskIdentity.of("weather", ("x", "y"))))
            assert all(name in str(caught.value) for name in ("toy", "weather"))
        with raises(DeviceRefusedError, code="wrong-task"):
            await client.evaluate(request(task=TaskIdentity.of("toy", ("y", "x"))))

    play(make_client, scene)
    assert device.plans == device.requests == []


def test_an_unknown_round_is_refused_as_such(make_client):
    async def scene(client):
        with raises(DeviceRefusedError, code="unknown-round"):
            await client.wait("r", 7)

    play(make_client, scene)


def test_waiting_ends_at_its_timeout_and_the_work_goes_on(make_client, device):
    device.gate.clear()
    seen: list[RoundProgress] = []

    async def scene(client):
        await client.start(plan())
        began = time.monotonic()
        with raises(DeviceTimeoutError, device="a") as caught:
            await client.wait("r", 1, timeout_s=0.2, on_progress=seen.append)
        assert "round 1 within 0.2 s" in str(caught.value)
        assert time.monotonic() - began < 2
        device.gate.set()
        await client.wait("r", 1)

    play(make_client, scene)
    assert (seen[-1].done, seen[-1].total, seen[-1].state) == (1, 2, "running")


def test_cancelling_stops_the_work_and_the_round_can_begin_again(make_client, device):
    device.gate.clear()

    async def scene(client):
        await client.start(plan())
        waiting = asyncio.ensure_future(client.wait("r", 1))
        await asyncio.sleep(0.1)
        await client.cancel("r", 1)
        with raises(DeviceFailedError, device="a", is_fault=False):
            await waiting
        with raises(DeviceRefusedError, code="unknown-round"):
            await client.wait("r", 1)
        await client.cancel("r", 1)
        assert not (await client.status()).busy
        device.gate.set()
        await client.start(plan())
        await client.wait("r", 1)

    play(make_client, scene)


def test_failed_work_is_reported_with_its_reason_and_can_be_tried_again(make_client, device):
    async def scene(client):
        quoting = DataError("row 3: 'the cat sat'", public="row 3")
        problems = (InputError("no rows"), "no rows"), (quoting, "row 3"), (KeyError("the cat"), "KeyError")
        for problem, told in problems:
            device.fail = problem
            await client.start(plan())
            with raises(DeviceFailedError, device="a") as failed:
                await client.wait("r", 1)
            assert told in str(failed.value)
            assert "the cat" not in str(failed.value)  # no text of a row leaves the device
        device.fail = None
        await client.start(plan())
        await client.wait("r", 1)

    play(make_client, scene)


def test_work_is_the_report_on_a_plan(make_client, device):
    async def scene(client):
        report = await client.work(plan())
        assert report.plan_digest == codec.digest(plan())
        assert await client.work(plan()) == report
        with raises(DeviceRefusedError, code="conflict"):
            await client.work(plan(seed=1))
        with raises(DeviceRefusedError, code="wrong-model"):
            await client.work(plan(model_fingerprint="sha256:other"))

    play(make_client, scene)
    assert len(device.plans) == 1


def test_work_that_takes_longer_than_a_poll_is_followed_to_its_end(make_client, device):
    device.slow_s = 1.0
    seen: list[RoundProgress] = []

    async def scene(client):
        client._poll_s = 0.2
        report = await client.work(plan(), on_progress=seen.append)
        assert report.plan_digest == codec.digest(plan())

    play(make_client, scene)
    assert {progress.state for progress in seen} == {"running"}


def test_work_that_is_cancelled_or_fails_raises(make_client, device):
    device.gate.clear()

    async def scene(client):
        working = asyncio.ensure_future(client.work(plan()))
        while not device.plans:  # work that the device has not begun is not there to be cancelled
            await asyncio.sleep(0.01)
        await client.cancel("r", 1)
        with raises(DeviceFailedError, device="a", is_fault=False):
            await working
        device.gate.set()
        device.fail = InputError("no rows")
        with raises(DeviceFailedError) as caught:
            await client.work(plan())
        assert "no rows" in str(caught.value)

    play(make_client, scene)


def test_a_slot_is_held_only_while_the_plan_is_sent(make_client, device):
    device.gate.clear()
    slots = Slots(at_once=1, max_hold_s=60.0)

    async def scene(client):
        working = asyncio.ensure_future(client.work(plan(), slots=slots))
        await asyncio.sleep(0)
        async with slots.acquire():  # the device has the plan, and works on it
            assert not working.done()
        device.gate.set()
        await working

    play(make_client, scene)


def test_a_finished_report_is_kept_until_the_next_round_replaces_it(make_client):
    async def scene(client):
        await client.start(plan())
        await client.wait("r", 1)
        await client.wait("r", 1)
        await client.start(plan(round=2))
        with pytest.raises(DeviceRefusedError):
            await client.wait("r", 1)

    play(make_client, scene)


def test_a_later_round_of_the_same_run_supersedes_one_at_work(make_client, device):
    device.gate.clear()

    async def scene(client):
        await client.start(plan())
        await client.start(plan(round=2))
        device.gate.set()
        assert (await client.wait("r", 2)).round == 2

    play(make_client, scene)


@pytest.mark.parametrize("run", ["r", "evaluate"])
def test_another_run_is_told_that_the_device_is_busy(make_client, device, run):
    device.gate.clear()

    async def scene(client):
        await client.start(plan(run=run))
        with raises(DeviceRefusedError, code="busy") as caught:
            await client.start(plan(run="other"))
        assert f"'{run}'" in str(caught.value)
        device.gate.set()
        await client.wait(run, 1)
        await client.start(plan(run="other"))
        await client.wait("other", 1)
        await client.wait(run, 1)

    play(make_client, scene)


def test_an_evaluation_gives_counts_for_every_latent(make_client, device):
    device.evaluate_slow_s = 0.2

    async def scene(client):
        report = await client.evaluate(request())
        assert (report.n, report.correct) == (20, (10, 20))
        assert (await client.evaluate(request(split="dev", max_rows=5))).n == 5

    play(make_client, scene)


def test_an_evaluation_waits_its_turn_and_may_run_out_of_time(make_client, device):
    device.gate.clear()

    async def scene(client):
        await client.start(plan())
        with raises(DeviceTimeoutError, device="a") as caught:
            await client.evaluate(request(), timeout_s=0.1)
        assert "evaluation within 0.1 s" in str(caught.value)
        device.gate.set()
        assert (await client.evaluate(request())).n == 20
        await client.wait("r", 1)

    play(make_client, scene)


def test_bodies_are_counted_both_ways(make_client):
    async def scene(client):
        info = await client.status()
        assert (client.bytes_down, client.bytes_up) == (0, len(codec.encode(info)))
        before = client.bytes_up
        await client.start(plan())
        assert client.bytes_down == len(codec.encode(plan()))
        report = await client.wait("r", 1)
        assert 0 <= client.bytes_up - before - len(codec.encode(report)) < 200

    play(make_client, scene)


def test_a_client_can_be_used_again_after_closing_in_another_loop(make_client):
    async def scene(client):
        await client.start(plan())
        await client.wait("r", 1)

    client = play(make_client, scene)
    play(lambda: client, scene)
    assert client.bytes_down >= len(codec.encode(plan()))


def test_closing_stops_the_work(device):
    device.gate.clear()

    async def scene(client):
        await client.start(plan())

    began = time.monotonic()
    play(lambda: InProcessClient(device), scene)
    assert time.monotonic() - began < 3


def question(**changes: Any) -> Question:
    made = Question(model_fingerprint=FINGERPRINT, prompt=b"of a file", text="so it is")
    return msgspec.structs.replace(made, **changes)


def test_a_question_is_answered_piece_by_piece(make_client, device):
    device.slow_s = 0.2
    so_far: list[Answer] = []

    async def scene(client):
        answer = await client.ask(question(seed=3, stop=("x",)), on_answer=so_far.append)
        assert answer == Answer(texts=("so it is ", "SO IT IS "), n=3, done=True)
        assert await client.ask(question(text="no")) == Answer(texts=("no ", "NO "), n=1, done=True)

    play(make_client, scene)
    assert device.questions == [question(seed=3, stop=("x",)), question(text="no")]
    assert Answer(texts=("so ", "SO "), n=1) in so_far


def test_the_same_question_again_is_answered_again(make_client, device):
    async def scene(client):
        assert await client.ask(question()) == await client.ask(question())

    play(make_client, scene)
    assert len(device.questions) == 2


def test_a_question_for_another_model_is_refused(make_client, device):
    async def scene(client):
        with raises(DeviceRefusedError, code="wrong-model"):
            await client.ask(question(model_fingerprint="sha256:other"))

    play(make_client, scene)
    assert not device.questions


def test_a_question_that_times_out_is_cancelled(make_client, device):
    device.slow_s = 5.0

    async def scene(client):
        with raises(DeviceTimeoutError, device="a"):
            await client.ask(question(), timeout_s=0.1)
        device.slow_s = 0.0
        assert (await client.ask(question(text="no"))).done

    play(make_client, scene)


def test_a_failed_answer_has_its_reason(make_client, device):
    device.fail = InputError("the text is empty: give at least one word")

    async def scene(client):
        with raises(DeviceFailedError) as caught:
            await client.ask(question())
        assert str(device.fail) in str(caught.value)

    play(make_client, scene)


def test_a_question_waits_for_a_running_round(make_client, device):
    device.slow_s = 0.3

    async def scene(client):
        await client.start(plan())
        answer = await client.ask(question(text="no"))
        assert answer.done
        assert (await client.wait("r", 1)).plan_digest == codec.digest(plan())

    play(make_client, scene)
