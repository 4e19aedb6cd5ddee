"""The spread between runs by its source, if an experiment crosses seeds of initial weights and of the data order."""

from collections.abc import Iterator

import pandas as pd

from moe.analysis.components import DATA, INIT, is_crossed, variance_components
from moe.analysis.report.blocks import Heading, Paragraph, ReportBlock, TableBlock
from moe.analysis.report.inputs import ReportInputs
from moe.analysis.sentences import unit_of

EXPLAINED = f"""\
The variance of a metric between runs of one setting, divided by its source. `{INIT}` decides the initial weights, and
`{DATA}` the order of the training text, noise and dropout. An estimate from few seeds is rough, and one below 0 means
that the source is too small to be seen. Runs that share such a seed are not independent, so settings are compared over
`seed`."""


def seed_components(inputs: ReportInputs) -> Iterator[ReportBlock]:
    """Yield a table of variance components; nothing if no experiment crosses the two seeds."""
    if not is_crossed(inputs.runs):
        return
    tables, reasons = [], []
    for metric in inputs.tested:
        try:
            tables.append(variance_components(inputs.runs, metric).assign(metric=unit_of(metric)))
        except ValueError as error:
            reasons.append(f"Not estimated: {error}.")
    yield Heading("Initial weights and data order")
    yield Paragraph(EXPLAINED)
    if tables:
        yield TableBlock(pd.concat(tables).set_index("metric").reset_index())
    yield from map(Paragraph, reasons)
