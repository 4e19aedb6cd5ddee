"""Tests of the report in a browser: its charts show their values, it loads nothing else, and it fits a phone."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moe.analysis.report.report import write_report
from moe.bench.analyze import write_runs
from moe.results.table import load_runs

pytestmark = pytest.mark.browser
MALICIOUS_HTML = "<script>console.error('ran')</script><img src=http://example.com/x.png onerror=console.error(1)>"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the report of a sweep with a failed run whose name and error message contain HTML and JavaScript."""
    folder = tmp_path_factory.mktemp("sweep")
    write_runs(folder / "experiment_a", runs=24, steps=30)
    run = next(folder.glob("*/*")) / "run.json"
    changes = {"status": "failed", "error": MALICIOUS_HTML, "name": MALICIOUS_HTML}
    run.write_text(json.dumps(json.loads(run.read_text()) | changes))
    return write_report(load_runs([folder]), folder / "out").with_name("report.html")


@pytest.fixture
def page(report: Path, browser: Any) -> Iterator[Any]:
    """Return the report in a browser with a mouse, with all its parts open."""
    page = browser.new_page(viewport={"width": 1400, "height": 900})
    page.goto(report.as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(details => details.open = true)")
    yield page
    page.close()


def drawn(page: Any) -> list[Any]:
    """Scroll through the page until all its charts are drawn, and return their elements."""
    for place in page.query_selector_all(".plot"):
        place.scroll_into_view_if_needed()
        page.wait_for_function("place => place.classList.contains('js-plotly-plot')", arg=place)
    return list(page.query_selector_all(".plot"))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1400])
