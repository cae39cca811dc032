"""The formats that weights are stored in: what a file has, what this CPU multiplies fast, and how to change it."""

from __future__ import annotations

import math
import os
import shlex
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from fedbpt.argument_types import checked
from fedbpt.errors import InputError, ModelError
from fedbpt.machine.folders import expanded
from fedbpt.machine.interrupts import interruptible
from fedbpt.machine.wheel_files import Progress, publish
from fedbpt.models.parts import model_parts, model_size, model_stem
from fedbpt.models.store import locate
from fedbpt.models.trial import TrialSettings, run_once
from fedbpt.quantities import Threads

FORMATS = ("q2_k", "q3_k_m", "q4_0", "iq4_nl", "q4_k_m", "q4_1", "q5_k_m", "q6_k", "q8_0", "bf16", "f16")
"""What `requantize` can write, smallest first. Most are mixtures: q4_k_m is q4_K with some q6_K, say."""

_WORTH_IT = 1.5  # times faster: less is not worth what requantising loses
_MEASUREMENTS = 3  # all of them must say so: what else runs may slow one
_SMALL = 20_000_000  # parameters: a model below that is fast in any format
_ROOM = 64_000_000  # bytes by which the file may grow
_OFFERED = {"q8_0": 8.5, "q4_0": 4.5}  # with a fast kernel on most CPUs: bits a parameter, least loss first


class WeightFormat(NamedTuple):
    """The part of a model's layers that is stored as ``type``, a ggml type (q4_1, q6_K, f16, ...)."""

    type: str
    n_params: int
    n_bytes: int


@dataclass(frozen=True)
class Requantized:
    """What `requantize` wrote, with the sizes of the two files in bytes."""

    path: Path
    format: str
    source: Path
    size: int
    source_size: int


@checked
@interruptible()
def requantize(
    name_or_path: str | os.PathLike[str],
    format: str,
    out: str | os.PathLike[str] | None = None,
    *,
    force: bool = False,
    n_threads: Threads | None = None,
    progress: Progress | None = None,
) -> Requantized:
    """Write a model in another format, by llama.cpp's quantiser; use the new file by its path.

    What quantisation lost stays lost, and requantising a quantised file loses some more: `fedbpt.evaluate` says how
    much. The new file is another model, with a fingerprint of its own. Nothing half-written ever has its name.

    Args:
        name_or_path: a catalogue name that has been pulled, or a GGUF file; any part of a split one.
        format: one of `FORMATS`.
        out: the file to write, in one part; None: ``NAME.FORMAT.gguf`` beside the source.
        force: replace ``out`` if it exists. The source is never replaced.
        n_threads: threads that compute; None: as many as the machine has.
        progress: called with tensors done and in total. What it raises ends the work.

    Raises:
        InputError: no such format, no threads, or ``out`` exists or is the source.
        ModelNotFoundError: no such model.
        ModelFileError: not a GGUF file, damaged, or no room on the disk.
        UnsupportedModelError: a model that fedbpt cannot use.
        ModelError: ``out`` cannot be written.
    """
    if format not in FORMATS:
        raise InputError(f"unknown format {format!r}: choose one of {', '.join(FORMATS)}")
    from fedbpt import _native

    source = locate(name_or_path)
    target = source.with_name(f"{model_stem(source)}.{format}.gguf") if out is None else expanded(out)
    if target.is_dir():
        raise InputError(f"{target} is a folder: give the .gguf file to write")
    if target.exists() and any(target.samefile(part) for part in model_parts(source)):
        raise InputError(f"{target} is the model itself: choose another file to write")
    if target.exists() and not force:
        raise InputError(f"{target} exists: choose another file, or replace it (--force)")
    temporary = target.parent / f"{target.name}.{os.getpid()}-{threading.get_ident():x}.tmp"
    try:
        temporary.touch(exist_ok=False)  # before the work: a folder that cannot be written to is told at once
        try:
            threads = n_threads or os.cpu_count() or 1
            run_once(source, TrialSettings(threads))  # llama.cpp's quantiser, too, ends a process over some files
            _native.requantize(os.fsencode(source), os.fsencode(temporary), format, threads, progress)
            publish(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise ModelError(f"cannot write {target}: {error.strerror or error}") from error
    return Requantized(target, format, source, target.stat().st_size, model_size(source))


@checked
def weight_formats(path: Path) -> tuple[WeightFormat, ...]:
    """The formats of the matrices in the layers of a model, of all its files, most parameters first.

    Raises:
        ModelFileError: not a GGUF file.
    """
    from fedbpt import _native

    return tuple(WeightFormat(*part) for part in _native.weight_formats(os.fsencode(path)))


@checked
def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor of a model by name, of all its files; ggml's way round: a matrix's inputs come first.

    Raises:
        ModelFileError: not a GGUF file.
    """
    from fedbpt import _native

    return dict(_native.tensor_shapes(os.fsencode(path)))


@checked
def matmul_flops(types: Collection[str]) -> dict[str, float]:
    """FLOP/s of one thread of this CPU multiplying 64 tokens by a matrix of each ggml type, in its own CPU time.

    Measured anew, for some 30 ms each: in turn, three times over, so that what else runs here slows all of them alike.

    Raises:
        InputError: no such type.
    """
    from fedbpt import _native

    rounds = [{type: _native.matmul_flops(type) for type in types} for _ in range(3)]
    return {type: max(found[type] for found in rounds) for type in rounds[0]}


@checked
def faster_format(
    model: str,
    weights: Sequence[WeightFormat],
    measure: Callable[[Collection[str]], Mapping[str, float]] = matmul_flops,
) -> str | None:
    """One line of advice where this CPU multiplies much faster by another format, in about the same room; else None.

    The format that loses least comes first, of those that make the file larger by 64 MB at most.

    Args:
        model: the name or path that a command takes.
        weights: from `weight_formats`.
        measure: gives FLOP/s by ggml type.
    """
    n_params = sum(part.n_params for part in weights)
    if n_params < _SMALL:
        return None
    room = 8 * (sum(part.n_bytes for part in weights) + _ROOM)
    offered = [format for format, bits in _OFFERED.items() if bits * n_params <= room]
    if not offered:
        return None
    times = dict.fromkeys(offered, math.inf)
    for _ in range(_MEASUREMENTS):
        flops = measure({*offered, *(part.type for part in weights)})
        seconds = sum(part.n_params / flops[part.type] for part in weights)
        times = {format: min(times[format], seconds * flops[format] / n_params) for format in offered}
        if max(times.values()) < _WORTH_IT:
            return None
    for format in offered:
        if times[format] >= _WORTH_IT:
            share = 100 * weights[0].n_params / n_params
            return (
                f"this CPU multiplies by matrices in {format} {times[format]:.1f} times faster than by this model's "
                f"({share:.0f} % {weights[0].type}): try `fedbpt models requantize {shlex.quote(model)} {format}`; "
                "`fedbpt bench` shows what it gains, `fedbpt evaluate` what it loses"
            )
    return None
