"""Tables as text: a DataFrame in, Markdown or HTML out, with the same numbers in both."""

import html
import math
import re
from typing import Any

import pandas as pd

P_VALUE = re.compile(r"(^|\s)p(\s|$)")  # columns such as "p", "p Holm" and "smallest p sign-flip"

LONG = 60  # characters of a cell that stay on one line


def markdown(table: pd.DataFrame) -> str:
    """The table in GitHub's Markdown: numbers to the right, with five significant digits (p-values two); NaN a dash."""
    if table.empty:
        return "(none)"
    rule = ["---:" if right else ":---" for right in _numeric(table)]
    head, *body = [[harmless(text).replace("|", "\\|") for text in row] for row in _cells(table)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, rule, *body])


def as_html(table: pd.DataFrame) -> str:
    """The same table as an HTML element; every text in it is escaped, and cells with long text may wrap."""
    if table.empty:
        return "<p>(none)</p>"
    numeric = _numeric(table)
    head, *body = [
        "".join(_element(tag, text, right) for text, right in zip(row, numeric, strict=True))
        for tag, row in zip(["th"] + ["td"] * len(table), _cells(table), strict=True)
    ]
    return f"<table><thead><tr>{head}</tr></thead><tbody><tr>{'</tr><tr>'.join(body)}</tr></tbody></table>"


def harmless(text: str) -> str:
    """Text for Markdown on one line, in which nothing that came from the data becomes HTML or a link."""
    return " ".join(text.splitlines()).replace("<", "&lt;").replace("](", "]\\(")


def _element(tag: str, text: str, right: bool) -> str:
    kind = ' class="number"' if right else ' class="long"' if tag == "td" and len(text) > LONG else ""
    return f"<{tag}{kind}>{html.escape(text)}</{tag}>"


def _numeric(table: pd.DataFrame) -> list[bool]:
    return [pd.api.types.is_numeric_dtype(table[column]) for column in table]


def _cells(table: pd.DataFrame) -> list[list[str]]:
    """Head and rows as text."""
    digits = [".2g" if P_VALUE.search(str(column)) else ".5g" for column in table]
    rows = table.itertuples(index=False, name=None)
    return [[str(column) for column in table]] + [
        [_text(value, d) for value, d in zip(row, digits, strict=True)] for row in rows
    ]


def _text(value: Any, digits: str) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, float):
        return format(value, digits)
    return str(value)
