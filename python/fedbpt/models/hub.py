"""One file from the Hugging Face hub, resumable and verified.

`huggingface_hub` says where the file is, who may read it, its commit, size and sha256; the bytes are streamed here,
since its own downloader starts from zero in each new process, which a 3 GB file over a weak link cannot afford.
"""

from __future__ import annotations

import os
import re
import time
from dataclasses import dataclass
from pathlib import Path

import httpx

from fedbpt.errors import DownloadError, MissingExtraError
from fedbpt.machine.wheel_files import Progress, require_space, sha256_of

_ATTEMPTS = 5  # in a row without a new byte
_BACKOFF_S = 1.0
_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class RemoteFile:
    """What the hub says of a file: ``url`` is pinned to ``commit``; ``sha256`` hex; ``size`` bytes."""

    url: str
    headers: dict[str, str]
    commit: str
    sha256: str
    size: int


def describe(repo: str, filename: str) -> RemoteFile:
    """Ask the hub (``$HF_ENDPOINT`` where set) about a file.

    Raises:
        MissingExtraError: `huggingface_hub` is not installed.
        DownloadError: the hub cannot be reached, refuses, or does not state a sha256.
    """
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        from huggingface_hub import get_hf_file_metadata, get_token, hf_hub_url
    except ImportError as error:
        raise MissingExtraError("fetching from the Hugging Face hub", "hub") from error
    endpoint = os.environ.get("HF_ENDPOINT")
    try:
        token = get_token()
        url = hf_hub_url(repo, filename, endpoint=endpoint)
        metadata = get_hf_file_metadata(url, token=token, library_name="fedbpt")
    except Exception as error:  # its transport errors share no base and change from version to version
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise DownloadError(f"the Hugging Face hub did not give {repo}/{filename}: {reason[0]}") from error
    sha256 = (metadata.etag or "").lower()
    if not re.fullmatch(r"[0-9a-f]{64}", sha256) or metadata.commit_hash is None or metadata.size is None:
        raise DownloadError(f"the hub states no sha256 for {repo}/{filename}: fetch it by hand and give its path")
    url = hf_hub_url(repo, filename, revision=metadata.commit_hash, endpoint=endpoint)
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    return RemoteFile(url, headers, metadata.commit_hash, sha256, metadata.size)


def fetch(remote: RemoteFile, folder: Path, progress: Progress | None = None) -> Path:
    """Download ``remote`` into ``folder``, going on from where an earlier try (of any process) stopped.

    Returns a file that has the stated size and sha256. Not safe for two at once: hold a lock.

    Raises:
        DownloadError: no answer after several tries, an error status, a full disk, or a wrong checksum (the bytes
            are then thrown away).
    """
    folder.mkdir(parents=True, exist_ok=True)
    # Named by content: bytes of two versions of a file are never joined.
    partial = folder / f"{remote.sha256}.partial"
    if partial.is_file() and partial.stat().st_size > remote.size:
        partial.unlink()
    have = _size(partial)
    require_space(folder, remote.size - have, "the model")
    failures = 0
    while have < remote.size:
        try:
            _stream(remote, partial, have, progress)
            reason = "the answer ended early"
        except httpx.TransportError as error:
            reason = str(error) or type(error).__name__
        now = _size(partial)
        failures = 0 if now > have else failures + 1
        if failures >= _ATTEMPTS:
            raise DownloadError(
                f"the download stopped at byte {now} of {remote.size} ({reason}): run it again to go on"
            )
        if now < remote.size:
            time.sleep(_BACKOFF_S * 2**failures)
        have = now
    actual = sha256_of(partial)
    if actual != remote.sha256:
        partial.unlink()
        raise DownloadError(f"{remote.url}: sha256 is {actual}, expected {remote.sha256}; thrown away, try again")
    return partial


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _stream(remote: RemoteFile, partial: Path, have: int, progress: Progress | None) -> None:
    headers = {**remote.headers, "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    # Redirects lead to a store on another host; httpx leaves the access token behind there.
    with httpx.stream("GET", remote.url, headers=headers, follow_redirects=True, timeout=_TIMEOUT_S) as response:
        continues = response.status_code == 206
        if continues and not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            raise DownloadError(f"{remote.url}: the server sent another range than bytes {have}-; try again later")
        if not continues and response.status_code != 200:
            raise DownloadError(f"{remote.url}: HTTP {response.status_code} {response.reason_phrase}".rstrip())
        done = have if continues else 0
        # Flushed as it comes: a cut or a kill loses nothing that has arrived.
        with partial.open("ab" if continues else "wb") as file:
            for block in response.iter_bytes():
                file.write(block)
                file.flush()
                done += len(block)
                if progress is not None:
                    progress(done, remote.size)
                if done > remote.size:
                    return
