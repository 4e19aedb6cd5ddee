"""Build HTML pages from templates. A page is one file: it contains its style, its figures and its scripts.

The templates escape every value, so text from the data cannot become markup. The page runs no script but those whose
hashes its policy lists.
"""

import base64
import gzip
import hashlib
import importlib.util
import io
import json
import math
import re
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import pandas as pd
from markupsafe import Markup, escape
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from moe.analysis.figures.charts import charts
from moe.analysis.figures.drawing import Drawing
from moe.analysis.report.blocks import (
    MAX_ROWS,
    Attachment,
    Details,
    Folded,
    Glossary,
    Heading,
    Interval,
    ReportBlock,
    Term,
    truncation_note,
)
from moe.analysis.report.markdown import numeric_columns, p_columns, table_cells, without_constants
from moe.checks import one_line, plain, printable

LONG_TEXT = 60  # largest number of characters in a table cell that is kept on one line
MAX_FILE = 200_000  # largest number of bytes of a file that the page contains too
UNLINKED = {"a", "button", "code", "dt", "h1", "h2", "h3", "h4", "script", "summary", "svg", "table"}  # without terms
PICTURE = (300, 34)  # width and height of the picture of an interval, without its axis
AXIS = 14  # height of the numbers of its axis
ARROW = 12  # length of the arrow at an open end of a claimed range


class Cell(NamedTuple):
    """A cell of an HTML table; `kind` is its CSS class, or empty. `value`: what it is sorted by, if not by its text."""

    text: str
    kind: str
    value: float | None = None


class Library(NamedTuple):
    """The script of plotly.js: its text, and the same as base64 of gzip, which has two fifths of the size."""

    text: str
    packed: str


def render_page(
    template: str,
    *,
    package: str = "moe.analysis.report",
    scripts: Sequence[str] = (),
    loaded: Sequence[str] = (),
    **values: Any,
) -> str:
    """Fill a template of `package` with `values` and return the page, with `scripts` at its end.

    The file is in the folder templates/ of the package. Every template may extend page.html.j2. `loaded` are further
    scripts that may run, because `scripts` load them.
    """
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in (*scripts, *loaded)]
    policy = Markup("; script-src " + " ".join(f"'sha256-{each}'" for each in hashes)) if hashes else ""
    trusted = [Markup(script) for script in scripts]
    return _environment(package).get_template(template).render(scripts=trusted, policy=policy, **values)


class Page:
    """The body of a report as it grows: blocks as HTML, in parts that the reader can open and close.

    contents: id and title of each part, for the table of contents.
    """

    def __init__(self) -> None:
        self.contents: list[tuple[str, str]] = []
        self.has_charts = False
        self._terms: list[Term] = []
        self._elements: list[Markup] = []
        self._open: list[tuple[int, str, Markup]] = []  # level, id and end of the parts that have not ended
        self._ids: set[str] = set()

    def add(self, block: ReportBlock) -> None:
        """Append a block. A title ends all parts of its level and of lower ones."""
        match block:
            case Heading() | Folded():
                self._end(block.level)
                name = self._id(block.text)
                if block.level == 2:
                    self.contents.append((name, block.text))
                folded = isinstance(block, Folded)
                self._elements += [
                    Markup('<details class="part">' if folded else "<section>"),
                    _macro(block)(block, name),
                ]
                self._open.append((block.level, name, Markup("</details>" if folded else "</section>")))
            case Details(_, blocks):
                self._elements.append(Markup("<details><summary>{}</summary>").format(inline_markup(block.summary)))
                for inner in blocks:
                    self.add(inner)
                self._elements.append(Markup("</details>"))
            case Drawing(_, _, Figure() as figure):
                found = charts(figure)
                self.has_charts |= found is not None
                data = _json(found) if found else ""
                self._elements.append(Markup(_macro(block)(block, data, "" if found else _svg(figure))))
            case Drawing():
                pass  # the report lists figures that could not be drawn at its end
            case Attachment(_, content):
                small = content.encode() if len(content) <= MAX_FILE else b""
                self._elements.append(_macro(block)(block, base64.b64encode(small).decode()))
            case _:
                self._terms += block.terms if isinstance(block, Glossary) else []
                self._elements.append(_macro(block)(block))

    def render(self, title: str) -> str:
        """Return the whole page."""
        self._end(0)
        values: dict[str, Any] = {"title": title, "contents": self.contents, "body": self._body()}
        library = plotly() if self.has_charts else None
        loaded = [library.text] if library else []
        return render_page("report.html.j2", scripts=[_script()], loaded=loaded, library=library, **values)

    def _body(self) -> Markup:
        """Return all elements, with a link at the first use of each term in running text."""
        body = Markup("\n").join(self._elements)
        return with_links(body, self._terms) if self._terms else body

    def _end(self, level: int) -> None:
        while self._open and self._open[-1][0] >= level:
            self._elements.append(self._open.pop()[2])

    def _id(self, text: str) -> str:
        """Return an id for a title: the title of the part above it comes first if another part has the same title."""
        name = anchor(text)
        if name in self._ids and self._open:
            name = f"{self._open[-1][1]}-{name}"
        number = next(n for n in range(1, len(self._ids) + 2) if (name if n == 1 else f"{name}-{n}") not in self._ids)
        name = name if number == 1 else f"{name}-{number}"
        self._ids.add(name)
        return name


