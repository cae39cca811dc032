"""Partitions of rows over devices, splits, manifests."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedbpt import tasks
from fedbpt.errors import DataError, InputError
from tests.support.raises import raises

LABELS = ("a", "b", "c")


@settings(max_examples=60, deadline=None)
@given(
    labels=st.lists(st.integers(0, 4), min_size=12, max_size=120),
    n_devices=st.integers(1, 6),
    scheme=st.sampled_from(["iid", "dirichlet", "size"]),
    alpha=st.sampled_from([0.01, 0.1, 1.0, 100.0]),
    seed=st.integers(0, 2**31),
)
def test_a_partition_deals_every_row_once_and_leaves_no_device_short(labels, n_devices, scheme, alpha, seed):
    parts = tasks.partition(labels, n_devices, scheme, alpha, seed, min_rows=2)
    assert len(parts) == n_devices
    assert min(map(len, parts)) >= 2
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(labels)))
    again = tasks.partition(labels, n_devices, scheme, alpha, seed, min_rows=2)
    assert all(np.array_equal(x, y) for x, y in zip(parts, again, strict=True))


def test_iid_parts_are_equal_and_depend_on_the_seed():
    labels = np.arange(30) % 3
    parts = tasks.partition(labels, 3, "iid", seed=1)
    assert [len(part) for part in parts] == [10, 10, 10]
    assert not np.array_equal(parts[0], tasks.partition(labels, 3, "iid", seed=2)[0])


def test_a_small_alpha_skews_labels_and_a_large_one_does_not():
    labels = np.arange(3000) % 3

    def purity(alpha):
        parts = tasks.partition(labels, 3, "dirichlet", alpha, seed=5)
        return np.mean([np.bincount(labels[part], minlength=3).max() / len(part) for part in parts])

    assert purity(0.05) > 0.7
    assert purity(1000.0) < 0.4


def test_by_size_skews_sizes_and_keeps_labels_alike():
    labels = np.arange(3000) % 3
    parts = tasks.partition(labels, 4, "size", 0.3, seed=3)
    assert max(map(len, parts)) > 2 * min(map(len, parts))
    largest = max(parts, key=len)
    assert np.bincount(labels[largest]).max() / len(largest) < 0.4


@pytest.mark.parametrize(
    "arguments",
    [
        {"n_devices": 0},
        {"n_devices": 5},
        {"min_rows": 0},
        {"scheme": "random"},
        {"alpha": 0.0},
        {"alpha": float("nan")},
        {"labels": [0.5] * 4},
        {"labels": [[0, 1]]},
    ],
)
def test_an_impossible_partition_is_refused(arguments):
    (field,) = arguments
    with raises(InputError, field=field):
        tasks.partition(**{"labels": [0, 1, 0, 1], "n_devices": 2, **arguments})


def test_splits_are_stratified_disjoint_and_repeatable():
    rows = [(f"text {i}", i % 3) for i in range(300)]
    sizes = {"train": 30, "dev": 60, "test": 90}
    splits = tasks.split_rows(rows, sizes, seed=1)
    assert {name: len(part) for name, part in splits.items()} == sizes
    seen = [text for part in splits.values() for text, _ in part]
    assert len(set(seen)) == 180
    for part in splits.values():
        counts = np.bincount([label for _, label in part])
        assert np.ptp(counts) <= 2
    assert splits == tasks.split_rows(rows, sizes, seed=1)
    assert splits != tasks.split_rows(rows, sizes, seed=2)


def test_no_text_is_in_two_splits_even_if_it_occurs_twice():
    rows = [(f"text {i // 2}", 0) for i in range(20)]
    splits = tasks.split_rows(rows, {"train": 5, "test": 5})
    assert not {t for t, _ in splits["train"]} & {t for t, _ in splits["test"]}
    with raises(DataError, limit=10):
        tasks.split_rows(rows, {"train": 6, "test": 5})
    with raises(InputError, field="sizes"):
        tasks.split_rows(rows, {"train": -1})


def test_a_manifest_describes_the_parts_and_detects_a_changed_file(tmp_path):
    rows = [(f"text {i}", i % 3) for i in range(30)]
    manifest = tasks.write_partition(tmp_path, rows, LABELS, 3, "dirichlet", alpha=0.5, seed=4)
    assert tasks.read_manifest(tmp_path) == manifest
    assert json.loads((tmp_path / "manifest.json").read_text())["scheme"] == "dirichlet"
    read = []
    for part in manifest.devices:
        own = tasks.read_rows(tmp_path / part.file, LABELS)
        assert part.rows == len(own) == sum(part.counts.values())
        assert part.counts["b"] == sum(label == 1 for _, label in own)
        read += own
    assert sorted(read) == sorted(rows)
    (tmp_path / "device-1.jsonl").write_text('{"text": "other", "label": 0}\n')
    with raises(DataError) as caught:
        tasks.read_manifest(tmp_path)
    assert "device-1.jsonl" in str(caught.value)


def test_a_missing_or_damaged_manifest_is_refused(tmp_path):
    with raises(DataError):
        tasks.read_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with raises(DataError):
        tasks.read_manifest(tmp_path)
