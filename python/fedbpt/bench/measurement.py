"""How fast this machine scores with a model, what memory and energy that takes: `measure`.

What is measured is what tuning does, on texts as long as news: the prefill rate, and evaluations in both placements. An
evaluation is one candidate prompt on one mini-batch.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Literal, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from fedbpt import models
from fedbpt.argument_types import checked
from fedbpt.engine.scorer import Plan, Scorer
from fedbpt.machine.energy import EnergyMeter
from fedbpt.machine.info import Heat, board_name, cpu_name, heat, physical_cores
from fedbpt.machine.interrupts import interruptible
from fedbpt.machine.memory import physical_memory
from fedbpt.machine.system_files import SYSFS
from fedbpt.protocol.specs import Placement
from fedbpt.version import VERSION

SECONDS = 4.0  # for each kind of work, after a first call that is not counted
MIN_CALLS, MAX_CALLS = 3, 50
QUICK_SECONDS, QUICK_CALLS = 0.5, 1
KERNELS = ("q4_0", "iq4_nl", "q4_K", "q4_1", "q5_K", "q6_K", "q8_0", "bf16", "f16")

_TEXT = """
The company said on Tuesday that sales of its new phone had beaten expectations in every market but one, and its shares
rose by four per cent before noon. Scientists who watched the comet for a year now think that it is older than the sun.
After extra time the visitors scored twice from corners, and the cup goes north for the first time since the war.
Ministers will meet again next week to talk about grain, water and the border, but nobody expects them to agree.
"""


class BenchScorer(Scorer, Protocol):
    """A scorer that knows how its model is stored."""

    @property
    def n_threads(self) -> int: ...

    @property
    def weight_formats(self) -> Sequence[models.WeightFormat]: ...

    @property
    def hint(self) -> str | None: ...


class Workload(msgspec.Struct, frozen=True, kw_only=True):
    """One call of the scorer: ``candidates`` prompts of ``n_prompt`` rows on ``texts`` texts of ``text_tokens``."""

    placement: Placement
    n_prompt: int
    candidates: int
    texts: int
    text_tokens: int


PREFILL = Workload(placement="front", n_prompt=0, candidates=1, texts=1, text_tokens=512)
CUE = Workload(placement="cue", n_prompt=1, candidates=16, texts=8, text_tokens=56)
FRONT = Workload(placement="front", n_prompt=50, candidates=2, texts=8, text_tokens=56)
BATCHES = tuple(msgspec.structs.replace(PREFILL, texts=texts, text_tokens=56) for texts in (1, 4, 16))
THREADS = BATCHES[1]


class Rate(msgspec.Struct, frozen=True, kw_only=True):
    """How fast a workload went: medians over ``calls`` calls; joules are means, None where nothing tells."""

    work: Workload
    calls: int
    seconds_per_call: float
    tokens_per_second: float  # forward tokens that were computed
    evaluations_per_second: float
    joules_per_call: float | None
    joules_per_evaluation: float | None
    watts: float | None = None


class ThreadRate(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens per second of `THREADS` with so many threads."""

    n_threads: int
    tokens_per_second: float


class Projection(msgspec.Struct, frozen=True, kw_only=True):
    """What a run with the default settings would take of this machine alone, at most
    (`fedbpt.coordinator.estimate.project`).
    """

    task: str
    rows: int
    rounds: int
    evaluations: int
    tokens: int
    seconds: float


class Measurement(msgspec.Struct, frozen=True, kw_only=True):
    """What `measure` found. Sizes are bytes, times seconds, energies joules."""

    fedbpt_version: str
    cpu: str
    board: str | None
    machine: str
    n_logical_cpus: int
    n_physical_cores: int
    n_threads: int
    ram_bytes: int
    model: str
    model_fingerprint: str
    weights: Mapping[str, float]  # share of the layers' parameters by ggml type
    backend: str
    prefill: Rate
    cue: Rate
    front: Rate
    memory_bytes: Mapping[str, int]  # as `Scorer.memory`
    energy_source: str | None
    energy_note: str | None  # why there is none
    heat_before: Heat
    heat_after: Heat
    kernel_flops_per_second: Mapping[str, float]  # of one thread by ggml type
    hint: str | None
    elapsed_seconds: float  # that measuring took
    batches: tuple[Rate, ...] = ()  # of `BATCHES`: more texts a call
    threads: tuple[ThreadRate, ...] = ()  # empty: not measured
    best_threads: int | None = None
    best_format: str | None = None  # the ggml type of the fastest kernel
    weights_flops_per_second: float | None = None  # of one thread, by the model's mixture of formats
    projection: Projection | None = None
    format: Literal[1] = 1


