"""What a report is made of: everything its sections read, gathered once, before a single file is written."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pandas as pd

from moe.analysis.statistics import contrasts, name_cell
from moe.analysis.style import MOST_LINES
from moe.results import history
from moe.summaries import HEADLINE, conditions, levels, tied_factors, varied_factors, with_causality

# What is tested: metric -> its unit, and what a rise and a fall of it mean. Each is a family of its own for Holm.
TESTED = {
    "val/perplexity": ("perplexity", "worse", "better"),
    "routing/load_cv/pooled": ("load CV", "less balanced", "more balanced"),
}


class Evidence(NamedTuple):
    """The runs and all that was asked about them; nothing here changes while sections read it."""

    loaded: pd.DataFrame  # as `moe.results.load` returned it
    runs: pd.DataFrame  # the same, with "(causal: yes|no)" beside every router's name
    factors: list[str]  # what varies, without the seed
    tied: dict[str, str]  # varied factor -> the one that fixes it
    condition: pd.Series  # per run, "lb=0.01, noise=0.1": the levels of the factors; absent where one is unknown
    metrics: list[str]  # the headline metrics that some run has
    tested: list[str]  # those of TESTED that some run has
    contrasts: pd.DataFrame  # of `moe.analysis.statistics.contrasts`, all tested metrics
    evals: pd.DataFrame  # every evaluation, all metrics
    trains: Callable[[Sequence[str]], pd.DataFrame]  # these columns of every training step; read when asked for
    problems: list[str]  # a line per thing in the event logs that could not be read

    def labelled(self, events: pd.DataFrame) -> pd.DataFrame:
        """Events of runs whose condition is known, with it as column "condition"."""
        labels = pd.DataFrame({"folder": self.runs["folder"], "condition": self.condition}).dropna()
        return events.merge(labels, on="folder") if len(events) else events

    def too_many(self) -> str:
        """Why a figure with a line a condition cannot be drawn; empty if it can."""
        count = self.condition.nunique()
        return f"{count} conditions are too many" if count > MOST_LINES else ""


def gather(loaded: pd.DataFrame, *, references: dict[str, Any] | None = None) -> Evidence:
    """The evidence in a table of `moe.results.load`; `references` names the level that a factor's are compared with.

    ValueError for a reference that is no level of a varied factor, and for a seed with two runs of one condition.
    """
    runs = with_causality(loaded)
    factors = [factor for factor in varied_factors(runs) if factor != "seed"]
    names = {
        index: name_cell(cell) or "all runs" for cell, members in conditions(runs, factors) for index in members.index
    }
    tested = [metric for metric in TESTED if metric in runs]
    references = _labelled(references or {}, runs)
    compared = [contrasts(runs, metric, factors, references=references) for metric in tested]
    folders = runs.loc[runs["status"] != "missing", "folder"]
    past = history(folders)
    return Evidence(
        loaded=loaded,
        runs=runs,
        factors=factors,
        tied=tied_factors(runs),
        condition=pd.Series(names, index=runs.index, dtype=object),
        metrics=[metric for metric in HEADLINE if metric in runs],
        tested=tested,
        contrasts=stack(compared),
        evals=past.events,
        trains=lambda columns: history(folders, kind="train", columns=columns).events,
        problems=past.problems,
    )


def stack(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Tables one below the other; no rows at all make an empty table."""
    tables = [table for table in tables if not table.empty]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def _labelled(references: dict[str, Any], runs: pd.DataFrame) -> dict[str, Any]:
    """References with the router's level as the runs have it, "topk (causal: yes)", where people write "topk"."""
    if "router" not in references:
        return references
    label = f"{references['router']} (causal: "
    routers = [router for router in levels(runs["router"]) if router.startswith(label)]
    return references | {"router": routers[0] if routers else references["router"]}
