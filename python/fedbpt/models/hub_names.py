"""Names of models in Hugging Face repositories: ``hf.co/OWNER/REPO:FILE.gguf``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePosixPath

from fedbpt.errors import InputError
from fedbpt.models.parts import names_of_parts

NAME_FORMAT = "hf.co/OWNER/REPO:FILE.gguf"

_PREFIX = re.compile(r"(https://)?(hf\.co|huggingface\.co)/(?P<rest>.*)", re.DOTALL)
_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_FILE = re.compile(r"[\w][\w.+ -]*", re.ASCII)  # a folder or a file


@dataclass(frozen=True)
class HubName:
    """A model in a repository. ``files``: one, or all parts of a split model in order."""

    repo: str
    files: tuple[str, ...]

    def __str__(self) -> str:
        return f"hf.co/{self.repo}:{self.files[0]}"


def parse_hub_name(name: str) -> HubName | None:
    """Parse the name of a model in a hub repository, by any of its parts; None if it is no such name.

    Raises:
        InputError: it begins with ``hf.co/`` or ``huggingface.co/``, but names no repository or no GGUF file.
    """
    found = _PREFIX.fullmatch(name)
    if found is None:
        return None
    repo, _, file = found["rest"].partition(":")
    path = PurePosixPath(file)
    if not _REPO.fullmatch(repo):
        raise InputError(f"no repository in {name!r}: give {NAME_FORMAT}")
    if path.suffix != ".gguf" or path.as_posix() != file or not all(_FILE.fullmatch(part) for part in path.parts):
        raise InputError(f"no GGUF file in {name!r}: give {NAME_FORMAT}, with FILE as listed in the repository")
    return HubName(repo, tuple(path.with_name(part).as_posix() for part in names_of_parts(path.name)))
