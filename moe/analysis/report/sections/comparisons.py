"""Tables of statistics: the conditions, all contrasts, the analysis of variance and the noise floor."""

from collections.abc import Iterator

import pandas as pd

from moe.analysis.learned import NO_VERDICT
from moe.analysis.report.blocks import (
    BulletList,
    Details,
    Facts,
    Heading,
    Paragraph,
    ReportBlock,
    TableBlock,
    csv_file,
    literal,
)
from moe.analysis.report.inputs import ReportInputs
from moe.analysis.report.sections.cost import SPEED, about_speeds
from moe.analysis.sentences import enumerated
from moe.analysis.statistics import noise_floor, with_intervals
from moe.metrics.catalog import lookup
from moe.results.conditions import ADAPTER_ROUTING, ROUTING, present, spread_table, summary

NOISE_FLOOR_EXPLAINED = """\
These runs differ in the seed alone. The table shows their sample standard deviation (ddof=1) with its 95 % chi-square
interval, and the smallest true difference that an unpaired t test with so many seeds on each side would find with
power 0.8."""
POOLED = "/pooled"  # the end of the name of a metric of all layers together
OBSERVED_EXPLAINED = "Values of the evaluation. There is one, so it has no spread (–)."
CONDITIONS_EXPLAINED = """\
Values of the final evaluation: mean ± sample standard deviation (ddof=1) over n seeds. "± 0" means that every seed has
the same value, and "± –" that there is one seed."""
EVEN_LOADS = """\
The load CV is exactly 0 in every run of {settings}. No training does that: each expert gets equally many tokens by
construction. So a comparison of this balance with that of another setting says how a router is built, and nothing about
what it learned."""
MOST_NAMED = 5  # settings that a sentence names
COLUMNS = {  # of the table of contrasts
    "difference": "level minus reference, averaged over paired seeds; `ci_low` and `ci_high` are its 95 % t interval",
    "p": "of the paired t test",
    "p Holm": "p corrected for all tests of this report",
    "p BH": "p corrected for the false discovery rate (Benjamini-Hochberg) over all comparisons that nobody planned",
    "std of differences": "sample standard deviation (ddof=1) of the paired differences",
    "d_z": "the difference in standard deviations of the paired differences",
    "p Welch": "of a test that ignores the pairing",
    "width ratio": "width of the interval as a share of the width that it would have without the pairing",
    "p sign-flip": "of a test that assumes no normal distribution; exact up to 16 seeds",
    "smallest p sign-flip": "below which `p sign-flip` can never be with so many seeds, however large the effect is",
    "tests": "the number by which 5 % are divided before any test is significant (40 if 20 tests share 2.5 %)",
    "detectable": "smallest true difference that would be significant at 5 % / `tests` with power 0.8; "
    "`detectable_low` and `detectable_high` give it for both ends of the 95 % interval of the spread; infinite if the "
    "metric cannot change so much",
    "deterministic": "whether the difference is the same in every seed; it then has no p",
    "margin": "differences below it count as equal",
    "p TOST": "of two one-sided tests that the difference is smaller than the margin",
    "p beyond": "of the test that the difference exceeds the margin",
    "p TOST Holm": "the same, corrected over the rows of this table alone",
    "beyond": "whether the difference exceeds the margin at 5 % / `tests`",
}
VARIANCE_EXPLAINED = """\
Each term is tested against its own interaction with the seed, so an effect counts only if it is larger than its spread
from seed to seed. `p GG` has Greenhouse and Geisser's correction: with three levels or more, p alone is too small if
some seeds respond more strongly than others. `p Holm` is p GG corrected for all tests of this report. `runs` says which
runs were used: those of the seeds that have all combinations."""


def noise_floor_table(inputs: ReportInputs) -> Iterator[ReportBlock]:
    """Yield how much runs differ by chance, if nothing but the seed varies."""
    seeds = inputs.runs["seed"].nunique() if "seed" in inputs.runs else 0
    if not inputs.factors and seeds > 1 and inputs.metrics:
        yield Heading("Noise floor")
        yield Paragraph(NOISE_FLOOR_EXPLAINED)
        yield TableBlock(_with_units(noise_floor(inputs.runs, inputs.metrics)))


