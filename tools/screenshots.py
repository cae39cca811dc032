"""Take the screenshots in docs/img of a real run: ``make screenshots``.

Runs ``fedbpt demo`` unless a store is given, opens its dashboard in Chromium (`playwright`, extra ``dev``), and writes
``dashboard-light.png``, ``dashboard-dark.png``, ``dashboard-phone.png`` and ``compare.png``.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

ROOT = Path(__file__).resolve().parent.parent
DESKTOP, PHONE = (1280, 800), (390, 844)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
WAIT_MS = 300_000  # on a busy machine the first question takes long, as it loads the model


def fedbpt(*arguments: object) -> list[str]:
    """A ``fedbpt`` command of this environment."""
    return [sys.executable, "-m", "fedbpt", *map(str, arguments)]


@contextmanager
def dashboard(run: str, store: Path) -> Iterator[str]:
    """Serve the dashboard of a stored run within the block; gives its URL."""
    command = fedbpt("dashboard", run, "--store", store, "--at", "127.0.0.1:0", "--json")
    questions = store.parent / "data" / "test" / "device-0.jsonl"  # of the demo
    if questions.is_file():
        command += ["--questions", str(questions)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise SystemExit(
                f"the dashboard of {run} did not start: run fedbpt dashboard {run} --store {store} for the reason"
            )
        yield str(json.loads(line)["ready"]["url"])
    finally:
        process.terminate()
        process.wait()


def shoot(page: Page, url: str, target: Path) -> None:
    """Take a screenshot of a page when its charts are drawn."""
    page.goto(url)
    page.wait_for_selector(".chart svg")
    page.wait_for_timeout(1500)  # charts are animated
    page.screenshot(path=str(target), full_page=True)
    print(target)


def compare(page: Page, url: str, target: Path) -> None:
    """Take a screenshot of the compare page when all held-out rows are scored, and the first one is asked."""
    page.goto(url.rstrip("/") + "/compare")
    page.locator(".count", has_text=re.compile(r"^\d+ .*:")).wait_for(timeout=WAIT_MS)
    page.locator(".held-out button").first.click()
    page.locator(".side", has_text="Tuned").locator(".share", has_text="%").first.wait_for(timeout=WAIT_MS)
    page.mouse.move(0, 0)
    page.wait_for_timeout(1500)
    page.screenshot(path=str(target), full_page=True)
    print(target)


def main() -> None:
    """Take all screenshots."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", default="demo", help="name of the run in the store")
    parser.add_argument("--store", type=Path, help="run database; default: that of a new demo")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "img")
    args = parser.parse_args()
    store = args.store
    if store is None:
        folder = ROOT / "build" / "screenshots"
        subprocess.run(fedbpt("demo", "--out", folder), check=True)
        store = folder / "demo-0" / "runs.db"
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with dashboard(args.run, store) as url, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        for name, (width, height), scheme in (
            ("dashboard-light", DESKTOP, "light"),
            ("dashboard-dark", DESKTOP, "dark"),
            ("dashboard-phone", PHONE, "light"),
        ):
            page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)  # type: ignore[arg-type]
            shoot(page, url, args.out / f"{name}.png")
            if name == "dashboard-light":
                compare(page, url, args.out / "compare.png")
            page.close()
        browser.close()


if __name__ == "__main__":
    main()
