"""Routers as a league: ranks with intervals, differences to the reference, cost; and how much routing matters here."""

import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from moe.analysis.figures.drawing import drawing
from moe.analysis.figures.forest import CLEAR, MOST_ROWS, Row, forest, leaves_out
from moe.analysis.league import (
    LEAST,
    ROUTER,
    WORSE,
    League,
    compared_runs,
    league_of,
    losses_by_seed,
    verdict,
    without_place,
)
from moe.analysis.learned import TOO_LITTLE
from moe.analysis.limits import ORACLE, RANDOM, Share, covered
from moe.analysis.looks import SMALLEST, group_of
from moe.analysis.power import SIGNIFICANCE
from moe.analysis.report.blocks import Heading, Paragraph, ReportBlock, TableBlock, csv_file, literal
from moe.analysis.report.inputs import LEAGUE, ReportInputs, league_metric, league_reference
from moe.analysis.sentences import enumerated, noun, with_interval
from moe.analysis.statistics import name_cell
from moe.results.conditions import conditions

COST = {
    "model.ffn": "width of an expert",
    "flops_per_token": "FLOPs per token",
    "time/tokens_per_s": "tokens / s",
    "peak_memory_gb": "peak memory, GB",
}
MEANS = """\
{metric} in nats per token, mean over the {seeds} seeds that all ranked routers have. Differences are those from
{reference}, paired by seed"""
INTERVALS = """\
, each with its own spread. Their intervals are corrected for the number of routers{looks}: in {confidence} of cases all
of them contain the true differences (Bonferroni's correction). The verdict of a row compares the router with
{reference} alone: better or worse if its interval leaves out 0. Verdicts elsewhere in this report are corrected for all
of its tests, so they may be undecided where a row of this table is not. Ranks compare all pairs of routers: a router's
best rank is 1 plus the number of routers that are certainly better. Their intervals hold together too. They are about
more comparisons and so know less about each: a router may be worse than {reference} by its verdict, although the
intervals of their ranks overlap."""
NO_INTERVALS = ". There are no intervals and no verdicts, because {reason}."
NOTHING_LEFT = "nothing of the 5 % is left for this look"
OTHERS = """\
 Routers that see later tokens have no rank, because their losses are not comparable. Costs are medians; speed depends
on what else the machine did."""
MATTERS_EXPLAINED = """\
`{random}` deals tokens to experts at random and evenly in training, and `{oracle}` knows the domain of each text. The
share is how much of the distance between their losses ({metric}) a router covers: 0 is as good as random, 1 as good as
the oracle. It may be below 0, and above 1, because the domain is not the best that a router can know. In evaluation,
`{random}` has a fixed table of experts, and its loss contains what this change costs. Without that, shares would be
farther from 1. The interval is Fieller's 95 % interval over seeds, for each router alone and for a single look, so
other looks at these runs do not widen it; nothing is tested."""
UNCLEAR = """\
The distance between `{random}` and `{oracle}` is {distance:+.3g}, which is not clear from zero with these seeds. So the
shares have no interval: the data do not tell how much routing matters here."""
ORACLE_WORSE = """\
Here `{oracle}` is worse than `{random}`: the distance is {distance:.3g}. So it is no upper limit, and the shares do not
mean what they are called: below 0 is then better than random. It may have fewer experts per token, or the domain helps
little."""

UNEQUAL = """\
The routers do not cost the same: `{most}` takes {more:.0f} % more FLOPs per token than `{least}`, so the shares also
show what more computation gives{advice}."""
ADVICE = " (`model.ffn=${equal_flops:F}` makes the costs equal)"
ROUNDED = ", although the widths of the experts were chosen for each router"
SAME_COST = 1.02  # the largest ratio of FLOPs per token at which routers count as equally costly

LEFT_OUT = "Left out: {}."
NO_LEAGUE = """\
None: a league needs at least {least} causal routers with a finite {metric}, {reference} among them, and a seed that all
of these have. Of {planned} routers, {measured} have a finite {metric}, and {causal} of these are causal."""
CERTAIN = "In each league, the intervals of all ranks hold together in {confidence} of cases."
BY_INTERVALS = "By intervals for all routers together, of differences and of ranks"
OVERLAP = "the intervals of some ranks overlap"
MOST_NAMED = 5  # routers that a sentence names

LEAGUE_CAPTION = """\
Routers in the order of their mean {metric}, the best one on top. Each point is the mean difference from {reference}
over the seeds that all have, in nats per token; left is better. An interval that leaves out 0 is a difference that
chance does not explain, with all routers taken together. The dashed lines are the reference routers."""
SHARE_CAPTION = """\
How much of the distance from random to oracle routing each router covers, in {metric}, with its 95 % interval over
seeds: 0 is as good as random routing, 1 as good as knowing the domain of each text."""


