"""Weight formats: which ones a file has, which ones this CPU multiplies fast, and requantisation."""

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
"""Formats that `requantize` can write, smallest first. Most are mixtures, such as q4_k_m: q4_K with some q6_K."""

_MIN_SPEEDUP = 1.5  # less is not worth the loss of requantisation
_MEASUREMENTS = 3  # all must agree, as other processes may slow down one
_MIN_PARAMS = 20_000_000  # a smaller model is fast in any format
_MAX_GROWTH_BYTES = 64_000_000
_BITS_PER_PARAM = {"q8_0": 8.5, "q4_0": 4.5}  # formats with a fast kernel on most CPUs, smallest loss first


class WeightFormat(NamedTuple):
    """The share of a model's layers stored as the ggml type ``type`` (q4_1, q6_K, f16, ...)."""

    type: str
    n_params: int
    n_bytes: int


@dataclass(frozen=True)
class Requantized:
    """The result of `requantize`. Sizes in bytes."""

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
    """Write a model in another format with llama.cpp's quantiser.

    Requantising a quantised file loses additional accuracy; `fedbpt.evaluate` measures how much. The new file is a new
    model with its own fingerprint, to be used by its path. It is written atomically.

    Args:
        name_or_path: a pulled model's name, or a GGUF file; any part of a split one.
        format: one of `FORMATS`.
        out: the file to write, in one part; None: ``NAME.FORMAT.gguf`` in the source's folder.
        force: replace ``out`` if it exists. The source is never replaced.
        n_threads: number of compute threads; None: one per CPU.
        progress: called with tensors done and in total. An exception that it raises cancels the work.

    Raises:
        InputError: no such format, no threads, or ``out`` exists or is the source.
        ModelNotFoundError: no such model.
        ModelFileError: not a GGUF file, damaged, or no space on the disk.
        UnsupportedModelError: a model that fedbpt cannot use.
        ModelError: ``out`` cannot be written.
    """
    if format not in FORMATS:
        raise InputError(f"unknown format {format!r}: choose one of {', '.join(FORMATS)}", field="format")
    from fedbpt import _native

    source = locate(name_or_path)
    target = source.with_name(f"{model_stem(source)}.{format}.gguf") if out is None else expanded(out)
    if target.is_dir():
        raise InputError(f"{target} is a folder: give the .gguf file to write", field="out")
    if target.exists() and any(target.samefile(part) for part in model_parts(source)):
        raise InputError(f"{target} is the model itself: choose another file to write", field="out")
    if target.exists() and not force:
        raise InputError(f"{target} exists: choose another file, or replace it (--force)", field="out")
    temporary = target.parent / f"{target.name}.{os.getpid()}-{threading.get_ident():x}.tmp"
    try:
        temporary.touch(exist_ok=False)  # fails early if the folder is not writable
        try:
            threads = n_threads or os.cpu_count() or 1
            run_once(source, TrialSettings(threads))  # llama.cpp's quantiser too may crash on a bad file
            _native.requantize(os.fsencode(source), os.fsencode(temporary), format, threads, progress)
            publish(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise ModelError(f"cannot write {target}: {error.strerror or error}") from error
    return Requantized(target, format, source, target.stat().st_size, model_size(source))


@checked
def weight_formats(path: Path) -> tuple[WeightFormat, ...]:
    """The formats of the matrices in a model's layers, most parameters first.

    Raises:
        ModelFileError: not a GGUF file.
    """
    from fedbpt import _native

    return tuple(WeightFormat(*part) for part in _native.weight_formats(os.fsencode(path)))


@checked
def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of a model's tensors by name, in ggml's order: a matrix's input dimension comes first.

    Raises:
        ModelFileError: not a GGUF file.
    """
    from fedbpt import _native

    return dict(_native.tensor_shapes(os.fsencode(path)))


@checked
def matmul_flops(types: Collection[str]) -> dict[str, float]:
    """Measure the FLOP/s of one thread multiplying 64 tokens by a matrix, for each ggml type, in its CPU time.

    Takes some 30 ms per type. The types are measured in turn, three times, so that other load affects them all alike.

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
    """Advise, in one line, a format of similar size that this CPU multiplies much faster; None if there is none.

    Of the formats that enlarge the file by at most 64 MB, the one that loses least is preferred.

    Args:
        model: the model's name or path, for the command in the advice.
        weights: from `weight_formats`.
        measure: returns FLOP/s by ggml type.
    """
    n_params = sum(part.n_params for part in weights)
    if n_params < _MIN_PARAMS:
        return None
    max_bits = 8 * (sum(part.n_bytes for part in weights) + _MAX_GROWTH_BYTES)
    offered = [format for format, bits in _BITS_PER_PARAM.items() if bits * n_params <= max_bits]
    if not offered:
        return None
    times = dict.fromkeys(offered, math.inf)
    for _ in range(_MEASUREMENTS):
        flops = measure({*offered, *(part.type for part in weights)})
        seconds = sum(part.n_params / flops[part.type] for part in weights)
        times = {format: min(times[format], seconds * flops[format] / n_params) for format in offered}
        if max(times.values()) < _MIN_SPEEDUP:
            return None
    for format in offered:
        if times[format] >= _MIN_SPEEDUP:
            share = 100 * weights[0].n_params / n_params
            return (
                f"this CPU multiplies {format} matrices {times[format]:.1f} times faster than this model's "
                f"({share:.0f} % {weights[0].type}): try `fedbpt models requantize {shlex.quote(model)} {format}`; "
                "`fedbpt bench` measures the gain, `fedbpt evaluate` the loss"
            )
    return None
