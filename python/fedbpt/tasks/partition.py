"""Partitions of rows over the devices of a simulated federation, with a manifest.

Schemes: ``iid`` (shuffled, equal sizes), ``dirichlet`` (each label's rows in proportions drawn from Dirichlet(α):
Hsu, Qi & Brown 2019, arXiv 1909.06335; with a small α a device has almost a single label), ``size`` (the same label
distribution everywhere, sizes drawn from Dirichlet(α)).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, TypeAlias

import msgspec
import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedbpt.argument_types import array_of, checked
from fedbpt.checking import DECODE_ERRORS
from fedbpt.decoders import from_json
from fedbpt.errors import DataError, InputError
from fedbpt.machine.wheel_files import sha256_of
from fedbpt.protocol.seeding import generator
from fedbpt.tasks.readers import drop_duplicates, write_rows
from fedbpt.tasks.rows import Row

Scheme: TypeAlias = Literal["iid", "dirichlet", "size"]


class DevicePart(msgspec.Struct, frozen=True):
    """A device's file in a manifest. ``sha256``: of the file, hexadecimal; ``counts``: rows by label name."""

    file: str
    rows: int
    counts: dict[str, int]
    sha256: str


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``manifest.json``: the partition's parameters and the devices' files."""

    labels: tuple[str, ...]
    scheme: Scheme
    alpha: float | None
    seed: int
    devices: tuple[DevicePart, ...]
    version: Literal[1] = 1


@checked
def partition(
    labels: ArrayLike,
    n_devices: int,
    scheme: Scheme = "iid",
    alpha: float = 1.0,
    seed: int = 0,
    min_rows: int = 1,
) -> list[NDArray[np.int64]]:
    """Partition rows by label: ``n_devices`` arrays of ascending row indices, disjoint and together all rows.

    ``labels``: int [n]. A device drawn with fewer than ``min_rows`` gets random rows from the largest. Deterministic.

    Raises:
        InputError: an unknown scheme, α ≤ 0, fewer than one device, fewer rows than n_devices·min_rows.
    """
    given = array_of(labels, np.int64, "labels")
    if given.ndim != 1:
        raise InputError(f"labels must be one-dimensional, got shape {list(given.shape)}", field="labels")
    if n_devices < 1:
        raise InputError(f"n_devices must be at least 1, got {n_devices}", field="n_devices")
    if min_rows < 1:
        raise InputError(f"min_rows must be at least 1, got {min_rows}", field="min_rows")
    if not alpha > 0:
        raise InputError(f"alpha must be a positive number, got {alpha}", field="alpha")
    if len(given) < n_devices * min_rows:
        needed = n_devices * min_rows
        raise InputError(
            f"{n_devices} devices with {min_rows} rows each need at least {needed} rows, got {len(given)}",
            field="n_devices",
            limit=needed,
        )
    rng = generator(seed, "partition", scheme)
    if scheme == "dirichlet":
        groups = [np.flatnonzero(given == label) for label in np.unique(given)]
        shares = [rng.dirichlet(np.full(n_devices, alpha)) for _ in groups]
    else:
        groups = [np.arange(len(given))]
        equal = np.full(n_devices, 1.0 / n_devices)
        shares = [equal if scheme == "iid" else rng.dirichlet(np.full(n_devices, alpha))]
    parts: list[list[int]] = [[] for _ in range(n_devices)]
    for group, share in zip(groups, shares, strict=True):
        cuts = np.rint(np.cumsum(share)[:-1] * len(group)).astype(int)
        for part, indices in zip(parts, np.split(rng.permutation(group), cuts), strict=True):
            part.extend(indices.tolist())
    _top_up(parts, min_rows, rng)
    return [np.sort(np.asarray(part, dtype=np.int64)) for part in parts]


def _top_up(parts: list[list[int]], min_rows: int, rng: np.random.Generator) -> None:
    for part in parts:
        while len(part) < min_rows:
            richest = max(parts, key=len)
            part.append(richest.pop(int(rng.integers(len(richest)))))


@checked
def split_rows(rows: Sequence[Row], sizes: Mapping[str, int], seed: int = 0) -> dict[str, list[Row]]:
    """Split ``rows`` into disjoint, shuffled, stratified splits (each label's share is exact to within one row).

    ``sizes`` maps a split's name to its number of rows. Of rows with equal texts only the first is used, so that no
    text is in two splits. Rows left over are not returned.

    Raises:
        DataError: fewer distinct rows than requested.
        InputError: a negative size.
    """
    if any(size < 0 for size in sizes.values()):
        raise InputError(f"sizes must be 0 or more, got {dict(sizes)}", field="sizes")
    distinct = drop_duplicates(rows)
    total = sum(sizes.values())
    if total > len(distinct):
        raise DataError(f"{dict(sizes)} needs {total} distinct rows, got {len(distinct)}", limit=len(distinct))
    rng = generator(seed, "split")
    # Each label's rows are spread evenly over [0, 1) in random order: any interval then has every label in proportion.
    positions = np.empty(len(distinct))
    given = _strata(distinct)
    for label in np.unique(given):
        members = rng.permutation(np.flatnonzero(given == label))
        positions[members] = (np.arange(len(members)) + rng.random()) / len(members)
    order = np.argsort(positions, kind="stable")
    splits: dict[str, list[Row]] = {}
    start = 0
    for name, size in sizes.items():
        splits[name] = [distinct[i] for i in rng.permutation(order[start : start + size])]
        start += size
    return splits


def _strata(rows: Sequence[Row]) -> NDArray[np.int64]:
    """Label indices [n]; zeros for target texts."""
    return np.array([0 if isinstance(label, str) else label for _, label in rows], dtype=np.int64)


@checked
def write_partition(
    folder: str | Path,
    rows: Sequence[Row],
    labels: Sequence[str],
    n_devices: int,
    scheme: Scheme = "iid",
    alpha: float = 1.0,
    seed: int = 0,
    min_rows: int = 1,
) -> Manifest:
    """Write a partition of ``rows`` to ``folder``/``device-0.jsonl`` … and ``manifest.json``; return the manifest.

    Raises as `partition` does.
    """
    parts = partition(_strata(rows), n_devices, scheme, alpha, seed, min_rows)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    devices = []
    for index, part in enumerate(parts):
        file = folder / f"device-{index}.jsonl"
        own = [rows[i] for i in part]
        write_rows(file, own, labels)
        counts = {name: sum(label == i for _, label in own) for i, name in enumerate(labels)}
        devices.append(DevicePart(file=file.name, rows=len(own), counts=counts, sha256=sha256_of(file)))
    manifest = Manifest(
        labels=tuple(labels),
        scheme=scheme,
        alpha=None if scheme == "iid" else alpha,
        seed=seed,
        devices=tuple(devices),
    )
    encoded = msgspec.json.format(msgspec.json.encode(manifest), indent=2)
    (folder / "manifest.json").write_bytes(encoded + b"\n")
    return manifest


@checked
def read_manifest(folder: str | Path) -> Manifest:
    """Read the manifest of ``folder`` and check each file against its sha256.

    Raises:
        DataError: no manifest, a damaged one, or a file that is missing or was changed.
    """
    folder = Path(folder)
    path = folder / "manifest.json"
    try:
        manifest = from_json(path.read_bytes(), Manifest)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    except DECODE_ERRORS as error:
        raise DataError(f"{path} is damaged: {error}") from error
    for part in manifest.devices:
        file = folder / part.file
        if not file.is_file() or sha256_of(file) != part.sha256:
            raise DataError(f"{file} is missing or differs from {path}: partition again")
    return manifest
