"""Cost: what each setting costs, comparisons at equal cost, and the effective speed-up over the reference."""

import math
from collections.abc import Iterable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import pandas as pd
from matplotlib.figure import Figure

from moe.analysis.equal_cost import (
    ACTIVE,
    FLOPS,
    LOSS,
    MEASURED,
    SECONDS,
    TOTAL,
    advice,
    equal_cost,
    is_budget,
    is_scale,
    paired_sides,
    points,
    training_curves,
    training_points,
    unknown_flops,
)
from moe.analysis.figures.drawing import Drawing, drawing
from moe.analysis.figures.forest import CLEAR, MOST_ROWS, Row, forest, leaves_out
from moe.analysis.learned import NO_VERDICT
from moe.analysis.report.blocks import BulletList, Heading, Paragraph, ReportBlock, TableBlock, csv_file, literal
from moe.analysis.report.inputs import ReportInputs, reference_levels
from moe.analysis.sentences import levels_compared, with_interval
from moe.analysis.speed_up import COSTS_MORE, SAVES, Curve, SpeedUp, groups, speed_up
from moe.analysis.statistics import NAMES, name_cell, table_of_comparisons
from moe.results.comparable import LATER_TOKENS, NOT_COMPARABLE, incomparable, not_poolable, other_causality
from moe.results.conditions import conditions, varied_factors
from moe.results.training_flops import CLOSE, SPENT

SPEED = "time/tokens_per_s"
COLUMNS = {
    "parameters.trainable": "trained parameters",
    "parameters.active": ACTIVE,
    "parameters.total": TOTAL,
    "flops_per_token": "FLOPs per token",
    SPENT: "training FLOPs",
    "peak_memory_gb": "peak memory, GB",
    SPEED: "tokens / s",
}
COUNTS = list(COLUMNS)[:5]
SPEED_COLUMNS = [*NAMES[:2], "verdict", "times the compute", *NAMES[2:], "training FLOPs", "loss", "doubts"]
COSTS_EXPLAINED = """\
Medians over the runs of each condition. FLOPs per token are those of a forward pass in evaluation. Training FLOPs are
those of all training steps, which cost three times as much for the experts that they ran, and nothing for others.
Memory is that of the whole process. Speed depends on what else the machine did."""
EQUAL_EXPLAINED = """\
Difference of the validation loss from that of the reference level, in nats per token, paired by seed and with its 95 %
t interval. The cost is the largest that all runs of a comparison have reached; losses between two evaluations are
interpolated. Settings whose FLOPs differ by less than 1 % are left out there: they are compared at equal FLOPs
elsewhere. "Read at 60 %" means that one side is read there before its end, when its learning rate is still high, so it
looks worse than a run of that length would. "Between points 0.02 apart" means that a loss was interpolated between two
that differ by 0.02 nats, which bounds the error of that if the loss falls steadily; evaluate more often (`eval_every`)
to lower it. This table describes, and its intervals take interpolated losses for exact ones; a claim with `at` tests,
and its interval has all losses that may lie between two evaluations."""
VERDICTS = """\
A level is not told apart from the reference if its interval contains 1. If the interval lies above 1, the level saves
compute, provided that runs of the reference ended at its compute, or, unless the curve goes through evaluations during
training, at less and at more. If the interval lies below 1, the level costs more, provided that the curve has a point
at its compute or at less, and that the runs of the reference reach its loss. If the curve goes through evaluations,
runs must have ended at the level's compute or at less with its loss or a lower one, up to what 2 % of the compute
change. Otherwise the difference is not shown, and `doubts` says why. It is not shown either if runs of the
reference ended at the level's compute, but too few seeds have them for a point of the curve, or if their losses
contradict it. Budgets that differ by at most 2 % are one. There is no
verdict if one side alone may see later tokens: its losses are not comparable."""
SPEED_EXPLAINED = """\
How many times as much training compute (FLOPs) the reference level needs for the loss that the level has. Both sides
have one size, and the same seeds at a budget. A curve L_inf + A C^-alpha is fitted through the reference's runs, and
then corrected at each of their budgets, so that it has their mean loss there. The interval is a t interval of the log,
with the spread of {resamples} resamples of the seeds, which are the same for both levels. It says what other seeds
could change: if the curve is right, in 95 % of cases all intervals of the table contain the true values (Bonferroni's
correction). It does not say how wrong the curve is between two budgets, and beyond the last one. It is that of a single
look: other looks at these runs do not widen it. A value above 1 saves compute. {verdicts} None of this is a claim, and
it is not among the tests of the report."""
FROM_CURVES = """\
Where the reference has three budgets of one size for fewer than two seeds, or for fewer than half of those that both
sides have, the curve goes through the evaluations of its runs. A run in the middle of its training is no run of that
budget: its learning rate has not fallen yet, which makes its loss too high, but in very short runs the longer schedule
can also learn faster. So a number that is read there is off by more than its interval says. Runs of three or more
budgets, such as `steps=100,200,400`, tell more."""
NO_TABLE = "No two settings that differ in {cost} can be compared at equal {cost}{reasons}."
NOWHERE = "no budget of the reference reaches it"
NO_CURVE = "no curve can be fitted through the runs of the reference"
RESAMPLES = 200
STEADY = 1.5  # times: by which the speeds of one setting may differ before something else must have slowed its runs
OTHER_WORK = """\
Speeds say nothing about the settings: the fastest run of {setting} is {ratio:.2g} times as fast as its slowest, so
other work on the machine slowed some of the runs."""
EQUAL_CAPTION = """\
Difference of the validation loss from the reference level at equal {cost}. Each point is the mean over paired seeds,
the line its 95 % t interval for that comparison alone; left of 0 is better. A percentage at the end of a name says how
far in its training the earlier side is read."""
SPEED_CAPTION = """\
How many times as much training compute the reference level needs for the loss of each level; right of 1 saves compute.
If the curve is right, all intervals contain the true values in 95 % of cases. The axis is logarithmic. An interval that
ends at the edge goes on beyond it."""


