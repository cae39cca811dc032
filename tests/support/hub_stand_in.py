"""A stand-in for the Hugging Face hub on loopback: a few files, HEAD and GET of ``resolve``, ranges, faults.

Based on the hub's documented headers (``X-Repo-Commit``, ``X-Linked-Etag``, ``X-Linked-Size``).
"""

from __future__ import annotations

import hashlib
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Serves ``content`` as ``repo``/``filename``, and more files after `add`.

    Public attributes set before a request cause faults.
    """

    daemon_threads = True

    def __init__(self, repo: str, filename: str, content: bytes) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repo = repo
        self.contents: dict[str, bytes] = {}  # by path
        self.add(filename, content)
        self.paths = set(self.contents)  # those that exist
        self.etag = hashlib.sha256(content).hexdigest()  # of the first file
        self.cut_after: list[int] = []  # each entry truncates one GET response to this many bytes
        self.ignore_ranges = False
        self.get_status = 200
        self.seconds_per_block = 0.0
        self.ranges: list[str | None] = []  # the Range header of each GET
        self.redirect_to: str | None = None  # another stand-in, to which GETs are redirected
        self.tokens: set[str | None] = set()  # the Authorization header of each request
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02})

    def add(self, filename: str, content: bytes) -> None:
        """Serve another file."""
        added = {f"/{self.repo}/resolve/{revision}/{filename}": content for revision in ("main", COMMIT)}
        self.contents |= added
        self.paths = set(self.contents)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def __enter__(self) -> Hub:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"
    BLOCK: ClassVar[int] = 1 << 14

    def do_HEAD(self) -> None:
        if not self._known():
            return
        self.send_response(302 if self.server.redirect_to else 200)
        if self.server.redirect_to:
            self.send_header("Location", self.server.redirect_to + self.path)
        self.send_header("X-Repo-Commit", COMMIT)
        content = self.server.contents[self.path]
        first = content is next(iter(self.server.contents.values()))
        etag = self.server.etag if first else hashlib.sha256(content).hexdigest()
        self.send_header("X-Linked-Etag", f'"{etag}"')
        self.send_header("X-Linked-Size", str(len(content)))
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()

    def do_GET(self) -> None:
        hub = self.server
        hub.ranges.append(self.headers.get("Range"))
        if not self._known():
            return
        if hub.redirect_to:
            self.send_response(302)
            self.send_header("Location", hub.redirect_to + self.path)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if hub.get_status != 200:
            self._empty(hub.get_status)
            return
        start = 0
        if self.headers.get("Range") and not hub.ignore_ranges:
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        content = hub.contents[self.path]
        body = content[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if hub.cut_after:
            self.wfile.write(body[: hub.cut_after.pop(0)])
            self.close_connection = True
            return
        for at in range(0, len(body), self.BLOCK):
            self.wfile.write(body[at : at + self.BLOCK])
            time.sleep(hub.seconds_per_block)

    def handle(self) -> None:
        try:
            super().handle()
        except ConnectionError:  # the test has killed the client
            self.close_connection = True

    def _known(self) -> bool:
        self.server.tokens.add(self.headers.get("Authorization"))
        if self.path in self.server.paths:
            return True
        self._empty(404)
        return False

    def _empty(self, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass
