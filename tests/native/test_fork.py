"""Processes forked from one with a model: gunicorn's workers, `multiprocessing`, PyTorch's data loaders."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_case import Case

from fedbpt.engine.native_scorer import _twin
from fedbpt.errors import InputError

SCRIPT = """
import os, signal, sys, threading, warnings
from multiprocessing import get_context

import numpy as np

import fedbpt
from fedbpt.device.agent import Worker
from fedbpt.errors import InputError, StoreError
from fedbpt.engine.text_generator import Placed, Sampling
from fedbpt.runs.store import RunStore

warnings.simplefilter("ignore", DeprecationWarning)  # Python warns of forks of processes with threads
scorer = fedbpt.load_model(sys.argv[1], n_threads=2)
embeds = np.zeros((2, 1, scorer.n_embd), np.float32)
texts, labels = ["good movie", "bad film"], [5, 6]
plan = scorer.compile(texts, labels, "cue")
expected = plan.score(embeds)
placed = Placed(scorer.tokenize("good"))
generator = scorer.generator
stream = generator.open(placed, Sampling())
first = stream.next()
worker = Worker()


def work(done=None):
    done = done or threading.Event()
    worker.submit(done.set)
    return done.wait(30)


def refused(call, kind=InputError):
    try:
        call()
    except kind:
        return True
    return False


def forked(child):
    pid = os.fork()
    if pid == 0:
        signal.alarm(60)
        try:
            ok = child()
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            ok = False
        sys.stderr.flush()
        os._exit(0 if ok else 1)
    return os.waitpid(pid, 0)[1] == 0
"""

CHECKS = {
    "scores": """
def child():
    anew = scorer.compile(texts, labels, "cue")
    return (plan.score(embeds) == expected).all() and (anew.score(embeds) == expected).all()
assert forked(child)
assert (plan.score(embeds) == expected).all()
""",
    "generates": """
def child():
    again = scorer.generator.open(placed, Sampling()).next() == first
    return again and refused(stream.next) and refused(lambda: generator.open(placed, Sampling()))
assert forked(child)
assert stream.next() is not None
""",
    "tokenises while another thread scores, but refuses the texts being scored": """
started, busy = threading.Event(), scorer.compile(texts, labels)
def long_call():
    started.set()
    try:
        busy.score(np.zeros((10**6, 1, scorer.n_embd), np.float32))
    except fedbpt.errors.ScoringInterrupted:
        pass
thread = threading.Thread(target=long_call)
thread.start()
started.wait()
while busy.n_tokens == 0:
    pass
def child():
    same = len(scorer.tokenize("good")) > 0 and (plan.score(embeds) == expected).all()
    return same and refused(lambda: busy.score(embeds))
ok = forked(child)
scorer.interrupt()
thread.join()
assert ok
assert (busy.score(embeds)[:, :, 0].shape) == (2, 2)
""",
    "exits normally": """
pid = os.fork()
if pid == 0:
    signal.alarm(60)
    sys.exit(0)
assert os.waitpid(pid, 0)[1] == 0
pid = os.fork()
if pid == 0:
    signal.alarm(60)
    plan.score(embeds)
    scorer.generator.open(placed, Sampling()).next()
    del plan, stream, generator, scorer
    sys.exit(0)
assert os.waitpid(pid, 0)[1] == 0
""",
    "forks again": """
def child():
    return (plan.score(embeds) == expected).all() and forked(lambda: (plan.score(embeds) == expected).all())
assert forked(child)
""",
    "works in multiprocessing": """
def score(i):
    return scorer.compile(texts, labels, "cue").score(embeds)
with get_context("fork").Pool(2) as pool:
    assert all((found == expected).all() for found in pool.map(score, range(4)))
""",
    "runs a job on a worker": """
assert work()
assert forked(work)
assert work()
""",
    "refuses its parent's database": """
store = RunStore(sys.argv[2])
assert forked(lambda: refused(store.list_runs, StoreError) and refused(lambda: store.delete_run("r"), StoreError))
assert store.list_runs() == []
""",
}


@pytest.mark.parametrize("check", CHECKS)
def test_a_forked_process(check: str, llama: Case, tmp_path: Path) -> None:
    given = [str(llama.path), str(tmp_path / "runs.db")]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT + CHECKS[check], *given], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_model_on_a_gpu_is_refused_in_a_forked_process(llama: Case) -> None:
    with pytest.raises(InputError):
        _twin(llama.scorer._engine, on_gpu=True)


def test_a_scorer_is_pickled_as_its_file_and_settings(llama: Case) -> None:
    embeds, texts = llama.prompts(1, 1), ["good movie"]
    copy = pickle.loads(pickle.dumps(llama.scorer))
    found = copy.compile(texts, [5]).score(embeds)
    np.testing.assert_array_equal(found, llama.scorer.compile(texts, [5]).score(embeds))
    assert (copy.name, copy.n_threads) == (llama.scorer.name, llama.scorer.n_threads)
