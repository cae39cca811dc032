"""Models split by llama.cpp into several files: NAME-00001-of-00003.gguf and so on."""

from __future__ import annotations

import os
import re
from pathlib import Path

from fedbpt.argument_types import checked
from fedbpt.errors import ModelNotFoundError

_PART = re.compile(r"(?P<model>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


@checked
def model_parts(path: Path) -> tuple[Path, ...]:
    """The files of a model in order: one, or all parts of the split model that ``path`` is any part of.

    Raises:
        ModelFileError: a part is missing, not a GGUF file, truncated, or of another model.
    """
    # A link may have any name, so the other parts are found by its target's name. A link with the name of a part is not
    # followed: in a Hugging Face cache its target is a blob named by its content.
    named = path if _PART.fullmatch(path.name) else path.resolve()
    if not _PART.fullmatch(named.name):
        return (path,)
    from fedbpt import _native

    parts = tuple(Path(os.fsdecode(part)) for part in _native.model_parts(os.fsencode(named)))
    return parts if len(parts) > 1 else (path,)


def names_of_parts(name: str) -> tuple[str, ...]:
    """The file names of all parts of a split model, given any of them; otherwise the name itself."""
    found = _PART.fullmatch(name)
    if found is None or not 1 <= int(found["number"]) <= int(found["count"]):
        return (name,)
    return tuple(f"{found['model']}-{i + 1:05d}-of-{found['count']}.gguf" for i in range(int(found["count"])))


@checked
def model_size(path: Path) -> int:
    """Total size of a model's files in bytes. Raises as `model_parts`, and `ModelNotFoundError` for a missing file."""
    try:
        return sum(part.stat().st_size for part in model_parts(path))
    except OSError as error:
        raise ModelNotFoundError(f"cannot read the model file {path}: {error.strerror or error}") from error


def model_stem(path: Path) -> str:
    """A model file's name without ``.gguf`` and without part number."""
    found = _PART.fullmatch(path.name)
    return found["model"] if found else path.stem
