"""Linear algebra on one thread, see `fedbpt.machine.linear_algebra`."""

from __future__ import annotations

import os
import threading
import time

import numpy as np
import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from fedbpt.engine.discriminant import fold_sums
from fedbpt.machine.linear_algebra import one_blas_thread


def blas_threads() -> list[int]:
    return [found["num_threads"] for found in threadpool_info() if found["user_api"] == "blas"]


def test_blas_has_one_thread_and_then_those_of_before() -> None:
    with threadpool_limits(2, user_api="blas"):
        before = blas_threads()
        assert set(one_blas_thread(blas_threads)()) == {1}
        assert blas_threads() == before
    assert before


def test_one_call_at_a_time_computes() -> None:
    inside, most = 0, 0

    @one_blas_thread
    def compute(again: int = 1) -> None:
        nonlocal inside, most
        if again:
            compute(0)  # may call itself
            return
        inside += 1
        most = max(most, inside)
        time.sleep(0.01)
        inside -= 1

    threads = [threading.Thread(target=compute) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1


def test_the_limit_ends_with_an_error() -> None:
    @one_blas_thread
    def fail() -> None:
        raise ValueError("no")

    with threadpool_limits(2, user_api="blas"):
        before = blas_threads()
        with pytest.raises(ValueError, match="no"):
            fail()
        assert blas_threads() == before


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_process_does_not_wait_for_a_thread_of_its_parent() -> None:
    began, ends = threading.Event(), threading.Event()

    @one_blas_thread
    def wait() -> None:
        began.set()
        ends.wait(60)

    thread = threading.Thread(target=wait)
    thread.start()
    began.wait(60)
    child = os.fork()
    if child == 0:
        found = np.linalg.norm(one_blas_thread(np.ones)(4))
        os._exit(0 if found == 2.0 else 1)
    ends.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_devices_sum_up_their_rows_on_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    svd = np.linalg.svd

    def noting(*args: object, **options: object) -> object:
        seen.extend(blas_threads())
        return svd(*args, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(np.linalg, "svd", noting)
    states = np.random.default_rng(0).normal(size=(8, 16))
    fold_sums(states, np.array([0, 1] * 4), 2, 8)
    assert seen
    assert set(seen) == {1}
