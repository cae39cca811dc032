"""Notices when the files of a model change while it is in use: its weights are mapped from them, not copied."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedbpt.argument_types import checked
from fedbpt.errors import ModelFileError, ModelNotFoundError
from fedbpt.models.fingerprints import FileStamp, fingerprint, stamps_of
from fedbpt.models.parts import model_parts


class WatchedFiles:
    """The files of one model, as they were when this was made: make it before the model is loaded.

    Raises `ModelFileError` as `model_parts`, and `ModelNotFoundError` where there is no such file.
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
        """``sha256:…`` of the files as they were. Raises `ModelFileError` where they changed before it was known."""
        if self._fingerprint is None:
            with self.unchanged():
                found = fingerprint(self._path)
            self._fingerprint = found
        return self._fingerprint

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Work with the files, which must be the same before and after. Raises `ModelFileError`."""
        self.check()
        yield
        self.check()

    def check(self) -> None:
        """Raise `ModelFileError` where a file has changed. Not where it was only touched, or has its content again."""
        try:
            now = stamps_of(self._parts)
        except OSError as error:
            what = f"cannot be read any more ({error.strerror or error})"
            raise self._refusal(Path(error.filename or self._path), what) from error
        if now == self._stamps:
            return
        if self._has_same_content(now):
            self._stamps = now
            return
        changed = next(part for part, old, new in zip(self._parts, self._stamps, now, strict=True) if old != new)
        raise self._refusal(changed, "is no longer the file that was loaded: it was written to or replaced")

    def _has_same_content(self, now: tuple[FileStamp, ...]) -> bool:
        if self._fingerprint is None or [file.size for file in now] != [file.size for file in self._stamps]:
            return False
        return fingerprint(self._path) == self._fingerprint

    def _refusal(self, path: Path, what: str) -> ModelFileError:
        return ModelFileError(f"{path} {what}; restart what uses it (fedbpt device, serve, your program)")
