"""Rounds of an aggregation algorithm over devices that are plain functions; messages are encoded and decoded."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import msgspec
import numpy as np

from fedbpt.aggregation import Aggregator
from fedbpt.protocol.rounds import LocalWork, PooledResult, PooledWork, Result, RoundReport, Work
from fedbpt.protocol.seeding import derive_seed
from fedbpt.protocol.specs import Array
from fedbpt.search.local_search import local_search
from fedbpt.search.population import sample_population

Loss = Callable[[np.ndarray], np.ndarray]
"""Latents [k, d] to losses [k]."""


def report(device: str, round: int, result: Result, n_texts: int = 8, evaluations: int = 1) -> RoundReport:
    """A report with only the fields that aggregation reads."""
    return RoundReport(
        run="toy",
        round=round,
        device=device,
        plan_digest="",
        result=result,
        n_texts=n_texts,
        evaluations=evaluations,
        tokens=0,
        seconds=0.0,
        peak_rss_bytes=0,
    )


def answer(work: Work, device: str, round: int, loss: Loss, seed: int, n_texts: int = 8) -> RoundReport:
    """The report of a device with ``loss`` on ``work``."""
    work = msgspec.msgpack.decode(msgspec.msgpack.encode(work), type=PooledWork | LocalWork)
    if isinstance(work, PooledWork):
        losses = loss(sample_population(work.state, work.popsize, seed, work.generation))
        return report(device, round, PooledResult(losses=Array.of(losses)), n_texts, work.popsize)
    found = local_search(work, derive_seed(seed, "local", device, round), lambda z, _: loss(z))
    return report(
        device, round, found.with_fitness(float(loss(found.mean[None])[0])), n_texts, work.popsize * work.iterations + 1
    )


def run(
    aggregator: Aggregator, devices: Mapping[str, Loss], rounds: int, seed: int = 3, backwards: bool = False
) -> list[list[RoundReport]]:
    """Run ``rounds`` in which all devices report; returns the reports. ``backwards``: in reverse order."""
    history = []
    for number in range(rounds):
        work = aggregator.work(number)
        reports = [answer(work, name, number, loss, seed) for name, loss in devices.items()]
        history.append(reports)
        aggregator.update(reports[::-1] if backwards else reports)
    return history
