"""What the runs say and how sure one may be: sections of verdicts, conditions, contrasts and analyses of variance."""

import math
from collections.abc import Iterator
from textwrap import shorten

import pandas as pd

from moe.analysis.claims import evidence as in_words
from moe.analysis.claims import planned as claims_of
from moe.analysis.claims import post_hoc as not_claimed
from moe.analysis.report.accounts import listed
from moe.analysis.report.blocks import Attachment, Block, Bullets, Heading, Table, Text
from moe.analysis.report.inputs import ReportInputs, stack
from moe.analysis.statistics import anova, noise_floor, with_intervals
from moe.metrics.catalog import lookup
from moe.results.conditions import ROUTING, present, spread_table, summary

STANDINGS = AFTER, BEFORE, UNDECIDED = (
    "A direction, Holm's correction included",
    "A direction, but not after Holm's correction",
    "Undecided",
)
CLAIMS_EXPLAINED = """\
Written down in the experiment's yaml, and so in every run's record, before its first step. A difference is taken within
a seed, over all combinations of the other factors; the verdict asks whether p, Holm-corrected over these claims, is at
most 5 %. Everything else in this report is post hoc."""
FLOOR_EXPLAINED = """\
Runs that differ in the seed alone: sample standard deviation (ddof=1) with its 95 % chi-square interval, and the
smallest true difference that an unpaired t test over so many seeds on either side finds with power 0.8."""
CONTRASTS_EXPLAINED = """\
`difference` is level minus reference over paired seeds, with its 95 % t interval and p of the paired t test; `p Holm`
is corrected over all contrasts of the metric, and of every metric if `--metric` added one; `d_z` is the difference in
standard deviations (ddof=1) of the paired differences; `p Welch` ignores the pairing; `p sign-flip` is exact up to 16
seeds and can never go below `smallest p sign-flip`, however large the effect; `detectable` is the smallest true
difference that this many seeds, spread as they are, show with power 0.8; `p BH` is corrected for the false discovery
rate (Benjamini-Hochberg), over the same contrasts; `p TOST`, for a metric with a `--margin`, is that of two one-sided
tests that the difference is smaller than the margin."""


def planned(inputs: ReportInputs) -> Iterator[Block]:
    """What was claimed before the runs, each claim with its verdict."""
    if inputs.claims.empty:
        return
    judged = inputs.claims
    yield Heading("Planned claims")
    yield Text(CLAIMS_EXPLAINED)
    sentences = [
        f"{row['claim']} ({row['source']}): **{row['verdict']}**; {in_words(row)}" for _, row in judged.iterrows()
    ]
    yield Bullets(sentences)
    yield _csv("claims", judged, "every claim with its numbers.")


def post_hoc(inputs: ReportInputs) -> Iterator[Block]:
    """Every contrast that no claim is about as a sentence, the most certain ones first."""
    yield Heading("Verdicts")
    if inputs.contrasts.empty:
        yield Text("None: no factor varies among runs with results.")
        return
    unclaimed = not_claimed(inputs.contrasts, [claim for claim, _ in claims_of(inputs.loaded)])
    yield Text("Contrasts of every level with its reference, post hoc: nobody wrote them down before the runs.")
    sentences: dict[str, list[str]] = {}
    for _, contrast in unclaimed.iterrows():
        sentences.setdefault(_standing(contrast), []).append(verdict(contrast))
    for standing in STANDINGS:
        if standing in sentences:
            yield Text(f"**{standing}**: {len(sentences[standing])} of {len(unclaimed)} contrasts.")
            yield from listed(sentences[standing])


def floor(inputs: ReportInputs) -> Iterator[Block]:
    """How far runs differ by luck alone, where nothing but the seed varies."""
    seeds = inputs.runs["seed"].nunique() if "seed" in inputs.runs else 0
    if not inputs.factors and seeds > 1 and inputs.metrics:
        yield Heading("Noise floor")
        yield Text(FLOOR_EXPLAINED)
        yield Table(noise_floor(inputs.runs, inputs.metrics))


