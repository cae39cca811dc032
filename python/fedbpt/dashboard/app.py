"""The dashboard as an ASGI application. NiceGUI is an optional dependency: import this module only when needed."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final

from fastapi import FastAPI
from nicegui import Client, app, ui
from starlette.requests import Request
from starlette.types import ASGIApp

from fedbpt.coordinator.control import RunControl
from fedbpt.dashboard.compare_page import ComparePage
from fedbpt.dashboard.comparison import Comparison
from fedbpt.dashboard.guard import may_control
from fedbpt.dashboard.pages import RunPage
from fedbpt.dashboard.state import RunState
from fedbpt.errors import FedbptError

Hook = Callable[[], Awaitable[None]]

RECONNECT_S: Final = 5.0
"""How long a page is kept after it loses its connection, in seconds."""

_built: list[RunState] = []


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
    if _built:
        raise FedbptError("this process already has a dashboard: start another process for a second one")
    _built.append(state)

    @ui.page("/", title=f"{state.run} · fedbpt")
    def index(request: Request) -> None:
        RunPage(state, control if may_control(request.scope) else None, invitation())

    @ui.page("/compare", title=f"Compare · {state.run} · fedbpt")
    def compare(request: Request) -> None:
        ComparePage(state.run, comparison, invitation(), may_vote=may_control(request.scope))

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
