"""Types for the figures and sections that a source study adds to the report."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

from moe.analysis.figures.drawing import Drawing
from moe.analysis.report.blocks import ReportBlock
from moe.analysis.report.inputs import ReportInputs

Section = Callable[[ReportInputs], Iterable[ReportBlock]]


class OverviewFigure(NamedTuple):
    """A figure that replaces the general figures of these metrics in the report."""

    drawing: Drawing
    metrics: tuple[str, ...]


class Study(NamedTuple):
    """Figures and sections of one source study. A section yields nothing for runs that do not belong to the study.

    training_columns: metrics of training steps that the study reads.
    overview_figures: functions that return a figure for the section on the effects of factors, or None.
    experiment_sections: sections about the runs of one experiment, after those on routing.
    report_sections: sections about all runs, before those on where the numbers come from.
    """

    training_columns: tuple[str, ...] = ()
    overview_figures: tuple[Callable[[ReportInputs], OverviewFigure | None], ...] = ()
    experiment_sections: tuple[Section, ...] = ()
    report_sections: tuple[Section, ...] = ()