class _Placed(NamedTuple):
    """A league, its finished runs, and which routers and seeds it lacks, with the reasons."""

    found: League
    finished: pd.DataFrame
    lacking: list[str]


def league(inputs: ReportInputs) -> Iterator[ReportBlock]:
    """Yield the ranks of all routers with intervals, their differences to the reference, and their costs."""
    if league_metric(inputs) is None or inputs.contrasts.empty:
        return
    metric, reference, leagues = str(league_metric(inputs)), league_reference(inputs), _leagues(inputs)
    yield Heading("League of routers")
    if not leagues:
        measured = inputs.runs[np.isfinite(inputs.runs[metric].astype(float))]
        routers = {"planned": inputs.runs, "measured": measured, "causal": measured[measured["causal"] != False]}  # noqa: E712
        numbers = {name: runs[ROUTER].nunique() for name, runs in routers.items()}
        yield Paragraph(NO_LEAGUE.format(least=LEAST, metric=metric, reference=literal(str(reference)), **numbers))
    for number, (place, (found, finished, lacking)) in enumerate(leagues.items()):
        name = f"league_{number}" if place else "league"
        table = _table(found, reference, finished, metric)
        yield Paragraph((f"**{literal(place)}**: " if place else "") + _explained(inputs, found, reference, metric))
        if lacking:
            yield Paragraph(literal(LEFT_OUT.format("; ".join(lacking))))
        yield drawing(name, LEAGUE_CAPTION.format(reference=reference, metric=metric), _league_figure(found, reference))
        yield TableBlock(table)
        yield csv_file(name, table, "this table.")


def order_of_routers(inputs: ReportInputs) -> str:
    """Return the best router by the league, and whether the order depends on the other factors; empty without one.

    Routers and seeds without a place are named.
    """
    leagues = _leagues(inputs)
    if not leagues:
        return ""
    lacking = dict.fromkeys(each for league in leagues.values() for each in league.lacking)
    found = {place: each.found for place, each in leagues.items()}
    confidence = _confidence(max(each.level for each in found.values()))
    order = _order(found, noun(str(league_metric(inputs))), league_reference(inputs), confidence)
    return f"{order} {LEFT_OUT.format('; '.join(lacking))}" if lacking else order


def standings(inputs: ReportInputs) -> dict[str, pd.DataFrame]:
    """Return the ranked routers of each league, the best one first, by the levels of the other factors as a text."""
    return {place: _ranked(each.found) for place, each in _leagues(inputs).items()}


def _leagues(inputs: ReportInputs) -> dict[str, _Placed]:
    """Return each league by the levels of the other factors as a text."""
    metric = league_metric(inputs)
    if metric is None or inputs.contrasts.empty:
        return {}
    leagues, reference = {}, league_reference(inputs)
    for cell, members in _cells(inputs, inputs.runs):
        finished = members[members["status"] == "finished"]
        level = _level(inputs, compared_runs(finished, metric))
        if (found := league_of(finished, metric, reference, level)) is not None:
            leagues[name_cell(cell)] = _Placed(found, finished, without_place(members, found, metric))
    return leagues


def _level(inputs: ReportInputs, runs: pd.DataFrame) -> float:
    """Return the level of a league that compares these runs.

    It is 0 if nothing is left in this look, or if the runs learned too little. A league with another reference is
    another one, because it compares other routers.
    """
    asked_by = {each for each in inputs.study.present.asked if each.factor == LEAGUE}
    share = inputs.study.share(group_of(runs), asked_by)
    return 0.0 if inputs.learned_little or share <= SMALLEST else SIGNIFICANCE * share


def _confidence(level: float) -> str:
    return f"{100 * (1 - level):.4g} %"


def _ranked(found: League) -> pd.DataFrame:
    """Return the rows of a league that have a rank, the best one first."""
    return found.table.dropna(subset="rank").sort_values("rank")


def _order(found: dict[str, League], unit: str, reference: Any, confidence: str) -> str:
    """Return what the ranks of the leagues say. confidence: how often those of a league hold together."""
    certain, leagues = CERTAIN.format(confidence=confidence), {place: _ranked(each) for place, each in found.items()}
    if len(found) < 2:
        return next((_first(each, unit, reference) for each in found.values()), "")
    orders, places = [list(table.index) for table in leagues.values()], enumerated(list(leagues))
    if all(order == orders[0] for order in orders) and all(map(_is_certain, leagues.values())):
        order = ", ".join(map(str, orders[0]))
        return f"The order by {unit} is the same at {places}: {order}. Every rank is certain. {certain}"
    if changed := _changed_places(leagues):
        return f"The order by {unit} depends on the setting: {changed}. {certain}"
    best = " ".join(f"At {place}, {_first(each, unit, reference)}" for place, each in found.items())
    open_ = f"The runs do not decide whether the order of routers differs between {places}: {OVERLAP}."
    return f"{open_} {best}"


