"""Ctrl-C during a blocking call inside a running event loop, with real signals to real processes."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from fedbpt.machine.interrupts import interruptible, uninterrupted
from fedbpt.net.event_loop import run_to_end

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[3]

BEGIN = """
import asyncio, signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where tests run in a shell's background
from fedbpt import Budget, PromptSpec, evaluate, tune
from fedbpt.runs.events import RoundClosed
from tests.support.toy_scorer import ToyScorer
from tests.support.toy_task import TASK, rows

def ready(event):
    if isinstance(event, RoundClosed) and event.searched == 2:
        print("ready", flush=True)

def tuned(evaluations):
    given = dict(budget=Budget(evaluations=evaluations), prompt=PromptSpec(d=6), popsize=8, on_event=ready)
    return tune(ToyScorer(), TASK, rows(24), show=False, **given)

class Telling(ToyScorer):
    def score_with_soft_prompt(self, *given):
        if not self.calls:
            print("ready", flush=True)
        return super().score_with_soft_prompt(*given)
"""

TUNE = """
async def main():
    handler = signal.getsignal(signal.SIGINT)
    result = tuned(10**9)
    assert signal.getsignal(signal.SIGINT) == handler
    await asyncio.sleep(0)  # nothing was cancelled
    assert result.interrupted and result.run.rounds >= 2 and result.prompt.readout is not None
    same = tuned(8 * result.run.rounds)
    print("kept", same.prompt.rows.tobytes() == result.prompt.rows.tobytes(), flush=True)
"""

EVALUATE = """
async def main():
    handler = signal.getsignal(signal.SIGINT)
    try:
        evaluate(Telling(), TASK, rows(100_000))
    except KeyboardInterrupt:
        assert signal.getsignal(signal.SIGINT) == handler
        await asyncio.sleep(0)
        print("kept True", flush=True)
"""

WAYS = {
    "asyncio.run": "asyncio.run(main())",
    "a loop as a notebook's": "asyncio.new_event_loop().run_until_complete(main())",
    "a loop with a handler": """
async def handled():
    asyncio.get_running_loop().add_signal_handler(signal.SIGINT, print, "heard")
    await main()
asyncio.run(handled())
""",
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("work", [TUNE, EVALUATE], ids=["tune", "evaluate"])
def test_the_first_ctrl_c_ends_a_call_inside_a_loop(work: str, way: str) -> None:
    program = f"{BEGIN}{work}{WAYS[way]}\n"
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=120)
        finally:
            process.kill()
    said = out.split("\n")
    assert "kept True" in said, err
    assert ("heard" in said) == ("handler" in way)
    assert process.returncode == 0, err


def test_ctrl_c_before_the_work_has_begun_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    run, interrupted = asyncio.run, threading.Event()
    began: list[bool] = []

    def handler(*_: object) -> None:
        interrupted.set()
        raise KeyboardInterrupt

    def late(main: Coroutine[Any, Any, None]) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupted.wait(60)
        time.sleep(0.2)  # the interrupted thread goes on meanwhile
        run(main)

    async def endless() -> None:
        began.append(True)
        await asyncio.sleep(1e6)

    async def call() -> None:
        before = signal.signal(signal.SIGINT, handler)
        try:
            with pytest.raises(KeyboardInterrupt):
                run_to_end(endless)
        finally:
            signal.signal(signal.SIGINT, before)

    monkeypatch.setattr(asyncio, "run", late)
    run(call())
    assert began == []


def test_ctrl_c_waits_for_code_that_would_swallow_it() -> None:
    reached = []

    def swallow(interrupt: bool) -> None:
        with uninterrupted():
            if interrupt:
                os.kill(os.getpid(), signal.SIGINT)
            reached.append(interrupt)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            swallow(True)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        swallow(False)
    finally:
        signal.signal(signal.SIGINT, before)
    assert reached == [True, False]


def test_a_handler_of_the_users_own_and_one_outside_a_loop_stay() -> None:
    def own(*_: object) -> None:
        heard.append(True)

    async def call() -> None:
        with interruptible():
            os.kill(os.getpid(), signal.SIGINT)
            assert signal.getsignal(signal.SIGINT) is own

    heard: list[bool] = []
    before = signal.signal(signal.SIGINT, own)
    try:
        asyncio.run(call())
        with interruptible():
            assert signal.getsignal(signal.SIGINT) is own
    finally:
        signal.signal(signal.SIGINT, before)
    assert heard == [True]
