"""The best setting of an experiment: its lead over the next one, its cost, and what the ranking leaves out."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import pandas as pd
from statsmodels.stats.weightstats import DescrStatsW

from moe.analysis.report.blocks import literal
from moe.analysis.report.inputs import ReportInputs
from moe.analysis.sentences import unit_of
from moe.analysis.statistics import CONFIDENCE, has_no_spread, name_cell
from moe.checks import plain
from moe.metrics.catalog import lookup
from moe.results.conditions import by_seed, conditions
from moe.results.table import ABSENT

MOST_NAMED = 5  # settings that a sentence names


class Setting(NamedTuple):
    """A setting: its name, its runs, and their values of the metric by seed."""

    name: str
    runs: pd.DataFrame
    values: pd.Series


class Ranking(NamedTuple):
    """The settings by their means of a metric, the best one first, and those that cannot be ranked.

    acausal: settings whose routers see later tokens, if others do not: their losses are not comparable.
    without_value: settings without a finished run that has a finite value.
    """

    metric: str
    settings: list[Setting]
    acausal: list[str]
    without_value: list[str]


def ranking(inputs: ReportInputs) -> Ranking | None:
    """Return the settings by the first tested metric that measures quality and of which less is better.

    Returns None if there is no such metric, or only one setting.
    """
    metrics = ((name, lookup(name)) for name in inputs.tested)
    fits = (name for name, metric in metrics if metric and metric.group == "quality" and metric.better == "lower")
    metric = next(fits, None)
    if metric is None or not inputs.factors:
        return None
    ranked, acausal, without = [], [], []
    comparable = inputs.runs["causal"] != False if (inputs.runs["causal"] == True).any() else None  # noqa: E712
    for cell, members in conditions(inputs.runs, inputs.factors):
        name = name_cell({factor: level for factor, level in cell.items() if level != ABSENT})
        finished = members[members["status"] == "finished"]
        values = by_seed(finished, metric)
        if comparable is not None and not comparable[members.index].any():
            acausal.append(name)
        elif values.empty:
            without.append(name)
        else:
            ranked.append(Setting(name, finished, values))
    return Ranking(metric, sorted(ranked, key=lambda each: each.values.mean()), acausal, without)


def best_setting(inputs: ReportInputs) -> Iterator[str]:
    """Yield a sentence about the setting with the best mean, what it costs, and how sure its lead is."""
    found = ranking(inputs)
    if found is None or len(found.settings) < 2:
        return
    (name, members, values), (other, _, other_values) = found.settings[:2]
    spread = f" ± {values.std(ddof=1):.2g}" if len(values) > 1 else ""
    text = f"**Best setting here:** {literal(name)}, with a {unit_of(found.metric)} of {values.mean():.4g}{spread}"
    text += f" (n={len(values)}), of {len(found.settings)} settings"
    lead = (other_values - values).dropna()
    behind = f"{lead.mean():.2g} behind" if len(lead) and lead.mean() else "equal to it"
    text += f". The next one, {literal(other)}, is {behind}" if len(lead) else ""
    if len(lead) > 1 and not has_no_spread(lead.to_numpy(), scale=float(values.abs().max())):
        low, high = DescrStatsW(lead.to_numpy()).tconfint_mean(1 - CONFIDENCE)
        text += f" [{low:.2g}, {high:.2g}]" + (", so the order of the two may be luck" if low < 0 else "")
    text += ". A setting that was chosen because it is the best looks better than it is."
    yield " ".join([plain(text), *_left_out(found)])
    yield from _cost(inputs, found, members)


def _left_out(found: Ranking) -> Iterator[str]:
    """Yield which settings the ranking leaves out, and why."""
    reasons = (
        (found.acausal, "their routers see later tokens, so their losses are not comparable"),
        (found.without_value, f"no finished run has a finite {unit_of(found.metric)}"),
    )
    for names, reason in reasons:
        if names:
            more = f" and {len(names) - MOST_NAMED} more" if names[MOST_NAMED:] else ""
            yield f"Left out: {literal('; '.join(names[:MOST_NAMED]))}{more} ({reason})."


def _cost(inputs: ReportInputs, found: Ranking, best: pd.DataFrame) -> Iterator[str]:
    seconds = best["train_seconds"].mean()
    everything = [cost for each in found.settings if math.isfinite(cost := each.runs["train_seconds"].mean())]
    if math.isfinite(seconds) and seconds > 0 and len(everything) == len(found.settings):
        total = _duration(inputs.runs.drop_duplicates("folder")["train_seconds"].sum())
        yield (
            f"**Its cost:** {_duration(seconds)} of training a run, {seconds / min(everything):.2f} times as long as "
            f"the fastest setting; all runs together: {total}. Times hold for this machine and what else it did."
        )


def _duration(seconds: Any) -> str:
    return f"{seconds / 60:.3g} minutes" if seconds >= 100 else f"{seconds:.3g} seconds"
