"""Models in several files: NAME-00001-of-00003.gguf and what follows it, as llama.cpp splits and names them."""

from __future__ import annotations

import os
import re
from pathlib import Path

from fedbpt.argument_types import checked
from fedbpt.errors import ModelNotFoundError

_PART = re.compile(r"(?P<model>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


@checked
def model_parts(path: Path) -> tuple[Path, ...]:
    """The files of a model in order: one, or all parts of a split model, whichever of them ``path`` is.

    Raises:
        ModelFileError: a part is missing, no GGUF file, cut short, or of another model.
    """
    # A link may have any name: the other parts are then found by the name of what it leads to. A link that has the name
    # of a part is not followed: in a Hugging Face cache it leads to a blob, which is named by its content.
    named = path if _PART.fullmatch(path.name) else path.resolve()
    if not _PART.fullmatch(named.name):
        return (path,)
    from fedbpt import _native

    parts = tuple(Path(os.fsdecode(part)) for part in _native.model_parts(os.fsencode(named)))
    return parts if len(parts) > 1 else (path,)


def names_of_parts(name: str) -> tuple[str, ...]:
    """The names of all parts of the model that a file of this name is a part of; of another file its own."""
    found = _PART.fullmatch(name)
    if found is None or not 1 <= int(found["number"]) <= int(found["count"]):
        return (name,)
    return tuple(f"{found['model']}-{i + 1:05d}-of-{found['count']}.gguf" for i in range(int(found["count"])))


@checked
def model_size(path: Path) -> int:
    """Bytes of all files of a model. Raises as `model_parts`, and `ModelNotFoundError` where there is no such file."""
    try:
        return sum(part.stat().st_size for part in model_parts(path))
    except OSError as error:
        raise ModelNotFoundError(f"cannot read the model file {path}: {error.strerror or error}") from error


def model_stem(path: Path) -> str:
    """A model file's name without ``.gguf``, and without the number of a part."""
    found = _PART.fullmatch(path.name)
    return found["model"] if found else path.stem