def costs(inputs: ReportInputs) -> Iterator[ReportBlock]:
    """Yield what each condition costs, if the conditions do not all train and compute equally much."""
    runs = inputs.runs.assign(condition=inputs.condition)
    runs = runs[runs["status"] == "finished"]
    present = [column for column in COLUMNS if column in runs and runs[column].notna().any()]
    if not any(_differ(runs[column]) for column in present if column in COUNTS):
        return
    table = runs.groupby("condition", sort=False)[present].median().rename(columns=COLUMNS).reset_index()
    counts = [COLUMNS[column] for column in present if column in COUNTS]
    yield Heading("What each setting costs")
    yield Paragraph(f"{COSTS_EXPLAINED} {about_speeds(inputs.runs)}".rstrip())
    yield TableBlock(table.assign(**{column: table[column].map("{:,.0f}".format) for column in counts}))


def about_speeds(runs: pd.DataFrame) -> str:
    """Return a sentence that says why the speeds of these runs cannot be compared; an empty text if they can."""
    if SPEED not in runs:
        return ""
    if reason := not_poolable(SPEED, runs):
        return f"Speeds are {reason}."
    runs = runs[(runs[SPEED] > 0) & (runs["status"] == "finished")]
    factors = [factor for factor in varied_factors(runs) if factor != "seed"]
    ratios = {
        name_cell(cell) or "this setting": members[SPEED].max() / members[SPEED].min()
        for cell, members in conditions(runs, factors)
    }
    setting = max(ratios, key=ratios.__getitem__, default="")
    return OTHER_WORK.format(setting=literal(setting), ratio=ratios[setting]) if ratios.get(setting, 1) > STEADY else ""


def equal_costs(inputs: ReportInputs) -> Iterator[ReportBlock]:
    """Yield the contrasts of the validation loss at equal steps, FLOPs, seconds and parameters, where these differ."""
    if inputs.contrasts.empty or LOSS not in inputs.runs:
        return
    seconds = inputs.options.seconds
    curves = training_curves(inputs.runs, inputs.past.evals, seconds=seconds)
    finished = inputs.runs[inputs.runs["status"] == "finished"]
    of_run = {
        FLOPS: curves.groupby("folder")[FLOPS].max(),
        ACTIVE: finished["parameters.active"],
        TOTAL: finished["parameters.total"],
    }
    differ = {cost: _differ(values) for cost, values in of_run.items() if values.notna().any()}
    wanted = [cost for cost, differs in differ.items() if differs] + ([SECONDS] if seconds is not None else [])
    tables = {cost: _by_cost(inputs, curves, cost) for cost in wanted}
    found = {cost: table for cost, table in tables.items() if (table["n"] > 0).any()}
    empty = [NO_TABLE.format(cost=cost, reasons=why_none(table)) for cost, table in tables.items() if cost not in found]
    yield Heading("At equal cost")
    left_out = unknown_flops(inputs.runs)
    if left_out and not differ.get(FLOPS):
        differ.pop(FLOPS, None)  # those that are known are equal
    facts = [*_equal_anyway(differ), *empty, left_out, _about_seconds(seconds)]
    yield BulletList(list(filter(None, facts)))
    if not found:
        return
    yield Paragraph(EQUAL_EXPLAINED)
    for cost, of_cost in found.items():
        yield _equal_drawing(of_cost, cost)
    table = pd.concat([of_cost.assign(at=f"equal {cost}") for cost, of_cost in found.items()])
    table["cell"] = [_cell(row) for row in table.itertuples()]
    for costs in ((FLOPS, SECONDS), (ACTIVE, TOTAL)):
        rows = table[table["at"].isin([f"equal {cost}" for cost in costs])]
        if len(rows):
            yield TableBlock(rows.pivot_table("cell", NAMES, "at", aggfunc="first", sort=False).reset_index())
    yield csv_file("equal_cost", table.drop(columns="cell"), "these tables, with n and the costs.")


