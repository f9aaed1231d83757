"""Pages of comparisons and histories as a person meets them: in a real browser, from disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from edgebert_pipeline.cli import main

Open = Callable[..., Any]
HOSTILE = '</script><img src=x onerror="document.title=1">\u202e' + "x" * 10_000


@pytest.fixture(scope="module", params=["compare", "history"])
def page(request, tmp_path_factory, made_report) -> str:
    """A page about three reports, one of whose names and variants try to be more than text."""
    directory: Path = tmp_path_factory.mktemp(request.param)
    names = ["main", "change", "orin"]
    for day, name in enumerate(names, start=1):
        right = {"int8-cpu": [True] * (30 + day) + [False] * (10 - day), "fp32": [True] * 40}
        report = json.loads(
            made_report(
                right,
                name=HOSTILE if name == "orin" else "made-up",
                p50_ms={"int8-cpu": 1 + 0.2 * day},
                measured_at=f"2026-01-0{day}T10:00:00+00:00",
                bundle_digest=f"{day:064x}",
            )
        )
        if name == "orin":
            report["evaluation"]["environment"]["processor"] = HOSTILE
            report["evaluation"]["variants"][0]["name"] = HOSTILE
        (directory / f"{name}.json").write_text(json.dumps(report))
    html = directory / "page.html"
    arguments = ["history", str(directory)]
    if request.param == "compare":
        files = [f"{name}={directory / f'{name}.json'}" for name in names[:2]]
        arguments = ["compare", *files, f"{HOSTILE.replace('=', ' ')}={directory / 'orin.json'}"]
        arguments += ["--max-accuracy-drop", "0.5"]
    done = CliRunner().invoke(main, [*arguments, "--html", str(html)])
    # One of orin's variants is called otherwise, and so is missing.
    assert done.exit_code == (3 if request.param == "compare" else 0), done.stderr
    return html.read_text(encoding="utf-8")


def script(browser: Any, code: str) -> Any:
    return browser.execute_script(code)


def test_nothing_is_fetched_run_or_complained_of(page: str, open_page: Open) -> None:
    browser = open_page(page)
    assert browser.get_log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [
        message["params"]["request"]["url"]
        for message in messages
        if message["method"] == "Network.requestWillBeSent"
    ]
    assert [url for url in urls if not url.startswith("data:")] == [browser.current_url]
    assert "reports" in browser.title
    assert script(browser, "return document.querySelectorAll('img').length") == 0
    assert "onerror" in script(browser, "return document.body.textContent")
    assert "\u202e" not in script(browser, "return document.querySelector('main').textContent")
    assert len(page.encode()) < 3_000_000


def test_every_chart_has_marks(page: str, open_page: Open) -> None:
    browser = open_page(page)
    marks = script(
        browser,
        """return [...document.querySelectorAll('.plot')].map(plot => [
            plot.parentElement.querySelector('figcaption').textContent,
            plot.querySelectorAll('.role-mark path, .role-mark line').length])""",
    )
    assert len(marks) >= 3
    assert [title for title, count in marks if count == 0] == []


def test_hovering_shows_which_report_and_its_figures(page: str, open_page: Open) -> None:
    browser = open_page(page)
    script(
        browser,
        "document.querySelector('.plot').scrollIntoView({block: 'center', behavior: 'instant'})",
    )
    point = browser.find_element(By.CSS_SELECTOR, ".plot .mark-symbol.role-mark path")
    ActionChains(browser).move_to_element(point).perform()
    tooltip = WebDriverWait(browser, 10).until(
        lambda found: found.find_element(By.CSS_SELECTOR, "#vg-tooltip-element.visible")
    )
    assert "main" in tooltip.text
    assert "0.7750" in tooltip.text  # 31 of 40


def test_the_first_table_sorts(page: str, open_page: Open) -> None:
    browser = open_page(page)
    table = browser.find_elements(By.CSS_SELECTOR, "main table")[0]
    heads = [head.text for head in table.find_elements(By.CSS_SELECTOR, "thead th")]
    (column,) = [n for n, head in enumerate(heads, start=1) if head.startswith("accuracy")]
    button = table.find_element(By.CSS_SELECTOR, f"thead th:nth-child({column}) button")
    for descending in (False, True):
        button.click()
        cells = table.find_elements(By.CSS_SELECTOR, f"tbody tr > :nth-child({column})")
        values = [float(cell.text.split()[0].rstrip("%")) for cell in cells]
        assert len(values) > 1
        assert values == sorted(values, reverse=descending)


@pytest.mark.parametrize("width", [320, 1280])
def test_nothing_scrolls_sideways_but_tables_in_themselves(
    page: str, open_page: Open, width: int
) -> None:
    browser = open_page(page, width=width)
    script(browser, "for (const d of document.querySelectorAll('details')) d.open = true")
    assert script(browser, "return document.documentElement.scrollWidth") <= width
