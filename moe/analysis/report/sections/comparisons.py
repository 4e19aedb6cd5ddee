"""Tables of statistics: the conditions, all contrasts, the analysis of variance and the noise floor."""

from collections.abc import Iterator
from textwrap import shorten

from moe.analysis.report.blocks import BulletList, Heading, Paragraph, ReportBlock, TableBlock, csv_file
from moe.analysis.report.inputs import ReportInputs, stack
from moe.analysis.statistics import anova, noise_floor, with_intervals
from moe.results.conditions import ROUTING, present, spread_table, summary

NOISE_FLOOR_EXPLAINED = """\
These runs differ in the seed alone. The table shows their sample standard deviation (ddof=1) with its 95 % chi-square
interval, and the smallest true difference that an unpaired t test with so many seeds on each side would find with
power 0.8."""
CONTRASTS_EXPLAINED = """\
`difference` is level minus reference, averaged over paired seeds, with its 95 % t interval and the p of the paired t
test. `p Holm` is p corrected for all contrasts of the metric. If `--metric` added a metric, it is corrected for the
contrasts of all metrics together.
`d_z` is the difference in standard deviations (ddof=1) of the paired differences. `p Welch` is the p of a test that
ignores the pairing. `p sign-flip` is exact up to 16 seeds, and can never be below `smallest p sign-flip`, however large
the effect is. `detectable` is the smallest true difference that a test of this many seeds with this spread would find
with power 0.8. `p BH` is p corrected for the false discovery rate (Benjamini-Hochberg) over the same contrasts. A
metric with a `--margin` also has `p TOST`, the p of two one-sided tests that the difference is smaller than the
margin."""


def noise_floor_table(inputs: ReportInputs) -> Iterator[ReportBlock]:
    """Yield how much runs differ by chance, if nothing but the seed varies."""
    seeds = inputs.runs["seed"].nunique() if "seed" in inputs.runs else 0
    if not inputs.factors and seeds > 1 and inputs.metrics:
        yield Heading("Noise floor")
        yield Paragraph(NOISE_FLOOR_EXPLAINED)
        yield TableBlock(noise_floor(inputs.runs, inputs.metrics))


def condition_table(inputs: ReportInputs) -> Iterator[ReportBlock]:
    """Yield the mean and spread of the headline metrics and of the routing metrics, a row for each condition."""
    routing = present(inputs.runs, ROUTING)
    means = summary(inputs.runs, inputs.factors, dict.fromkeys((*inputs.metrics, *routing)))
    yield Heading("Conditions")
    yield Paragraph("Values of the final evaluation: mean ± sample standard deviation (ddof=1) over n seeds.")
    yield TableBlock(spread_table(means[means["metric"].isin(inputs.metrics)]))
    if routing:
        yield Paragraph("**Routing by condition**: the same for the metrics `routing/...`, averaged over layers.")
        table = spread_table(means[means["metric"].isin(routing)])[[*inputs.factors, *routing, "n seeds"]]
        yield TableBlock(table.rename(columns=lambda name: name.removeprefix("routing/")))
    yield csv_file("conditions", with_intervals(means), "the same with 95 % t intervals.")


def contrast_table(inputs: ReportInputs) -> Iterator[ReportBlock]:
    """Yield all contrasts with all numbers on which the verdicts are based."""
    yield Heading("Contrasts, paired by seed")
    yield Paragraph(CONTRASTS_EXPLAINED)
    yield TableBlock(inputs.contrasts)
    yield csv_file("contrasts", inputs.contrasts, "every row of this table.")


def analysis_of_variance(inputs: ReportInputs) -> Iterator[ReportBlock]:
    """Yield the factorial analysis of variance of every tested metric, or why there is none."""
    tables, refusals = [], []
    for metric in inputs.tested:
        try:
            tables.append(anova(inputs.runs, metric, inputs.factors))
        except ValueError as error:
            refusals.append(shorten(f"{metric}: {error}", 500, placeholder=" …"))
    yield Heading("Analysis of variance, seed as block")
    if refusals:
        yield BulletList(refusals)
    table = stack(tables)
    yield TableBlock(table)
    yield csv_file("anova", table, "this table.")