@cache
def plotly() -> Library:
    """Return plotly.js from the package plotly, which is not imported, because that takes long."""
    spec = importlib.util.find_spec("plotly")
    assert spec is not None
    assert spec.origin is not None
    script = Path(spec.origin).with_name("package_data") / "plotly.min.js"
    text = script.read_text(encoding="utf-8")
    return Library(text, base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode())


def _script() -> str:
    environment = _environment()
    assert environment.loader
    return environment.loader.get_source(environment, "charts.js")[0]


def _macro(block: ReportBlock) -> Any:
    return getattr(_environment().get_template("blocks.html.j2").module, type(block).__name__)


def _json(value: Any) -> Markup:
    """Return JSON that can stand inside of a script element."""
    return Markup(json.dumps(value, separators=(",", ":")).replace("<", "\\u003c"))


def _svg(figure: Figure) -> str:
    """Return a figure as a vector picture in base64."""
    picture = io.BytesIO()
    figure.savefig(picture, format="svg")
    return base64.b64encode(picture.getvalue()).decode()


@cache
def _environment(package: str = "moe.analysis.report") -> jinja2.Environment:
    packages = dict.fromkeys([package, "moe.analysis.report"])
    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader([jinja2.PackageLoader(name) for name in packages]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_without_control,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = (
        inline_markup,
        breakable,
        same_in_all_rows,
        term_anchor,
        cells,
        truncation_note,
        interval_picture,
        file_name,
    )
    environment.filters |= {function.__name__: function for function in filters}
    return environment


def _without_control(value: Any) -> Any:
    """Return text with characters that control a terminal as escapes: a page may be read in one. Lines stay."""
    if isinstance(value, str) and not isinstance(value, Markup):
        return "\n".join(map(printable, value.split("\n")))
    return value


def breakable(name: str) -> Markup:
    """Return the name of a column as HTML that may break into lines after a slash or an underscore."""
    return Markup(re.sub("[/_]", r"\g<0><wbr>", str(escape(one_line(name)))))


def anchor(text: str) -> str:
    """Return the id of a title, to which links point."""
    return re.sub(r"\W+", "-", text.lower()).strip("-") or "part"


def term_anchor(name: str) -> str:
    """Return the id of the meaning of a term."""
    return f"term-{anchor(name)}"


def with_links(html: Markup, terms: Sequence[Term]) -> Markup:
    """Return HTML in which the first use of each term in running text is a link to its meaning.

    Names such as router.temp are no use of a term. `UNLINKED` elements stay as they are, such as titles and tables, and
    so do the terms themselves.
    """
    waiting = dict(enumerate(terms))
    anywhere = re.compile(
        "|".join(rf"(?P<t{i}>(?<![\w./=-])(?:{term.pattern})(?!\w|[./-]\w))" for i, term in waiting.items())
    )

    def link(found: re.Match[str]) -> str:
        term = waiting.pop(int(str(found.lastgroup)[1:]), None)
        if term is None:
            return found[0]
        return f'<a class="term" href="#{term_anchor(term.name)}" title="{escape(term.meaning)}">{found[0]}</a>'

    parts, inside, depth = [], "", 0  # the element that is not touched, and how many of its kind are open
    for part in re.split("(<[^>]*>)", html):
        if part.startswith("<"):
            name = re.split(r"\W", part.strip("</"), maxsplit=1)[0]
            if not inside and (name in UNLINKED or part.startswith('<dl class="facts terms"')):
                inside = name
            depth += (inside == name) * (-1 if part.startswith("</") else 1)
            inside = inside if depth else ""
        parts.append(part if part.startswith("<") or inside or not waiting else anywhere.sub(link, part))
    return Markup("".join(parts))


def file_name(path: str) -> str:
    """Return the last part of a path."""
    return Path(path).name


def inline_markup(text: str) -> Markup:
    """Return text as HTML on one line: `**bold**` and `` `code` `` become elements, everything else is escaped.

    Code may break into lines after a comma, so that a long list of seeds is not broken inside a number.
    """
    html = re.sub(r"\\([*`\\])", lambda found: f"&#{ord(found[1])};", str(escape(one_line(text))))
    html = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", html)
    return Markup(re.sub(r"`(.+?)`", lambda found: f"<code>{found[1].replace(',', ',<wbr>')}</code>", html))


def interval_picture(interval: Interval) -> Markup:
    """Return the picture of a difference: its interval as a line, the claimed range as an area, and a mark at 0.

    The area ends in an arrow where the range has no end. Numbers below are the axis.
    """
    width, height = PICTURE
    span = interval.most - interval.least

    def place(value: int | float) -> float:
        return 6 + (width - 12) * min(1.0, max(0.0, (value - interval.least) / span))

    middle, zero, point = height / 2, place(0), place(interval.value)
    parts = []
    if interval.claimed is not None:
        parts.append(f'<polygon class="claimed" points="{_outline(interval.claimed, place, height)}"/>')
    parts.append(f'<line class="zero" x1="{zero:.1f}" x2="{zero:.1f}" y1="2" y2="{height - 2}"/>')
    if math.isfinite(interval.low):
        low, high = place(interval.low), place(interval.high)
        parts.append(f'<line class="interval" x1="{low:.1f}" x2="{high:.1f}" y1="{middle}" y2="{middle}"/>')
    parts.append(f'<circle cx="{point:.1f}" cy="{middle}" r="5"/>')
    for number in MaxNLocator(4, steps=[1, 2, 5, 10]).tick_values(interval.least, interval.most):
        if interval.least <= number <= interval.most:
            x, text = place(number), plain(f"{round(number, 10):.4g}")
            anchor_of_text = "start" if x < AXIS else "end" if x > width - AXIS else "middle"
            parts.append(f'<text x="{x:.1f}" y="{height + AXIS - 4}" text-anchor="{anchor_of_text}">{text}</text>')
    box = f"0 0 {width} {height + AXIS}"
    return Markup(f'<svg class="interval" viewBox="{box}" aria-hidden="true">{"".join(parts)}</svg>')


def _outline(claimed: tuple[float, float], place: Callable[[float], float], height: int) -> str:
    """Return the corners of the area of a claimed range, as the points of a polygon."""
    left, right = map(place, claimed)
    tip = min(ARROW, (right - left) / 2)
    top, middle, bottom = 2.0, height / 2, height - 2.0
    corners = [(left, bottom), (left, top)]
    if math.isinf(claimed[0]):
        corners = [(left + tip, bottom), (left, middle), (left + tip, top)]
    if math.isinf(claimed[1]):
        corners += [(right - tip, top), (right, middle), (right - tip, bottom)]
    else:
        corners += [(right, top), (right, bottom)]
    return " ".join(f"{x:.1f},{y:g}" for x, y in corners)


def same_in_all_rows(table: pd.DataFrame) -> str:
    """Return the sentence about the columns that `cells` leaves out; an empty text if there are none."""
    return without_constants(table)[1]


def cells(table: pd.DataFrame) -> tuple[list[Cell], list[list[Cell]]]:
    """Return the head and the first `MAX_ROWS` rows of a table, without the columns that are the same in every row.

    Cells with long text may wrap.
    """
    table, _ = without_constants(table)
    numeric, of_p = numeric_columns(table), p_columns(table)
    shown = table.head(MAX_ROWS)
    head, *rows = table_cells(shown)
    return [Cell(text, "number" if right else "") for text, right in zip(head, numeric, strict=True)], [
        [
            Cell(
                text,
                "number" if right else "long" if len(text) > LONG_TEXT else "",
                float(value) if is_p and text.startswith("<") else None,
            )
            for text, right, is_p, value in zip(row, numeric, of_p, values, strict=True)
        ]
        for row, values in zip(rows, shown.itertuples(index=False, name=None), strict=True)
    ]
