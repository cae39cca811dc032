"""Runs written directly into a store, to show many rounds and devices without computing them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fedbpt.protocol import codec
from fedbpt.protocol.rounds import PooledResult, RoundReport
from fedbpt.protocol.specs import Array
from fedbpt.runs.settings import RunSettings
from fedbpt.runs.store import RunStore, Traffic
from tests.support.fake_device import FINGERPRINT, FakeDevice


def write_run(path: Path, n_devices: int, n_rounds: int, run: str = "big", limit: int = 0) -> Path:
    """A running run with ``n_rounds`` closed rounds of at most ``limit``."""
    names = [f"device-{i:02d}" for i in range(n_devices)]
    settings = codec.encode(RunSettings(rounds=limit or 2 * n_rounds))
    with RunStore(path) as store:
        store._db.execute("PRAGMA synchronous = OFF")  # a store to throw away
        store.create_run(
            run, task="toy", model_fingerprint=FINGERPRINT, model_name="toy", identity="", settings=settings,
            devices=names,
        )  # fmt: skip
        for name in names:
            store.record_devices(run, {name: FakeDevice(name).info()})
        store.record_metrics(run, 0, _evaluation(names, 0.0))
        for round in range(1, n_rounds + 1):
            share = round / n_rounds
            reports = [write_report(run, round, name, 1.0 - 0.5 * share) for name in names]
            costs = {name: Traffic(600 * round, 5000 * round, 2**28) for name in names}
            store.commit_round(
                run, round, work_digest="", state_digest="", reports=reports,
                metrics={"loss": 1.0 - 0.5 * share, "seconds": 2.0, "tokens": 320.0}, traffic=costs,
            )  # fmt: skip
            if round % 10 == 0:
                store.record_metrics(run, round, _evaluation(names, share))
    return path


def _evaluation(names: list[str], share: float) -> dict[str, float]:
    accuracy, loss = 0.7 + 0.2 * share, 0.9 - 0.4 * share
    figures = {"dev_accuracy": accuracy, "dev_loss": loss, "dev_n": 100.0}
    for i, name in enumerate(names):
        figures |= {f"dev_accuracy/{name}": accuracy - 0.002 * i, f"dev_loss/{name}": loss + 0.002 * i}
    return figures


def write_report(run: str, round: int, device: str, loss: float) -> RoundReport:
    return RoundReport(
        run=run, round=round, device=device, plan_digest="", n_texts=8, evaluations=20, tokens=320, seconds=1.6,
        peak_rss_bytes=2**28, result=PooledResult(losses=Array.of(np.full(4, loss), "<f4")),
    )  # fmt: skip
