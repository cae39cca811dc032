"""Threads that share a scorer, a plan or a model file get the same bits as single calls, and may start and end."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.support.raises import raises
from tiny_case import N_THREADS, Case

import fedbpt
from fedbpt.engine.native_scorer import NativePlan
from fedbpt.errors import InputError, ScoringInterrupted

LABELS = [5, 300, 17]
Logits = NDArray[np.float32]


def compiled(case: Case, scorer: fedbpt.NativeScorer, placement: str, seed: int = 0) -> NativePlan:
    return scorer.compile(case.texts([3, 40, 17, 9], seed), LABELS, placement, prefix=[1, 44])


def at_once(jobs: Sequence[Callable[[], Any]]) -> list[Any]:
    """Run each job on its own thread, started together; return their results."""
    start = threading.Barrier(len(jobs))

    def run(job: Callable[[], Any]) -> Any:
        start.wait()
        return job()

    with ThreadPoolExecutor(len(jobs)) as pool:
        return [future.result() for future in [pool.submit(run, job) for job in jobs]]


def repeated(job: Callable[[], Logits], times: int = 5) -> Callable[[], list[Logits]]:
    return lambda: [job() for _ in range(times)]


@pytest.fixture(scope="module", params=["llama-q4_1", "gemma3-f32"])
def shared(request: pytest.FixtureRequest, case_of: Callable[..., Case]) -> Case:
    """With flash attention and int8 activations, and without either."""
    name, weights = request.param.split("-")
    return case_of(name, weights)


@pytest.fixture
def scorer(shared: Case) -> fedbpt.NativeScorer:
    """A scorer that no other test has used."""
    return fedbpt.load_model(shared.path, n_threads=N_THREADS)


def test_threads_that_share_a_scorer_get_the_bits_of_single_calls(shared: Case, scorer: fedbpt.NativeScorer) -> None:
    front, cue, other = (compiled(shared, scorer, *how) for how in (("front",), ("cue",), ("cue", 9)))
    jobs: list[Callable[[], Logits]] = [
        lambda: front.score(shared.prompts(3, 3)),
        lambda: cue.score(shared.prompts(3, 1)),
        lambda: cue.score(shared.prompts(2, 2), [3, 0]),  # another prompt length discards the plan's KV
        lambda: other.score(shared.prompts(2, 1)),
        lambda: compiled(shared, scorer, "front", 5).score(shared.prompts(1, 0)),
        lambda: scorer.score_with_soft_prompt(shared.texts([200]), shared.prompts(1, 3), None),
        lambda: scorer.token_embeddings(shared.ids(50)),
    ]
    alone = [job() for job in jobs]
    for expected, results in zip(alone, at_once([repeated(job) for job in jobs]), strict=True):
        for actual in results:
            np.testing.assert_array_equal(actual, expected)


def test_two_scorers_on_one_model_file_do_not_see_each_other(shared: Case, scorer: fedbpt.NativeScorer) -> None:
    scorers = [scorer, fedbpt.load_model(shared.path, n_threads=N_THREADS)]
    plans = [compiled(shared, each, "cue") for each in scorers]
    embeds = [shared.prompts(4, 2, seed) for seed in range(2)]
    alone = [plan.score(rows) for plan, rows in zip(plans, embeds, strict=True)]
    together = at_once([repeated(lambda i=i: plans[i].score(embeds[i])) for i in range(2)])
    for expected, results in zip(alone, together, strict=True):
        for actual in results:
            np.testing.assert_array_equal(actual, expected)


def test_plans_may_be_dropped_while_another_thread_scores(shared: Case, scorer: fedbpt.NativeScorer) -> None:
    embeds = shared.prompts(3, 2)
    kept = compiled(shared, scorer, "cue")
    expected = kept.score(embeds)
    over = threading.Event()

    def make_and_drop() -> int:
        n = 0
        while not over.is_set():
            compiled(shared, scorer, "cue", seed=n).score(embeds[:1])
            gc.collect()
            n += 1
        return n

    def score() -> list[Logits]:
        try:
            return [kept.score(embeds) for _ in range(20)]
        finally:
            over.set()

    n_dropped, results = at_once([make_and_drop, score])
    assert n_dropped > 0
    for actual in results:
        np.testing.assert_array_equal(actual, expected)


def test_a_plan_and_its_scorer_may_lose_their_last_reference_while_scoring(shared: Case) -> None:
    """Only the call in flight refers to them."""
    held = [compiled(shared, fedbpt.load_model(shared.path, n_threads=N_THREADS), "cue")]
    expected = held[0].score(shared.prompts(30, 2))
    handed_over = threading.Event()

    def score() -> Logits:
        call = held[0].score
        handed_over.set()
        return call(shared.prompts(30, 2))

    def drop() -> None:
        handed_over.wait()
        held.clear()
        gc.collect()

    result, _ = at_once([score, drop])
    np.testing.assert_array_equal(result, expected)


def test_scorers_may_be_loaded_and_dropped_in_threads(shared: Case) -> None:
    embeds = shared.prompts(2, 2)

    def load_and_score() -> Logits:
        return compiled(shared, fedbpt.load_model(shared.path, n_threads=N_THREADS), "front").score(embeds)

    expected = load_and_score()
    for results in at_once([repeated(load_and_score, 3)] * 3):
        for actual in results:
            np.testing.assert_array_equal(actual, expected)


def test_interrupt_ends_the_call_in_flight_but_no_waiting_call(llama: Case) -> None:
    scorer = fedbpt.load_model(llama.path, n_threads=N_THREADS)
    waiting = [compiled(llama, scorer, placement) for placement in ("front", "cue", "front")]
    embeds = llama.prompts(2, 2)
    expected = [plan.score(embeds) for plan in waiting]
    in_flight = compiled(llama, scorer, "front")
    called = threading.Semaphore(0)

    def long_call() -> str:
        try:
            in_flight.score(np.zeros((100_000, 1, scorer.n_embd), np.float32))  # takes minutes if nothing stops it
        except ScoringInterrupted:
            return "interrupted"
        return "ended"

    def wait_in_line(plan: NativePlan) -> Logits:
        while in_flight.n_tokens == 0:
            pass
        called.release()
        return plan.score(embeds)

    def interrupt() -> None:
        for _ in waiting:
            called.acquire()
        scorer.interrupt()

    ended, _, *results = at_once([long_call, interrupt, *(lambda plan=plan: wait_in_line(plan) for plan in waiting)])
    assert ended == "interrupted"
    for actual, wanted in zip(results, expected, strict=True):
        np.testing.assert_array_equal(actual, wanted)


def test_an_interrupt_with_no_call_in_flight_is_forgotten(llama: Case) -> None:
    scorer = fedbpt.load_model(llama.path, n_threads=N_THREADS)
    plan = compiled(llama, scorer, "front")
    expected = plan.score(llama.prompts(1, 1))
    scorer.interrupt()
    np.testing.assert_array_equal(plan.score(llama.prompts(1, 1)), expected)


def test_another_scorers_plan_is_refused_in_one_line(llama: Case) -> None:
    first, second = (fedbpt.load_model(llama.path, n_threads=N_THREADS) for _ in range(2))
    foreign = compiled(llama, second, "front")
    with raises(InputError):
        first.score_plan(foreign._plan, llama.prompts(1, 1), np.arange(foreign.n_texts))
