"""The dashboard as an ASGI application. The only importer of NiceGUI besides `pages`: it is an optional dependency."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final

from fastapi import FastAPI
from nicegui import Client, app, ui
from starlette.requests import Request
from starlette.types import ASGIApp

from fedbpt.coordinator.control import RunControl
from fedbpt.dashboard.compare_page import ComparePage
from fedbpt.dashboard.comparing import Comparison
from fedbpt.dashboard.guard import may_steer
from fedbpt.dashboard.pages import RunPage
from fedbpt.dashboard.state import RunState
from fedbpt.errors import FedbptError

Hook = Callable[[], Awaitable[None]]

RECONNECT_S: Final = 5.0
"""How long a page that lost its connection is kept for it to come back."""

_built: list[RunState] = []


def build_app(
    state: RunState,
    control: RunControl | None,
    comparison: Callable[[], Comparison | None],
    invitation: Callable[[], str | None],
    on_startup: Hook,
    on_shutdown: Hook,
) -> ASGIApp:
    """The pages of one run, behind a `fedbpt.dashboard.guard.Guard`, which says who may steer.

    ``comparison``: what there is to compare by now; ``invitation``: the link for others who want to watch.
    NiceGUI keeps one application in a process: a second is refused with `FedbptError`.
    """
    if _built:
        raise FedbptError("this process has a dashboard already: start another process for another one")
    _built.append(state)

    @ui.page("/", title=f"{state.run} · fedbpt")
    def index(request: Request) -> None:
        RunPage(state, control if may_steer(request.scope) else None, invitation())

    @ui.page("/compare", title=f"Compare · {state.run} · fedbpt")
    def compare() -> None:
        ComparePage(state.run, comparison, invitation())

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
    """Pages that are open."""
    return sum(client.has_socket_connection for client in list(Client.instances.values()))
