"""Add the temperature study to the report: its figures and its two JSON files, with the names of the study."""

import json
from collections.abc import Iterator

import pandas as pd

from moe.analysis.report.blocks import Attachment, ReportBlock, figure_section
from moe.analysis.report.inputs import ReportInputs
from moe.analysis.studies.temperature.data import TEMPERATURE, scheduled
from moe.analysis.studies.temperature.figures import temperature_drawings
from moe.analysis.studies.temperature.reports import specialization_report, summary_report
from moe.results.table import ABSENT


def temperature_section(inputs: ReportInputs) -> Iterator[ReportBlock]:
    """Yield the study's figures and JSON files if there are several temperatures, or schedules of a temperature."""
    runs, evals = inputs.runs, inputs.past.evals
    temperatures = set(runs[TEMPERATURE].dropna()) - {ABSENT} if TEMPERATURE in runs else set()
    if len(temperatures) < 2 and not (temperatures and isinstance(scheduled(runs), pd.DataFrame)):
        return
    yield from figure_section("Temperature", temperature_drawings(runs, evals, inputs.past.trains))
    for report in (summary_report, specialization_report):
        content = json.dumps(report(runs, evals), indent=1, allow_nan=False) + "\n"
        caption = "a summary with the keys of the temperature study, with n and intervals in addition."
        yield Attachment(f"{report.__name__}.json", content, caption)
