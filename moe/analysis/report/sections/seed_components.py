"""The spread between runs by its source, if an experiment crosses seeds of initial weights and of the data order."""

import math
from collections.abc import Iterator

import pandas as pd

from moe.analysis.components import DATA, INIT, SOURCES, is_crossed, variance_components
from moe.analysis.report.blocks import Heading, Paragraph, ReportBlock, TableBlock
from moe.analysis.report.inputs import ReportInputs
from moe.analysis.sentences import enumerated, noun

EXPLAINED = f"""\
The variance of a metric between runs of one setting, divided by its source. `{INIT}` decides the initial weights, and
`{DATA}` the order of the training text, noise and dropout. An estimate from few seeds is rough: `std_low` and
`std_high` are the ends of the 95 % interval of a standard deviation. A variance below 0 means that the source is too
small to be seen. Runs that share such a seed are not independent, so settings are compared over
`seed`."""


def spread_sentence(runs: pd.DataFrame, metric: str) -> str:
    """Return as a sentence which shares of the variance of a metric between runs its sources have."""
    try:
        found = variance_components(runs, metric)
    except ValueError as error:
        return f"The sources of the spread cannot be told apart, because {error}."
    total = found["std"].pow(2).sum()
    if total == 0:
        return f"All runs have the same {noun(metric)}."
    init, data, both = (f"{100 * share:.0f} %" for share in found["share"])
    weights, orders, _ = found["levels"]
    ends = enumerated([f"{row.std:.2g} [{row.std_low:.2g}, {row.std_high:.2g}]" for row in found.itertuples()])
    return (
        f"Of the variance of the {noun(metric)} between runs, {init} is due to the {SOURCES[INIT]}, {data} to the "
        f"{SOURCES[DATA]}, and {both} to {SOURCES['both']}. The standard deviation of a run is {math.sqrt(total):.2g}. "
        f"Those of its three parts, in the same order and with 95 % intervals, are {ends}. They are estimated from "
        f"{weights} x {orders} seeds."
    )


def seed_components(inputs: ReportInputs) -> Iterator[ReportBlock]:
    """Yield a table of variance components; nothing if no experiment crosses the two seeds."""
    if not is_crossed(inputs.runs):
        return
    tables, reasons = [], []
    for metric in inputs.tested:
        try:
            tables.append(variance_components(inputs.runs, metric).assign(metric=noun(metric)))
        except ValueError as error:
            reasons.append(f"Not estimated: {error}.")
    yield Heading("Initial weights and data order")
    yield Paragraph(EXPLAINED)
    if tables:
        yield TableBlock(pd.concat(tables).set_index("metric").reset_index())
    yield from map(Paragraph, reasons)
