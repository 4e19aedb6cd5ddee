"""The report: what was run, what it says and how sure one may be; Markdown, with tables as CSV and figures as PNG."""

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from moe.analysis import figures
from moe.analysis.statistics import anova, contrasts, name_cell, with_intervals
from moe.analysis.style import MOST_LINES
from moe.analysis.tables import markdown
from moe.frontier import STEMS, measured
from moe.record import write_text
from moe.results import History, history
from moe.summaries import (
    HEADLINE,
    conditions,
    levels,
    spread_table,
    summary,
    tied_factors,
    unfinished,
    varied_factors,
    with_causality,
)

# What is tested: metric -> its unit, and what a rise and a fall of it mean. Each is a family of its own for Holm.
TESTED = {
    "val/perplexity": ("perplexity", "worse", "better"),
    "routing/load_cv/pooled": ("load CV", "less balanced", "more balanced"),
}
SETTINGS = ("router", "schedule", "model", "data", "optimizer", "noise", "lb", "z", "capacity", "steps", "commit")


def write_report(runs: pd.DataFrame, out: Path | str, *, references: dict[str, Any] | None = None) -> Path:
    """Write report.md, its CSV files and its figures into `out` and return the report's path.

    `runs` is what `moe.results.load` returns; `references` names the level that a factor's others are compared with.
    """
    out, as_loaded = Path(out), runs
    runs = with_causality(runs)
    if references and "router" in references:
        label = f"{references['router']} (causal: "
        routers = [router for router in levels(runs["router"]) if router.startswith(label)]
        references = references | {"router": routers[0] if routers else references["router"]}
    factors = [factor for factor in varied_factors(runs) if factor != "seed"]
    metrics = [metric for metric in HEADLINE if metric in runs]
    tested = [metric for metric in TESTED if metric in runs]
    past = history(runs.loc[runs["status"] != "missing", "folder"])

    means = summary(runs, factors, metrics)
    compared = _stack(contrasts(runs, metric, factors, references=references) for metric in tested)
    variance, refusals = _anovas(runs, tested, factors)
    tables = {"runs": as_loaded, "conditions": with_intervals(means), "contrasts": compared, "anova": variance}
    out.mkdir(parents=True, exist_ok=True)
    for name, table in tables.items():
        write_text(out / f"{name}.csv", table.to_csv(index=False) if len(table.columns) else "")

    lines = ["# Report", "", *_what_was_run(runs, factors, past.problems)]
    lines += ["", "## Verdicts", "", *_verdicts(compared)]
    lines += ["", "## Conditions", "", "Final evaluation, mean ± sample standard deviation (ddof=1) over n seeds."]
    lines += ["", markdown(spread_table(means))]
    lines += ["", "## Contrasts, paired by seed", "", CONTRASTS_EXPLAINED, "", markdown(compared)]
    lines += ["", "## Analysis of variance, seed as block", "", *refusals, "", markdown(variance)]
    lines += ["", "## Figures", ""]
    for name, figure in _figures(runs, factors, past):
        if isinstance(figure, Figure):
            figure.savefig(out / f"{name}.png")
            lines += [f"![{name}]({name}.png)", ""]
        else:
            lines += [f"- {name}: not drawn, {figure}", ""]
    write_text(out / "report.md", "\n".join(lines))
    return out / "report.md"


CONTRASTS_EXPLAINED = """\
`difference` is level minus reference over paired seeds, with its 95 % t interval and p of the paired t test; `p Holm`
is corrected over all contrasts of the metric; `d_z` is the difference in standard deviations (ddof=1) of the paired
differences; `p Welch` ignores the pairing; `p sign-flip` is exact up to 16 seeds and can never go below `smallest p
sign-flip`, however large the effect; `detectable` is the smallest true difference that this many seeds, spread as they
are, show with power 0.8."""


def verdict(contrast: pd.Series) -> str:
    """One contrast as a sentence that ends in its direction or in undecided."""
    c = contrast
    unit, up, down = TESTED[c["metric"]]
    place = f" at {c['within']}" if c["within"] else ""
    claim = f"{c['factor']} {c['level']} vs {c['reference']}{place}:"
    note = f" ({c['note']})" if c["note"] else ""
    if c["n"] == 0:
        return f"{claim} no seed has its {unit} at both levels: **undecided**{note}"
    claim += f" {c['difference']:+.3g} {unit}"
    if math.isnan(c["p"]):
        return f"{claim}, n={c['n']}: **undecided**{note}"
    evidence = f"[{c['ci_low']:.3g}, {c['ci_high']:.3g}], p={c['p']:.2g} (Holm {c['p Holm']:.2g}), n={c['n']}"
    if c["ci_low"] <= 0 <= c["ci_high"]:
        seen = f"the smallest effect these seeds could have seen (power 0.8) is {c['detectable']:.2g}"
        return f"{claim} {evidence}: **undecided**, {seen}{note}"
    doubt = ", but not after Holm's correction" if c["p Holm"] > 0.05 else ""
    return f"{claim} {evidence}: **{up if c['difference'] > 0 else down}**{doubt}{note}"