def condition_table(inputs: ReportInputs) -> Iterator[ReportBlock]:
    """Yield the mean and spread of the headline metrics and of the routing metrics, a row for each condition."""
    routing, of_adapters = present(inputs.runs, ROUTING), present(inputs.runs, ADAPTER_ROUTING)
    means = summary(inputs.runs, inputs.factors, dict.fromkeys((*inputs.metrics, *routing, *of_adapters)))
    yield Heading("Conditions")
    yield Paragraph(OBSERVED_EXPLAINED if inputs.observed else CONDITIONS_EXPLAINED)
    spreads = spread_table(means)  # of all metrics, because each counts the seeds of a condition
    yield TableBlock(spreads[[*inputs.factors, *inputs.metrics, "n seeds"]].rename(columns=_with_unit))
    for metrics, title, prefix in (
        (routing, "Routing by condition", "routing/"),
        (of_adapters, "Routing of adapters by condition", "adapter/routing/"),
    ):
        if metrics:
            yield Paragraph(
                f"**{title}**: the same for the metrics `{prefix}...`, means over layers{_pooled(metrics)}."
            )
            table = spreads[[*inputs.factors, *metrics, "n seeds"]]
            heads = {name: _with_unit(name).removeprefix(prefix) + _layers(name, metrics) for name in table}
            yield TableBlock(table.rename(columns=heads))
            if SPEED in metrics and (why := about_speeds(inputs.runs)):
                yield Paragraph(why)
    yield from even_loads(inputs)
    yield csv_file("conditions", with_intervals(means), "the same with 95 % t intervals.")


def even_loads(inputs: ReportInputs) -> Iterator[Paragraph]:
    """Yield which settings have an even load by construction, if any: it is exactly even in all of their runs."""
    if "routing/load_cv" not in inputs.runs:
        return
    loads = inputs.runs["routing/load_cv"].astype(float).groupby(inputs.condition, sort=False)
    even = [str(name) for name, values in loads if (values.dropna() == 0).all() and values.notna().any()]
    more = [f"{len(even) - MOST_NAMED} more"] if len(even) > MOST_NAMED else []
    if even:
        yield Paragraph(EVEN_LOADS.format(settings=enumerated([*map(literal, even[:MOST_NAMED]), *more])))


def contrast_table(inputs: ReportInputs) -> Iterator[ReportBlock]:
    """Yield all contrasts with all numbers on which the verdicts are based."""
    yield Heading("Contrasts, paired by seed")
    if inputs.learned_little:
        yield Paragraph(NO_VERDICT)
    if known := [(column, words) for column, words in COLUMNS.items() if column in inputs.contrasts]:
        yield Details("What the columns mean", [Facts(known)])
    yield TableBlock(_with_units(inputs.contrasts))
    yield from map(Paragraph, _gains_of_pairing(inputs.contrasts))
    yield csv_file("contrasts", inputs.contrasts, "every row of this table.")


def _with_unit(column: str) -> str:
    """Return the head of a column: the name of a metric with its unit, or another name as it is."""
    metric = lookup(column) if "/" in column else None  # a factor may have the name of a setting that is measured too
    return f"{column} ({metric.unit})" if metric and metric.unit else column


def _pooled(metrics: list[str]) -> str:
    """Return what `/pooled` means, as the end of a sentence; empty if no metric has it."""
    pooled = any(name.endswith(POOLED) for name in metrics)
    return (
        f"; of `{POOLED}`, the loads of all layers are added first, so that opposite imbalances cancel"
        if pooled
        else ""
    )


def _layers(name: str, metrics: list[str]) -> str:
    """Return how a metric combines layers, as the end of its head, if the table has it both ways."""
    if f"{name}{POOLED}" in metrics:
        return " (mean over layers)"
    return " (layers pooled)" if name.endswith(POOLED) and name.removesuffix(POOLED) in metrics else ""


def _with_units(table: pd.DataFrame) -> pd.DataFrame:
    """Add the unit of the metric of each row."""
    if table.empty:
        return table
    metrics = table["metric"].map(lookup)
    units = [(metric.unit or "–") if metric else "–" for metric in metrics]
    table = table.copy()
    table.insert(table.columns.get_loc("metric") + 1, "unit", units)
    return table


def _gains_of_pairing(contrasts: pd.DataFrame) -> Iterator[str]:
    """Yield a sentence for each metric: how much narrower its intervals are because runs are paired by seed."""
    if contrasts.empty:  # it may have no columns
        return
    for metric, ratios in contrasts.dropna(subset="width ratio").groupby("metric", sort=False)["width ratio"]:
        low, middle, high = ratios.min(), ratios.median(), ratios.max()
        span = f" (median of {len(ratios)} contrasts, from {low:.2f} to {high:.2f})" if len(ratios) > 1 else ""
        gain = "A value below 1 is what pairing gains" if middle < 1 else "Pairing gained nothing here"
        yield f"Pairing by seed: intervals of {metric} are {middle:.2f} times as wide as without pairing{span}. {gain}."


def analysis_of_variance(inputs: ReportInputs) -> Iterator[ReportBlock]:
    """Yield the factorial analysis of variance of every tested metric, or why there is none."""
    yield Heading("Analysis of variance within seeds")
    yield Paragraph(VARIANCE_EXPLAINED)
    if inputs.learned_little:
        yield Paragraph(NO_VERDICT)
    if inputs.without_variance:
        yield BulletList(inputs.without_variance)
    yield TableBlock(inputs.variance)
    yield csv_file("anova", inputs.variance, "this table.")
