"""The repository's front page: links lead to files, and metadata files can be parsed."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "CONTRIBUTING.md", "SECURITY.md")


@pytest.mark.parametrize("page", PAGES)
def test_every_link_into_the_repository_leads_to_a_file(page: str) -> None:
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", (ROOT / page).read_text())
    inside = [target for target in targets if "://" not in target]
    assert inside
    assert [target for target in inside if not (ROOT / target).exists()] == []


def test_forms_and_workflows_are_yaml_and_ci_calls_our_own_script() -> None:
    parsed: dict[str, Any] = {path.name: yaml.safe_load(path.read_text()) for path in (ROOT / ".github").rglob("*.yml")}
    assert {"ci.yml", "release.yml", "dependabot.yml", "fault.yml", "feature.yml"} <= set(parsed)
    assert {"run": ".ci/run"} in parsed["ci.yml"]["jobs"]["test"]["steps"]
    assert all(form["body"] for name, form in parsed.items() if name in ("fault.yml", "feature.yml"))


def test_the_citation_names_the_paper() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["cff-version"] == "1.2.0"
    assert cited["references"][0]["identifiers"][0]["value"] == "arXiv:2310.01467"


def test_the_projects_addresses_are_placeholders_until_there_is_a_repository() -> None:
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]
    assert {"Homepage", "Documentation", "Issues", "Changelog"} == set(urls)
    assert all("OWNER" in url for url in urls.values()), "the repository has an address: delete this test"
