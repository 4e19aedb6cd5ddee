"""A document: a list of blocks, built once and rendered twice, here as Markdown and in `moe.analysis.report.html` as
HTML.

Sections yield blocks and know neither Markdown nor HTML. In every text `**bold**` and `` `code` `` are markup, all else
is shown as it stands: whatever a run's name or error holds, it becomes neither HTML nor a link.
"""

from typing import NamedTuple

import pandas as pd
from matplotlib.figure import Figure

from moe.analysis.report.markdown import harmless, markdown

MOST_ROWS = 200  # of a table; a page that shows more is not read


class Heading(NamedTuple):
    """Level 2 begins a section and stands in the table of contents, level 3 a part of one."""

    text: str
    level: int = 2


class Text(NamedTuple):
    """A paragraph."""

    text: str


class Bullets(NamedTuple):
    """A list of sentences."""

    items: list[str]


class Table(NamedTuple):
    """A table; beyond `MOST_ROWS` rows it is cut, and says so."""

    frame: pd.DataFrame


class Tally(NamedTuple):
    """How many of a whole are what: (name, count, "good" | "bad" | "idle"), in the order in which they are shown."""

    parts: list[tuple[str, int, str]]


class Picture(NamedTuple):
    """A figure, saved as `name`.png; the caption says in words what it shows."""

    name: str
    figure: Figure
    caption: str


class Attachment(NamedTuple):
    """A file beside the report, by its name; the caption says what it holds."""

    name: str
    content: str
    caption: str


Leaf = Heading | Text | Bullets | Table | Tally | Picture | Attachment


class Details(NamedTuple):
    """Blocks behind a line that opens them."""

    summary: str
    blocks: list[Leaf]


Block = Leaf | Details


def as_markdown(block: Block) -> str:
    """The block in GitHub's Markdown."""
    match block:
        case Heading(text, level):
            return f"{'#' * level} {harmless(text)}"
        case Text(text):
            return harmless(text)
        case Bullets(items):
            return "\n".join(f"- {harmless(item)}" for item in items)
        case Table(frame):
            return markdown(frame.head(MOST_ROWS)) + (f"\n\n{cut(frame)}" if cut(frame) else "")
        case Tally(parts):
            return f"{sum(n for _, n, _ in parts)} runs: " + ", ".join(f"{n} {name}" for name, n, _ in parts if n)
        case Picture(name, _, caption):
            return f"![{name}]({name}.png)\n\n{harmless(caption)}"
        case Attachment(name, _, caption):
            return f"[{name}]({name}): {harmless(caption)}"
        case Details(summary, leaves):
            inner = "\n\n".join(as_markdown(leaf) for leaf in leaves)
            return f"<details><summary>{harmless(summary)}</summary>\n\n{inner}\n\n</details>"


def cut(frame: pd.DataFrame) -> str:
    """What a table's reader has to know if not all of its rows are shown."""
    return f"The first {MOST_ROWS} of {len(frame)} rows." if len(frame) > MOST_ROWS else ""