def _first(found: League, unit: str, reference: Any) -> str:
    """Return two sentences: the best router and its lead, and which others may be as good.

    The lead is the difference from the reference; that of the next router if the best one is the reference. As good may
    be a router that no other one beats, by the ranks, and that the reference does not beat either.
    """
    table = _ranked(found)
    best, following = table.index[:2]
    shown = following if best == reference else best
    lead = with_interval(*table.loc[shown, ["difference", "low", "high"]], least=3)
    lead = (
        f"that of {shown} differs by {lead}" if best == reference else f"it differs from that of {reference} by {lead}"
    )
    number = len(found.values)
    text = f"{best} has the lowest {unit}: {table['mean'].iloc[0]:.4g} nats per token "
    text += f"{f'in the mean of {number} seeds' if number > 1 else 'with one seed'}; {lead}."
    if not found.level or number < 2:
        return f"{text} No router is shown to be better than another one, because there are no intervals."
    rivals = [
        str(name)
        for name, row in table.iloc[1:].iterrows()
        if row["best rank"] == 1 and verdict(row["low"], row["high"]) != WORSE
    ]
    if not rivals:
        return f"{text} {BY_INTERVALS}, {best} is certainly the best of {len(table)} routers."
    rest = len(table) - 1 - len(rivals)
    others = f" Each of the other {rest} is worse than some router." if rest > 1 else ""
    others = others or (" The other one is worse than some router." if rest else "")
    number, more = len(rivals), len(rivals) - MOST_NAMED
    names = enumerated([*rivals[:MOST_NAMED], *([f"{more} other routers"] if more > 1 else rivals[MOST_NAMED:])])
    several, they = (f"{number} other routers", "they are") if number > 1 else ("one other router", "it is")
    why = f"because no router is shown to be better than {they}: {names}"
    return f"{text} {BY_INTERVALS}, {several} may be as good, {why}.{others}"


def _is_certain(table: pd.DataFrame) -> bool:
    return bool((table["best rank"] == table["worst rank"]).all())


def _changed_places(leagues: dict[str, pd.DataFrame]) -> str:
    """Return two routers that certainly change places between two leagues; an empty text if there are none."""
    for (here, one), (there, other) in itertools.combinations(leagues.items(), 2):
        for a, b in itertools.permutations(one.index.intersection(other.index), 2):
            ahead = one.loc[a, "worst rank"] < one.loc[b, "best rank"]
            if ahead and other.loc[b, "worst rank"] < other.loc[a, "best rank"]:
                return f"{a} is better than {b} at {here}, and worse at {there}"
    return ""


def _league_figure(found: League, reference: Any) -> Figure | str:
    """Draw the difference of each ranked router from the reference, in the order of their losses."""
    ranked = found.table.dropna(subset="rank")
    if len(ranked) > MOST_ROWS:
        return f"{len(ranked)} routers are too many"
    if not found.level:
        return "there are no intervals"
    rows = [
        Row(f"{int(each.rank)}. {each.Index}", each.difference, each.low, each.high, leaves_out(each.low, each.high))
        for each in ranked.itertuples()
    ]
    limits = {name: float(ranked.loc[name, "difference"]) for name in (RANDOM, ORACLE) if name in ranked.index}
    marks = f"line: {_confidence(found.level)} interval, all of them together; {CLEAR}"
    return forest(rows, f"difference from {reference} (nats per token)", marks, lines=limits)


def _cells(inputs: ReportInputs, runs: pd.DataFrame) -> Iterator[tuple[dict[str, Any], pd.DataFrame]]:
    return conditions(runs, [factor for factor in inputs.factors if factor != ROUTER])


def _explained(inputs: ReportInputs, found: League, reference: Any, metric: str) -> str:
    """Return what the numbers of a league are, and why it has no verdicts if that is so."""
    facts = {"metric": f"`{metric}`", "seeds": len(found.values), "reference": literal(str(reference))}
    if not found.level:
        reason = TOO_LITTLE if inputs.learned_little else NOTHING_LEFT
        return (MEANS + NO_INTERVALS + OTHERS).format(**facts, reason=reason)
    looks = "" if found.level == SIGNIFICANCE else " and of looks"
    return (MEANS + INTERVALS + OTHERS).format(**facts, looks=looks, confidence=_confidence(found.level))


