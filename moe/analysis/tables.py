"""Tables as text: a DataFrame in, Markdown or HTML out, with the same numbers in both."""

import html
import math
import re
from typing import Any

import pandas as pd

P_VALUE = re.compile(r"(^|\s)p(\s|$)")  # columns such as "p", "p Holm" and "smallest p sign-flip"


def markdown(table: pd.DataFrame) -> str:
    """The table in GitHub's Markdown: numbers to the right, with five significant digits (p-values two); NaN a dash."""
    if table.empty:
        return "(none)"
    rule = ["---:" if right else ":---" for right in _numeric(table)]
    head, *body = [[harmless(text).replace("|", "\\|") for text in row] for row in _cells(table)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, rule, *body])


def as_html(table: pd.DataFrame) -> str:
    """The same table as an HTML element; every text in it is escaped."""
    if table.empty:
        return "<p>(none)</p>"
    classes = [' class="number"' if right else "" for right in _numeric(table)]
    head, *body = [[html.escape(text) for text in row] for row in _cells(table)]
    top = "".join(f'<th scope="col"{c}>{text}</th>' for c, text in zip(classes, head, strict=True))
    rows = ["".join(f"<td{c}>{text}</td>" for c, text in zip(classes, row, strict=True)) for row in body]
    return f"<table><thead><tr>{top}</tr></thead><tbody>{''.join(f'<tr>{row}</tr>' for row in rows)}</tbody></table>"


def harmless(text: str) -> str:
    """Text for Markdown on one line, in which nothing that came from the data becomes HTML or a link."""
    return " ".join(text.splitlines()).replace("<", "&lt;").replace("](", "]\\(")


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
