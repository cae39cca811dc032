"""Random streams: reproducible, independent, and never numpy's global generator."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedbpt.errors import InputError
from fedbpt.protocol.seeding import derive_seed, generator

PATHS = st.lists(st.one_of(st.text(max_size=8), st.integers(-5, 1000)), min_size=1, max_size=4)


def first(seed: int, *path: str | int) -> bytes:
    return generator(seed, *path).bytes(16)


@given(seed=st.integers(0, 2**63), path=PATHS)
def test_the_same_path_gives_the_same_stream(seed: int, path: list[str | int]) -> None:
    assert first(seed, *path) == first(seed, *path)


@given(one=PATHS, other=PATHS, seed=st.integers(0, 5))
def test_different_paths_give_different_streams(one: list[str | int], other: list[str | int], seed: int) -> None:
    assert (first(seed, *one) == first(seed, *other)) == (one == other)


def test_a_number_and_its_text_are_different_paths() -> None:
    assert first(1, "batch", 2) != first(1, "batch", "2")


def test_parts_do_not_run_into_each_other() -> None:
    assert first(1, "ab", "c") != first(1, "a", "bc")


def test_streams_of_neighbouring_seeds_are_uncorrelated() -> None:
    draws = np.array([generator(seed, "x").standard_normal(2000) for seed in range(8)])
    off_diagonal = np.corrcoef(draws)[~np.eye(8, dtype=bool)]
    assert np.abs(off_diagonal).max() < 0.1


def test_the_stream_is_pinned() -> None:
    """A run must reproduce from its seed on other machines and later releases."""
    assert generator(7, "batch", "pi5", 3).integers(0, 1000, 4).tolist() == [4, 842, 335, 520]


def test_derived_seeds_differ_by_path_and_by_seed() -> None:
    seeds = {derive_seed(seed, "local", name, r) for seed in (0, 1) for name in ("a", "b") for r in range(3)}
    assert len(seeds) == 12
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_the_global_generator_is_left_alone() -> None:
    before = np.random.get_state()  # noqa: NPY002
    generator(3, "x").standard_normal(10)
    derive_seed(3, "x")
    after = np.random.get_state()  # noqa: NPY002
    assert before[0] == after[0]
    assert np.array_equal(before[1], after[1])
    assert before[2:] == after[2:]


@pytest.mark.parametrize(("seed", "path"), [(-1, ("x",)), (0, ()), (0, (True,)), (0, (1.5,))])
def test_a_bad_seed_or_path_is_refused(seed: int, path: tuple[str | int, ...]) -> None:
    with pytest.raises(InputError):
        generator(seed, *path)