def _table(found: League, reference: Any, members: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Return a row for each router; without a level there are no intervals and no verdicts."""
    rows = []
    for name, standing in found.table.iterrows():
        of_router = members[members[ROUTER] == name]
        ranked = math.isfinite(standing["rank"])
        place = "{:.0f} to {:.0f}".format(*standing[["best rank", "worst rank"]])
        row: dict[str, Any] = {"rank": f"{standing['rank']:.0f}" if ranked else "–"}
        if found.level:
            row |= {f"{_confidence(found.level)} interval of the rank": place if ranked else "–"}
        row |= {ROUTER: str(name), metric: float(standing["mean"]), "n": int(standing["n"])}
        compared = ranked and name != reference
        if found.level:
            difference = with_interval(*standing[["difference", "low", "high"]], least=3) if compared else "–"
            row[f"difference from {reference} [interval, all together]"] = difference
            row["verdict"] = verdict(standing["low"], standing["high"]) if compared else "–"
        else:
            row[f"difference from {reference}"] = f"{standing['difference']:+.3g}" if compared else "–"
        row |= {COST[key]: of_router[key].astype(float).median() for key in COST if key in of_router}
        row["causal"] = {True: "yes", False: "no"}.get(of_router["causal"].iloc[0], "unknown")
        rows.append(row)
    return pd.DataFrame(rows)


def how_much_routing_matters(inputs: ReportInputs) -> Iterator[ReportBlock]:
    """Yield the share of the distance from random to oracle routing that each router covers."""
    metric = league_metric(inputs)
    if metric is None or inputs.contrasts.empty:
        return
    runs = inputs.runs[inputs.runs["status"] == "finished"]
    rows, doubts, shares, compared = list[dict[str, Any]](), list[str](), list[Row](), list[pd.DataFrame]()
    for cell, members in _cells(inputs, runs):
        values = losses_by_seed(members, metric)
        if not {RANDOM, ORACLE} <= set(values):
            continue
        limits = values[[RANDOM, ORACLE]].dropna()
        measured = {name: limits.assign(arm=values[name]).dropna() for name in values.columns.drop([RANDOM, ORACLE])}
        of_routers = {
            name: covered(*(both[side].to_numpy() for side in ("arm", RANDOM, ORACLE)))
            for name, both in measured.items()
        }
        for name in sorted(of_routers, key=lambda each: np.nan_to_num(of_routers[each].value), reverse=True):
            share, n = of_routers[name], len(measured[name])
            rows.append({"within": name_cell(cell), ROUTER: name, "n": n, "share covered": _share(share)})
            place = f"{name} at {name_cell(cell)}" if cell else str(name)
            shares += [Row(f"{place} (n={n})", *share[:3], decided=leaves_out(share.low, share.high))]
        clear = covered(*(limits[side].to_numpy() for side in (ORACLE, RANDOM, ORACLE))).clear
        distance = float((limits[RANDOM] - limits[ORACLE]).mean())
        if not clear or distance < 0:
            doubts.append((ORACLE_WORSE if clear else UNCLEAR).format(random=RANDOM, oracle=ORACLE, distance=distance))
        compared.append(members[members[ROUTER].isin(values.columns)])
    if not rows:
        return
    yield Heading("How much routing matters here")
    yield Paragraph(MATTERS_EXPLAINED.format(random=RANDOM, oracle=ORACLE, metric=metric))
    yield from map(Paragraph, (*doubts, *_unequal_cost(compared)))
    unclear = "the distance between random and oracle is not a clear one" if doubts else ""
    yield drawing("share_covered", SHARE_CAPTION.format(metric=metric), unclear or _share_figure(shares))
    table = pd.DataFrame(rows)
    yield TableBlock(table.drop(columns=[] if table["within"].any() else ["within"]))


def _unequal_cost(cells: list[pd.DataFrame]) -> Iterator[str]:
    """Yield that the routers of a cell differ in FLOPs per token, for the cell in which they differ most."""
    costs = [cell["flops_per_token"].astype(float).groupby(cell[ROUTER]).median() for cell in cells]
    widest = max(costs, key=lambda cost: cost.max() / cost.min())
    ratio = widest.max() / widest.min()
    if ratio > SAME_COST:
        chosen = any(cell["model.ffn"].nunique() > 1 for cell in cells if "model.ffn" in cell)
        advice = ROUNDED if chosen else ADVICE
        yield UNEQUAL.format(most=widest.idxmax(), least=widest.idxmin(), more=100 * (ratio - 1), advice=advice)


def _share_figure(rows: list[Row]) -> Figure | str:
    """Draw the share of each router, the largest on top."""
    if len(rows) > MOST_ROWS:
        return f"{len(rows)} routers are too many"
    rows = sorted(rows, key=lambda row: -row.value)
    label = f"share of the distance from {RANDOM} (0) to {ORACLE} (1)"
    marks = "line: 95 % interval of each router alone; orange: above 0, blue: below, gray and open: undecided"
    return forest(rows, label, marks, lines={RANDOM: 0.0, ORACLE: 1.0})


def _share(share: Share) -> str:
    if not math.isfinite(share.value):
        return "–"
    if not np.isfinite(share.low):
        return "unknown, because random and oracle are not clearly apart"
    return with_interval(*share[:3], least=2, sign="")
