"""Measurement of this machine's scoring speed, memory and energy use with a model.

The workloads are those of tuning, on texts of the length of news: prefill, and evaluations in both placements. An
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

SECONDS = 4.0  # per workload, after a warm-up call
MIN_CALLS = 3
MAX_CALLS = 50
QUICK_SECONDS = 0.5
QUICK_CALLS = 1
KERNELS = ("q4_0", "iq4_nl", "q4_K", "q4_1", "q5_K", "q6_K", "q8_0", "bf16", "f16")

_TEXT = """
The company said on Tuesday that sales of its new phone had beaten expectations in every market but one, and its shares
rose by four per cent before noon. Scientists who watched the comet for a year now think that it is older than the sun.
After extra time the visitors scored twice from corners, and the cup goes north for the first time since the war.
Ministers will meet again next week to talk about grain, water and the border, but nobody expects them to agree.
"""


class BenchScorer(Scorer, Protocol):
    """A scorer with the properties that a measurement reports."""

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
    """The speed of a workload: medians over ``calls`` calls. Joules and watts are means, None without a source."""

    work: Workload
    calls: int
    seconds_per_call: float
    tokens_per_second: float  # forward tokens that were computed
    evaluations_per_second: float
    joules_per_call: float | None
    joules_per_evaluation: float | None
    watts: float | None = None


class ThreadRate(msgspec.Struct, frozen=True, kw_only=True):
    """Speed of the workload `THREADS` with ``n_threads`` threads."""

    n_threads: int
    tokens_per_second: float


class Projection(msgspec.Struct, frozen=True, kw_only=True):
    """Maximum cost of a run with default settings on this machine (`fedbpt.coordinator.costs.estimate.project`)."""

    task: str
    rows: int
    rounds: int
    evaluations: int
    tokens: int
    seconds: float


class Measurement(msgspec.Struct, frozen=True, kw_only=True):
    """The result of `measure`. Sizes in bytes, times in seconds, energies in joules."""

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
    energy_note: str | None  # why there is no source
    heat_before: Heat
    heat_after: Heat
    kernel_flops_per_second: Mapping[str, float]  # of one thread by ggml type
    hint: str | None
    elapsed_seconds: float  # duration of the measurement
    batches: tuple[Rate, ...] = ()  # of `BATCHES`: more texts per call
    threads: tuple[ThreadRate, ...] = ()  # empty: not measured
    best_threads: int | None = None
    best_format: str | None = None  # the ggml type of the fastest kernel
    weights_flops_per_second: float | None = None  # of one thread, for the model's mixture of formats
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
    """Measure this machine with a model. Takes some 7 times ``seconds``, more if a single call takes longer.

    Args:
        scorer: the loaded model.
        seconds: minimum time per workload.
        quick: use at most `QUICK_SECONDS` per workload, and a minimum of `QUICK_CALLS` calls.
        threads: result of `measure_threads`, to be included.
        on_part: called with the name of each part before it is measured.
        kernel_flops: measures FLOP/s by ggml type.
        sysfs: mount point of sysfs, for energy and heat.

    Raises:
        InputError: the model's context is shorter than the 512 tokens of the prefill.
    """
    start = time.perf_counter()
    before = heat(sysfs)
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
        prefill=prefill,
        cue=cue,
        front=front,
        batches=tuple(batches),
        memory_bytes=dict(scorer.memory()),
        energy_source=meter.source,
        energy_note=meter.why_not,
        heat_before=before,
        heat_after=after,
        kernel_flops_per_second=kernels,
        hint=scorer.hint,
        elapsed_seconds=time.perf_counter() - start,
        threads=tuple(threads),
        best_threads=best_threads(threads),
        best_format=max(kernels, key=kernels.__getitem__),
        weights_flops_per_second=1 / sum(share / kernels[type] for type, share in weights.items()),
    )


def _rates(
    scorer: Scorer, seconds: float, quick: bool, meter: EnergyMeter, on_part: Callable[[str], None]
) -> list[Rate]:
    """The rates of prefill, cue, front and `BATCHES`, in this order."""
    calls = MIN_CALLS
    if quick:
        seconds = min(seconds, QUICK_SECONDS)
        calls = QUICK_CALLS
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
    """Measure the speed of a model with each number of threads in ``counts``.

    Args:
        load: loads the model for a number of threads; one is in memory at a time.
        counts: numbers of threads; None: 1, 2, 4, ... and the number of physical cores.
        seconds: minimum time for each.
        on_part: called with the name of each part before it is measured.
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
    """The share of each ggml type in the layers' parameters."""
    n_params = sum(part.n_params for part in formats)
    return {part.type: part.n_params / n_params for part in formats}


@checked
def best_threads(rates: Sequence[ThreadRate]) -> int | None:
    """The fastest number of threads; None if none was measured."""
    return max(rates, key=lambda rate: rate.tokens_per_second).n_threads if rates else None


def _rate(scorer: Scorer, work: Workload, seconds: float, calls: int, meter: EnergyMeter) -> Rate:
    ids = scorer.tokenize(_TEXT, add_bos=False)
    texts = [np.resize(np.roll(ids, -7 * i), work.text_tokens) for i in range(work.texts)]
    plan = scorer.compile(texts, np.unique(ids)[:4], work.placement)
    embeds = _candidates(scorer, ids, work)
    plan.score(embeds)  # warm-up: what is computed only once

    tokens_before = plan.n_tokens
    joules_before = meter.joules()
    times = _call_times(plan, embeds, seconds, calls)
    joules_after = meter.joules()
    median = statistics.median(times)
    joules = None if joules_before is None or joules_after is None else (joules_after - joules_before) / len(times)
    return Rate(
        work=work,
        calls=len(times),
        seconds_per_call=median,
        tokens_per_second=(plan.n_tokens - tokens_before) / len(times) / median,
        evaluations_per_second=work.candidates / median,
        joules_per_call=joules,
        joules_per_evaluation=None if joules is None else joules / work.candidates,
        watts=None if joules is None else joules / statistics.fmean(times),
    )


def _candidates(scorer: Scorer, ids: NDArray[np.int32], work: Workload) -> NDArray[np.float32]:
    """Prompts [candidates, n_prompt, n_embd] of token embeddings."""
    rows = scorer.token_embeddings(np.resize(ids, work.candidates * work.n_prompt))
    return rows.reshape(work.candidates, work.n_prompt, scorer.n_embd)


def _call_times(plan: Plan, embeds: NDArray[np.float32], seconds: float, calls: int) -> list[float]:
    times: list[float] = []
    while len(times) < calls or (sum(times) < seconds and len(times) < MAX_CALLS):
        start = time.perf_counter()
        plan.score(embeds)
        times.append(time.perf_counter() - start)
    return times
