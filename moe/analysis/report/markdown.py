"""Render report blocks as GitHub's Markdown."""

import math
import re
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

import pandas as pd

from moe.analysis.figures.drawing import Drawing
from moe.analysis.report.blocks import (
    MAX_ROWS,
    Attachment,
    BulletList,
    Card,
    Cards,
    Details,
    Facts,
    Folded,
    Glossary,
    Heading,
    Paragraph,
    ReportBlock,
    StatusBar,
    TableBlock,
    literal,
    truncation_note,
)
from moe.analysis.sentences import p_text
from moe.analysis.statistics import SIDES
from moe.checks import escaped, plain

FEW_COLUMNS = 5  # a table with fewer columns keeps those that are the same in every row
P_VALUE = re.compile(r"(^|\s)p(\s|$)")  # columns such as "p", "p Holm" and "smallest p sign-flip"


def block_as_markdown(block: ReportBlock) -> str:
    """Return a block as Markdown."""
    match block:
        case Heading(text, level):
            return f"{'#' * level} {escaped(text)}"
        case Folded(text, _, level):
            return f"{'#' * level} {escaped(text)}"
        case Paragraph(text):
            return escaped(text)
        case Facts(items):
            return "\n".join(f"- {escaped(name)}: {escaped(fact)}" for name, fact in items)
        case Glossary(items):
            return "\n".join(f"- {escaped(term.name)}: {escaped(term.meaning)}" for term in items)
        case Cards(cards):
            return "\n".join(f"- {escaped(_card_text(card))}" for card in cards)
        case BulletList(items):
            return "\n".join(f"- {escaped(item)}" for item in items)
        case TableBlock(frame):
            shown, same = without_constants(frame)
            return "\n\n".join(
                filter(None, [escaped(same), table_as_markdown(shown.head(MAX_ROWS)), truncation_note(frame)])
            )
        case StatusBar(counts):
            total = sum(n for _, n, _ in counts)
            shares = ", ".join(f"{n} {name}" for name, n, _ in counts if n)
            return f"{total} {'run' if total == 1 else 'runs'}: {shares}"
        case Drawing(name, caption):
            return f"![{escaped(name)}]({quote(name)}.png)\n\n{escaped(caption)}"
        case Attachment(name, _, caption):
            return f"[{escaped(name)}]({quote(name)}): {escaped(caption)}"
        case Details(summary, blocks):
            inner = "\n\n".join(block_as_markdown(inner) for inner in blocks)
            return f"<details><summary>{escaped(summary)}</summary>\n\n{inner}\n\n</details>"


def _card_text(card: Card) -> str:
    """Return a verdict as one sentence, and its advice as further ones."""
    parts = [f"{card.text}: **{card.verdict}**", card.effect]
    verdict = "; ".join(filter(None, (part.rstrip(".") for part in parts)))
    return f"{verdict}. {card.advice}" if card.advice else verdict


def table_as_markdown(table: pd.DataFrame) -> str:
    """Return a table as Markdown. Numbers are aligned to the right."""
    if table.empty:
        return "(none)"
    rule = ["---:" if right else ":---" for right in numeric_columns(table)]
    head, *body = [[escaped(literal(text)).replace("|", "\\|") for text in row] for row in table_cells(table)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, rule, *body])


def numeric_columns(table: pd.DataFrame) -> list[bool]:
    """Return for each column whether it holds numbers."""
    return [pd.api.types.is_numeric_dtype(table[column]) for column in table]


def p_columns(table: pd.DataFrame) -> list[bool]:
    """Return for each column whether it holds p-values, by its name."""
    return [bool(P_VALUE.search(str(column))) for column in table]


def table_cells(table: pd.DataFrame) -> list[list[str]]:
    """Return the head and the rows of a table as text.

    Floats have five significant digits, and p-values what `p_text` gives them. Levels are as the user writes them: 4.0
    does not become 4. NaN and None are shown as a dash.
    """
    texts = [
        str if column in SIDES else p_text if is_p else "{:.5g}".format
        for column, is_p in zip(table, p_columns(table), strict=True)
    ]
    rows = table.itertuples(index=False, name=None)
    return [[str(column) for column in table]] + [
        [_cell_text(value, text) for value, text in zip(row, texts, strict=True)] for row in rows
    ]


def without_constants(table: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """Return a table without the columns that are the same in every row, and the sentence that takes their place.

    A table of fewer than `FEW_COLUMNS` columns or two rows is returned as it is.
    """
    if len(table.columns) < FEW_COLUMNS or len(table) < 2:
        return table, ""
    head, *rows = table_cells(table)
    same = {place: texts[0] for place, texts in enumerate(zip(*rows, strict=True)) if len(set(texts)) == 1}
    if len(same) == len(head):
        return table, ""
    told = {place: f'"{text[:-1]}"' if text.endswith(".") else text for place, text in same.items()}  # a sentence
    known = [f"{head[place]} is {text}" for place, text in told.items() if text not in ("", "–")]
    empty = [head[place] for place, text in same.items() if text in ("", "–")]
    parts = [*([f"In every row, {', '.join(known)}."] if known else [])]
    parts += [f"No row has {', '.join(empty)}."] if empty else []
    return table.iloc[:, [place for place in range(len(head)) if place not in same]], " ".join(parts)


def _cell_text(value: Any, text: Callable[[float], str]) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    return plain(text(value)) if isinstance(value, float) else str(value)
