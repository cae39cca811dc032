"""``fedbpt coordinator``: take runs from ``fedbpt tune --coordinator``, over devices that stay enrolled."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from fedbpt.cli.credentials import token_in
from fedbpt.cli.options import (
    AllowInsecure,
    AsJson,
    Ca,
    Cert,
    ClientCerts,
    Dashboard,
    DashboardToken,
    Key,
    Quiet,
    status_printer,
)
from fedbpt.cli.reach import host_and_port
from fedbpt.coordinator.devices.enrolment import DeviceRegistry
from fedbpt.coordinator.service.run_queue import DEFAULT_QUOTA, Quota, RunQueue
from fedbpt.coordinator.service.run_routes import run_routes
from fedbpt.coordinator.service.run_worker import RunWorker, unwatched
from fedbpt.coordinator.service.server import CoordinatorServer
from fedbpt.errors import ConfigError, StoreError
from fedbpt.net.tls import Tls
from fedbpt.plain_text import echo
from fedbpt.runs.run_lock import sole_worker
from fedbpt.runs.store import RunStore
from fedbpt.runs.submission import Job

if TYPE_CHECKING:
    from fedbpt.dashboard.runs_server import RunsDashboardServer

DEFAULT_LISTEN = "127.0.0.1:8400"
ADMIN_TOKEN = "admin.token"

POLL_S = 1.0
"""Interval between two checks that the thread of the runs is alive, in seconds."""


def coordinator(
    listen: Annotated[
        str, typer.Option("--listen", help="HOST:PORT where devices call in and runs are handed in.")
    ] = DEFAULT_LISTEN,
    folder: Annotated[
        Path, typer.Option("--folder", help="Folder of runs.db, devices.db, queue.db, logs and the admin token.")
    ] = Path("runs"),
    admin_token: Annotated[
        Path | None,
        typer.Option(
            "--admin-token",
            help="File of the token for handing in runs; created if absent. Default: admin.token in the folder.",
        ),
    ] = None,
    wait: Annotated[float, typer.Option("--wait", min=0, help="How long a run waits for devices, in seconds.")] = 60,
    max_queued: Annotated[int, typer.Option("--max-queued", min=0, help="Most runs that wait.")] = DEFAULT_QUOTA.queued,
    max_evaluations: Annotated[
        int | None, typer.Option("--max-evaluations", min=1, help="Most evaluations that a run may ask for.")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", min=1, help="Most forward tokens that a run may ask for.")
    ] = None,
    max_seconds: Annotated[
        float | None, typer.Option("--max-seconds", min=1, help="Longest budget in seconds that a run may ask for.")
    ] = None,
    max_bytes: Annotated[
        int | None,
        typer.Option("--max-bytes", min=1, help="Most bytes that a run's devices send and receive; then it stops."),
    ] = None,
    dashboard: Dashboard = None,
    dashboard_token: DashboardToken = None,
    ca: Ca = None,
    cert: Cert = None,
    key: Key = None,
    client_certs: ClientCerts = False,
    allow_insecure: AllowInsecure = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Run what `fedbpt tune --coordinator` hands in, one run after the other, until Ctrl-C or SIGTERM.

    Devices enrol once (`fedbpt devices invite`) and stay connected. Started again, it goes on where it was.

    Example: fedbpt coordinator --listen 127.0.0.1:8400
    """
    host, port = host_and_port("--listen", listen)
    tell = status_printer(quiet or as_json)
    secret_file = admin_token or folder / ADMIN_TOKEN
    quota = Quota(max_queued, max_evaluations, max_tokens, max_seconds, max_bytes)
    with ExitStack() as stack:
        stack.enter_context(_only_one(folder))
        secret = token_in(secret_file)
        store = stack.enter_context(RunStore(folder / "runs.db"))
        registry = stack.enter_context(DeviceRegistry(folder / "devices.db"))
        queue = stack.enter_context(RunQueue(folder / "queue.db", quota))
        pages = _pages(store.path, lambda: worker.jobs(), dashboard, dashboard_token, Tls(cert, key), allow_insecure)
        watch = unwatched if pages is None else pages.watch
        worker = RunWorker(queue, store, registry, folder / "logs", wait, tell, watch)
        if pages is not None:
            stack.enter_context(pages)
        tls = Tls(cert, key, ca, client_certs)
        routes = run_routes(worker, secret)
        server = CoordinatorServer(registry, host, port, tls=tls, allow_insecure=allow_insecure, more=routes)
        stack.enter_context(server)
        link = None if pages is None else pages.link
        if as_json:
            ready = {"url": server.url, "admin_token": str(secret_file), "dashboard": link}
            echo(msgspec.json.encode({"ready": ready}).decode())
        tell(f"coordinator at {server.url}; Ctrl-C stops it")
        tell(f"hand runs in with: fedbpt tune run.toml --coordinator {server.url} --admin-token {secret_file}")
        if pages is not None:
            tell(f"dashboard at {link}")
            if pages.watch_link is not None:
                tell(f"read-only link for other machines: {pages.watch_link}")
        _work(worker, server)


def _pages(
    store: Path, jobs: Callable[[], Sequence[Job]], at: str | None, token: Path | None, tls: Tls, allow_insecure: bool
) -> RunsDashboardServer | None:
    """The dashboard; None: there is to be none."""
    if at is None:
        if token is not None:
            raise ConfigError("--dashboard-token needs --dashboard HOST:PORT: give both", field="--dashboard-token")
        return None
    from fedbpt.dashboard.runs_server import RunsDashboardServer

    host, port = host_and_port("--dashboard", at)
    secret = None if token is None else token_in(token)
    return RunsDashboardServer(store, jobs, host, port, token=secret, tls=tls, allow_insecure=allow_insecure)


@contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """Make ``folder`` and lock it against other coordinators. Raises `ConfigError` if there is one."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"cannot make the folder {folder}: {error.strerror or error}: choose another one (--folder)",
            field="--folder",
        ) from error
    with ExitStack() as stack:
        try:
            stack.enter_context(sole_worker(folder / "queue.db", ""))
        except StoreError as error:
            if not isinstance(error.__cause__, BlockingIOError):
                raise
            raise ConfigError(
                f"a coordinator runs in {folder} already: stop it, or choose another folder (--folder)",
                field="--folder",
            ) from error
        yield


def _work(worker: RunWorker, server: CoordinatorServer) -> None:
    """Work until Ctrl-C or SIGTERM, then stop the running run. Raises what ended the worker before."""
    try:
        worker.start(server)
        while worker.is_alive():
            worker.join(POLL_S)
    except KeyboardInterrupt:
        return  # the regular end
    finally:
        worker.stop()
    if worker.failure is not None:
        raise worker.failure
