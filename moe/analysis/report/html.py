"""Build HTML pages from templates. A page is one file: it contains its style, its figures and its scripts.

The templates escape every value, so text from the data cannot become markup.
"""

import base64
import hashlib
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import pandas as pd
from markupsafe import Markup, escape

from moe.analysis.figures.drawing import Drawing
from moe.analysis.report.blocks import MAX_ROWS, Details, ReportBlock, not_drawn, truncation_note
from moe.analysis.report.markdown import numeric_columns, table_cells
from moe.checks import one_line, printable

LONG_TEXT = 60  # largest number of characters in a table cell that is kept on one line


class Cell(NamedTuple):
    """A cell of an HTML table; `kind` is its CSS class, or empty."""

    text: str
    kind: str


def render_page(
    template: str, *, package: str = "moe.analysis.report", scripts: Sequence[str] = (), **values: Any
) -> str:
    """Fill a template of `package` with `values` and return the page.

    The file is in the folder templates/ of the package. Every template may extend page.html.j2. The page runs the
    scripts at its end. Its policy names their checksums, so that a browser runs no other script.
    """
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    policy = Markup("; script-src " + " ".join(f"'sha256-{each}'" for each in hashes)) if hashes else ""
    trusted = [Markup(script) for script in scripts]
    return _environment(package).get_template(template).render(scripts=trusted, policy=policy, **values)


def block_as_html(block: ReportBlock, folder: Path) -> Markup:
    """Return a block as HTML. The bytes of a figure are read from `folder`, where it has been saved as PNG."""
    macro = getattr(_environment().get_template("blocks.html.j2").module, type(block).__name__)
    match block:
        case Drawing():
            return Markup(macro(block, folder))
        case Details():
            return Markup(macro(block, [block_as_html(inner, folder) for inner in block.blocks]))
        case _:
            return Markup(macro(block))


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
    filters = (anchor, inline_markup, cells, image_data, truncation_note, not_drawn)
    environment.filters |= {function.__name__: function for function in filters}
    return environment


def _without_control(value: Any) -> Any:
    """Return text with characters that control a terminal as escapes: a page may be read in one. Lines stay."""
    if isinstance(value, str) and not isinstance(value, Markup):
        return "\n".join(map(printable, value.split("\n")))
    return value


def anchor(text: str) -> str:
    """Return the id of a heading, to which links point."""
    return re.sub(r"\W+", "-", text.lower()).strip("-")


def inline_markup(text: str) -> Markup:
    """Return text as HTML on one line: `**bold**` and `` `code` `` become elements, everything else is escaped."""
    html = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", str(escape(one_line(text))))
    return Markup(re.sub(r"`(.+?)`", r"<code>\1</code>", html))


def cells(table: pd.DataFrame) -> tuple[list[Cell], list[list[Cell]]]:
    """Return the head and the first `MAX_ROWS` rows of a table. Cells with long text may wrap."""
    numeric = numeric_columns(table)
    head, *rows = table_cells(table.head(MAX_ROWS))

    def kind(text: str, right: bool) -> str:
        return "number" if right else "long" if len(text) > LONG_TEXT else ""

    return [Cell(text, "number" if right else "") for text, right in zip(head, numeric, strict=True)], [
        [Cell(text, kind(text, right)) for text, right in zip(row, numeric, strict=True)] for row in rows
    ]


def image_data(name: str, folder: Path) -> str:
    """Return a saved figure in base64."""
    return base64.b64encode((folder / f"{name}.png").read_bytes()).decode()