@checked
@interruptible()
def measure(
    scorer: BenchScorer,
    *,
    seconds: float = SECONDS,
    quick: bool = False,
    threads: Sequence[ThreadRate] = (),
    on_part: Callable[[str], None] = lambda _part: None,
    kernel_flops: Callable[[Collection[str]], Mapping[str, float]] = models.matmul_flops,
    sysfs: Path = SYSFS,
) -> Measurement:
    """Measure this machine with a model. Takes some 7 times ``seconds``, more where a single call takes longer.

    Args:
        scorer: the model, loaded.
        seconds: for each kind of work, at least.
        quick: at most `QUICK_SECONDS` for each, and no more calls than `QUICK_CALLS` where one takes longer.
        threads: what `measure_threads` found.
        on_part: told what is measured next.
        kernel_flops: measures FLOP/s by ggml type.
        sysfs: the root of the system's files on energy and heat.

    Raises:
        InputError: the model's context is shorter than the 512 tokens of the prefill.
    """
    began, before = time.perf_counter(), heat(sysfs)
    with EnergyMeter(sysfs) as meter:
        prefill, cue, front, *batches = _rates(scorer, seconds, quick, meter, on_part)
    after = heat(sysfs)
    on_part("matrix kernels")
    weights = _shares(scorer.weight_formats)
    kernels = kernel_flops((*KERNELS, *(type for type in weights if type not in KERNELS)))
    return Measurement(
        fedbpt_version=VERSION,
        cpu=cpu_name(),
        board=board_name(),
        machine=platform.machine(),
        n_logical_cpus=os.cpu_count() or 1,
        n_physical_cores=physical_cores(),
        n_threads=scorer.n_threads,
        ram_bytes=physical_memory(),
        model=scorer.name,
        model_fingerprint=scorer.fingerprint,
        weights=weights,
        backend=scorer.backend,
        prefill=prefill, cue=cue, front=front, batches=tuple(batches),
        memory_bytes=dict(scorer.memory()),
        energy_source=meter.source,
        energy_note=meter.why_not,
        heat_before=before,
        heat_after=after,
        kernel_flops_per_second=kernels,
        hint=scorer.hint,
        elapsed_seconds=time.perf_counter() - began,
        threads=tuple(threads),
        best_threads=best_threads(threads),
        best_format=max(kernels, key=kernels.__getitem__),
        weights_flops_per_second=1 / sum(share / kernels[type] for type, share in weights.items()),
    )  # fmt: skip


def _rates(
    scorer: Scorer, seconds: float, quick: bool, meter: EnergyMeter, on_part: Callable[[str], None]
) -> list[Rate]:
    """Prefill, cue, front, then `BATCHES`."""
    seconds, calls = (min(seconds, QUICK_SECONDS), QUICK_CALLS) if quick else (seconds, MIN_CALLS)
    works = [("prefill", PREFILL), ("cue", CUE), ("front", FRONT), *(("batches", work) for work in BATCHES)]
    rates = []
    for name, work in works:
        on_part(name)
        rates.append(_rate(scorer, work, seconds, calls, meter))
    return rates


@checked
def measure_threads(
    load: Callable[[int], Scorer],
    counts: Sequence[int] | None = None,
    *,
    seconds: float = QUICK_SECONDS,
    on_part: Callable[[str], None] = lambda _part: None,
) -> tuple[ThreadRate, ...]:
    """How fast a model is with each of ``counts`` threads.

    Args:
        load: loads it, for so many threads; one is in memory at a time.
        counts: None: 1, 2, 4, ... and the physical cores.
        seconds: for each, at least.
        on_part: told what is measured next.
    """
    if counts is None:
        cores = physical_cores()
        counts = sorted({cores, *(2**power for power in range(cores.bit_length()))})
    found = []
    for n_threads in counts:
        on_part(f"threads: {n_threads}")
        rate = _rate(load(n_threads), THREADS, seconds, QUICK_CALLS, EnergyMeter())
        found.append(ThreadRate(n_threads=n_threads, tokens_per_second=rate.tokens_per_second))
    return tuple(found)


def _shares(formats: Sequence[models.WeightFormat]) -> dict[str, float]:
    """Of each ggml type in the parameters of the layers."""
    n_params = sum(part.n_params for part in formats)
    return {part.type: part.n_params / n_params for part in formats}


@checked
def best_threads(rates: Sequence[ThreadRate]) -> int | None:
    """The number of threads that was fastest; None: none was measured."""
    return max(rates, key=lambda rate: rate.tokens_per_second).n_threads if rates else None


def _rate(scorer: Scorer, work: Workload, seconds: float, calls: int, meter: EnergyMeter) -> Rate:
    ids = scorer.tokenize(_TEXT, add_bos=False)
    texts = [np.resize(np.roll(ids, -7 * i), work.text_tokens) for i in range(work.texts)]
    plan = scorer.compile(texts, np.unique(ids)[:4], work.placement)
    embeds = _candidates(scorer, ids, work)
    plan.score(embeds)  # what is computed once only, and the caches

    tokens, before = plan.n_tokens, meter.joules()
    taken = _call_times(plan, embeds, seconds, calls)
    after = meter.joules()
    median = statistics.median(taken)
    used = None if before is None or after is None else (after - before) / len(taken)
    return Rate(
        work=work,
        calls=len(taken),
        seconds_per_call=median,
        tokens_per_second=(plan.n_tokens - tokens) / len(taken) / median,
        evaluations_per_second=work.candidates / median,
        joules_per_call=used,
        joules_per_evaluation=None if used is None else used / work.candidates,
        watts=None if used is None else used / statistics.fmean(taken),
    )


def _candidates(scorer: Scorer, ids: NDArray[np.int32], work: Workload) -> NDArray[np.float32]:
    """[candidates, n_prompt, n_embd]: rows of real tokens."""
    rows = scorer.token_embeddings(np.resize(ids, work.candidates * work.n_prompt))
    return rows.reshape(work.candidates, work.n_prompt, scorer.n_embd)


def _call_times(plan: Plan, embeds: NDArray[np.float32], seconds: float, calls: int) -> list[float]:
    taken: list[float] = []
    while len(taken) < calls or (sum(taken) < seconds and len(taken) < MAX_CALLS):
        began = time.perf_counter()
        plan.score(embeds)
        taken.append(time.perf_counter() - began)
    return taken
