"""``fedbpt demo --dashboard`` with the smallest model and real news."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from playwright.sync_api import expect

from tests.browser.conftest import OpenPage
from tests.integration.processes import Fleet

pytestmark = pytest.mark.slow


@pytest.mark.timeout(600)
def test_the_demo_is_shown_and_its_models_can_be_compared(tmp_path: Path, fleet: Fleet, open_page: OpenPage) -> None:
    process = fleet.spawn(
        "fedbpt", "demo", "--quick", "--rounds", "3", "--dashboard", "127.0.0.1:0", "--out", "runs", cwd=tmp_path
    )
    assert process.stderr is not None
    address = next(line.removeprefix("dashboard at ") for line in process.stderr if line.startswith("dashboard at "))
    page = open_page(address.strip())
    expect(page.get_by_role("status")).to_have_text("finished", timeout=300_000)
    page.get_by_role("link", name="Compare").click()
    row = page.locator(".held-out button").first
    expect(row).to_be_visible()
    row.click()
    expect(page.get_by_role("status")).to_contain_text("Expected:")
    for side in ("Tuned", "Original"):
        expect(page.locator(".side", has_text=side).locator(".state")).to_have_text(re.compile("right|wrong"))
    page.close()
    out, err = process.communicate(timeout=60)
    assert (process.returncode, "Traceback" in err) == (0, False)
    assert "fedbpt runs show demo" in out
    assert json.loads((tmp_path / "runs" / "demo-0" / "demo.json").read_text())["devices"] == 3
