"""The runs of a coordinator that stays up: the list, a page for each, and the controls of the one that runs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import expect

from fedbpt.coordinator.service.run_queue import RunQueue
from fedbpt.runs.submission import Submission
from tests.browser.conftest import OpenPage
from tests.browser.test_stored_runs import WCAG_AA
from tests.integration.processes import Fleet
from tests.support.fake_device import FakeDevice
from tests.support.toy_scene import Scene, ToyTask, settings


@pytest.fixture
def url(tmp_path: Path, fleet: Fleet) -> str:
    """The dashboard of a coordinator with a finished run, and one that waits for devices."""
    scene = Scene(tmp_path / "runs.db", FakeDevice("pi5"), FakeDevice("pixel"))
    scene.run(rounds=6, evaluate_every=2)
    scene.store.close()
    with RunQueue(tmp_path / "queue.db") as queue:
        for run in ("r", "next"):
            queue.add(Submission(run=run, task=ToyTask(), settings=settings()))
        queue.end("r", "finished")
    given = ("--folder", tmp_path, "--listen", "127.0.0.1:0", "--dashboard", "127.0.0.1:0", "--wait", "600", "--json")
    process = fleet.spawn("fedbpt", "coordinator", *given)
    assert process.stdout is not None
    return str(json.loads(process.stdout.readline())["ready"]["dashboard"])


def test_each_run_has_a_page_and_the_running_one_its_controls(url: str, open_page: OpenPage) -> None:
    page = open_page(url, drawn=False)
    rows = page.locator("tbody tr")
    expect(rows).to_have_count(2)
    expect(rows.first).to_contain_text("next")
    expect(rows.first).to_contain_text("running")
    expect(rows.last).to_contain_text("finished")
    assert Axe().run(page, options=WCAG_AA).violations_count == 0

    page.get_by_role("link", name="r", exact=True).click()
    expect(page.get_by_role("status")).to_have_text("finished")
    expect(page).to_have_title(re.compile("^r "))
    expect(page.get_by_role("button", name="Stop")).to_have_count(0)
    page.get_by_role("link", name="All runs").click()

    page.get_by_role("link", name="next").click()
    page.get_by_role("button", name="Stop").click()
    page.get_by_role("button", name="Stop the run").click()
    expect(page.get_by_role("status")).to_have_text("stopped")
    page.get_by_role("link", name="All runs").click()
    expect(rows.filter(has_text="next")).to_contain_text("cancelled")