def _standing(contrast: pd.Series) -> str:
    if math.isnan(contrast["p"]) or contrast["ci_low"] <= 0 <= contrast["ci_high"]:
        return UNDECIDED
    return BEFORE if contrast["p Holm"] > 0.05 else AFTER


def verdict(contrast: pd.Series) -> str:
    """One contrast as a sentence that ends in its direction or in undecided."""
    c = contrast
    metric = lookup(c["metric"])
    unit, up, down = (
        (metric.noun or metric.name, metric.rise, metric.fall) if metric else (c["metric"], "higher", "lower")
    )
    place = f" at {c['within']}" if c["within"] else ""
    claim = f"{c['factor']} {c['level']} vs {c['reference']}{place}:"
    note = f" ({c['note']})" if c["note"] else ""
    if c["n"] == 0:
        return f"{claim} no seed has its {unit} at both levels: **undecided**{note}"
    claim += f" {c['difference']:+.3g} {unit}"
    if math.isnan(c["p"]):
        return f"{claim}, n={c['n']}: **undecided**{note}"
    standing = _standing(c)
    evidence = f"[{c['ci_low']:.3g}, {c['ci_high']:.3g}], p={c['p']:.2g} (Holm {c['p Holm']:.2g}), n={c['n']}"
    if standing == UNDECIDED and pd.notna(c.get("p TOST Holm")) and c["equivalent"]:
        return f"{claim} {evidence}: **equivalent** within {c['margin']:.3g} (TOST, Holm {c['p TOST Holm']:.2g}){note}"
    if standing == UNDECIDED:
        seen = f"the smallest effect these seeds could have seen (power 0.8) is {c['detectable']:.2g}"
        return f"{claim} {evidence}: **undecided**, {seen}{note}"
    doubt = ", but not after Holm's correction" if standing == BEFORE else ""
    return f"{claim} {evidence}: **{up if c['difference'] > 0 else down}**{doubt}{note}"


def conditions(inputs: ReportInputs) -> Iterator[Block]:
    """Mean and spread of the headline metrics and of routing, a row a condition."""
    routing = present(inputs.runs, ROUTING)
    means = summary(inputs.runs, inputs.factors, dict.fromkeys((*inputs.metrics, *routing)))
    yield Heading("Conditions")
    yield Text("Final evaluation, mean ± sample standard deviation (ddof=1) over n seeds.")
    yield Table(spread_table(means[means["metric"].isin(inputs.metrics)]))
    if routing:
        yield Text("**Routing by condition**: the same of `routing/...`, mean over layers.")
        table = spread_table(means[means["metric"].isin(routing)])[[*inputs.factors, *routing, "n seeds"]]
        yield Table(table.rename(columns=lambda name: name.removeprefix("routing/")))
    yield _csv("conditions", with_intervals(means), "the same with 95 % t intervals.")


def contrasts(inputs: ReportInputs) -> Iterator[Block]:
    """All numbers behind the verdicts."""
    yield Heading("Contrasts, paired by seed")
    yield Text(CONTRASTS_EXPLAINED)
    yield Table(inputs.contrasts)
    yield _csv("contrasts", inputs.contrasts, "every row of this table.")


def variance(inputs: ReportInputs) -> Iterator[Block]:
    """Factorial analysis of variance of every tested metric, or why there is none."""
    tables, refusals = [], []
    for metric in inputs.tested:
        try:
            tables.append(anova(inputs.runs, metric, inputs.factors))
        except ValueError as error:
            refusals.append(shorten(f"{metric}: {error}", 500, placeholder=" …"))
    yield Heading("Analysis of variance, seed as block")
    if refusals:
        yield Bullets(refusals)
    table = stack(tables)
    yield Table(table)
    yield _csv("anova", table, "this table.")


def _csv(name: str, table: pd.DataFrame, caption: str) -> Attachment:
    return Attachment(f"{name}.csv", table.to_csv(index=False) if len(table.columns) else "", caption)
