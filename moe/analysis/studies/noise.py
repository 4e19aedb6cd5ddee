"""The noise study: its figure of perplexity and load CV against router noise."""

from moe.analysis.figures.drawing import drawing
from moe.analysis.figures.effects import factor_panels
from moe.analysis.report.inputs import ReportInputs
from moe.analysis.report.study import OverviewFigure, Study

METRICS = ("val/perplexity", "routing/load_cv/pooled")


def noise_figure(inputs: ReportInputs) -> OverviewFigure | None:
    """Return the study's figure if nothing but router noise and load-balancing weight varies."""
    if set(inputs.factors) != {"noise", "lb"} or not set(METRICS) <= set(inputs.tested):
        return None
    figure = factor_panels(inputs.runs, "noise", "lb", METRICS)
    caption = "Perplexity and load CV against router noise, by load-balancing weight."
    return OverviewFigure(drawing("noise_lb", caption, figure), METRICS)


NOISE_STUDY = Study(overview_figures=(noise_figure,))
