"""The documentation site: built without a warning, opened from disk, and nothing fetched from elsewhere."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import runpy
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = ("index", "quickstart", "tutorial", "cli", "plans", "api/attacks", "results/paper-linear")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the site, strictly: a broken link, a missing anchor or a page without a name fails."""
    if importlib.util.find_spec("mkdocs") is None or importlib.util.find_spec("mkdocstrings") is None:
        pytest.skip("the site needs sparring[docs]")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.browser
def test_nothing_is_fetched_from_elsewhere(site: Path, driver) -> None:  # type: ignore[no-untyped-def]
    for page in PAGES:
        driver.get((site / f"{page}.html").as_uri())
    messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    asked = [one["params"]["request"]["url"] for one in messages if one["method"] == "Network.requestWillBeSent"]
    assert len(asked) > len(PAGES)
    assert [url for url in asked if re.match("(https?|wss?|ftp):", url)] == []


def test_every_command_part_and_plan_table_has_its_place(site: Path) -> None:
    commands = (site / "cli.html").read_text(encoding="utf-8")
    assert all(f'id="sparring-{name}"' in commands for name in ("study", "attack", "export", "doctor"))
    assert 'id="attacks"' in (site / "plans.html").read_text(encoding="utf-8")
    assert "sparring.attacks.run" in (site / "api" / "attacks.html").read_text(encoding="utf-8")


def test_pages_use_no_fonts_or_scripts_of_others(site: Path) -> None:
    for page in site.rglob("*.html"):
        loaded = re.findall(r'<(?:script|link|img)[^>]*(?:src|href)="(https?:[^"]*)"', page.read_text(encoding="utf-8"))
        assert loaded == [], page


def test_the_tutorial_shows_what_it_prints() -> None:
    """Digits may differ: the last bits of a training depend on the processor."""
    content = json.loads((ROOT / "docs" / "tutorial.ipynb").read_text(encoding="utf-8"))
    kept = json.dumps([cell["outputs"] for cell in content["cells"] if cell["cell_type"] == "code"], sort_keys=True)
    made = runpy.run_path(str(ROOT / ".ci" / "notebook"))["executed"](content)
    shown = json.dumps([cell["outputs"] for cell in made["cells"] if cell["cell_type"] == "code"], sort_keys=True)
    assert re.sub(r"[\d.+-]+", "#", shown) == re.sub(r"[\d.+-]+", "#", kept), "run: make notebook"


@pytest.mark.browser
def test_the_search_works_from_disk(site: Path, driver) -> None:  # type: ignore[no-untyped-def]
    from selenium.webdriver.support.ui import WebDriverWait

    driver.get((site / "quickstart.html").as_uri())
    # A busy machine may draw the page late.
    field = WebDriverWait(driver, 30).until(
        lambda page: page.find_element("css selector", "[data-md-component=search-query]")
    )
    field.click()
    field.send_keys("FAB")
    links = "return [...document.querySelectorAll('.md-search-result__link')].map(a => a.href)"
    found: list[str] = []
    for _ in range(150):
        if found := driver.execute_script(links):
            break
        time.sleep(0.2)
    assert any("api/attacks.html" in link for link in found)