def test_the_report_shows_every_figure_and_loads_nothing_else(
    report: Path, browser: Any, width: int, scheme: str
) -> None:
    page = browser.new_page(viewport={"width": width, "height": 844}, color_scheme=scheme)
    messages: list[str] = []
    requests: list[str] = []
    page.on("console", lambda message: messages.append(message.text))
    page.on("pageerror", lambda error: messages.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(report.as_uri())
    assert page.evaluate("document.documentElement.scrollHeight") < (2600 if width == 1400 else 6000)
    page.evaluate("document.querySelectorAll('details').forEach(details => details.open = true)")

    assert len(drawn(page)) >= len(list(report.parent.glob("*.png"))) >= 8
    marks = page.evaluate(
        "[...document.querySelectorAll('.plot')].map(plot => plot.querySelectorAll('.point, .js-line, image').length)"
    )
    assert min(marks) > 0, "every chart has marks"
    assert messages == []
    assert [url for url in requests if not url.startswith(("data:", "blob:"))] == [report.as_uri()]
    assert page.evaluate("document.documentElement.scrollWidth") == width, "only tables scroll sideways"
    assert page.get_by_text("console.error('ran')").first.is_visible(), "the script is shown as text"
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    levels = [int(level) for level in background.removeprefix("rgb(").removesuffix(")").split(",")]
    assert max(levels) < 60 if scheme == "dark" else min(levels) > 200
    page.close()


def test_a_point_shows_its_values_and_its_run(page: Any) -> None:
    """The value in the box is one that the table of runs has."""
    drawn(page)
    place = page.query_selector("figure.chart:has-text('factors_val_perplexity') .plot")
    place.scroll_into_view_if_needed()
    point = place.query_selector(".scatterlayer .point").bounding_box()
    page.mouse.move(point["x"] + point["width"] / 2, point["y"] + point["height"] / 2)
    page.wait_for_selector(".hoverlayer .hovertext")
    text = page.text_content(".hoverlayer .hovertext")
    assert "seed " in text
    assert "router: " in text
    shown = float(text.split("validation perplexity: ")[1])
    values = page.evaluate("place => place.data.flatMap(trace => trace.y)", place)
    assert min(abs(shown - value) for value in values if value is not None) < 0.001


def test_names_of_contrasts_stand_above_their_marks_on_a_phone(report: Path, browser: Any) -> None:
    """No line strikes a name, and the axis has ticks on both sides of zero or several on one."""
    page = browser.new_page(viewport={"width": 390, "height": 844})
    page.goto(report.as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(details => details.open = true)")
    place = page.query_selector("figure.chart:has-text('contrasts_val_perplexity') .plot")
    place.scroll_into_view_if_needed()
    page.wait_for_function("place => place.classList.contains('js-plotly-plot')", arg=place)
    names, points = (
        [each.bounding_box() for each in place.query_selector_all(kind)] for kind in (".annotation-text-g", ".point")
    )
    assert len(names) == len(points) > 1
    edges = sorted(
        [(box["y"], box["y"] + box["height"], kind) for kind, boxes in enumerate((names, points)) for box in boxes]
    )
    assert [kind for *_, kind in edges] == [0, 1] * len(names), "each name is followed by its mark"
    middles = [(top + bottom) / 2 for top, bottom, kind in edges if kind]
    assert all(bottom <= middle for (_, bottom, _), middle in zip(edges[::2], middles, strict=True))
    assert len(place.query_selector_all(".xtick")) >= 4
    page.close()


def test_a_term_is_a_link_to_its_meaning(report: Path, browser: Any) -> None:
    page = browser.new_page()
    page.goto(report.as_uri())
    term = page.query_selector("a.term")
    meaning = page.query_selector(term.get_attribute("href"))
    assert not meaning.is_visible()
    assert term.get_attribute("title") == meaning.query_selector("dd").text_content()
    term.click()
    page.wait_for_function("meaning => meaning.checkVisibility()", arg=meaning)
    page.close()


def test_a_click_on_the_legend_hides_a_condition_in_all_panels(page: Any) -> None:
    drawn(page)
    figure = page.query_selector("figure.chart:has-text('layer_profile')")
    key = figure.query_selector(".legend button")
    hidden = """figure => [...figure.querySelectorAll('.plot')].map(
        plot => plot.data.filter(trace => trace.visible === false).map(trace => trace.name))"""
    assert not any(page.evaluate(hidden, figure))
    key.click()
    name = key.text_content()
    page.wait_for_function(f"figure => ({hidden})(figure).every(names => names.length > 0)", arg=figure)
    assert {each for names in page.evaluate(hidden, figure) for each in names} == {name}
    assert key.get_attribute("aria-pressed") == "false"


def test_a_click_on_a_column_sorts_a_table(page: Any) -> None:
    table = page.query_selector("table.sortable:has(th:text-is('difference'))")
    column = next(i for i, head in enumerate(table.query_selector_all("th")) if head.text_content() == "difference")
    cells = f"""table => [...table.tBodies[0].rows].map(row => parseFloat(row.cells[{column}].textContent))
        .filter(value => !Number.isNaN(value))"""
    before = page.evaluate(cells, table)
    for order in (False, True):
        table.query_selector_all("th")[column].click()
        assert page.evaluate(cells, table) == sorted(before, reverse=order) != before


def test_a_script_that_the_page_does_not_know_does_not_run(page: Any) -> None:
    """The policy allows the scripts of the page by their hashes, and no other."""
    page.evaluate(
        "document.head.append(Object.assign(document.createElement('script'), {textContent: 'window.ran = 1'}))"
    )
    assert page.evaluate("window.ran") is None


def test_the_table_of_contents_links_to_every_part_and_opens_it(report: Path, browser: Any) -> None:
    page = browser.new_page()
    page.goto(report.as_uri())
    links = page.eval_on_selector_all("nav a", "links => links.map(link => link.hash)")
    assert len(set(links)) == len(links) >= 6
    assert set(links) == set(page.eval_on_selector_all(".part > summary", "parts => parts.map(part => '#' + part.id)"))
    page.click("nav a >> nth=-1")
    page.wait_for_function(
        "document.querySelectorAll('details.part')[document.querySelectorAll('nav a').length - 1].open"
    )
    page.close()