def _equal_drawing(table: pd.DataFrame, cost: str) -> Drawing:
    """Draw the differences at one cost, a row for each comparison, in the order of the table."""
    rows = [
        Row(
            f"{levels_compared(each)} (n={each.n})" + (f", at {each.share:.0%}" if each.share < 1 - CLOSE else ""),
            each.value,
            each.low,
            each.high,
            leaves_out(each.low, each.high),
        )
        for each in table[table["n"] > 0].itertuples()
    ]
    result: Figure | str = f"{len(rows)} comparisons are too many" if rows else "no comparison has a cost in common"
    if 0 < len(rows) <= MOST_ROWS:
        result = forest(rows, f"difference at equal {cost} (nats per token)", f"line: 95 % t interval; {CLEAR}")
    return drawing(f"equal_{cost.replace(' ', '_')}", EQUAL_CAPTION.format(cost=cost), result)


def _cell(row: Any) -> str:
    """Return a difference with its interval, how early it was read, and between which points it was interpolated."""
    if not row.n:
        return "; ".join([row.note, *advice([row.eval_every])])
    early = f", read at {row.share:.0%}" if row.share < 1 - CLOSE else ""
    between = f", between points {row.gap:.2g} apart" if row.gap else ""
    apart = f", {NOT_COMPARABLE}" if row.note else ""
    return with_interval(row.value, row.low, row.high, least=3) + early + between + apart


def in_parentheses(reasons: Iterable[str]) -> str:
    """Return different reasons in parentheses, after a space; an empty text if there is none."""
    known = [literal(each) for each in dict.fromkeys(reasons) if each]
    return f" ({'; '.join(known)})" if known else ""


def why_none(table: pd.DataFrame) -> str:
    """Return why the rows of `equal_cost` have no number, as `in_parentheses` does, with one advice for all."""
    return in_parentheses([*table["note"], *advice(table["eval_every"])])


def _by_cost(inputs: ReportInputs, curves: pd.DataFrame, cost: str) -> pd.DataFrame:
    """Return the comparisons at one cost, also those without a number, whose note says why.

    At equal FLOPs, comparisons of two settings that cost the same after the last step are left out.
    """
    table = equal_cost(inputs.runs, curves, inputs.factors, reference_levels(inputs), cost)
    return table[(table["n"] == 0) | (table["share"] < 1 - CLOSE)] if cost == FLOPS else table


def equal_flops(inputs: ReportInputs, curves: pd.DataFrame) -> pd.DataFrame:
    """Return the comparisons at equal training FLOPs of settings that do not cost the same, with a column `cell`."""
    table = _by_cost(inputs, curves, FLOPS)
    return table.assign(cell=[_cell(row) for row in table.itertuples()])


def _equal_anyway(differ: dict[str, bool]) -> list[str]:
    names = {FLOPS: "training FLOPs"}
    same = " and the same ".join(names.get(cost, cost) for cost, differs in differ.items() if not differs)
    return [f"All runs have the same {same}: equal steps are equal cost in that respect."] if same else []


def _about_seconds(seconds: float | str | None) -> str:
    if seconds == MEASURED:
        return "Seconds were measured in these runs, on a machine that had nothing else to do, as `--seconds` states."
    if seconds is None:
        return (
            "Equal seconds are left out: `--seconds measured` states that the machine had nothing else to do, and "
            "`--seconds 5e10` computes them from FLOPs per second."
        )
    return (
        f"Seconds are training FLOPs at {seconds:.3g} FLOPs per second, as `--seconds` states. The efficiency is the "
        "same for all runs, so equal seconds are equal FLOPs."
    )


