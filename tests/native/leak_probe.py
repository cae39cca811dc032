"""Call a model's scorer repeatedly in all ways: ``leak_probe.py MODEL N_CALLS``.

Prints JSON ``{"calls": [...], "rss": [...]}``: resident bytes of this process after each number of calls.
"""

from __future__ import annotations

import itertools
import json
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

import fedbpt
from fedbpt.errors import InputError, ScoringInterrupted
from fedbpt.protocol.specs import Placement

N_SAMPLES = 200
LABELS = [5, 17]
PLACEMENTS: tuple[Placement, ...] = ("front", "cue")


def calls(scorer: fedbpt.NativeScorer) -> Iterator[Callable[[], object]]:
    """Yield calls endlessly: with a kept plan, with a new one, invalid ones and interrupted ones."""
    rng = np.random.default_rng(0)
    texts = [rng.integers(3, scorer.n_vocab, n) for n in (4, 9)]
    few = rng.standard_normal((2, 2, scorer.n_embd), dtype=np.float32)
    many = rng.standard_normal((3000, 2, scorer.n_embd), dtype=np.float32)
    not_a_number = np.full_like(few, np.nan)

    kept = {placement: scorer.compile(texts, LABELS, placement) for placement in PLACEMENTS}
    for placement in itertools.cycle(PLACEMENTS):
        plan = kept[placement]
        yield lambda plan=plan: plan.score(few)
        yield lambda placement=placement: scorer.compile(texts, LABELS, placement).score(few)
        yield lambda plan=plan: interrupted(scorer, lambda: plan.score(many))
        yield lambda plan=plan: refused(lambda: plan.score(not_a_number))
        yield lambda plan=plan: refused(lambda: plan.score(few, [len(texts)]))
        yield lambda placement=placement: refused(lambda: scorer.compile([*texts, [-1]], LABELS, placement))


def refused(call: Callable[[], object]) -> None:
    try:
        call()
    except InputError:
        return
    raise AssertionError("a call that should have been refused was not")


def interrupted(scorer: fedbpt.NativeScorer, call: Callable[[], object]) -> None:
    """Interrupt ``call`` from a signal handler, which runs on this thread and so within ``call``.

    A signal may still be pending when the timer stops: its handler then runs in a later call, and must do nothing.
    """
    in_call = True

    def interrupt(*_: object) -> None:
        if in_call:
            scorer.interrupt()

    signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 2e-4, 2e-4)
    try:
        call()
    except ScoringInterrupted:
        return
    finally:
        in_call = False
        signal.setitimer(signal.ITIMER_REAL, 0)
    raise AssertionError("a call that should have been interrupted was not")


def main(path: Path, n_calls: int) -> None:
    at = np.linspace(0, n_calls, N_SAMPLES + 1, dtype=np.int64)[1:]
    rss = np.zeros(N_SAMPLES, np.int64)
    scorer = fedbpt.load_model(path, n_threads=1)
    next_calls = calls(scorer)
    n_done = 0
    with Path("/proc/self/statm").open() as statm:
        for sample, n in enumerate(at):
            for call in itertools.islice(next_calls, int(n) - n_done):
                call()
            n_done = int(n)
            statm.seek(0)
            rss[sample] = int(statm.read().split()[1]) * resource.getpagesize()
    print(json.dumps({"calls": at.tolist(), "rss": rss.tolist()}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
