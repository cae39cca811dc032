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
from importlib import metadata
from pathlib import Path
from typing import Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from fedbpt import models
from fedbpt.energy import SYSFS, EnergyMeter
from fedbpt.machine import Heat, board_name, cpu_name, heat
from fedbpt.memory import physical_memory
from fedbpt.messages import Placement
from fedbpt.native_scorer import physical_cores
from fedbpt.scorer import Plan, Scorer

SECONDS = 4.0  # for each kind of work, after a first call that is not counted
MIN_CALLS, MAX_CALLS = 3, 50
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


class Rate(msgspec.Struct, frozen=True, kw_only=True):
    """How fast a workload went: medians over ``calls`` calls; joules are means, None where nothing tells."""

    work: Workload
    calls: int
    seconds_per_call: float
    tokens_per_second: float  # forward tokens that were computed
    evaluations_per_second: float
    joules_per_call: float | None
    joules_per_evaluation: float | None


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


def measure(
    scorer: BenchScorer,
    *,
    seconds: float = SECONDS,
    on_part: Callable[[str], None] = lambda _part: None,
    kernel_flops: Callable[[Collection[str]], Mapping[str, float]] = models.matmul_flops,
    sysfs: Path = SYSFS,
) -> Measurement:
    """Measure this machine with a model. Takes some 4 times ``seconds``, more where a single call takes longer.

    Args:
        scorer: the model, loaded.
        seconds: for each kind of work, at least.
        on_part: told what is measured next.
        kernel_flops: measures FLOP/s by ggml type.
        sysfs: the root of the system's files on energy and heat.

    Raises:
        InputError: the model's context is shorter than the 512 tokens of the prefill.
    """
    began = time.perf_counter()
    before = heat(sysfs)
    rates = {}
    with EnergyMeter(sysfs) as meter:
        for name, work in {"prefill": PREFILL, "cue": CUE, "front": FRONT}.items():
            on_part(name)
            rates[name] = _rate(scorer, work, seconds, meter)
        source, note = meter.source, meter.why_not
    after = heat(sysfs)
    on_part("matrix kernels")
    n_params = sum(part.n_params for part in scorer.weight_formats)
    return Measurement(
        fedbpt_version=_version(),
        cpu=cpu_name(),
        board=board_name(),
        machine=platform.machine(),
        n_logical_cpus=os.cpu_count() or 1,
        n_physical_cores=physical_cores(),
        n_threads=scorer.n_threads,
        ram_bytes=physical_memory(),
        model=scorer.name,
        model_fingerprint=scorer.fingerprint,
        weights={part.type: part.n_params / n_params for part in scorer.weight_formats},
        backend=scorer.backend,
        **rates,
        memory_bytes=dict(scorer.memory()),
        energy_source=source,
        energy_note=note,
        heat_before=before,
        heat_after=after,
        kernel_flops_per_second=kernel_flops(KERNELS),
        hint=scorer.hint,
        elapsed_seconds=time.perf_counter() - began,
    )


def _rate(scorer: Scorer, work: Workload, seconds: float, meter: EnergyMeter) -> Rate:
    ids = scorer.tokenize(_TEXT, add_bos=False)
    texts = [np.resize(np.roll(ids, -7 * i), work.text_tokens) for i in range(work.texts)]
    plan = scorer.compile(texts, np.unique(ids)[:4], work.placement)
    embeds = _candidates(scorer, ids, work)
    plan.score(embeds)  # what is computed once only, and the caches

    tokens, before = plan.n_tokens, meter.joules()
    taken = _call_times(plan, embeds, seconds)
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
    )


def _candidates(scorer: Scorer, ids: NDArray[np.int32], work: Workload) -> NDArray[np.float32]:
    """[candidates, n_prompt, n_embd]: rows of real tokens."""
    rows = scorer.token_embeddings(np.resize(ids, work.candidates * work.n_prompt))
    return rows.reshape(work.candidates, work.n_prompt, scorer.n_embd)


def _call_times(plan: Plan, embeds: NDArray[np.float32], seconds: float) -> list[float]:
    taken: list[float] = []
    while len(taken) < MIN_CALLS or (sum(taken) < seconds and len(taken) < MAX_CALLS):
        began = time.perf_counter()
        plan.score(embeds)
        taken.append(time.perf_counter() - began)
    return taken


def _version() -> str:
    try:
        return metadata.version("fedbpt")
    except metadata.PackageNotFoundError:  # a source tree that is not installed
        return "unknown"
