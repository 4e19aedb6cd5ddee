"""What a search for good settings found. No test is made on its runs, because results decided which runs there are."""

from collections.abc import Iterator

import pandas as pd

from moe.analysis.report.blocks import Heading, Paragraph, ReportBlock, TableBlock, literal
from moe.analysis.report.inputs import ReportInputs
from moe.analysis.report.sections.tuning import tuning
from moe.results.conditions import spread_table, summary

EXPLAINED = """\
A search chose these settings one after another, each by the results of those before it, to {goal}. Therefore they are
no factorial grid: which levels occur together depends on the results. This report makes no test on them, neither
contrasts nor an analysis of variance, and judges no claims. The best value was chosen because it is the best, so it is
too good on average. To find out how good its settings are, train them and your baseline with other seeds, as an
experiment of their own."""
SHOWN = 10  # trials
NO_CONFIRMATION = """\
A search for good settings in this folder also trained these runs: {settings}. Settings that were chosen by these seeds
look better on them than they are. So the tests and verdicts of this report leave these runs out, and the tables of
means show them. To have more seeds that count, add other ones to the experiment."""


def search_result(inputs: ReportInputs) -> Iterator[ReportBlock]:
    """Yield the best trials of a search, the best one first; of runs that tune keys, what they chose."""
    if len(inputs.trials):
        yield from tuning(inputs)
        return
    yield Heading("Search")
    yield Paragraph(EXPLAINED.format(goal=inputs.search))
    direction, _, metric = str(inputs.search).partition(" ")
    if metric not in inputs.loaded or inputs.loaded[metric].isna().all():
        return
    means = summary(inputs.runs, inputs.factors, [metric])
    best = means.sort_values("mean", ascending=direction == "minimize").head(SHOWN)
    yield Paragraph(f"The best {len(best)} of {len(means)} settings: mean ± sample standard deviation over seeds.")
    yield TableBlock(pd.concat([spread_table(best.iloc[[place]]) for place in range(len(best))]))


def levels_from_a_search(inputs: ReportInputs) -> Iterator[ReportBlock]:
    """Yield which settings of an ordinary experiment a search trained too, and with which seeds."""
    shared = inputs.runs[inputs.runs["folder"].isin(inputs.searched)]
    if shared.empty:
        return
    seeds = shared.groupby(inputs.condition[shared.index], sort=False)["seed"].agg(lambda each: sorted(set(each)))
    named = [f"{label} (seed {', '.join(map(str, each))})" for label, each in seeds.items()]
    yield Heading("Settings from a search")
    yield Paragraph(NO_CONFIRMATION.format(settings=literal("; ".join(named))))
