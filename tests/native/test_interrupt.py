"""An interrupted call computes at most one more graph (ubatch), counted in tokens, and does not affect later calls."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable

import msgspec
import numpy as np
import pytest
import tiny_gguf
from numpy.typing import NDArray
from tiny_case import N_THREADS, Case

import fedbpt
from fedbpt.device.agent.service import AgentService
from fedbpt.device.device import Device
from fedbpt.engine.native_scorer import NativePlan
from fedbpt.errors import ScoringInterrupted
from fedbpt.protocol.rounds import PooledWork, RoundPlan, RoundReport, SearchState
from fedbpt.protocol.specs import Array, ObjectiveSpec, PromptSpec, Template
from fedbpt.tasks import Task

UBATCH = 512  # tokens per graph
N_SIGNALS = 8
PLACEMENTS = pytest.mark.parametrize("placement", ["front", "cue"])


@pytest.fixture(scope="module")
def fast(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A model that computes many graphs before a person notices a delay."""
    path = tmp_path_factory.mktemp("fast") / "smallest.gguf"
    return Case(tiny_gguf.SMALLEST, tiny_gguf.write(path, tiny_gguf.SMALLEST))


def load(case: Case, placement: str) -> tuple[fedbpt.NativeScorer, NativePlan]:
    """A plan whose candidates take several batches, each one graph that the texts with 25 rows nearly fill."""
    scorer = fedbpt.load_model(case.path, n_threads=N_THREADS)
    return scorer, scorer.compile(case.texts([60] * 50), [5, 17], placement)


def candidates(case: Case, n: int) -> NDArray[np.float32]:
    return np.repeat(case.prompts(2, 25), n // 2, axis=0)


def once_it_computes(plan: NativePlan, act: Callable[[], object]) -> threading.Thread:
    """Start a thread that calls ``act`` after the plan has computed some graphs."""
    before = plan.n_tokens

    def wait() -> None:
        while plan.n_tokens < before + 4 * UBATCH:
            time.sleep(0.001)
        act()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


@PLACEMENTS
@pytest.mark.parametrize("by", ["another thread", "a signal handler"])
def test_interrupt_ends_a_call_within_one_graph(fast: Case, placement: str, by: str) -> None:
    scorer, plan = load(fast, placement)
    expected = plan.score(candidates(fast, 2))
    n_tokens = []

    def interrupt(*_: object) -> None:
        scorer.interrupt()
        n_tokens.append(plan.n_tokens)

    def send() -> None:
        signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)

    handler = signal.signal(signal.SIGUSR1, interrupt)  # runs on this thread, within the call
    thread = once_it_computes(plan, send if by == "a signal handler" else interrupt)
    try:
        with pytest.raises(ScoringInterrupted):
            plan.score(candidates(fast, 20_000))  # takes minutes if nothing stops it
    finally:
        thread.join()
        signal.signal(signal.SIGUSR1, handler)
    assert plan.n_tokens - n_tokens[0] <= UBATCH
    np.testing.assert_array_equal(plan.score(candidates(fast, 2)), expected)


def test_interrupt_ends_a_graph_before_its_last_node(llama: Case) -> None:
    scorer = fedbpt.load_model(llama.path, n_threads=N_THREADS)
    length = llama.model.n_ctx
    plan = scorer.compile([llama.ids(length)], [5])
    over = threading.Event()

    def interrupt() -> None:
        while not over.wait(0.001):
            scorer.interrupt()

    def ends_within_its_graph() -> bool:
        before = plan.n_tokens
        try:
            plan.score(llama.prompts(1, 0))
        except ScoringInterrupted:
            return plan.n_tokens - before == length  # counted when the graph begins
        return False

    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        assert any(ends_within_its_graph() for _ in range(200))
    finally:
        over.set()
        thread.join()


@PLACEMENTS
def test_cancelling_a_round_ends_its_call_within_one_graph(fast: Case, placement: str) -> None:
    """A coordinator whose budget is spent cancels a device's round, a single call of several minutes."""
    template = Template(pattern="{text} so", label_words=(" a", " b"))
    task = Task(name="t", labels=("a", "b"), templates=(template,))
    device = Device("a", fedbpt.load_model(fast.path, n_threads=N_THREADS), [("text " * 50, 0)] * 50, task=task)
    state = SearchState(mean=Array.of(np.zeros(2)), sigma=1.0)
    asked = RoundPlan(
        run="r",
        round=1,
        device="a",
        seed=0,
        model_fingerprint=device.scorer.fingerprint,
        task=task.identity,
        labels=task.labels,
        template=template,
        prompt=PromptSpec(placement=placement, n_prompt=2, d=2),
        objective=ObjectiveSpec(batch_size=0, readout_words=0),
        work=PooledWork(state=state, generation=0, popsize=20_000),
    )

    async def play() -> None:
        service = AgentService(device)
        service.start(asked)
        while not device._objectives or not next(iter(device._objectives.values()))._plan.n_tokens:
            await asyncio.sleep(0.001)
        service.cancel("r", 1)
        smaller = msgspec.structs.replace(asked, round=2, work=msgspec.structs.replace(asked.work, popsize=2))
        service.start(smaller)
        assert isinstance(await service.wait("r", 2, 60), RoundReport)
        service.close()

    asyncio.run(play())


@PLACEMENTS
def test_ctrl_c_ends_a_call_within_one_graph(fast: Case, placement: str) -> None:
    """In a child process, where another thread reads the count when a signal arrives. Graphs are small and many."""
    script = f"""
        import os, signal, sys, threading, time
        import numpy as np
        import fedbpt

        scorer = fedbpt.load_model({str(fast.path)!r}, n_threads={N_THREADS})
        rng = np.random.default_rng(0)
        embeds = rng.standard_normal((30_000, 10, scorer.n_embd), dtype=np.float32)
        plan = scorer.compile([rng.integers(3, scorer.n_vocab, 20) for _ in range(4)], [5, 17], {placement!r})
        expected = plan.score(embeds[:2])
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer)
        signal.signal(signal.SIGINT, signal.default_int_handler)

        def watch(before, counts):
            while plan.n_tokens < before + {4 * UBATCH}:
                time.sleep(0.001)
            print("computing", flush=True)
            os.read(reader, 1)
            counts.append(plan.n_tokens)

        for _ in range({N_SIGNALS}):
            counts = []
            thread = threading.Thread(target=watch, args=(plan.n_tokens, counts))
            thread.start()
            try:
                plan.score(embeds)
            except KeyboardInterrupt:
                thread.join()
            else:
                sys.exit("the call ended before the signal came")
            if plan.n_tokens - counts[0] > {UBATCH}:
                sys.exit(f"computed {{plan.n_tokens - counts[0]}} tokens after the signal")
            if not np.array_equal(plan.score(embeds[:2]), expected):
                sys.exit("the next call gave other bits")
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        for _ in process.stdout:  # a line per call
            process.send_signal(signal.SIGINT)
        _, said = process.communicate()
    finally:
        process.kill()
    assert process.returncode == 0, said
