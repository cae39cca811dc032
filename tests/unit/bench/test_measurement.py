"""`fedbpt.bench.measurement.measure` with a toy model and a fake clock: times, tokens and joules."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from fedbpt.bench import measurement
from fedbpt.bench.measurement import (
    BATCHES,
    CUE,
    FRONT,
    MAX_CALLS,
    MIN_CALLS,
    PREFILL,
    QUICK_CALLS,
    Measurement,
    ThreadRate,
    measure,
    measure_threads,
)
from tests.support.toy_scorer import ToyScorer

TICK_S = 0.5


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock advances by half a second at each reading."""
    ticks = itertools.count()
    monkeypatch.setattr(measurement.time, "perf_counter", lambda: TICK_S * next(ticks))


class PoweredToy(ToyScorer):
    """Uses 3 joules per call, by a RAPL counter under ``sysfs``."""

    def __init__(self, sysfs: Path) -> None:
        super().__init__()
        self._zone = sysfs / "class/powercap/intel-rapl:0"
        self._zone.mkdir(parents=True)
        (self._zone / "name").write_text("package-0")
        (self._zone / "max_energy_range_uj").write_text("262143328850")
        self._count()

    def _count(self) -> None:
        new = self._zone / "new"
        new.write_text(str(3_000_000 * len(self.calls)))
        new.replace(self._zone / "energy_uj")  # in one step, as the kernel's files change: a thread reads it

    def score_with_soft_prompt(self, *given: Any, **named: Any) -> NDArray[np.float32]:
        logits = super().score_with_soft_prompt(*given, **named)
        self._count()
        return logits


def measured(scorer: ToyScorer, sysfs: Path, seconds: float = 0.0, **given: Any) -> Measurement:
    return measure(scorer, seconds=seconds, kernel_flops=lambda types: dict.fromkeys(types, 1e9), sysfs=sysfs, **given)


@pytest.mark.usefixtures("clock")
def test_rates_are_what_a_call_does_over_its_median_time(tmp_path: Path) -> None:
    found = measured(ToyScorer(), tmp_path)
    rates = {"prefill": found.prefill, "cue": found.cue, "front": found.front}
    assert {rate.seconds_per_call for rate in rates.values()} == {TICK_S}
    assert {name: rate.work for name, rate in rates.items()} == {"prefill": PREFILL, "cue": CUE, "front": FRONT}
    assert {name: rate.tokens_per_second * TICK_S for name, rate in rates.items()} == {
        "prefill": 512,
        "cue": 16 * 8,  # the texts were computed in the first call, which does not count
        "front": 2 * (50 + 8 * 56),
    }
    assert {name: rate.evaluations_per_second * TICK_S for name, rate in rates.items()} == {
        "prefill": 1,
        "cue": 16,
        "front": 2,
    }


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize(("seconds", "calls"), [(0.0, MIN_CALLS), (5.0, 10), (1e9, MAX_CALLS)])
def test_calls_go_on_for_the_time_that_is_given(tmp_path: Path, seconds: float, calls: int) -> None:
    toy = ToyScorer()
    assert measured(toy, tmp_path, seconds).cue.calls == calls
    assert len(toy.calls) == (3 + len(BATCHES)) * (calls + 1)


@pytest.mark.usefixtures("clock")
def test_a_quick_measurement_has_few_calls(tmp_path: Path) -> None:
    found = measured(ToyScorer(), tmp_path, seconds=1e9, quick=True)
    assert {rate.calls for rate in (found.prefill, found.cue, found.front, *found.batches)} == {QUICK_CALLS}


@pytest.mark.usefixtures("clock")
def test_batches_have_more_texts_a_call(tmp_path: Path) -> None:
    batches = measured(ToyScorer(), tmp_path).batches
    assert [rate.work.texts for rate in batches] == [1, 4, 16]
    assert [rate.tokens_per_second * TICK_S for rate in batches] == [56, 4 * 56, 16 * 56]


def test_the_fastest_number_of_threads_and_format_are_named(tmp_path: Path) -> None:
    rates = [ThreadRate(n_threads=n, tokens_per_second=speed) for n, speed in ((1, 10.0), (2, 18.0), (4, 17.0))]
    speeds = {"q8_0": 4e9, "f32": 1e9}
    found = measure(
        ToyScorer(),
        seconds=0.0,
        threads=rates,
        sysfs=tmp_path,
        kernel_flops=lambda types: {type: speeds.get(type, 2e9) for type in types},
    )
    assert (found.best_threads, found.best_format, found.weights_flops_per_second) == (2, "q8_0", pytest.approx(1e9))


def test_threads_are_measured_one_load_after_the_other() -> None:
    loaded: list[int] = []

    def load(n_threads: int) -> ToyScorer:
        loaded.append(n_threads)
        return ToyScorer()

    found = measure_threads(load, [1, 3], seconds=0.0)
    assert loaded == [rate.n_threads for rate in found] == [1, 3]
    assert all(rate.tokens_per_second > 0 for rate in found)


def test_the_candidates_differ_and_so_do_the_texts(tmp_path: Path) -> None:
    seen: list[NDArray[np.float32]] = []

    class Recording(ToyScorer):
        def score_with_soft_prompt(self, *given: Any, **named: Any) -> NDArray[np.float32]:
            seen.append(super().score_with_soft_prompt(*given, **named))
            return seen[-1]

    measured(Recording(), tmp_path)
    cue = next(logits for logits in seen if len(logits) == CUE.candidates)
    assert len(np.unique(cue[:, 0, 0])) > CUE.candidates / 2
    assert len(np.unique(cue[0, :, 0])) > 1


def test_joules_are_given_per_call_and_evaluation(tmp_path: Path) -> None:
    found = measured(PoweredToy(tmp_path), tmp_path)
    assert found.energy_source == "RAPL package-0"
    assert found.energy_note is None
    for rate in (found.prefill, found.cue, found.front):
        assert rate.joules_per_call == pytest.approx(3.0)
        assert rate.joules_per_evaluation == pytest.approx(3.0 / rate.work.candidates)
        assert rate.watts is not None
        assert rate.watts > 0


def test_without_a_meter_there_are_no_joules_but_a_reason(tmp_path: Path) -> None:
    found = measured(ToyScorer(), tmp_path)
    assert (found.energy_source, found.cue.joules_per_call, found.cue.joules_per_evaluation) == (None, None, None)
    assert found.energy_note


def test_the_machine_and_the_model_are_named(tmp_path: Path) -> None:
    toy = ToyScorer()
    toy.hint = "another format"
    parts: list[str] = []
    found = measured(toy, tmp_path, on_part=parts.append)
    assert parts == ["prefill", "cue", "front", *len(BATCHES) * ["batches"], "matrix kernels"]
    assert (found.model, found.model_fingerprint, found.backend) == ("toy", toy.fingerprint, "numpy")
    assert (found.weights, found.hint, found.n_threads) == ({"f32": 1.0}, "another format", 1)
    assert found.memory_bytes == toy.memory()
    assert found.cpu
    assert 1 <= found.n_physical_cores <= found.n_logical_cpus
    assert found.ram_bytes > 2**20
    assert set(found.kernel_flops_per_second) == {*measurement.KERNELS, "f32"}


def test_a_measurement_is_plain_json(tmp_path: Path) -> None:
    found = measured(ToyScorer(), tmp_path)
    assert msgspec.json.decode(msgspec.json.encode(found), type=Measurement) == found
