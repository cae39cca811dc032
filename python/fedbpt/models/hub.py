"""One file from the Hugging Face hub, resumable and verified.

`huggingface_hub` says where the file is and what its user may read it by. It is asked for and streamed here: that
library's own downloader starts from zero in each new process, which a 3 GB file over a weak link cannot afford.
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

_ATTEMPTS = 5  # in a row without a new byte
_BACKOFF_S = 1.0
_TIMEOUT_S = 30.0
_REDIRECTS = 5


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
        from huggingface_hub import constants, get_token, hf_hub_url
    except ImportError as error:
        raise MissingExtraError("fetching from the Hugging Face hub", "hub") from error
    what, endpoint = f"{repo}/{filename}", os.environ.get("HF_ENDPOINT")
    if constants.HF_HUB_OFFLINE:
        raise DownloadError(f"HF_HUB_OFFLINE is set: unset it to fetch {what}, or fetch it by hand and give its path")
    try:
        token = get_token()
        url = hf_hub_url(repo, filename, endpoint=endpoint)
    except Exception as error:
        raise _not_given(what, str(error) or type(error).__name__) from error
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    told = _head(url, headers, what)
    etag = told.get("X-Linked-Etag") or told.get("ETag", "")
    sha256, commit = etag.removeprefix("W/").strip('"').lower(), told.get("X-Repo-Commit", "")
    size = told.get("X-Linked-Size") or told.get("Content-Length", "")
    if not re.fullmatch(r"[0-9a-f]{64}", sha256) or not commit or not re.fullmatch(r"[0-9]{1,18}", size):
        raise DownloadError(f"the hub states no sha256 for {what}: fetch it by hand and give its path")
    pinned = hf_hub_url(repo, filename, revision=commit, endpoint=endpoint)
    return RemoteFile(pinned, headers, commit, sha256, int(size))


def _head(url: str, headers: dict[str, str], what: str) -> httpx.Headers:
    """What the hub says of a file: not what the store says that it leads to, which is on another host."""
    target = httpx.URL(url)
    try:
        with _client() as http:
            for _ in range(_REDIRECTS):  # a repository that was renamed
                response = http.head(target, headers={**headers, "Accept-Encoding": "identity"})
                following = response.next_request
                if following is None or following.url.netloc != target.netloc:
                    break
                target = following.url
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise _not_given(what, certificate_problem(error) or str(error) or type(error).__name__) from error
    if response.status_code in (401, 403):
        raise _not_given(what, f"HTTP {response.status_code}: set HF_TOKEN to an access token that may read it")
    if response.is_error:
        raise _not_given(what, f"HTTP {response.status_code} {response.reason_phrase}".rstrip())
    return response.headers


def _not_given(what: str, reason: str) -> DownloadError:
    return DownloadError(f"the Hugging Face hub did not give {what}: {reason}")


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


def _client() -> httpx.Client:
    return httpx.Client(transport=ByProxy(), timeout=_TIMEOUT_S)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _stream(remote: RemoteFile, partial: Path, have: int, progress: Progress | None) -> None:
    headers = {**remote.headers, "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    # Redirects lead to a store on another host; httpx leaves the access token behind there.
    with _client() as http, http.stream("GET", remote.url, headers=headers, follow_redirects=True) as response:
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
