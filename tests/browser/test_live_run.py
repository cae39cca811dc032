"""A running run in the browser: real device processes, a real coordinator, controlled by hand."""

from __future__ import annotations

import re
import subprocess

import pytest
from playwright.sync_api import Page, expect

from tests.browser.conftest import PHONE, OpenPage, dashboard_of
from tests.integration.processes import Fleet
from tests.integration.test_observability import Site

pytestmark = pytest.mark.slow


@pytest.fixture
def site(tmp_path_factory: pytest.TempPathFactory, fleet: Fleet) -> Site:
    return Site(tmp_path_factory.mktemp("site"), fleet)


class Live:
    """A run over two toy devices, and its page."""

    def __init__(self, site: Site, open_page: OpenPage, rounds: int, **options: object) -> None:
        self.devices = site.fleet.devices(("a", "--slow", "0.3"), ("b", "--slow", "0.3"))
        limits = f"rounds = {rounds}\nquorum = 0.5"
        self.coordinator: subprocess.Popen[str] = site.tune(
            [url for _, url in self.devices], limits, "--dashboard", "127.0.0.1:0"
        )
        self.url = dashboard_of(self.coordinator)
        self.page: Page = open_page(self.url, **options)

    def status(self, expected: str) -> None:
        """The stage may follow."""
        expect(self.page.get_by_role("status")).to_have_text(re.compile(rf"^{expected}( · [a-z]+)?$"))


def test_a_run_is_shown_to_its_end_until_the_page_is_closed(site: Site, open_page: OpenPage) -> None:
    live = Live(site, open_page, rounds=8)
    live.status("running")
    expect(live.page.locator(".tile").nth(2)).to_contain_text("2 / 2")
    live.status("finished")
    expect(live.page.locator(".tile").nth(1)).to_contain_text("8 / 8")
    expect(live.page.get_by_role("button", name="Stop")).to_be_hidden()
    assert live.coordinator.poll() is None
    live.page.close()
    out, err = live.coordinator.communicate(timeout=60)
    assert (live.coordinator.returncode, "Traceback" in err) == (0, False)
    assert "test rows" in out


def test_a_dead_device_is_shown_before_its_round_gives_up_on_it(site: Site, open_page: OpenPage) -> None:
    live = Live(site, open_page, rounds=2000)
    live.status("running")
    device, _ = live.devices[1]
    row = live.page.locator("tbody tr", has=live.page.get_by_role("cell", name="b", exact=True))
    expect(row).to_contain_text("live")
    device.kill()
    expect(row).to_contain_text("no response")  # by its heartbeat
    expect(row).to_contain_text("lost")  # by the round
    expect(live.page.locator(".tile").nth(2)).to_contain_text("1 / 2")
    expect(live.page.get_by_role("log")).to_contain_text("is lost")


def test_pause_resume_deadline_and_stop_work_by_keyboard(site: Site, open_page: OpenPage) -> None:
    live = Live(site, open_page, rounds=2000, size=PHONE)
    live.status("running")
    page = live.page

    def reach(name: str) -> None:
        """Press Tab until the button ``name`` has a visible focus."""
        for _ in range(30):
            page.keyboard.press("Tab")
            focused = page.locator(":focus")
            if focused.count() and name in focused.inner_text():
                assert focused.evaluate("e => getComputedStyle(e).outlineStyle") == "solid"
                return
        pytest.fail(f"{name} cannot be reached by the tabulator key")

    reach("Pause")
    page.keyboard.press("Enter")
    live.status("paused")
    page.keyboard.press("Space")
    live.status("running")

    reach("Deadline")
    page.keyboard.press("Enter")
    expect(page.get_by_label("Deadline, seconds")).to_be_focused()
    page.keyboard.press("ControlOrMeta+a")
    page.keyboard.type("45")
    reach("Change")
    page.keyboard.press("Enter")
    expect(page.get_by_role("log")).to_contain_text("45 s")

    expect(page.get_by_role("dialog")).to_be_hidden()
    reach("Stop")
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog")).to_contain_text("Stop this run?")
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_be_hidden()
    live.status("running")
    reach("Stop")
    page.keyboard.press("Enter")
    reach("Stop the run")
    page.keyboard.press("Enter")
    live.status("stopped")
    out, err = live.coordinator.communicate(timeout=60)
    assert live.coordinator.returncode == 130
    assert err.splitlines()[-1].startswith("fedbpt: stopped; to resume: fedbpt tune run.toml")
    assert "Traceback" not in out + err
