"""Detection of changes to a model's files while it is in use: its weights are mapped from them, not copied."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedbpt.argument_types import checked
from fedbpt.errors import ModelFileError, ModelNotFoundError
from fedbpt.models.fingerprints import FileStamp, fingerprint, stamps_of
from fedbpt.models.parts import model_parts


class WatchedFiles:
    """The state of a model's files at construction, to be constructed before the model is loaded.

    Raises `ModelFileError` as `model_parts`, and `ModelNotFoundError` if there is no such file.
    """

    @checked
    def __init__(self, path: Path) -> None:
        self._path = path
        self._parts = model_parts(path)
        try:
            self._stamps = stamps_of(self._parts)
        except OSError as error:
            raise ModelNotFoundError(f"cannot read the model file {path}: {error.strerror or error}") from error
        self._fingerprint: str | None = None

    @property
    def fingerprint(self) -> str:
        """``sha256:…`` of the files at construction. Raises `ModelFileError` if they changed before it was computed."""
        if self._fingerprint is None:
            with self.unchanged():
                found = fingerprint(self._path)
            self._fingerprint = found
        return self._fingerprint

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Context in which the files are used. Raises `ModelFileError` if they changed before or during it."""
        self.check()
        yield
        self.check()

    def check(self) -> None:
        """Raise `ModelFileError` if a file's content has changed; a changed time stamp is not enough."""
        try:
            now = stamps_of(self._parts)
        except OSError as error:
            problem = f"can no longer be read ({error.strerror or error})"
            raise self._changed(Path(error.filename or self._path), problem) from error
        if now == self._stamps:
            return
        if self._has_same_content(now):
            self._stamps = now
            return
        changed = next(part for part, old, new in zip(self._parts, self._stamps, now, strict=True) if old != new)
        raise self._changed(changed, "was modified or replaced after it was loaded")

    def _has_same_content(self, now: tuple[FileStamp, ...]) -> bool:
        if self._fingerprint is None or [file.size for file in now] != [file.size for file in self._stamps]:
            return False
        return fingerprint(self._path) == self._fingerprint

    def _changed(self, path: Path, problem: str) -> ModelFileError:
        return ModelFileError(f"{path} {problem}: restart the program that uses it (fedbpt device, serve, your own)")
