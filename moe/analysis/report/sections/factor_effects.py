"""Figures of the effects of factors: the tested metrics against the levels, and all contrasts with intervals."""

from collections.abc import Iterator
from itertools import chain

import pandas as pd
from matplotlib.figure import Figure

from moe.analysis.figures import effects
from moe.analysis.figures.drawing import Drawing, drawing
from moe.analysis.figures.forest import SIGNIFICANT_MARKS, contrast_rows, forest
from moe.analysis.figures.style import axis_label
from moe.analysis.report.blocks import ReportBlock, figure_section
from moe.analysis.report.inputs import ReportInputs, tested_metrics
from moe.analysis.statistics import name_cell
from moe.results.conditions import conditions

FILL_DECIDES = "Whether a mark is filled is the verdict; the lines are not corrected for the number of tests."
MAX_CONTRASTS = 40  # in one figure
OF_NOISE_STUDY = ("val/perplexity", "routing/load_cv/pooled")  # beside each other in a figure, as in that study


def factor_effects(inputs: ReportInputs) -> Iterator[ReportBlock]:
    """Yield the tested metrics against the factors, and every contrast with its interval."""
    yield from figure_section("Effects of the factors", chain(_factor_drawings(inputs), _contrast_drawings(inputs)))


def _factor_drawings(inputs: ReportInputs) -> Iterator[Drawing]:
    """Yield a figure for each tested metric; that of the noise study takes the place of two of them."""
    metrics = list(dict.fromkeys((*tested_metrics(inputs.runs), *inputs.tested)))
    if {*inputs.factors} == {"noise", "lb"} and {*OF_NOISE_STUDY} <= {*inputs.tested}:
        caption = "Perplexity and load CV against router noise, by load-balancing weight."
        yield drawing("noise_lb", caption, effects.factor_panels(inputs.runs, "noise", "lb", OF_NOISE_STUDY))
        metrics = [metric for metric in metrics if metric not in OF_NOISE_STUDY]
    if not inputs.factors:
        yield drawing("factors", "Effects of the factors that vary.", "no factor varies")
        return
    for metric in metrics:
        caption = f"Effect of {', '.join(inputs.factors)} on: {axis_label(metric)}."
        absent = "" if metric in inputs.tested else f"no run has {metric}"
        result = absent or inputs.too_many_lines() or _factor_figure(inputs, metric)
        yield drawing(_file_name("factors", metric), caption, result)


def _factor_figure(inputs: ReportInputs, metric: str) -> Figure:
    """Draw the factor with the most levels along x, and every combination of the others in a color."""
    runs, factors = inputs.runs, inputs.factors
    factor = max(factors, key=lambda name: runs[name].nunique())
    others = [name for name in factors if name != factor]
    colors = {index: name_cell(cell) or "all" for cell, members in conditions(runs, others) for index in members.index}
    colored = runs.assign(others=pd.Series(colors, dtype=object))
    return effects.factor_panels(colored, factor, "others", [metric])


def _contrast_drawings(inputs: ReportInputs) -> Iterator[Drawing]:
    for metric in inputs.tested if len(inputs.contrasts) else []:
        rows = inputs.contrasts[inputs.contrasts["metric"] == metric].dropna(subset=["ci_low"])
        label = axis_label(metric)
        if rows.empty:
            result: Figure | str = "no contrast has an interval"
        elif len(rows) > MAX_CONTRASTS:
            result = f"{len(rows)} contrasts are too many"
        else:
            marks = f"line: 95 % t interval of the difference; {SIGNIFICANT_MARKS};\norange: higher, blue: lower"
            result = forest(contrast_rows(rows), f"difference in {label}", f"{marks}, gray: undecided")
        yield drawing(
            _file_name("contrasts", metric),
            f"Differences between runs of the same seed: {label}. {FILL_DECIDES}",
            result,
        )


def _file_name(kind: str, metric: str) -> str:
    return f"{kind}_{metric.replace('/', '_')}"
