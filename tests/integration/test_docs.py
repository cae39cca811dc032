"""The documentation builds as a site with valid links, and loads nothing from other servers."""

from __future__ import annotations

import html
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fedbpt

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr  # a broken link, a page outside the navigation, an unknown name
    return folder


@pytest.mark.timeout(900)  # on a busy machine; 10 s on an idle one
def test_every_page_is_there(site: Path) -> None:
    sources = {path.relative_to(ROOT / "docs").with_suffix(".html") for path in (ROOT / "docs").rglob("*.md")}
    built = {path.relative_to(site) for path in site.rglob("*.html")}
    assert sources - built == set()
    assert (site / "notebooks" / "quickstart.ipynb").is_file()


@pytest.mark.timeout(900)
def test_nothing_comes_from_other_servers(site: Path) -> None:
    foreign = re.compile(r"<(?:script|img|iframe|link)[^>]*\s(?:src|href)=\"?(?:https?:)?//[^>]*>")
    found = [
        (path.name, tag)
        for path in site.rglob("*.html")
        for tag in foreign.findall(path.read_text())
        if 'rel="canonical"' not in tag
    ]
    assert found == []


@pytest.mark.timeout(900)
def test_the_reference_has_the_docstrings(site: Path) -> None:
    text = (site / "reference" / "python.html").read_text()
    for documented in (fedbpt.tune, fedbpt.Budget, fedbpt.import_prompt):
        summary = (inspect.getdoc(documented) or "").splitlines()[0]
        plain = re.split(r"[`*(]", summary)[0].strip()
        assert plain
        assert html.escape(plain, quote=False) in text
