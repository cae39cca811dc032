"""A headless Chromium, pages without console errors, and dashboards as real processes."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright
from playwright.sync_api import Error as PlaywrightError

from tests.integration.processes import Fleet

FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    " --disable-component-update --disable-sync"
)
WAIT_MS = 60_000
"""Maximum time for anything to show, in milliseconds."""

DESKTOP = {"width": 1280, "height": 800}
PHONE = {"width": 390, "height": 844}

OpenPage = Callable[..., Page]


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    """Close before other tests start, because Playwright leaves an event loop running in this thread."""
    expect.set_options(timeout=WAIT_MS)
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=found, args=FLAGS.split())
        except PlaywrightError as error:
            if found is not None:
                raise
            reason = str(error).splitlines()[0]
            pytest.skip(f"no browser: apt-get install chromium, or `playwright install chromium` ({reason})")
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Browser) -> Iterator[OpenPage]:
    """``open_page(url, size, scheme, drawn)``; ``drawn``: a chart is waited for.

    At the end: no page complained, and none asked another machine for anything.
    """
    complaints: list[str] = []
    asked: set[str] = set()
    contexts = []

    def open_one(url: str, size: dict[str, int] = DESKTOP, scheme: str = "light", drawn: bool = True) -> Page:
        context = browser.new_context(viewport=size, color_scheme=scheme, locale="en-US")  # type: ignore[arg-type]
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(WAIT_MS)
        page.on("console", lambda said: complaints.append(said.text) if said.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: asked.add(urlsplit(request.url).hostname or request.url[:20]))
        page.on("websocket", lambda socket: asked.add(urlsplit(socket.url).hostname or socket.url))
        try:
            page.goto(url)
        except PlaywrightError as error:
            if "ERR_CONNECTION_REFUSED" not in str(error):
                raise
            # Seen once, on a busy machine, of a server that had said where it is.
            print(f"a second try: {error}")
            time.sleep(2.0)
            page.goto(url)
        page.wait_for_selector(".chart svg" if drawn else ".panel")
        return page

    yield open_one
    for context in contexts:
        context.close()
    gone = "net::ERR_CONNECTION_REFUSED"  # the browser's own word on a coordinator that ended before its page
    assert [complaint for complaint in complaints if gone not in complaint] == []
    assert asked <= {"127.0.0.1"}


@pytest.fixture
def fleet() -> Iterator[Fleet]:
    fleet = Fleet()
    yield fleet
    fleet.end()


def shown(fleet: Fleet, run: str, store: Path, *more: object) -> str:
    """The address of ``fedbpt dashboard``."""
    process = fleet.spawn("fedbpt", "dashboard", run, "--store", store, "--at", "127.0.0.1:0", "--json", *more)
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        pytest.fail(f"the dashboard did not start: {process.communicate(timeout=10)[1]}")
    return str(json.loads(line)["ready"]["url"])


def dashboard_of(process: subprocess.Popen[str]) -> str:
    """The address that ``fedbpt tune --dashboard`` prints."""
    assert process.stderr is not None
    line = process.stderr.readline()
    found = re.fullmatch(r"dashboard at (\S+)\n", line)
    assert found, line + process.communicate(timeout=10)[1] if process.poll() is not None else line
    return found[1]
