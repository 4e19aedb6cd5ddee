"""What the sections of a report need: the runs, the choices of the reader, and what is computed about them once."""

from collections import Counter
from typing import Any, NamedTuple

import pandas as pd

from moe.analysis.claims import planned_claims
from moe.analysis.components import DATA, INIT, is_crossed
from moe.analysis.figures.style import MOST_LINES
from moe.analysis.league import LEAST, METRICS, PLAIN, ROUTER
from moe.analysis.looks import Study
from moe.analysis.report.judgments import Judgment
from moe.analysis.tuned import is_judged
from moe.metrics.catalog import select
from moe.results.comparable import search_goal, several_tokenizers, with_every_run
from moe.results.conditions import (
    levels,
    present,
    readable_level,
    reference_level,
    without_causality,
)
from moe.results.table import EventTables, level
from moe.runs.record import RunRecord

# The families into which all tests of a report fall, in the order in which they take their shares of 5 %. The last one
# holds every contrast and every term of the analysis of variance, of all tested metrics and all experiments.
OF_CLAIMS = ("planned claims of sources", "planned claims of our own")
FAMILIES = (*OF_CLAIMS, "comparisons that nobody planned (contrasts, and terms of the analysis of variance)")
# The metrics that are always tested.
TESTED = tuple(metric.headline for metric in select(shown="tested"))

GRADIENT_METRICS = tuple(metric.name for metric in select(shown="gradient figure"))
NOT_TRAINED = "no run was trained"  # why a figure over training cannot be drawn


LEAGUE = "the league of routers"  # in place of a factor, for the reference of the league


class Family(NamedTuple):
    """A family of tests, and the share of 5 % that it gets.

    looks: the smallest and the largest share of its level that a test of the family has in this look. earlier: how many
    of the tests are not in this report: earlier reports about these settings made them.
    """

    name: str
    tests: int
    share: float
    looks: tuple[float, float] = (1.0, 1.0)
    earlier: int = 0


class EarlierTests(NamedTuple):
    """How many tests earlier reports made of the same settings that this one does not make.

    unplanned: contrasts, and terms of the analysis of variance. equivalence: those of margins. claims: those of each
    family of claims, in the order of `OF_CLAIMS`.
    """

    unplanned: int = 0
    equivalence: int = 0
    claims: tuple[int, ...] = (0,) * len(OF_CLAIMS)

    @property
    def of_families(self) -> tuple[int, ...]:
        """How many tests of each family, in the order of `FAMILIES`."""
        return *self.claims, self.unplanned


class ReportOptions(NamedTuple):
    """Choices of the reader of a report, from the command line.

    references: factor -> the level that its other levels are compared with.
    margins: tested metric -> the largest difference that counts as equal, in its units or as text such as "1%".
    metrics: final metrics that are tested in addition to `TESTED`.
    seconds: how training time is known: "measured" on an idle machine, or the FLOPs per second that it is to reach.
    """

    references: dict[str, Any] = {}
    margins: dict[str, int | float | str] = {}
    metrics: tuple[str, ...] = ()
    seconds: float | str | None = None