def _what_was_run(runs: pd.DataFrame, factors: list[str], problems: list[str]) -> list[str]:
    counts = pd.crosstab(runs["experiment"], runs["status"]).reset_index()
    lines = ["## What was run", "", markdown(counts), ""]
    lines += [f"- factors: {', '.join(factors) or 'none varies'}; seeds: {_all_levels(runs, 'seed')}"]
    lines += [f"- {setting}: {_all_levels(runs, setting)}" for setting in SETTINGS if setting in runs]
    tied = {
        follower: leader for follower, leader in tied_factors(runs).items() if not follower.startswith(f"{leader}.")
    }
    lines += [f"- {a} changes only together with {b}: their effects cannot be told apart" for a, b in tied.items()]
    for metric in [metric for metric in HEADLINE if metric in runs]:
        finite = runs[metric].map(lambda value: math.isfinite(value))
        lost = runs.loc[(runs["status"] == "finished") & ~finite, "run"]
        lines += [f"- {run}: finished, but its {metric} is not finite; left out of that metric" for run in lost]
    rest = unfinished(runs)
    if len(rest):
        lines += ["", f"{len(rest)} of {len(runs)} runs did not finish and count nowhere below:", "", markdown(rest)]
    if problems:
        lines += ["", "Could not be read from the event logs:", "", *[f"- {problem}" for problem in problems]]
    return lines


def _verdicts(compared: pd.DataFrame) -> list[str]:
    if compared.empty:
        return ["None: no factor varies among runs with results."]
    return [f"- {verdict(row)}" for _, row in compared.iterrows()]


def _anovas(runs: pd.DataFrame, metrics: list[str], factors: list[str]) -> tuple[pd.DataFrame, list[str]]:
    tables, refusals = [], []
    for metric in metrics:
        try:
            tables.append(anova(runs, metric, factors))
        except ValueError as error:
            refusals.append(f"- {metric}: {error}")
    return _stack(tables), refusals


def _figures(runs: pd.DataFrame, factors: list[str], past: History) -> Iterator[tuple[str, Figure | str]]:
    """Every figure by name, or the reason why its input is not there."""
    labels = {
        index: name_cell(cell) or "all runs" for cell, members in conditions(runs, factors) for index in members.index
    }
    labelled = runs.assign(condition=pd.Series(labels, dtype=object))
    many = labelled["condition"].nunique() > MOST_LINES and f"{labelled['condition'].nunique()} conditions are too many"
    if set(factors) == {"noise", "lb"} and all(metric in runs for metric in TESTED):
        yield "noise_lb", figures.noise_lb(runs)
    elif not factors:
        yield "factors", "no factor varies"
    else:
        for metric in TESTED:
            name = "factors_" + metric.replace("/", "_")
            if metric not in runs:
                yield name, f"no run has {metric}"
            elif many:
                yield name, many
            else:
                yield name, _factor_figure(runs, factors, metric)
    if "val/loss" not in past.events:
        yield "learning_curves", "no run has an evaluation with val/loss"
    elif many:
        yield "learning_curves", many
    else:
        events = past.events.merge(labelled[["folder", "condition"]], on="folder")
        yield "learning_curves", figures.learning_curves(events, "condition")
    for experiment, stem in STEMS.items():
        members = runs[runs["experiment"] == experiment]
        if len(members):
            yield from _frontier_figures(members, stem)
            yield f"{stem}_overlay", many or _overlay(labelled.loc[members.index])


def _frontier_figures(runs: pd.DataFrame, stem: str) -> Iterator[tuple[str, Figure | str]]:
    """Perplexity against both measures of speed, for runs that differ in nothing but router, capacity and seed."""
    table = measured(runs)
    others = [factor for factor in varied_factors(runs) if factor not in ("router", "capacity", "seed")]
    for name, x in ((f"{stem}_frontier", "tokens_per_s"), (f"{stem}_frontier_tflops", "tflops")):
        if others:
            yield name, f"{', '.join(others)} varies beside router and capacity"
        elif "val/perplexity" not in table or table[[x, "val/perplexity"]].dropna().empty:
            yield name, f"no finished run has both {x} and val/perplexity"
        else:
            yield name, figures.frontier(table, x)


def _overlay(runs: pd.DataFrame) -> Figure | str:
    folders = runs.loc[runs["status"] != "missing", "folder"]
    events = pd.concat([history(folders, kind=kind).events for kind in ("train", "eval")])
    absent = [column for column in ("train/loss", "val/loss", "val/perplexity") if column not in events]
    if absent:
        return f"no run has {', '.join(absent)}"
    return figures.overlay(events.merge(runs[["folder", "condition"]], on="folder"), "condition")


def _factor_figure(runs: pd.DataFrame, factors: list[str], metric: str) -> Figure:
    """The factor with the most levels along x, every combination of the others a colour."""
    factor = max(factors, key=lambda name: runs[name].nunique())
    others = [name for name in factors if name != factor]
    hues = {index: name_cell(cell) or "all" for cell, members in conditions(runs, others) for index in members.index}
    return figures.factor_plot(runs.assign(others=pd.Series(hues, dtype=object)), factor, "others", metric)


def _all_levels(runs: pd.DataFrame, column: str) -> str:
    return ", ".join(str(level) for level in sorted(runs[column].dropna().unique(), key=str))


def _stack(tables: Iterable[pd.DataFrame]) -> pd.DataFrame:
    tables = [table for table in tables if not table.empty]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()