def speed_ups(inputs: ReportInputs) -> Iterator[ReportBlock]:
    """Yield how many times as much compute the reference level needs for the loss of each level."""
    if inputs.contrasts.empty or LOSS not in inputs.runs:
        return
    compared = list(found_speed_ups(inputs, training_curves(inputs.runs, inputs.past.evals)))
    rows = [each.names | speed_up_row(found) for each in compared for found in each.found]
    reasons = in_parentheses(each.reason for each in compared if each.reason != NO_CURVE)
    if not rows and not reasons:
        return
    yield Heading("Effective speed-up")
    if inputs.learned_little or not rows:
        yield Paragraph(NO_VERDICT if inputs.learned_little else f"There is none{reasons}.")
        return
    yield Paragraph(SPEED_EXPLAINED.format(resamples=RESAMPLES, verdicts=VERDICTS))
    if any(found.of_training for each in compared for found in each.found):
        yield Paragraph(FROM_CURVES)
    drawn = [
        _drawn_speed_up(levels_compared(SimpleNamespace(**each.names)), found, len(each.found))
        for each in compared
        for found in each.found
    ]
    yield drawing("speed_up", SPEED_CAPTION, _speed_up_figure(drawn))
    table = table_of_comparisons(rows, SPEED_COLUMNS)
    yield TableBlock(table)
    if reasons:
        yield Paragraph(f"Other comparisons have no speed-up{reasons}.")
    yield csv_file("speed_up", table, "this table, with all of its rows.")


class SpeedUps(NamedTuple):
    """The speed-ups of one comparison of levels, one for each budget. reason: why there is none, if there is none."""

    names: dict[str, Any]
    found: list[SpeedUp]
    reason: str


def found_speed_ups(inputs: ReportInputs, curves: pd.DataFrame) -> Iterator[SpeedUps]:
    """Yield the effective speed-ups of each comparison of levels.

    Both sides of a comparison have one size. Means over sizes would differ if a side lacks one of them.
    """
    factors = [factor for factor in inputs.factors if not (factor == "steps" or is_budget(inputs.runs, factor))]
    references = {factor: level for factor, level in reference_levels(inputs).items() if factor in factors}
    pairs = paired_sides(inputs.runs, factors, references, FLOPS)
    sides = [
        (names, *pair, incomparable(LOSS, *pair).removeprefix(f"{NOT_COMPARABLE}: "))
        for names, *pair in pairs
        if not is_scale(names["factor"])
    ]
    arms = [points(treated, curves) for _, treated, *_ in sides]
    number = sum(len(groups(arm)) for arm, (*_, reason) in zip(arms, sides, strict=True) if not reason)
    curves_of = dict[bytes, Curve]()  # most levels have the same reference
    for (names, treated, baseline, reason), arm in zip(sides, arms, strict=True):
        if reason:
            yield SpeedUps(names, [], reason)
            continue
        found = speed_up(
            points(baseline, curves),
            arm,
            evaluations=training_points(baseline, curves),
            of=number,
            resamples=RESAMPLES,
            known=curves_of,
        )
        if other_causality(treated, baseline):
            found = [each._replace(comparable=False, doubts=[LATER_TOKENS, *each.doubts]) for each in found]
        yield SpeedUps(names, found, "" if found else NO_CURVE)


def _speed_up_figure(rows: list[Row]) -> Figure | str:
    if len(rows) > MOST_ROWS:
        return f"{len(rows)} speed-ups are too many"
    marks = "line: interval, 95 % for all together; orange: saves compute, blue: costs more, open: neither"
    return forest(rows, "compute that the reference needs,\nas a multiple of the level's", marks, zero=1.0)


def _drawn_speed_up(name: str, found: SpeedUp, budgets: int) -> Row:
    """Return the row of a speed-up in the figure. What no budget reaches has no point, and its name says so."""
    value, low, high = found.times
    name += f", {found.budget:.3g} FLOPs" if budgets > 1 else ""
    name += "" if math.isfinite(value) else f": {NOWHERE}"
    text = f"interval from {_times(low)} to {_times(high)}" if not math.isnan(low) else "no interval"
    return Row(name, value, low, high, found.verdict in (SAVES, COSTS_MORE), text)


def speed_up_row(found: SpeedUp) -> dict[str, object]:
    """Return the cells of a speed-up in a table."""
    times = found.times
    text = NOWHERE if math.isinf(times.value) else _times(times.value)
    text += f" [{_times(times.low)}, {_times(times.high)}]" if not math.isnan(times.low) else ""
    return {
        "training FLOPs": f"{found.budget:.3g}",
        "loss": found.loss,
        "verdict": found.verdict,
        "times the compute": text,
        "doubts": "; ".join(found.doubts),
    }


def _times(value: float) -> str:
    return "∞" if value > 1e6 else f"{value:.3f}"


def _differ(values: pd.Series) -> bool:
    """Return whether numbers differ by more than one percent."""
    known = values.dropna().astype(float)
    return bool(len(known) and known.max() > known.min() * (1 + CLOSE))
