"""Resumable, verified downloads of single files from the Hugging Face hub.

`huggingface_hub` gives the file's URL and the user's access token. The download is done here, because that library's
downloader starts from zero in each new process, which is too slow for a 3 GB file over a weak link.
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
from fedbpt.net.proxies import ByProxy
from fedbpt.net.tls import certificate_problem

_ATTEMPTS = 5  # consecutive, without a new byte
_BACKOFF_S = 1.0
_TIMEOUT_S = 30.0
_REDIRECTS = 5


@dataclass(frozen=True)
class RemoteFile:
    """A file on the hub. ``url`` is pinned to ``commit``; ``sha256`` is hexadecimal, ``size`` in bytes."""

    url: str
    headers: dict[str, str]
    commit: str
    sha256: str
    size: int


def describe(repo: str, filename: str) -> RemoteFile:
    """Get a file's URL, commit, size and sha256 from the hub, at ``$HF_ENDPOINT`` if set.

    Raises:
        MissingExtraError: `huggingface_hub` is not installed.
        DownloadError: the hub cannot be reached, refuses access, or gives no sha256.
    """
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        from huggingface_hub import constants, get_token, hf_hub_url
    except ImportError as error:
        raise MissingExtraError("fetching from the Hugging Face hub", "hub") from error
    file = f"{repo}/{filename}"
    endpoint = os.environ.get("HF_ENDPOINT")
    if constants.HF_HUB_OFFLINE:
        raise DownloadError(
            f"HF_HUB_OFFLINE is set: unset it to download {file}, or download it yourself and give its path",
            field="HF_HUB_OFFLINE",
        )
    try:
        token = get_token()
        url = hf_hub_url(repo, filename, endpoint=endpoint)
    except Exception as error:
        raise _download_error(file, str(error) or type(error).__name__) from error
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    response = _head(url, headers, file)
    etag = response.get("X-Linked-Etag") or response.get("ETag", "")
    sha256 = etag.removeprefix("W/").strip('"').lower()
    commit = response.get("X-Repo-Commit", "")
    size = response.get("X-Linked-Size") or response.get("Content-Length", "")
    if not re.fullmatch(r"[0-9a-f]{64}", sha256) or not commit or not re.fullmatch(r"[0-9]{1,18}", size):
        raise DownloadError(
            f"the hub gives no sha256 for {file}: download it yourself and give its path", field="sha256"
        )
    pinned = hf_hub_url(repo, filename, revision=commit, endpoint=endpoint)
    return RemoteFile(pinned, headers, commit, sha256, int(size))


def _head(url: str, headers: dict[str, str], file: str) -> httpx.Headers:
    """The hub's response headers for a file, before any redirect to the storage on another host."""
    target = httpx.URL(url)
    try:
        with _client() as http:
            for _ in range(_REDIRECTS):  # renamed repositories redirect
                response = http.head(target, headers={**headers, "Accept-Encoding": "identity"})
                following = response.next_request
                if following is None or following.url.netloc != target.netloc:
                    break
                target = following.url
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        problem = certificate_problem(error)
        reason = f"it {problem}" if problem else str(error) or type(error).__name__
        raise _download_error(file, reason) from error
    if response.status_code in (401, 403):
        raise _download_error(file, f"HTTP {response.status_code}: set HF_TOKEN to an access token that may read it")
    if response.is_error:
        status = f"HTTP {response.status_code} {response.reason_phrase}".rstrip()
        raise _download_error(file, f"{status}: check the name, or try again later")
    return response.headers


def _download_error(file: str, reason: str) -> DownloadError:
    return DownloadError(f"cannot download {file} from the Hugging Face hub: {reason}")


def fetch(remote: RemoteFile, folder: Path, progress: Progress | None = None) -> Path:
    """Download ``remote`` into ``folder``, resuming an earlier download of any process.

    Returns the path of a file with the expected size and sha256. Not safe to run concurrently: hold a lock.

    Raises:
        DownloadError: no response after several attempts, an error status, a full disk, or a wrong checksum (the file
            is then deleted).
    """
    folder.mkdir(parents=True, exist_ok=True)
    # Named by content, so that two versions of a file are never mixed.
    partial = folder / f"{remote.sha256}.partial"
    if partial.is_file() and partial.stat().st_size > remote.size:
        partial.unlink()
    have = _size(partial)
    require_space(folder, remote.size - have, "the model")
    failures = 0
    while have < remote.size:
        try:
            _stream(remote, partial, have, progress)
            reason = "the response ended early"
        except httpx.TransportError as error:
            reason = str(error) or type(error).__name__
        now = _size(partial)
        failures = 0 if now > have else failures + 1
        if failures >= _ATTEMPTS:
            raise DownloadError(
                f"the download stopped at byte {now} of {remote.size} ({reason}): run it again to resume"
            )
        if now < remote.size:
            time.sleep(_BACKOFF_S * 2**failures)
        have = now
    actual = sha256_of(partial)
    if actual != remote.sha256:
        partial.unlink()
        raise DownloadError(f"{remote.url}: sha256 is {actual}, expected {remote.sha256}: try again", field="sha256")
    return partial


def _client() -> httpx.Client:
    return httpx.Client(transport=ByProxy(), timeout=_TIMEOUT_S)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _stream(remote: RemoteFile, partial: Path, have: int, progress: Progress | None) -> None:
    headers = {**remote.headers, "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    # Redirects lead to storage on another host, to which httpx does not send the access token.
    with _client() as http, http.stream("GET", remote.url, headers=headers, follow_redirects=True) as response:
        continues = response.status_code == 206
        if continues and not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            raise DownloadError(f"{remote.url}: expected the range bytes {have}-, got another one: try again later")
        if not continues and response.status_code != 200:
            status = f"HTTP {response.status_code} {response.reason_phrase}".rstrip()
            raise DownloadError(f"cannot download {remote.url}: {status}: try again later")
        done = have if continues else 0
        # Flushed block by block, so that an interruption loses nothing.
        with partial.open("ab" if continues else "wb") as file:
            for block in response.iter_bytes():
                file.write(block)
                file.flush()
                done += len(block)
                if progress is not None:
                    progress(done, remote.size)
                if done > remote.size:
                    return
