"""The report's page as a person meets it: in a real browser, from disk, without a network."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec
import pytest
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import Select, WebDriverWait

from edgebert_pipeline.page import render_page, to_script_json
from edgebert_pipeline.parts import Chart, Column, Notice, Section, Table, shorten
from edgebert_pipeline.read_report import read_report
from edgebert_pipeline.report import Report
from edgebert_pipeline.report_html import render_html
from edgebert_pipeline.report_markdown import render_markdown
from edgebert_pipeline.scores import FlippedRow, Flips, GivenAnswer
from edgebert_pipeline.sections.names import place_names
from edgebert_pipeline.vega import vega_script

REPORT = Path(__file__).parent / "reports" / "version-4.json"
MOST_BYTES = 3_000_000
HOSTILE = (
    "<script>document.title='run'</script>",
    '</script><img src=x onerror="document.title=1">',
    "</td></table><style>*{display:none}</style>",
    "{{ 7 * 7 }} {% raw %} ${7*7} `code` **strong**",
    "right-to-left \u202e override \u2067 isolate \u200f mark",
    "![x](https://example.org/x.png) [a](b) \\[a](b) ` [a](b) `` @team\n\n# heading",
    "line\u2028separators\u2029 and <!-- a comment",
    "no spaces " + "x" * 10_000,
)


@pytest.fixture(scope="module")
def report() -> Report:
    return read_report(REPORT)


@pytest.fixture(scope="module")
def html(report: Report) -> str:
    return render_html(report)


Open = Callable[..., Any]


def requests(browser: Any) -> list[str]:
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [
        message["params"]["request"]["url"]
        for message in messages
        if message["method"] == "Network.requestWillBeSent"
    ]


def fetched(browser: Any) -> list[str]:
    return [url for url in requests(browser) if not url.startswith("data:")]


def script(browser: Any, code: str) -> Any:
    return browser.execute_script(code)


def test_nothing_is_fetched_and_nothing_is_complained_of(html: str, open_page: Open) -> None:
    browser = open_page(html)
    assert browser.get_log("browser") == []
    assert fetched(browser) == [browser.current_url]
    assert len(html.encode()) < MOST_BYTES


def test_no_script_is_taken_from_the_cache_that_jobs_share(
    report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEBERT_CACHE_DIR", str(tmp_path))
    name = f"vega-{metadata.version('vl-convert-python')}.js"
    for place in (tmp_path, tmp_path / "charts", tmp_path / "edgebert-charts"):
        place.mkdir(exist_ok=True)
        (place / name).write_text("document.title = 'run'")
    vega_script.cache_clear()
    assert "document.title = 'run'" not in render_html(report)


def test_every_chart_has_marks_and_a_name(html: str, open_page: Open) -> None:
    browser = open_page(html)
    charts = script(
        browser,
        """return [...document.querySelectorAll('.plot')].map(plot => ({
            title: plot.parentElement.querySelector('figcaption').textContent,
            label: plot.getAttribute('aria-label'),
            role: plot.getAttribute('role'),
            marks: plot.querySelectorAll('.role-mark path, .role-mark text, .role-mark line').length
        }))""",
    )
    titles = [chart["title"] for chart in charts]
    for wanted in (
        "Accuracy against latency",
        "Size of the model files",
        "1 text a call",
        "32 texts a call",
        "Differences of accuracy",
        "F1 of each label",
        "Confusion",
        "Reliability",
        "Sensitivity",
        "Validation accuracy",
    ):
        assert any(title.startswith(wanted) for title in titles), wanted
    for chart in charts:
        assert chart["marks"] > 0, chart["title"]
        assert len(chart["label"]) > 30, chart["title"]
        assert chart["role"] == "graphics-document"


def test_the_page_says_what_was_built_the_verdict_and_what_to_take(
    html: str, report: Report, open_page: Open
) -> None:
    browser = open_page(html)
    head = browser.find_element(By.TAG_NAME, "header").text
    assert report.name in head
    assert "Gate passed: 8 checks." in head
    assert f"Recommended: {report.recommended.variant}" in head
    assert report.recommended.reason in head
    for heading in ("Flipped rows", "Not done", "Environment", "How it was made", "Engines"):
        assert browser.find_elements(By.XPATH, f"//h2[text()='{heading}']"), heading
    body = script(browser, "return document.body.textContent")
    for fact in (report.bundle_digest, report.data.sha256, report.evaluation.rows_sha256):
        assert fact is not None
        assert fact in body
    for item in report.not_done:
        assert item.what in body
        assert item.reason in body


def test_hovering_over_a_point_shows_its_values(html: str, report: Report, open_page: Open) -> None:
    browser = open_page(html)
    point = browser.find_element(By.CSS_SELECTOR, ".plot .mark-symbol.role-mark path")
    script(
        browser,
        "document.querySelector('.plot').scrollIntoView({block: 'center', behavior: 'instant'})",
    )
    ActionChains(browser).move_to_element(point).perform()
    tooltip = WebDriverWait(browser, 10).until(
        lambda found: found.find_element(By.CSS_SELECTOR, "#vg-tooltip-element.visible")
    )
    name = next(v.full_name for v in report.evaluation.variants if v.full_name in tooltip.text)
    variant = next(v for v in report.evaluation.variants if v.full_name == name)
    assert f"{variant.accuracy:.4f}" in tooltip.text
    assert variant.timing is not None
    assert f"{variant.timing.latency_p50_ms:.2f}" in tooltip.text


def test_a_table_is_sorted_by_the_column_that_is_clicked(html: str, open_page: Open) -> None:
    browser = open_page(html)
    table = browser.find_element(By.CSS_SELECTOR, "#variants table")

    def column(number: int) -> list[str]:
        cells = table.find_elements(By.CSS_SELECTOR, f"tbody tr > :nth-child({number})")
        return [cell.text for cell in cells]

    for number, value in ((2, float), (3, lambda text: float(text.split()[0]))):
        button = table.find_element(By.CSS_SELECTOR, f"thead th:nth-child({number}) button")
        for descending in (False, True):
            button.click()
            values = [value(text) for text in column(number)]
            assert values == sorted(values, reverse=descending)
            state = button.find_element(By.XPATH, "..").get_attribute("aria-sort")
            assert state == ("descending" if descending else "ascending")
    table.find_element(By.CSS_SELECTOR, "thead th:nth-child(6) button").click()
    timed = [text != "not timed" for text in column(6)]
    assert timed == sorted(timed, reverse=True)  # what has no value comes last


@pytest.mark.parametrize("width", [320, 768, 1280])
def test_nothing_scrolls_sideways_but_wide_tables_in_themselves(
    html: str, open_page: Open, width: int
) -> None:
    browser = open_page(html, width=width)
    script(browser, "for (const d of document.querySelectorAll('details')) d.open = true")
    assert script(browser, "return document.documentElement.scrollWidth") <= width
    outside = script(
        browser,
        """return [...document.querySelectorAll('p, h1, h2, h3, figure, svg, .facts, .filter')]
            .filter(e => !e.closest('.table') && e.getBoundingClientRect().right > innerWidth + 1)
            .map(e => e.outerHTML.slice(0, 80))""",
    )
    assert outside == []


CONTRAST = """
const parse = text => (text.match(/[\\d.]+/g) || [0, 0, 0, 0]).map(Number);
const over = ([r, g, b, a = 1], below) => [r, g, b].map((c, i) => c * a + below[i] * (1 - a));
const background = node => {
  const layers = [];
  for (let n = node; n; n = n.parentElement) {
    layers.push(parse(getComputedStyle(n).backgroundColor));
  }
  return layers.reverse().reduce((below, layer) => over(layer, below), [255, 255, 255]);
};
const luminance = colour => {
  const [r, g, b] = colour.map(c => (c /= 255) <= .03928 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4);
  return .2126 * r + .7152 * g + .0722 * b;
};
const ratio = (one, other) => {
  const [a, b] = [luminance(one), luminance(other)].sort((x, y) => y - x);
  return (a + .05) / (b + .05);
};
const found = [];
const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walk.nextNode()) {
  const node = walk.currentNode.parentElement;
  if (!walk.currentNode.data.trim() || node.closest('script, style, .skip')) continue;
  const style = getComputedStyle(node);
  const colour = parse(node.closest('svg') ? style.fill : style.color);
  const below = background(node.closest('svg')?.parentElement ?? node);
  found.push([ratio(over(colour, below), below), walk.currentNode.data.trim().slice(0, 40)]);
}
// Figures in the darkest cells of a confusion matrix: ink on 45 % of the accent.
const probe = document.createElement('i');
document.body.append(probe);
const variable = name => {
  probe.style.color = `var(--${name})`;
  return parse(getComputedStyle(probe).color);
};
const [ink, accent, surface] = ['ink', 'accent', 'surface'].map(variable);
found.push([ratio(ink, over([...accent.slice(0, 3), .45], surface)), 'confusion matrix']);
probe.remove();
return found;
"""


@pytest.mark.parametrize("dark", [False, True])
def test_every_text_is_legible(html: str, open_page: Open, dark: bool) -> None:
    """WCAG 2.2, level AA: a contrast of 4.5, in charts too."""
    browser = open_page(html, dark=dark)
    found = script(browser, CONTRAST)
    assert len(found) > 500
    background = script(browser, "return getComputedStyle(document.body).backgroundColor")
    assert (int(re.findall(r"\d+", background)[0]) < 60) == dark
    assert [item for item in found if item[0] < 4.5] == []


def test_print_is_light_shows_what_is_folded_and_leaves_out_what_is_for_hands(
    html: str, open_page: Open
) -> None:
    browser = open_page(html, dark=True)
    script(browser, "dispatchEvent(new Event('beforeprint'))")
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    assert (
        script(browser, "return getComputedStyle(document.body).backgroundColor")
        == "rgb(255, 255, 255)"
    )
    assert script(browser, "return document.querySelectorAll('details:not([open])').length") == 0
    for hidden in ("nav", "form.filter"):
        assert not browser.find_element(By.CSS_SELECTOR, hidden).is_displayed()
    script(browser, "dispatchEvent(new Event('afterprint'))")
    assert script(browser, "return document.querySelectorAll('details[open]').length") == 0


def test_flipped_rows_are_found_by_who_answered_what_and_by_words(
    html: str, report: Report, open_page: Open
) -> None:
    assert report.evaluation.flips is not None
    kept = report.evaluation.flips.kept
    names = [v.full_name for v in report.evaluation.variants]
    first, second = names.index("student int8-cpu"), names.index("student fp32")

    def answer(row: FlippedRow, name: str) -> tuple[str, ...]:
        return next(item.labels for item in row.answers if name in item.scores)

    def shown() -> set[int]:
        return {
            int(number)
            for number in script(
                browser,
                "return [...document.querySelectorAll('.flips tbody tr:not([hidden]) th')]"
                ".map(e => e.textContent)",
            )
        }

    browser = open_page(html)
    form = browser.find_element(By.CSS_SELECTOR, "form.filter")
    assert shown() == {row.row for row in kept}
    Select(form.find_element(By.NAME, "first")).select_by_value(str(first))
    Select(form.find_element(By.NAME, "second")).select_by_value(str(second))
    unlike = [row for row in kept if answer(row, names[first]) != answer(row, names[second])]
    assert len(unlike) == report.evaluation.variants[first].flips
    assert shown() == {row.row for row in unlike}
    Select(form.find_element(By.NAME, "right")).select_by_value("0")
    wrong = [row for row in unlike if answer(row, names[first]) != row.truth]
    assert shown() == {row.row for row in wrong}
    Select(form.find_element(By.NAME, "right")).select_by_value("")
    word = str(unlike[0].text).split()[0]
    form.find_element(By.NAME, "text").send_keys(word)
    assert shown() == {row.row for row in unlike if word.lower() in str(row.text).lower()}
    assert form.find_element(By.TAG_NAME, "output").text.startswith(f"{len(shown())} of ")


def hostile(report: Report) -> Report:
    """The report with labels and texts that try to be more than text."""
    first, second = HOSTILE[0], HOSTILE[1] + "y" * 10_000
    raw = msgspec.json.encode(report).decode()
    raw = raw.replace('"negative"', json.dumps(first)).replace('"positive"', json.dumps(second))
    found = msgspec.json.decode(raw, type=Report)
    assert found.evaluation.flips is not None
    rows = tuple(
        msgspec.structs.replace(row, text=HOSTILE[index % len(HOSTILE)])
        for index, row in enumerate(found.evaluation.flips.kept)
    )
    flips = msgspec.structs.replace(found.evaluation.flips, kept=rows)
    evaluation = msgspec.structs.replace(found.evaluation, flips=flips)
    return msgspec.structs.replace(found, evaluation=evaluation)


@pytest.mark.parametrize("width", [320, 1280])
def test_hostile_texts_and_labels_stay_text(report: Report, open_page: Open, width: int) -> None:
    browser = open_page(render_html(hostile(report)), width=width)
    assert browser.get_log("browser") == []
    assert fetched(browser) == [browser.current_url]
    assert browser.title == "tiny-version-4 · Export report"
    more = script(browser, "return document.querySelectorAll('img, main style').length")
    scripts = script(browser, "return document.querySelectorAll('script:not([type])').length")
    assert (more, scripts) == (0, 2)
    assert script(browser, "return document.documentElement.scrollWidth") <= width
    body = script(browser, "return document.querySelector('#flips').textContent")
    for text in HOSTILE[:-1]:
        assert text in body
    labels = script(browser, "return document.querySelector('#labels').textContent")
    assert HOSTILE[0] in labels
    # What turns the direction of writing ends with the text that holds it.
    isolation = script(
        browser,
        "return [...document.querySelectorAll('.flips .text')]"
        ".map(e => getComputedStyle(e).unicodeBidi)",
    )
    assert set(isolation) <= {"isolate", "plaintext"}
    markdown = render_markdown(hostile(report))
    assert "<script" not in markdown
    assert "<img" not in markdown


@pytest.mark.parametrize("name", HOSTILE)
def test_names_mean_nothing_in_markdown(report: Report, name: str) -> None:
    raw = msgspec.json.encode(report).decode()
    for old in ("tiny-version-4", "int8-cpu", *(["negative"] if name.isprintable() else [])):
        raw = raw.replace(json.dumps(old), json.dumps(f"{name} {old}"))
    markdown = render_markdown(msgspec.json.decode(raw, type=Report))
    headings = [
        sum(line.startswith("#") for line in text.splitlines())
        for text in (markdown, render_markdown(report))
    ]
    assert headings[0] == headings[1]
    plain = re.sub(r"(?<!`)(`+)(?!`).*?(?<!`)\1(?!`)", "", markdown)  # without code
    assert not re.findall(r"(?<!\\)(?:\\\\)*\[\w*\]\(", plain)
    for meant in ("@team", "<script", "<img"):
        assert meant not in markdown


def test_a_thousand_long_texts_in_any_script_fit_into_the_page(report: Report) -> None:
    for text in ("<&>\"'" * 2_000, "長い文章" * 2_500, "🙂" * 10_000, "x" * 10_000):
        rows = tuple(
            FlippedRow(
                row=row,
                text=text,
                truth=("negative",),
                answers=(
                    GivenAnswer(labels=("negative",), scores={"student fp32": 0.5}),
                    GivenAnswer(labels=("positive",), scores={"student int8-cpu": 0.5}),
                ),
            )
            for row in range(1000)
        )
        evaluation = msgspec.structs.replace(report.evaluation, flips=Flips(count=5000, kept=rows))
        html = render_html(msgspec.structs.replace(report, evaluation=evaluation))
        assert len(html.encode()) < MOST_BYTES
        assert html.count("<tr data-given") == 1000
        assert "1,000 of the 5,000" in html


def test_a_recipe_that_leaves_texts_out_leaves_no_text_anywhere(
    write_recipe: Any, tmp_path: Path, sentences: list[dict[str, Any]]
) -> None:
    from edgebert_pipeline.run import export

    texts = [row["text"] for row in sentences if len(row["text"]) > 20]
    for name, extra, wanted in (("with", "", True), ("without", "[report]\ntexts = false", False)):
        out = tmp_path / name
        if (tmp_path / "with").exists():  # the same stages, told in another report
            shutil.copytree(tmp_path / "with" / ".stages", out / ".stages")
        made = export(write_recipe(extra=extra), out)
        assert made is not None
        assert made.evaluation.flips is not None
        assert made.evaluation.flips.kept
        assert all((row.text is not None) == wanted for row in made.evaluation.flips.kept)
        files = [out / f"report.{kind}" for kind in ("json", "md", "html")]
        files += (out / ".stages").glob("evaluate-*/result.json")
        held = "\n".join(file.read_text(encoding="utf-8") for file in files)
        flipped = sum(json.dumps(text, ensure_ascii=False)[1:-1] in held for text in texts)
        assert (flipped > 0) == wanted
        assert any("Texts of rows that flipped" in item.what for item in made.not_done) != wanted


def test_json_in_a_script_element_cannot_end_it() -> None:
    value = {"a": list(HOSTILE), "n": 1.5}
    text = str(to_script_json(value))
    assert not set("<>&\u2028\u2029") & set(text)
    assert json.loads(text) == value


def test_labels_in_charts_show_control_characters_and_are_cut() -> None:
    assert shorten("a\u202eb\x00c") == "a\ufffdb\ufffdc"
    assert shorten("x" * 200) == "x" * 79 + "…"
    assert shorten("žluťoučký 日本語 🙂") == "žluťoučký 日本語 🙂"


def test_a_chart_that_cannot_be_drawn_says_so(browser: Any, tmp_path: Path) -> None:
    chart = Chart("Broken", "A chart that is none.", {"mark": "no such mark"})
    table = Table("Fine", [Column("a")], [["1"]])
    page = render_page(
        title="t", kind="k", lead=[Notice("n")], sections=[Section("s", "S", [chart, table])]
    )
    path = tmp_path / "page.html"
    path.write_text(page, encoding="utf-8")
    browser.get(path.as_uri())
    failed = WebDriverWait(browser, 10).until(
        lambda found: found.find_element(By.CSS_SELECTOR, ".plot.failed")
    )
    assert "cannot be drawn" in failed.text


@pytest.mark.parametrize("log", [False, True])
def test_names_of_points_at_one_place_go_around_it_and_the_others_are_left_out(log: bool) -> None:
    found = place_names([(10, 0.5)] * 9, ["variant"] * 9, (1, 100), (0, 1), log=log)
    assert {*found[:4]} == {(left, below) for left in (False, True) for below in (False, True)}
    assert found[4:] == [None] * 5
    apart = place_names([(2, 0.1), (50, 0.9)], ["one", "two"], (1, 100), (0, 1), log=log)
    assert None not in apart
    at_the_edge = place_names([(100, 0.5)], ["variant"], (1, 100), (0, 1), log=log)
    assert at_the_edge[0] is not None
    assert at_the_edge[0][0]  # to the left: on the right it would be cut
