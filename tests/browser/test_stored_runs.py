"""Runs of a store in the browser: finished, large, and running in another process."""

from __future__ import annotations

import json
import re
from pathlib import Path

import httpx
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, expect

from fedbpt.protocol import codec
from fedbpt.runs.settings import RunSettings
from fedbpt.runs.store import RunStore, Traffic
from tests.browser.conftest import DESKTOP, PHONE, OpenPage, shown
from tests.browser.stored_runs import write_report, write_run
from tests.integration.processes import Fleet
from tests.support.fake_device import FakeDevice
from tests.support.toy_scene import Scene

WCAG_AA = {"runOnly": {"type": "tag", "values": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"]}}


@pytest.fixture
def finished(tmp_path: Path, fleet: Fleet) -> str:
    """The address of a finished run's dashboard."""
    path = tmp_path / "runs.db"
    scene = Scene(path, FakeDevice("pi5"), FakeDevice("pixel"))
    scene.run(rounds=6, evaluate_every=2)
    scene.store.close()
    return shown(fleet, "r", path)


def points(page: Page, chart: int) -> int:
    """Number of markers in the curve of chart ``chart``, which ECharts draws as separate paths."""
    return page.locator(".chart").nth(chart).locator("svg path").count()


def test_a_finished_run_shows_its_result_and_no_controls(finished: str, open_page: OpenPage) -> None:
    page = open_page(finished)
    expect(page.get_by_role("status")).to_have_text("finished")
    expect(page.get_by_role("heading", name="r", exact=True, level=1)).to_be_visible()
    hero, steps = page.locator(".tile.hero"), page.locator(".panel", has_text="Results by step")
    expect(hero).to_contain_text("development rows")
    expect(hero).to_contain_text("95 % interval")
    expect(steps).to_contain_text("test rows")
    expect(steps.locator("tbody tr")).to_have_count(2)
    shown_figure = hero.locator(".big").inner_text()
    expect(steps.locator("tbody tr").last).to_contain_text(shown_figure)
    expect(page.locator(".tile").nth(1)).to_contain_text("6 / 6")
    expect(page.locator("tbody tr")).to_have_count(2 + 2)
    expect(page.locator(".panel", has_text="Communication")).to_contain_text("needs the model's file")
    for name in ("Pause", "Stop", "Deadline"):
        expect(page.get_by_role("button", name=name)).to_have_count(0)
    for title in ("Accuracy on development rows", "Loss, nats", "Devices", "Communication", "Memory", "Messages"):
        expect(page.get_by_role("heading", name=title, exact=True)).to_be_visible()
    assert points(page, 0) > 4
    page.get_by_role("button", name="how?").first.press("Enter")
    expect(page.get_by_text("2 × parameters × 4 bytes")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_text("2 × parameters × 4 bytes")).to_be_hidden()
    page.get_by_role("button", name="loss", exact=True).click()
    expect(page.get_by_role("button", name="loss", exact=True)).to_have_attribute("aria-pressed", "true")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_it_is_accessible_in_both_colours_and_fits_a_phone(
    finished: str, open_page: OpenPage, size: dict[str, int], scheme: str
) -> None:
    page = open_page(finished, size, scheme)
    expect(page.locator("body")).to_have_class(re.compile(f"body--{scheme}"))
    expect(page.get_by_text("pi5").first).to_be_visible()
    found = Axe().run(page, options=WCAG_AA)
    assert found.violations_count == 0, found.generate_report()
    assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]


def test_a_thousand_rounds_are_shown(tmp_path: Path, fleet: Fleet, open_page: OpenPage) -> None:
    page = open_page(shown(fleet, "big", write_run(tmp_path / "runs.db", 4, 1000)))
    expect(page.locator(".tile").nth(1)).to_contain_text("1,000 / 2,000")
    expect(page.locator(".tile.hero")).to_contain_text("90.0 %")
    expect(page.locator(".tile.hero")).to_contain_text("+20.0 points")
    nodes = page.locator(".chart svg").nth(1).evaluate("svg => svg.querySelectorAll('*').length")
    assert nodes < 200  # a thousand points are two curves


def test_fifty_devices_are_listed_and_new_rounds_appear(tmp_path: Path, fleet: Fleet, open_page: OpenPage) -> None:
    path = write_run(tmp_path / "runs.db", 50, 20, limit=100)
    page = open_page(shown(fleet, "big", path), PHONE)
    expect(page.locator(".tile").nth(2)).to_contain_text("50 / 50")
    expect(page.locator(".device")).to_have_count(50)
    with RunStore(path) as store:
        store.record_losses("big", 21, {"device-07": "device-07: it does not answer"})
        last = next(store.rounds("big", 20))
        reports = [r for r in last.reports if r.device != "device-07"]
        store.commit_round("big", 21, work_digest="", state_digest="", reports=reports, metrics={"seconds": 2.0})
    expect(page.locator(".tile").nth(1)).to_contain_text("21 / 100")
    expect(page.locator(".device", has_text="device-07")).to_contain_text("lost")
    expect(page.locator(".tile").nth(2)).to_contain_text("49 / 50")


def test_with_a_token_only_its_link_opens_the_page(tmp_path: Path, fleet: Fleet, open_page: OpenPage) -> None:
    path = write_run(tmp_path / "runs.db", 2, 3)
    link = shown(fleet, "big", path, "--token-file", tmp_path / "token")
    url, _, token = link.partition("/?token=")
    assert token == (tmp_path / "token").read_text().strip()
    assert httpx.get(url, trust_env=False).status_code == 401
    page = open_page(link)
    assert page.url == f"{url}/"  # the token is not left in the address
    expect(page.locator("tbody tr")).to_have_count(2)
    page.get_by_role("button", name="loss", exact=True).click()  # its WebSocket has the cookie
    expect(page.get_by_role("button", name="loss", exact=True)).to_have_attribute("aria-pressed", "true")


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_the_read_only_link_has_a_qr_code_and_no_controls(
    tmp_path: Path, fleet: Fleet, open_page: OpenPage, size: dict[str, int]
) -> None:
    path = write_run(tmp_path / "runs.db", 2, 3)
    process = fleet.spawn("tests.browser.shared_dashboard", path, "big", "the-operators-token")
    assert process.stdout is not None
    operators, everybodys = json.loads(process.stdout.readline())
    assert "the-operators-token" in operators
    assert "the-operators-token" not in everybodys
    page = open_page(operators)
    expect(page.get_by_role("button", name="Pause")).to_be_visible()
    page.get_by_role("button", name="Watch along").click()
    dialog = page.get_by_role("dialog")
    expect(dialog.get_by_role("img", name="QR code of the link")).to_be_visible()
    expect(dialog.get_by_text(everybodys, exact=True)).to_be_visible()

    watchers = open_page(everybodys, size)
    expect(watchers.locator("tbody tr, .device").first).to_be_visible()
    for name in ("Pause", "Stop", "Deadline"):
        expect(watchers.get_by_role("button", name=name)).to_have_count(0)
    assert "the-operators-token" not in watchers.content()
    watchers.get_by_role("button", name="Watch along").click()  # who watches may bring others
    expect(watchers.get_by_role("dialog").get_by_text(everybodys, exact=True)).to_be_visible()
    watchers.wait_for_function("document.getAnimations().every(each => each.playState !== 'running')")
    found = Axe().run(watchers, options=WCAG_AA)
    assert found.violations_count == 0, found.generate_report()
    assert watchers.evaluate("document.documentElement.scrollWidth") <= size["width"]


@pytest.mark.parametrize("size", [(1920, 1080), (1280, 720)], ids=["1920", "1280"])
def test_a_projector_shows_the_main_things_without_scrolling(
    tmp_path: Path, fleet: Fleet, open_page: OpenPage, size: tuple[int, int]
) -> None:
    width, height = size
    page = open_page(shown(fleet, "big", write_run(tmp_path / "runs.db", 3, 40)), {"width": width, "height": height})
    parts = [page.locator(".sentence"), page.locator(".path"), *page.locator(".tile").all()]
    for part in [*parts, *page.locator(".chart").all()[:2]]:
        expect(part).to_be_visible()
        box = part.bounding_box()
        assert box is not None
        assert box["y"] + box["height"] <= height
    for side in (page.locator(".tile").first, page.locator(".tile").last):
        box = side.bounding_box()
        assert box is not None
        assert box["x"] < 0.05 * width or box["x"] + box["width"] > 0.95 * width


def test_before_the_first_figure_there_is_no_empty_chart(tmp_path: Path, fleet: Fleet, open_page: OpenPage) -> None:
    path = tmp_path / "runs.db"
    with RunStore(path) as store:
        settings = codec.encode(RunSettings(rounds=4))
        store.create_run(
            "new", task="toy", model_fingerprint="sha256:toy", model_name="toy", identity="", settings=settings,
            devices=["pi5"],
        )  # fmt: skip
        page = open_page(shown(fleet, "new", path), drawn=False)
        expect(page.get_by_role("status")).to_have_text("running")
        expect(page.locator(".sentence")).to_contain_text("One device teaches a frozen toy to classify toy; its data")
        expect(page.locator(".waits")).to_have_count(5)
        expect(page.locator(".chart")).to_have_count(0)
        expect(page.locator("main")).not_to_contain_text("0 B")
        store.record_devices("new", {"pi5": FakeDevice("pi5").info()})
        expect(page.locator(".chart")).to_have_count(1)  # memory
        report = write_report("new", 1, "pi5", 0.5)
        costs = {"pi5": Traffic(600, 5000, 2**28)}
        store.commit_round(
            "new", 1, work_digest="", state_digest="", reports=[report], metrics={"seconds": 2.0}, traffic=costs
        )
        expect(page.locator(".chart svg")).to_have_count(4)  # all but accuracy
        expect(page.get_by_role("status")).to_have_text("running · search")
        expect(page.locator(".step.now")).to_have_text("search")


def test_colours_can_be_chosen(finished: str, open_page: OpenPage) -> None:
    page = open_page(finished)
    for expected, name in (("dark", "dark"), ("light", "light"), ("light", "system")):
        page.get_by_role("button", name="Colours").click()
        expect(page.get_by_role("button", name=f"Colours: {name}")).to_be_visible()
        expect(page.locator("body")).to_have_class(re.compile(f"body--{expected}"))
