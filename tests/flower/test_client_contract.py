"""`FlowerClient` keeps the contract of every `DeviceClient`, except for what Flower does not support."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator

import httpx
import pytest

from fedbpt.coordinator.clients import DeviceClient
from fedbpt.errors import DeviceFailedError, DeviceTimeoutError, DeviceUnreachableError
from fedbpt.flower import FlowerClient, Nodes
from fedbpt.protocol import codec
from tests.contract.test_clients import (  # noqa: F401 - with the client below
    plan,
    play,
    test_a_client_can_be_used_again_after_closing_in_another_loop,
    test_a_finished_report_is_kept_until_the_next_round_replaces_it,
    test_a_later_round_of_the_same_run_supersedes_one_at_work,
    test_a_plan_for_another_model_is_refused_by_name,
    test_a_round_is_accepted_at_once_and_its_report_awaited,
    test_an_evaluation_gives_counts_for_every_latent,
    test_an_evaluation_waits_its_turn_and_may_run_out_of_time,
    test_an_unknown_round_is_refused_as_such,
    test_another_plan_for_the_same_round_is_a_conflict,
    test_another_run_is_told_that_the_device_is_busy,
    test_failed_work_is_reported_with_its_reason_and_can_be_tried_again,
    test_status_is_what_the_device_says,
    test_the_same_plan_again_gives_the_same_report_without_working_twice,
)
from tests.flower.toy_grid import ToyGrid, node_of
from tests.support.fake_device import FakeDevice


@pytest.fixture
def device() -> Iterator[FakeDevice]:
    device = FakeDevice("a")
    yield device
    device.gate.set()


@pytest.fixture
def grid(device: FakeDevice) -> ToyGrid:
    return ToyGrid(node_of(device))


@pytest.fixture
def make_client(grid: ToyGrid) -> Iterator[Callable[[], DeviceClient]]:
    nodes = Nodes(grid, poll_s=0.01, discover_s=0.05)
    asyncio.run(nodes.find(1, 10))
    yield lambda: FlowerClient("a", nodes)
    nodes.close()


def test_waiting_ends_at_its_timeout_and_the_work_goes_on(make_client, device):
    device.gate.clear()

    async def scene(client):
        await client.start(plan())
        with pytest.raises(DeviceTimeoutError, match=r"round 1 .* 0\.2 s"):
            await client.wait("r", 1, timeout_s=0.2)
        device.gate.set()
        await client.wait("r", 1)

    play(make_client, scene)
    assert len(device.plans) == 1


def test_a_cancelled_round_can_be_started_again(make_client, device):
    device.gate.clear()

    async def scene(client):
        await client.start(plan())
        waiting = asyncio.ensure_future(client.wait("r", 1))
        await asyncio.sleep(0.1)
        await client.cancel("r", 1)
        with pytest.raises(DeviceFailedError):
            await waiting
        device.gate.set()
        await client.start(plan())
        await client.wait("r", 1)

    play(make_client, scene)


def test_a_node_that_dies_is_unreachable_until_it_is_back_under_another_id(make_client, device, grid):
    device.gate.clear()

    async def scene(client):
        await client.start(plan())
        await asyncio.sleep(0.1)
        [node] = grid.nodes.values()
        node.stop()
        with pytest.raises(DeviceUnreachableError):
            await client.wait("r", 1)
        with pytest.raises(DeviceUnreachableError):
            await client.status()
        device.gate.set()
        grid.add(node_of(device))
        while True:
            try:
                await client.status()
            except DeviceUnreachableError:
                await asyncio.sleep(0.05)
            else:
                break
        await client.start(plan())
        assert (await client.wait("r", 1)).round == 1

    play(make_client, scene)


def test_a_restarted_node_ends_the_wait_for_the_old_one(make_client, device, grid):
    device.gate.clear()

    async def scene(client):
        await client.start(plan())
        await asyncio.sleep(0.1)
        grid.add(node_of(FakeDevice("a")))  # the old node still counts as online
        with pytest.raises(DeviceUnreachableError):
            await client.wait("r", 1)
        await client.start(plan())
        assert (await client.wait("r", 1)).round == 1

    play(make_client, scene)


def test_an_app_that_cannot_be_loaded_is_reported_with_flowers_reason(make_client, grid):
    async def scene(client):
        [node] = grid.nodes.values()

        def broken(*_):
            raise ImportError("no module named llama")

        node.app = broken
        await client.start(plan())
        with pytest.raises(DeviceFailedError, match="no module named llama"):
            await client.wait("r", 1)

    play(make_client, scene)


def test_an_absent_superlink_makes_the_device_unreachable_for_a_while(make_client, grid):
    async def scene(client):
        grid.failing = httpx.ConnectError("refused")
        await client.start(plan())
        with pytest.raises(DeviceUnreachableError, match=r"SuperLink.*refused"):
            await client.wait("r", 1)
        await client.start(plan())
        await client.wait("r", 1)

    play(make_client, scene)


def test_a_bug_in_the_grid_is_raised_where_a_reply_is_awaited(make_client, grid):
    async def scene(client):
        grid.failing = RuntimeError("a bug")
        await client.start(plan())
        with pytest.raises(RuntimeError, match="a bug"):
            await client.wait("r", 1)

    play(make_client, scene)


def test_traffic_is_counted_without_flowers_overhead(make_client):
    async def scene(client):
        await client.status()
        down, up = client.bytes_down, client.bytes_up
        await client.start(plan())
        report = await client.wait("r", 1)
        assert client.bytes_down - down == len(codec.encode(plan()))
        assert client.bytes_up - up == len(codec.encode(report))

    play(make_client, scene)
