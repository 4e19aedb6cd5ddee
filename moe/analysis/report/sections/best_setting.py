"""The best setting of an experiment: its lead, how much of that is luck, its cost, and what the ranking leaves out."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import pandas as pd

from moe.analysis.components import DATA, INIT
from moe.analysis.league import ROUTER
from moe.analysis.learned import TOO_LITTLE
from moe.analysis.report.blocks import literal
from moe.analysis.report.inputs import ReportInputs, league_metric
from moe.analysis.report.sections.cost import SPEED, about_speeds
from moe.analysis.report.sections.league import standings
from moe.analysis.selection import first_alike, lead
from moe.analysis.sentences import SIGNIFICANT, enumerated, levels_compared, noun, standing
from moe.analysis.simultaneous import interval
from moe.analysis.statistics import has_no_spread, name_cell
from moe.checks import plain
from moe.metrics.catalog import lookup
from moe.results.conditions import by_seed, conditions, narrowed
from moe.results.table import ABSENT

MOST_NAMED = 5  # settings that a sentence names
HERE = "Best setting here:"
CHOSEN = "Lowest on the validation text, which is no verdict:"
VERDICT = """\
Validation text chose this setting, so its lead is partly luck. The verdict is that of the league, by {metric}, which
chose nothing: {first}."""
LUCK = ", so the order of the two may be luck"
NOT_COMPARED = ", but no test of this report compares the two"
UNCERTAIN = ", but by the ranks of the league, whose intervals overlap, the order of the two may be luck"
TURNED = ", but the league has the two the other way round, and its ranks are certain"
SAME = """\
{names} gave the same results in every seed, so they are one setting with {number} names. It counts once where \
settings are counted and ranked; comparisons with it are listed under each name."""
THESE_TWO = """\
; that is about these two settings and this metric alone, and a verdict above is about what its claim names"""
CORRECTED = ", but corrected for all tests of this report, the order of the two may be luck"


class Setting(NamedTuple):
    """A setting: levels, name, runs, and the values of the metric, by seed, for the seeds that all settings have."""

    levels: dict[str, Any]
    name: str
    runs: pd.DataFrame
    values: pd.Series


class Ranking(NamedTuple):
    """The settings by their means of a metric, the best one first, and those that cannot be ranked.

    acausal: settings whose routers see later tokens, if others do not: their losses are not comparable.
    A setting of several names (`same_settings`) is there once, under the first one.
    without_value: settings without a finished run that has a finite value. dropped: seeds that some setting lacks.
    """

    metric: str
    settings: list[Setting]
    acausal: list[str]
    without_value: list[str]
    dropped: list[int]


def ranking(inputs: ReportInputs) -> Ranking | None:
    """Return the settings by the first tested metric that measures quality and of which less is better.

    Returns None if there is no such metric, or only one setting, or if the settings differ in seeds.
    """
    names = (name.replace("test/", "val/") for name in inputs.tested)  # test text must not choose
    metrics = ((name, lookup(name)) for name in names if name in inputs.runs)
    fits = (name for name, metric in metrics if metric and metric.group == "quality" and metric.better == "lower")
    metric = next(fits, None)
    if metric is None or not inputs.factors or {INIT, DATA} & {*inputs.factors}:  # the best seed is luck alone
        return None
    ranked, acausal, without = [], [], []
    again = {name for names in same_settings(inputs) for name in names[1:]}
    comparable = inputs.runs["causal"] != False if (inputs.runs["causal"] == True).any() else None  # noqa: E712
    for cell, members in conditions(inputs.runs, inputs.factors):
        if (name := _name(cell)) in again:
            continue
        finished = members[members["status"] == "finished"]
        values = by_seed(finished, metric)
        if comparable is not None and not comparable[members.index].any():
            acausal.append(name)
        elif values.empty:
            without.append(name)
        else:
            ranked.append(Setting(cell, name, finished, values))
    values = pd.DataFrame({each.name: each.values for each in ranked})
    common = values.index[values.notna().all(axis=1)]
    ranked = [each._replace(values=each.values.reindex(common)) for each in ranked] if len(common) else []
    best_first = sorted(ranked, key=lambda each: each.values.mean())
    return Ranking(metric, best_first, acausal, without, [seed for seed in values.index if seed not in common])


def _name(cell: dict[str, Any]) -> str:
    return name_cell({factor: level for factor, level in cell.items() if level != ABSENT})


def same_settings(inputs: ReportInputs) -> list[list[str]]:
    """Return the names of each setting that has several: in each seed, all have the same results on validation text."""
    numbers = [name for name in inputs.runs if name.startswith("val/")]
    if not inputs.factors or not numbers or {INIT, DATA} & {*inputs.factors}:
        return []
    finished = inputs.runs[inputs.runs["status"] == "finished"]
    names, results = [], []
    for cell, members in conditions(narrowed(finished, ["seed", *inputs.factors, *numbers]), inputs.factors):
        names.append(_name(cell))
        rows = members[numbers].to_numpy(dtype=float)
        results.append({int(seed): row.tobytes() for seed, row in zip(members["seed"], rows, strict=True)})
    alike: dict[int, list[str]] = {}
    for name, first in zip(names, first_alike(results), strict=True):
        alike.setdefault(first, []).append(name)
    return [each for each in alike.values() if each[1:]]


def about_same_settings(inputs: ReportInputs) -> Iterator[str]:
    """Yield a sentence for each setting that has several names."""
    for names in same_settings(inputs):
        some = [*names[:MOST_NAMED], *([f"{len(names) - MOST_NAMED} more"] if names[MOST_NAMED:] else [])]
        yield SAME.format(names=literal(enumerated(some)), number=len(names))


def best_setting(inputs: ReportInputs) -> Iterator[str]:
    """Yield a sentence about the setting with the best mean, how much of its lead is luck, and what it costs."""
    found = ranking(inputs)
    if found is not None and not found.settings and found.dropped:
        yield f"**{HERE}** not named, because no seed has a finished run of every setting."
    if found is None or len(found.settings) < 2:
        return
    if inputs.learned_little:
        yield f"**{HERE}** not named, because {TOO_LITTLE}."
        return
    best, following = found.settings[:2]
    name, values = best.name, best.values
    judged = _by_league(inputs, found.metric, best)
    title, unit = CHOSEN if judged else HERE, noun(found.metric)
    text = f"**{title}** of {len(found.settings)} settings, {literal(name)} has the lowest {unit}: {_mean(values)}"
    gaps = following.values - values
    behind = f"{gaps.mean():.2g} higher" if gaps.mean() > 0 else "equal"
    text += f". That of the next one, {literal(following.name)}, is {behind}"
    if len(gaps) > 1 and not has_no_spread(gaps.to_numpy(), scale=float(values.abs().max())):
        low, high = interval(gaps.to_numpy())
        doubt = LUCK if low < 0 else _doubt(inputs, found.metric, best, following)
        text += f" (95 % interval {low:.2g} to {high:.2g}){doubt}"
        if doubt in (LUCK, CORRECTED) and _is_decided(inputs, best, following):
            text += THESE_TWO
    text += "."
    yield " ".join(filter(None, [plain(text), judged, *_left_out(found)]))
    yield plain(_luck(found))
    yield from _cost(inputs, found, best.runs)


def _mean(values: pd.Series) -> str:
    """Return the mean of the values by seed, with their spread in words if there are several."""
    if len(values) < 2:
        return f"{values.mean():.4g} (1 seed)"
    return f"{values.mean():.4g} ± {values.std(ddof=1):.2g} (mean and standard deviation of {len(values)} seeds)"


def _by_league(inputs: ReportInputs, metric: str, best: Setting) -> str:
    """Return which routers are first by test text, if a league judges by it and `best`, by validation text, is another.

    Empty without such a league.
    """
    judge, leagues = league_metric(inputs), standings(inputs)
    if not leagues or judge == metric or not str(judge).startswith("test/"):
        return ""
    if all(table.index[0] == best.levels.get(ROUTER) for table in leagues.values()):
        return ""
    first = [
        f"{literal(str(table.index[0]))} is first" + (f" at {literal(place)}" if place else "")
        for place, table in leagues.items()
    ]
    return VERDICT.format(metric=noun(str(judge)), first=enumerated(first))


def _by_ranks(inputs: ReportInputs, best: Setting, following: Setting) -> str:
    """Return what the ranks of a league say against the order of two settings that no test compares."""
    one, other = ({f: level for f, level in setting.levels.items() if f != ROUTER} for setting in (best, following))
    table = standings(inputs).get(name_cell(one)) if one == other else None
    names = [setting.levels.get(ROUTER) for setting in (best, following)]
    if table is None or not {*names} <= {*table.index}:
        return NOT_COMPARED
    first, second = (table.loc[name] for name in names)
    if first["worst rank"] < second["best rank"]:
        return ""
    return TURNED if second["worst rank"] < first["best rank"] else UNCERTAIN


def _doubt(inputs: ReportInputs, metric: str, best: Setting, following: Setting) -> str:
    """Return what the corrected tests say against the order of two settings; an empty text if one confirms it."""
    pair = _comparison(best, following), _comparison(following, best)
    metrics = metric, metric.replace("val/", "test/")  # settings are ranked by validation text, and judged on test text
    tests = [row for _, row in inputs.contrasts.iterrows() if row["metric"] in metrics and levels_compared(row) in pair]
    claims = [each for each in inputs.judgments if each.planned and each.metric in metrics and each.compared in pair]
    if not tests and not claims:
        return _by_ranks(inputs, best, following)
    told_apart = any(standing(row) == SIGNIFICANT for row in tests)
    return "" if told_apart or any(each.decided and math.isnan(each.margin) for each in claims) else CORRECTED


def _is_decided(inputs: ReportInputs, best: Setting, following: Setting) -> bool:
    """Return whether a claim about a factor in which two settings differ is decided."""
    different = {factor for factor, level in best.levels.items() if level != following.levels[factor]}
    decided = [each for each in inputs.judgments if each.planned and each.decided]
    return any(each.compared.partition(" ")[0] in different for each in decided)


def _comparison(one: Setting, other: Setting) -> str:
    """Return the words of a comparison of two settings that differ in one factor; otherwise an empty text."""
    different = [factor for factor, level in one.levels.items() if level != other.levels[factor]]
    if len(different) != 1:
        return ""
    within = name_cell({factor: level for factor, level in one.levels.items() if factor not in different})
    at = f" at {within}" if within else ""
    return f"{different[0]} {one.levels[different[0]]} vs {other.levels[different[0]]}{at}"


def _luck(found: Ranking) -> str:
    """Return how much of the lead of the best setting is due to choosing it, and its values on test text."""
    text = "**How much of that is luck:** a setting that was chosen because it is the best looks better than it is."
    best, number = found.settings[0], len(found.settings)
    tested = found.metric.replace("val/", "test/")
    chosen = pd.DataFrame({each.name: each.values for each in found.settings}).T
    tests = {each.name: by_seed(each.runs, tested) for each in found.settings if tested in each.runs}
    judged = pd.DataFrame(tests).T.reindex(index=chosen.index, columns=chosen.columns)
    has_test = chosen.notna().equals(judged.notna())
    if has_test:
        text += f" On test text, by which nothing was chosen, {literal(best.name)} has a {noun(tested)} of "
        text += f"{_mean(judged.loc[best.name].dropna())}. It is from the runs that chose the setting, "
        text += "so it may be lucky too."
    if len(chosen.columns) < 2:
        return text + " Without several seeds that all settings have, the luck cannot be estimated."
    where = "on test text" if has_test else "on validation text, as there is no test text"
    unit = noun(tested if has_test else found.metric)
    found_lead = lead(chosen.to_numpy(), (judged if has_test else chosen).to_numpy())
    side = "below" if found_lead.judged >= 0 else "above"
    all_of_them = "both settings" if number == 2 else f"all {number} settings"
    return (
        f"{text} The {noun(found.metric)} by which it was chosen is {found_lead.chosen:.2g} below the mean of "
        f"{all_of_them}; if all were equal, the best of {number} would be {found_lead.luck:.2g} below the mean through "
        f"luck alone. A fair number leaves out each seed in turn: the other seeds choose the best setting, and the "
        f"seed that was left out judges it {where}. On average, the {unit} of the chosen setting is then "
        f"{abs(found_lead.judged):.2g} {side} the mean of all settings."
    )


def _left_out(found: Ranking) -> Iterator[str]:
    """Yield which seeds and settings the ranking leaves out, and why."""
    if found.dropped:
        seeds = ", ".join(map(str, found.dropped))
        yield f"Ranked by the seeds that all settings have; without seed {seeds}."
    reasons = (
        (found.acausal, "they see later tokens, so their losses are not comparable"),
        (found.without_value, f"no finished run has a finite {noun(found.metric)}"),
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
        known = SPEED in inputs.runs and inputs.runs[SPEED].notna().all() and not about_speeds(inputs.runs)
        ratio = f"{seconds / min(everything):.2f}"
        times = f", {ratio} times as long as the fastest setting" if known and ratio != "1.00" else ""
        trials = inputs.trials["train_seconds"].sum() if len(inputs.trials) else 0.0
        tuning = f", and {_duration(trials)} of the runs that tuned them" if trials else ""
        yield (
            f"**Its cost:** {_duration(seconds)} of training a run{times}; "
            f"training of all runs together: {total}{tuning}, without evaluation and start. "
            "Times hold for this machine and what else it did."
        )


def _duration(seconds: Any) -> str:
    return f"{seconds / 60:.3g} minutes" if seconds >= 100 else f"{seconds:.3g} seconds"
