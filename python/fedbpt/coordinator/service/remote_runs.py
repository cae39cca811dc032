"""`RemoteRuns`: the runs of a coordinator that stays up, over HTTP: hand in, follow, list, cancel."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Final, TypeVar
from urllib.parse import quote

import httpx

from fedbpt.coordinator.monitoring.monitor import HEARTBEAT_S
from fedbpt.device.agent.calls import RESPONSE_S, accepted, client_options, decoded, origin
from fedbpt.errors import CoordinatorRefusedError, FedbptError, FederationError, WireError
from fedbpt.net.tls import Tls, certificate_problem
from fedbpt.protocol import codec
from fedbpt.protocol.specs import Message
from fedbpt.runs.event_log import Entry, Logged
from fedbpt.runs.events import EventCallback
from fedbpt.runs.result import RunResult
from fedbpt.runs.submission import RUNS_PATH, Job, Jobs, Submission

M = TypeVar("M", bound=Message)
T = TypeVar("T")

log = logging.getLogger(__name__)

POLL_S: Final = 0.5
"""Interval between two requests for the state of a run that waits, in seconds."""

PAUSES_S: Final = (0.5, 10.0)
"""First and longest pause between attempts to reach a coordinator that was reached before, in seconds."""

UNAVAILABLE: Final = (502, 503, 504)
"""Statuses of a proxy before a coordinator that is being restarted."""


class RemoteRuns:
    """The runs of the coordinator at ``url``. A context manager, for its connections.

    Args:
        url: the coordinator's address.
        token: its admin token.
        tls: trusted certificates and the client certificate, for an https address.
        allow_insecure: allow an unencrypted address beyond loopback.

    Raises:
        ConfigError: the address is invalid, or is unencrypted and beyond loopback without ``allow_insecure``.

    Every method raises:
        CoordinatorRefusedError: ``unauthorized``, ``conflict``, ``unknown-run``, ``too-many``, ``over-quota``, ...
        FedbptError: the coordinator cannot be reached, its certificate is not trusted, or it is another server.
    """

    def __init__(self, url: str, token: str, tls: Tls | None = None, allow_insecure: bool = False) -> None:
        self.url = origin(url, allow_insecure)
        options = client_options(self.url, tls or Tls())
        options["headers"]["authorization"] = f"Bearer {token}"
        self._http = httpx.Client(**options)

    def __enter__(self) -> RemoteRuns:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def hand_in(self, submission: Submission) -> Job:
        """Queue a run; see `fedbpt.coordinator.service.run_worker.RunWorker.hand_in`."""
        return self._once(lambda: self._request("POST", RUNS_PATH, Job, codec.encode(submission)))

    def jobs(self) -> tuple[Job, ...]:
        """All runs, in the order of `fedbpt.coordinator.service.run_queue.RunQueue.jobs`."""
        return self._once(lambda: self._request("GET", RUNS_PATH, Jobs)).jobs

    def cancel(self, run: str) -> Job:
        """Stop a run, or take it out of the queue."""
        return self._once(lambda: self._request("DELETE", _path(run), Job))

    def follow(
        self, run: str, on_event: EventCallback, on_job: Callable[[Job], None], tell: Callable[[str], None]
    ) -> RunResult:
        """The result of ``run``, when it is finished. While the coordinator is out of reach, it is tried again.

        Args:
            on_event: called for each event of the run, from this thread.
            on_job: called when the run's state or what it waits for has changed.
            tell: called with a line when the coordinator is out of reach, and when it is back.

        Raises:
            FederationError: the run failed, or was cancelled.
        """
        before: Job | None = None
        after = ""
        while True:
            job = self._persist(lambda: self._request("GET", _path(run), Job), tell)
            if job != before:
                on_job(job)
                before = job
            if job.is_over:
                break
            if job.state == "running" and not job.detail:
                after = self._stream(run, after, on_event)
            time.sleep(POLL_S)
        if job.state == "finished":
            return self._persist(lambda: self._request("GET", f"{_path(run)}/result", RunResult), tell)
        if job.state == "cancelled":
            raise FederationError(f"run {run!r} was cancelled: hand it in again to resume it")
        raise FederationError(f"run {run!r} failed: {job.detail}")

    # --- requests ------------------------------------------------------------------------------------------------

    def _stream(self, run: str, after: str, on_event: EventCallback) -> str:
        """Pass on events until the stream ends or breaks; returns the id of the last one."""
        headers = {"accept": "text/event-stream", "last-event-id": after}
        timeout = httpx.Timeout(RESPONSE_S, read=2 * HEARTBEAT_S)
        try:
            with self._http.stream("GET", f"{_path(run)}/events", headers=headers, timeout=timeout) as response:
                if not response.is_success:
                    return after  # it has just ended, or there are too many readers: ask for its state
                for line in response.iter_lines():
                    if not line.startswith('data: {"seq"'):
                        continue
                    entry = codec.decode_json(line.removeprefix("data: ").encode(), Entry)
                    after = f"{entry.sitting}-{entry.seq}"
                    if not isinstance(entry.event, Logged):
                        on_event(entry.event)
        except httpx.HTTPError as error:  # the state, which is asked for next, says what became of the coordinator
            log.info("the events of %s broke off: %s", run, error)
        return after

    def _request(self, method: str, path: str, kind: type[M], body: bytes | None = None) -> M:
        response = self._http.request(method, path, content=body)
        if response.status_code in UNAVAILABLE:
            raise httpx.TransportError(f"HTTP {response.status_code}")
        try:
            return decoded(accepted(response, response.content), kind)
        except CoordinatorRefusedError as error:
            if error.code in ("not-found", "method-not-allowed", "not-a-coordinator"):
                raise self._another_server() from error
            raise
        except WireError as error:
            if response.headers.get("content-type", "") == codec.CONTENT_TYPE:
                raise FedbptError(
                    f"{self.url} runs another version of fedbpt: update the older of the two ({error})"
                ) from error
            raise self._another_server() from error

    def _another_server(self) -> FedbptError:
        return FedbptError(
            f"{self.url} is not a coordinator that takes runs: give the address that `fedbpt coordinator` prints"
        )

    def _once(self, call: Callable[[], T]) -> T:
        try:
            return call()
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error

    def _persist(self, call: Callable[[], T], tell: Callable[[str], None]) -> T:
        """Call again until the coordinator responds."""
        pause, longest = PAUSES_S
        told = ""
        while True:
            try:
                found = call()
            except httpx.HTTPError as error:
                if certificate_problem(error):
                    raise self._unreachable(error) from error
                if not told:
                    told = f"{self._unreachable(error)}; trying again"
                    tell(told)
            else:
                if told:
                    tell(f"{self.url} responds again")
                return found
            time.sleep(pause)
            pause = min(2 * pause, longest)

    def _unreachable(self, error: httpx.HTTPError) -> FedbptError:
        reason = certificate_problem(error)
        if reason:
            return FedbptError(f"{self.url} {reason}")
        return FedbptError(
            f"no coordinator responds at {self.url} ({str(error) or type(error).__name__}): start `fedbpt coordinator`,"
            " or check the address"
        )


def _path(run: str) -> str:
    return f"{RUNS_PATH}/{quote(run, safe='')}"
