"""Print the reference of all metrics; `python -m moe.metrics --write` writes it to docs/metrics.md."""

from collections.abc import Iterable
from pathlib import Path

from moe.files import write_text
from moe.metrics.catalog import select
from moe.metrics.metric import GROUPS, LETTERS, VARIANTS, WRITTEN, Metric
from moe.options import OneLineParser

INTRODUCTION = """\
# Metrics

Generated from `moe/metrics/entries/` by `python -m moe.metrics --write`; a test compares.

Where each metric is written:

{written}
A value of an optimizer step is that of this step alone; its routing metrics are called `train/routing/...`. Routing
metrics and auxiliary losses are means over layers, and losses are logged without their weights. Ratios are taken of
sums over all tokens, so micro-batches and processes do not change them. A metric that a router does not have is null,
never zero. The router of an adapter (PERFT-R) has the same metrics, except those of a router's weights:
`adapter/routing/...`, at every evaluation.

Some metrics have variants, whose names follow after a slash:

{variants}
Deciles of the position are position × 10 / S, rounded down, for blocks of S tokens. A position counts from the start of
the block, or of the conversation if several are packed into a block.

Letters in the formulas:

{letters}"""


def page() -> str:
    """Return docs/metrics.md: every metric by group."""
    introduction = INTRODUCTION.format(
        written=_bullets(f"{word}: {meaning}" for word, meaning in WRITTEN.items()),
        variants=_bullets(f"`/{variant}`: {meaning}" for variant, meaning in VARIANTS.items()),
        letters=_bullets(LETTERS.splitlines()),
    )
    return introduction + "".join(map(_section, GROUPS))


def _section(group: str) -> str:
    rows = [
        [
            f"`{metric.name}`",
            metric.formula,
            metric.meaning,
            metric.unit,
            metric.better or "",
            ", ".join(f"`{variant}`" for variant in metric.variants),
            _written(metric),
        ]
        for metric in select(group=group)
    ]
    head = ["metric", "formula", "meaning", "unit", "better", "variants", "written"]
    return f"\n## {GROUPS[group]}\n\n{_table(head, rows)}"


def _written(metric: Metric) -> str:
    return ", ".join((*metric.written, "step") if metric.function else metric.written)


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _bullets(lines: Iterable[str]) -> str:
    return "".join(f"- {line}\n" for line in lines)


if __name__ == "__main__":
    parser = OneLineParser(prog="python -m moe.metrics", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write it to docs/metrics.md instead")
    if parser.parse_args().write:
        write_text(Path(__file__).parents[2] / "docs" / "metrics.md", page())
    else:
        print(page(), end="")
