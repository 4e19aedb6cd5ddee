"""Blocks: the pieces that a report consists of, such as a heading, a table or a figure.

A section of the report yields blocks and knows neither Markdown nor HTML. `moe.analysis.report.markdown` and
`moe.analysis.report.html` render each block. In every text, `**bold**` and `` `code` `` are markup, unless a backslash
is before them, as `literal` puts it. All other characters are shown as they are, so the name or the error of a run can
become neither HTML nor a link.
"""

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import pandas as pd

from moe.analysis.figures.drawing import Drawing
from moe.results.table import as_csv

MAX_ROWS = 200  # largest number of rows that a table shows
LIST_LENGTH = 20  # largest number of list items that are visible at once


def literal(text: str) -> str:
    """Return text from runs, such as a name, as part of a text with markup, in which it is shown as it is."""
    return re.sub(r"[*`\\]", r"\\\g<0>", text)


class Heading(NamedTuple):
    """A title. Level 2 begins a section and is listed in the table of contents; level 3 begins a part of a section."""

    text: str
    level: int = 2


class Folded(NamedTuple):
    """A title of a part of the page that is closed until the reader opens it; the part ends at the next title as high.

    The summary says in a few words what is inside.
    """

    text: str
    summary: str
    level: int = 2


class Paragraph(NamedTuple):
    """A paragraph of text."""

    text: str


class BulletList(NamedTuple):
    """A list of sentences."""

    items: list[str]


class Facts(NamedTuple):
    """Short facts, each with its name: (name, fact)."""

    items: list[tuple[str, str]]


class Term(NamedTuple):
    """A word of the report and what it means. `pattern` is a regular expression for the word as the report uses it."""

    name: str
    meaning: str
    pattern: str


class Glossary(NamedTuple):
    """Words with their meanings. On the page the first use of each word in running text is a link to its meaning."""

    terms: list[Term]


class Interval(NamedTuple):
    """A difference and its interval on an axis from `least` to `most`, and the range that a claim gives it, if any."""

    value: float
    low: float
    high: float
    least: float
    most: float
    claimed: tuple[float, float] | None = None


class Card(NamedTuple):
    """A verdict: the statement that is judged, how ("good" | "bad" | "idle" is its color), the effect, and advice."""

    text: str
    verdict: str
    tone: str
    effect: str
    advice: str = ""
    interval: Interval | None = None


class Cards(NamedTuple):
    """Verdicts beside each other. `key` says what their pictures show; only a page has the pictures."""

    cards: list[Card]
    key: str = ""


class TableBlock(NamedTuple):
    """A table. Only its first `MAX_ROWS` rows are shown, and a line below it says so."""

    frame: pd.DataFrame


class StatusBar(NamedTuple):
    """Number of runs by status: (status, count, "good" | "bad" | "idle"), in the order in which they are shown."""

    counts: list[tuple[str, int, str]]


class Attachment(NamedTuple):
    """A file beside the report; the caption says what it contains."""

    name: str
    content: str
    caption: str


SimpleBlock = (
    Heading | Folded | Paragraph | BulletList | Facts | Glossary | Cards | TableBlock | StatusBar | Drawing | Attachment
)


class Details(NamedTuple):
    """Blocks that are hidden until the reader opens them; the summary is the line to click."""

    summary: str
    blocks: list[SimpleBlock]


ReportBlock = SimpleBlock | Details


def truncation_note(frame: pd.DataFrame) -> str:
    """Return the line that says how many rows of a table are shown, or an empty text if all of them are."""
    return f"The first {MAX_ROWS} of {len(frame)} rows." if len(frame) > MAX_ROWS else ""


def not_drawn(drawing: Drawing) -> str:
    """Return the sentence that takes the place of a figure that could not be drawn."""
    return f"{drawing.name}: not drawn, {drawing.reason}"


def long_list(items: list[str]) -> Iterator[ReportBlock]:
    """Yield a list whose items after the first `LIST_LENGTH` are hidden behind a line that says how many there are."""
    if items:
        yield BulletList(items[:LIST_LENGTH])
    if items[LIST_LENGTH:]:
        yield Details(f"and {len(items) - LIST_LENGTH} more", [BulletList(items[LIST_LENGTH:])])


def csv_file(name: str, table: pd.DataFrame, caption: str) -> Attachment:
    """Return a table as a CSV file beside the report; a table without columns becomes an empty file."""
    return Attachment(f"{name}.csv", as_csv(table) if len(table.columns) else "", caption)


def figure_section(title: str, drawings: Iterable[Drawing]) -> Iterator[ReportBlock]:
    """Yield a heading and the figures below it; without a figure that could be drawn, yield no heading."""
    titled = False
    for drawing in drawings:
        if drawing.figure and not titled:
            yield Heading(title)
            titled = True
        yield drawing
