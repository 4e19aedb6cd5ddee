"""Tables as text: a DataFrame in, Markdown out."""

import math
import re
from typing import Any

import pandas as pd

P_VALUE = re.compile(r"(^|\s)p(\s|$)")  # columns such as "p", "p Holm" and "smallest p sign-flip"


def markdown(table: pd.DataFrame) -> str:
    """The table in GitHub's Markdown: numbers to the right, with five significant digits (p-values two); NaN a dash."""
    if table.empty:
        return "(none)"
    head = [_text(column, "") for column in table]
    rule = ["---:" if pd.api.types.is_numeric_dtype(table[column]) else ":---" for column in table]
    digits = [".2g" if P_VALUE.search(column) else ".5g" for column in table]
    body = [[_text(value, d) for value, d in zip(row, digits, strict=True)] for row in table.itertuples(index=False)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, rule, *body])


def _text(value: Any, digits: str) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, float):
        return format(value, digits)
    return str(value).replace("|", "\\|").replace("\n", " ")
