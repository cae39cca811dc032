"""The dashboard as an ASGI application. NiceGUI is an optional dependency: import this module only when needed."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from fastapi import FastAPI
from nicegui import Client, app, ui
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp

from fedbpt.coordinator.control import RunControl
from fedbpt.dashboard.compare_page import ComparePage
from fedbpt.dashboard.comparison import Comparison
from fedbpt.dashboard.guard import may_control
from fedbpt.dashboard.pages import RunPage
from fedbpt.dashboard.runs_page import RunsPage
from fedbpt.dashboard.state import RunState
from fedbpt.errors import FedbptError
from fedbpt.runs.submission import Job

Hook = Callable[[], Awaitable[None]]

RECONNECT_S: Final = 5.0
"""How long a page is kept after it loses its connection, in seconds."""

_built: list[bool] = []


def build_app(
    state: RunState,
    control: RunControl | None,
    comparison: Callable[[], Comparison | None],
    invitation: Callable[[], str | None],
    on_startup: Hook,
    on_shutdown: Hook,
) -> ASGIApp:
    """Build the pages of one run, for use behind a `fedbpt.dashboard.guard.Guard`, which decides who has controls.

    Args:
        state: what to show.
        control: through which pages control the run; None: they cannot.
        comparison: returns what the compare page needs; None: the run is not finished.
        invitation: returns the read-only link for others; None: there is none.
        on_startup, on_shutdown: called on the server's event loop.

    Raises:
        FedbptError: this process has a dashboard already; NiceGUI allows one application per process.
    """
    _reserve()

    @ui.page("/", title=f"{state.run} · fedbpt")
    def index(request: Request) -> None:
        RunPage(state, control if may_control(request.scope) else None, invitation())

    @ui.page("/compare", title=f"Compare · {state.run} · fedbpt")
    def compare(request: Request) -> None:
        ComparePage(state.run, comparison, invitation(), may_vote=may_control(request.scope))

    return _served(on_startup, on_shutdown)


def build_runs_app(
    jobs: Callable[[], Sequence[Job]],
    find: Callable[[str], tuple[RunState, RunControl | None] | None],
    invitation: Callable[[], str | None],
    on_startup: Hook,
    on_shutdown: Hook,
) -> ASGIApp:
    """Build the pages of a coordinator's runs: a list, and a page for each. Arguments and errors as `build_app`.

    Args:
        jobs: returns the runs, in the order of the list.
        find: returns a run's state, and its control while it runs; None: there is no such run.
    """
    _reserve()

    @ui.page("/", title="Runs · fedbpt")
    def index() -> None:
        RunsPage(jobs, invitation())

    @ui.page("/runs/{run}")
    def page(request: Request, run: str) -> Response | None:
        found = find(run)
        if found is None:
            return PlainTextResponse("there is no such run: / lists the runs\n", 404)
        state, control = found
        ui.page_title(f"{run} · fedbpt")
        RunPage(state, control if may_control(request.scope) else None, invitation(), ("All runs", "/"))
        return None

    return _served(on_startup, on_shutdown)


def _reserve() -> None:
    if _built:
        raise FedbptError("this process already has a dashboard: start another process for a second one")
    _built.append(True)


def _served(on_startup: Hook, on_shutdown: Hook) -> ASGIApp:
    app.on_startup(on_startup)
    app.on_shutdown(on_shutdown)
    served = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    ui.run_with(
        served,
        title="fedbpt",
        favicon="📈",
        dark=None,
        language="en-US",
        tailwind=False,
        binding_refresh_interval=None,
        reconnect_timeout=RECONNECT_S,
        show_welcome_message=False,
    )
    return served


def n_pages() -> int:
    """Number of open pages."""
    return sum(client.has_socket_connection for client in list(Client.instances.values()))
