"""Comparison of two measurements, and the results of boards in the repository."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from fedbpt.bench.comparison import compare, read_measurement
from fedbpt.bench.measurement import Measurement, ThreadRate, measure
from fedbpt.coordinator.costs.estimate import project
from fedbpt.errors import DataError
from tests.support.raises import raises
from tests.support.toy_scorer import ToyScorer
from tests.support.toy_task import TASK

BOARDS = Path(__file__).parents[3] / "benchmarks" / "boards"


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Measurement:
    folder = tmp_path_factory.mktemp("sys")
    threads = [ThreadRate(n_threads=1, tokens_per_second=100.0)]
    return measure(
        ToyScorer(),
        seconds=0.0,
        quick=True,
        threads=threads,
        kernel_flops=lambda t: dict.fromkeys(t, 1e9),
        sysfs=folder,
    )


def changed(found: Measurement, **fields: object) -> Measurement:
    return msgspec.structs.replace(found, **fields)


def test_ratios_are_second_over_first(found: Measurement) -> None:
    twice = msgspec.structs.replace(found.cue, evaluations_per_second=2 * found.cue.evaluations_per_second)
    made = compare(found, changed(found, cue=twice))
    assert made.notes == ()
    ratios = made.ratios()
    assert ratios.pop("cue evaluations/s") == pytest.approx(2.0)
    assert {round(ratio, 12) for ratio in ratios.values()} == {1.0}
    assert {"prefill tokens/s", "16 x 56 tokens/s", "1 threads tokens/s", "weights MB", "q8_0 GFLOP/s"} <= set(ratios)


def test_figures_that_one_lacks_are_left_out(found: Measurement) -> None:
    assert "1 threads tokens/s" not in compare(found, changed(found, threads=())).figures


@pytest.mark.parametrize(
    ("fields", "note"),
    [
        ({"model_fingerprint": "sha256:" + 64 * "7", "model": "other"}, "different models: toy and other"),
        ({"fedbpt_version": "9.9"}, "different versions of fedbpt"),
        ({"cpu": "Z80"}, "different processors"),
        ({"n_threads": 99}, "different numbers of threads"),
    ],
)
def test_what_makes_figures_incomparable_is_noted(found: Measurement, fields: dict[str, object], note: str) -> None:
    [said] = compare(found, changed(found, **fields)).notes
    assert note in said


def test_the_projection_is_the_default_run_at_the_measured_rates(found: Measurement) -> None:
    run = project(found, TASK, rows=64)
    assert (run.rows, run.rounds, run.evaluations) == (64, 40, 40 * 20)
    search = 40 * 20 * 8  # rounds x candidates x texts, one token each
    others = (run.tokens - search) / found.prefill.tokens_per_second
    assert run.seconds == pytest.approx(others + search / found.cue.tokens_per_second)


@pytest.mark.parametrize(
    ("content", "value"),
    [
        (None, "No such file"),
        (b"{", "JSON"),
        (b"\xff", "JSON"),
        (b"{}", "`fedbpt bench --json`"),
        (b"[1]", "`fedbpt bench --json`"),
    ],
)
def test_a_file_that_is_not_a_measurement_is_named(tmp_path: Path, content: bytes | None, value: str) -> None:
    path = tmp_path / "board.json"
    if content is not None:
        path.write_bytes(content)
    with raises(DataError) as caught:
        read_measurement(path)
    assert str(path) in str(caught.value)
    assert value in str(caught.value)


def test_a_later_format_is_refused(tmp_path: Path, found: Measurement) -> None:
    path = tmp_path / "board.json"
    path.write_bytes(msgspec.json.encode({**msgspec.to_builtins(found), "format": 2}))
    with raises(DataError) as caught:
        read_measurement(path)
    assert str(path) in str(caught.value)


def test_every_result_of_a_board_can_be_read() -> None:
    assert (BOARDS / "README.md").is_file()
    for path in sorted(BOARDS.glob("*.json")):
        board = read_measurement(path)
        assert board.model_fingerprint.startswith("sha256:")
        assert min(rate.tokens_per_second for rate in (board.prefill, board.cue, board.front)) > 0
