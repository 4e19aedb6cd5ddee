"""Tests of the report in a browser: it shows all figures, loads nothing else, runs no script, and fits a phone."""

import json
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
    page.evaluate("document.querySelectorAll('details').forEach(details => details.open = true)")

    widths = page.evaluate("[...document.images].map(image => image.complete ? image.naturalWidth : 0)")
    assert len(widths) == len(list(report.parent.glob("*.png"))) >= 8
    assert min(widths) > 0, "every figure is a readable image"
    assert messages == []
    assert [url for url in requests if not url.startswith("data:")] == [report.as_uri()]
    assert page.evaluate("document.documentElement.scrollWidth") == width, "only tables scroll sideways"
    assert page.get_by_text("console.error('ran')").first.is_visible(), "the script is shown as text"
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    levels = [int(level) for level in background.removeprefix("rgb(").removesuffix(")").split(",")]
    assert max(levels) < 60 if scheme == "dark" else min(levels) > 200
    page.close()


def test_the_table_of_contents_links_to_every_section(report: Path, browser: Any) -> None:
    page = browser.new_page()
    page.goto(report.as_uri())
    links = page.eval_on_selector_all("nav a", "links => links.map(link => link.hash)")
    assert links == page.eval_on_selector_all("h2", "titles => titles.map(title => '#' + title.id)")
    assert len(set(links)) == len(links) > 8
    page.close()