class ReportInputs(NamedTuple):
    """The runs, and everything that is computed about them before the sections use it."""

    loaded: pd.DataFrame  # as `moe.results.table.load_runs` returned it
    runs: pd.DataFrame  # the same, with "(not causal)" after the name of every such router
    factors: list[str]  # the factors that vary, without the seed
    tied: dict[str, str]  # a factor that varies -> the factor that determines its level in all runs
    condition: pd.Series  # of each run, such as "lb=0.01, noise=0.1"; no entry where a level is unknown
    metrics: list[str]  # those of the headline metrics and of the options that some run has and that are comparable
    tested: list[str]  # those of `TESTED` and the metrics of the options that some run has
    judgments: list[Judgment]  # on the claims, or else on the contrasts of the first tested metric
    # The next three are tables of tests. Each has a column `own` until it is corrected for looks and other tests.
    claims: pd.DataFrame  # from `moe.analysis.claims.decided`; empty if there are several experiments
    contrasts: pd.DataFrame  # `moe.analysis.statistics.contrasts` of all tested metrics; empty in the same case
    variance: pd.DataFrame  # `moe.analysis.variance.anova` of all tested metrics, with `p Holm`; empty in the same case
    without_variance: list[str]  # why a metric has no analysis of variance
    families: list[Family]  # those that have a test, in the whole report
    searched: frozenset[str]  # the folders of runs that a search also trained, in whichever experiment
    past: EventTables  # every evaluation, and some metrics of every training step
    records: dict[str, RunRecord]  # folder -> its record, of all runs of the whole report that have a readable one
    options: ReportOptions
    learned_little: str  # that no setting is better than a unigram model (`moe.results.learned`); else empty
    study: Study  # what was planned, and which reports were written before
    trials: pd.DataFrame  # the runs that chose the values of tuned keys; in a report on them, these runs themselves
    trained_at: pd.Series  # of each run that judges chosen values, these values as text; else empty
    earlier_tests: EarlierTests = EarlierTests()  # those that count among the tests of this report

    @property
    def search(self) -> str | None:
        """What a search for good settings aims at, such as "minimize val/loss"; None if there was no search."""
        return search_goal(self.loaded)

    @property
    def margins(self) -> dict[str, int | float | str]:
        """The margins of the options that were given at the first look at these runs."""
        late = self.study.late(self.options.margins)
        return {metric: margin for metric, margin in self.options.margins.items() if metric not in late}

    @property
    def tests_later(self) -> float:
        """The number by which 5 % are divided for an unplanned comparison in a later report with more seeds."""
        numbers = [each.tests / each.share for each in self.families if each.name == FAMILIES[-1]]
        return max(numbers, default=1.0) / self.study.looks.next_share

    @property
    def observed(self) -> bool:
        """Whether the report is about one model that was evaluated and not trained."""
        runs = self.runs.drop_duplicates("folder")
        return len(runs) == 1 and not self.trained and runs["status"].iloc[0] == "finished"

    @property
    def crosses_seeds(self) -> bool:
        """Whether nothing varies but seeds of initial weights and of the data order."""
        return is_crossed(self.runs) and {*self.factors} <= {INIT, DATA}

    @property
    def trained(self) -> bool:
        """Whether any of the runs took a training step."""
        return bool((self.runs["steps"] != 0).any()) if "steps" in self.runs else True

    def with_condition(self, events: pd.DataFrame) -> pd.DataFrame:
        """Return the events of runs whose condition is known, with condition and seed as columns."""
        seeds = self.runs.get("seed", "unknown")
        labels = pd.DataFrame({"folder": self.runs["folder"], "condition": self.condition, "seed": seeds}).dropna()
        return events.merge(labels, on="folder") if len(events) else events

    def too_many_lines(self) -> str:
        """Return why a figure with a line for each condition cannot be drawn; an empty text if it can."""
        count = self.condition.nunique()
        return f"{count} conditions are too many" if count > MOST_LINES else ""


def tested_metrics(runs: pd.DataFrame) -> tuple[str, ...]:
    """Return `TESTED`, with bits per byte in place of the perplexity if the runs have several tokenizers.

    Where it is null for a run, the mean over layers takes the place of the load of all layers together.
    Where validation text chose the values of tuned keys, test text judges them.
    """
    several, judged = several_tokenizers(runs), is_judged(runs)
    names = ("val/bits_per_byte" if several and name == "val/perplexity" else name for name in TESTED)
    names = (with_every_run(runs, name) if name in runs else name for name in names)
    return tuple(test if judged and (test := name.replace("val/", "test/")) in runs else name for name in names)


def reference_levels(inputs: ReportInputs) -> dict[str, Any]:
    """Return the reference level of each factor that the options or the claims name, with the level's full name.

    That of the claims is the one that they name most often after `than`, so that comparisons nobody planned have the
    sign and the reference of the planned ones.
    """
    named = Counter((claim.factor, level(each)) for claim, _ in planned_claims(inputs.loaded) for each in claim.than)
    of_claims: dict[str, Any] = {}
    for factor in inputs.factors:
        usual = without_causality(reference_level(inputs.runs, factor))
        number = {each: count for (name, each), count in named.items() if name == factor}
        if number:
            of_claims[factor] = max(number, key=lambda each: (number[each], each == usual))
    return full_names(inputs, of_claims) | full_names(inputs, inputs.options.references)


def full_names(inputs: ReportInputs, references: dict[str, Any]) -> dict[str, Any]:
    """Return those references that are levels of these runs, with the level's full name.

    The full name of a router is, for example, "expert_choice (not causal)". The reader writes only "expert_choice".
    """
    found = {}
    for factor, wanted in references.items():
        for name in levels(inputs.runs[factor]) if factor in inputs.factors else []:
            if name == readable_level(factor, level(wanted)) or without_causality(name) == wanted:
                found[factor] = name
    return found


def league_metric(inputs: ReportInputs) -> str | None:
    """Return the loss by which routers are compared; None if there are too few routers for a league."""
    if ROUTER not in inputs.factors or inputs.runs[ROUTER].nunique() < LEAST:
        return None
    return next(iter(present(inputs.runs, METRICS)), None)


def league_reference(inputs: ReportInputs) -> Any:
    """Return the router with which the others are compared."""
    runs = inputs.runs[inputs.runs["status"] == "finished"]
    usual = PLAIN if PLAIN in set(runs[ROUTER]) else reference_level(runs, ROUTER)
    return reference_levels(inputs).get(ROUTER, usual)
