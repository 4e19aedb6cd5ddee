"""Collect everything that the sections of a report need. This is done once, before the first file is written."""

from collections import Counter
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from textwrap import shorten
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from moe.analysis.claims import claim_families, decided, measured_claims, planned_claims
from moe.analysis.components import DATA, INIT, is_crossed
from moe.analysis.figures.style import MOST_LINES
from moe.analysis.learned import learned_little, withheld
from moe.analysis.looks import Study, group_of, study_of
from moe.analysis.report.judgments import Judgment, judgments
from moe.analysis.sentences import null_everywhere
from moe.analysis.statistics import (
    comparisons,
    contrasts,
    corrected,
    divisors,
    false_discovery,
    name_cell,
    shares,
    stack,
    with_correction,
)
from moe.analysis.tuned import is_judged, trials_of, tuned_keys, values_of
from moe.analysis.variance import anova, factors_of_terms
from moe.checks import require, unknown
from moe.config.claim import amount_of
from moe.metrics.catalog import select
from moe.results.comparable import not_poolable, search_goal, several_tokenizers, shown_together, with_every_run
from moe.results.conditions import (
    HEADLINE,
    NAMED_ROUTERS,
    conditions,
    levels,
    present,
    readable_level,
    reference_level,
    tied_factors,
    varied_factors,
    with_readable_levels,
    without_causality,
)
from moe.results.table import EventTables, level, read_event_tables
from moe.runs.record import RunRecord

# The families into which all tests of a report fall, in the order in which they take their shares of 5 %. The last one
# holds every contrast and every term of the analysis of variance, of all tested metrics and all experiments.
OF_CLAIMS = ("planned claims of sources", "planned claims of our own")
FAMILIES = (*OF_CLAIMS, "comparisons that nobody planned (contrasts, and terms of the analysis of variance)")
# The metrics that are always tested.
TESTED = tuple(metric.headline for metric in select(shown="tested"))

GRADIENT_METRICS = tuple(metric.name for metric in select(shown="gradient figure"))
NOT_TRAINED = "no run was trained"  # why a figure over training cannot be drawn
MOST_TESTS = 10**9  # by which 5 % are divided, at a look to which next to nothing of a level is left
TRAINING_METRICS = (*GRADIENT_METRICS, "train/loss")  # metrics of training steps that every report needs


class Family(NamedTuple):
    """A family of tests, and the share of 5 % that it gets.

    looks: the smallest and the largest share of its level that a test of the family has in this look.
    """

    name: str
    tests: int
    share: float
    looks: tuple[float, float] = (1.0, 1.0)


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
    # The next three are tables of tests. Each has a column `groups` until it is corrected for looks and other tests.
    claims: pd.DataFrame  # from `moe.analysis.claims.decided`; empty if there are several experiments
    contrasts: pd.DataFrame  # `moe.analysis.statistics.contrasts` of all tested metrics; empty in the same case
    variance: pd.DataFrame  # `moe.analysis.variance.anova` of all tested metrics, with `p Holm`; empty in the same case
    without_variance: list[str]  # why a metric has no analysis of variance
    families: list[Family]  # those that have a test, in the whole report
    searched: frozenset[str]  # the folders of runs that a search also trained, in whichever experiment
    past: EventTables  # every evaluation, and some metrics of every training step
    records: dict[str, RunRecord]  # folder -> its record, of all runs of the whole report that have a readable one
    options: ReportOptions
    learned_little: str  # that no setting is better than a unigram model (`moe.analysis.learned`); else empty
    study: Study  # what was planned, and which reports were written before
    trials: pd.DataFrame  # the runs that chose the values of tuned keys; in a report on them, these runs themselves
    trained_at: pd.Series  # of each run that judges chosen values, these values as text; else empty

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
    def later(self) -> float:
        """The factor by which the level of a comparison is divided more in a later report with more seeds."""
        return self.study.share() / self.study.next_share()

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


def collect_inputs(
    loaded: pd.DataFrame,
    options: ReportOptions | None = None,
    *,
    training_columns: Iterable[str] = (),
    past: EventTables | None = None,
) -> list[ReportInputs]:
    """Return the inputs of all runs together, followed by those of each experiment if there are several.

    Runs are compared within an experiment, so claims, contrasts and figures concern the factors that it varies.
    `loaded` is a table of `moe.results.table.load_runs`. `training_columns` are metrics of training steps to read in
    addition to `TRAINING_METRICS`. `past` holds the events of runs whose folders are elsewhere; by default they are
    read from the folders, with the records. All tests of all experiments are corrected together. Raises ValueError for
    a reference, margin or metric that no run has, and for two runs with the same seed in one condition.
    """
    options = options or ReportOptions()
    records = {}
    if past is None:
        columns = dict.fromkeys((*TRAINING_METRICS, *training_columns))
        past = read_event_tables(loaded.loc[loaded["status"] != "missing", "folder"], training=list(columns))
        readable = loaded.loc[~loaded["status"].isin(["missing", "unreadable"]), "folder"].unique()
        records = {folder: RunRecord.read(Path(folder) / RunRecord.FILE) for folder in readable}
    searched = frozenset(loaded.loc[loaded["search"].notna(), "folder"]) if "search" in loaded else frozenset[str]()
    describe = partial(_describe, everything=loaded, past=past, records=records, options=options, searched=searched)
    everything, names = describe(loaded), levels(loaded["experiment"])
    if len(names) < 2:
        _check([everything])
        return _with_corrections([_with_comparisons(everything)])
    experiments = [describe(loaded[loaded["experiment"] == name]) for name in names]
    _check(experiments)
    corrected_parts = _with_corrections([_with_comparisons(experiment) for experiment in experiments])
    return [everything._replace(families=corrected_parts[0].families), *corrected_parts]


def tested_metrics(runs: pd.DataFrame) -> tuple[str, ...]:
    """Return `TESTED`, with bits per byte in place of the perplexity if the runs have several tokenizers.

    Where it is null for a run, the mean over layers takes the place of the load of all layers together.
    Where validation text chose the values of tuned keys, test text judges them.
    """
    several, judged = several_tokenizers(runs), is_judged(runs)
    names = ("val/bits_per_byte" if several and name == "val/perplexity" else name for name in TESTED)
    names = (with_every_run(runs, name) if name in runs else name for name in names)
    return tuple(test if judged and (test := name.replace("val/", "test/")) in runs else name for name in names)


def _describe(
    loaded: pd.DataFrame,
    *,
    everything: pd.DataFrame,
    past: EventTables,
    records: dict[str, RunRecord],
    options: ReportOptions,
    searched: frozenset[str],
) -> ReportInputs:
    """Return the inputs of some runs of `everything`, without claims and contrasts."""
    trials, trained_at = trials_of(loaded, everything), pd.Series(dtype=object)
    if is_judged(loaded):  # chosen values belong to a setting, and are no factor
        trained_at = values_of(loaded)
        loaded = loaded.drop(columns=tuned_keys(loaded), errors="ignore")
    runs = with_readable_levels(loaded)
    factors = [factor for factor in varied_factors(runs) if factor != "seed"]
    name = "all runs" if len(runs) > 1 else "this run"  # if no factor varies
    names = {index: name_cell(cell) or name for cell, members in conditions(runs, factors) for index in members.index}
    folders = runs.loc[runs["status"] != "missing", "folder"]
    return ReportInputs(
        loaded=loaded,
        runs=runs,
        factors=factors,
        tied=tied_factors(runs),
        condition=pd.Series(names, index=runs.index, dtype=object),
        metrics=present(runs, (*shown_together(runs, HEADLINE), *options.metrics)),
        tested=present(runs, (*tested_metrics(runs), *options.metrics)),
        judgments=[],
        claims=pd.DataFrame(),
        contrasts=pd.DataFrame(),
        variance=pd.DataFrame(),
        without_variance=[],
        families=[],
        searched=searched,
        past=EventTables(_events_of(past.evals, folders), _events_of(past.trains, folders), past.problems),
        records=records,
        options=options,
        learned_little=learned_little(runs),
        study=study_of(loaded),
        trials=trials,
        trained_at=trained_at,
    )


def _events_of(events: pd.DataFrame, folders: pd.Series) -> pd.DataFrame:
    return events[events["folder"].isin(folders)] if len(events) else events


def _with_comparisons(inputs: ReportInputs) -> ReportInputs:
    """Return the inputs with claims measured and levels compared, before the correction for other tests.

    Runs that a search trained too do not count: they may have decided which settings there are.
    """
    if inputs.search:  # its settings were chosen by results
        return inputs
    runs, loaded = (table[~table["folder"].isin(inputs.searched)] for table in (inputs.runs, inputs.loaded))
    known, references = {factor: levels(runs[factor]) for factor in inputs.factors}, reference_levels(inputs)
    factors = [factor for factor in known if len(known[factor]) > 1]
    factors = [factor for factor in factors if references.get(factor, known[factor][0]) in known[factor]]
    references = {factor: each for factor, each in references.items() if factor in factors}
    tables = [
        contrasts(runs, metric, factors, references=references, margin=inputs.margins.get(metric))
        for metric in inputs.tested
    ]
    if is_crossed(runs):  # no seed is better than another
        tables = [table[~table["factor"].isin([INIT, DATA])] for table in tables]
    groups = {
        tuple(names.values()): [group_of(treated), group_of(baseline)]
        for names, treated, baseline in comparisons(runs, factors, references)
    }
    for table in tables:
        names = table[["factor", "level", "reference", "within"]].itertuples(index=False, name=None)
        table["groups"] = [groups[each] for each in names]
    variance, refusals = _variance(inputs, runs)
    if inputs.learned_little:
        tables = [withheld(table) for table in tables]
        variance = withheld(variance) if len(variance) else variance
    return inputs._replace(
        claims=measured_claims(loaded, inputs.past.evals),
        contrasts=stack(tables),
        variance=variance,
        without_variance=refusals,
    )


def _with_corrections(parts: list[ReportInputs]) -> list[ReportInputs]:
    """Correct all tests of a report together, and decide its claims."""
    tests = pd.concat([_tests(inputs).assign(part=number) for number, inputs in enumerate(parts)], ignore_index=True)
    p, family = tests["p"], tests["family"].to_numpy()
    of_look = (p / tests["share"]).clip(upper=1)
    divided = (divisors(p, family) / tests["share"]).clip(upper=MOST_TESTS)
    later = (divisors(p, family) / tests["next share"]).clip(upper=MOST_TESTS)
    tests = tests.assign(
        holm=corrected(of_look, family),
        tests=divided,
        later=later,
        bh=false_discovery(p.where(family == len(FAMILIES) - 1)),
    )
    of_look_by_family = tests[p > 0].groupby("family")["share"].agg(["size", "min", "max"])
    families = [
        Family(FAMILIES[number], int(count), share, (float(low), float(high)))
        for (number, count, low, high), share in zip(
            of_look_by_family.itertuples(), shares(len(of_look_by_family)), strict=True
        )
    ]
    return [
        _corrected(inputs._replace(families=families), tests[tests["part"] == number], equivalence)
        for number, (inputs, equivalence) in enumerate(zip(parts, _equivalence(parts), strict=True))
    ]


def _equivalence(parts: list[ReportInputs]) -> list[np.ndarray]:
    """Return the p of equivalence of each contrast of each part, corrected for looks and for all of the report.

    These tests have 5 % of their own. A contrast without a margin has NaN.
    """
    p = [
        (inputs.contrasts["p TOST"] / inputs.contrasts["groups"].map(inputs.study.share)).clip(upper=1)
        if "p TOST" in inputs.contrasts
        else pd.Series(np.nan, index=inputs.contrasts.index)
        for inputs in parts
    ]
    return np.split(corrected(pd.concat(p, ignore_index=True)), np.cumsum([len(each) for each in p])[:-1])


def _tests(inputs: ReportInputs) -> pd.DataFrame:
    """Return the p of each test, its family, and the field of the inputs in which it is a row.

    share, next share: the share of its level that this look has, and that the next one will have.
    """
    columns = {"claims": "p", "contrasts": "p", "variance": "p GG"}
    empty: dict[str, list[float]] = {"p": [], "family": [], "share": [], "next share": [], "field": []}
    tables = [pd.DataFrame(empty).astype({"p": float, "family": int})]
    for field, column in columns.items():
        if len(table := getattr(inputs, field)):
            family = claim_families(table) if field == "claims" else len(FAMILIES) - 1
            both = {
                "share": table["groups"].map(inputs.study.share).to_numpy(),
                "next share": table["groups"].map(inputs.study.next_share).to_numpy(),
            }
            p = table[column].to_numpy(dtype=float)
            tables.append(pd.DataFrame({"p": p, "family": family, "field": field} | both))
    return pd.concat(tables[1:] or tables, ignore_index=True)


def _corrected(inputs: ReportInputs, tests: pd.DataFrame, equivalence: np.ndarray) -> ReportInputs:
    """Return the inputs with the results of the correction, which `tests` holds in the order of `_tests`."""
    claims, compared, variance = (tests[tests["field"] == field] for field in ("claims", "contrasts", "variance"))
    if len(claims):
        found = [claims[name].to_numpy() for name in ("holm", "tests", "later")]
        inputs = inputs._replace(claims=decided(inputs.claims, *found))
    inputs = inputs._replace(
        contrasts=inputs.contrasts.drop(columns="groups", errors="ignore"),
        variance=inputs.variance.drop(columns="groups", errors="ignore"),
    )
    if len(compared):
        columns = compared["holm"].to_numpy(), compared["tests"].to_numpy(), compared["bh"].to_numpy(), equivalence
        inputs = inputs._replace(contrasts=with_correction(inputs.contrasts, *columns))
    if len(variance):
        table = inputs.variance.copy()
        table.insert(table.columns.get_loc("p GG") + 1, "p Holm", variance["holm"].to_numpy())
        inputs = inputs._replace(variance=table)
    first = next(iter(inputs.tested), None)
    return inputs._replace(judgments=judgments(inputs.claims, inputs.contrasts, first, later=inputs.later))


def _variance(inputs: ReportInputs, runs: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """Return the analysis of variance of every tested metric over these runs, and why a metric has none."""
    tables, refusals = [], []
    groups = {
        term: [group_of(members) for _, members in conditions(runs, factors)]
        for term, factors in factors_of_terms(inputs.factors).items()
    }
    for metric in inputs.tested:
        try:
            if reason := not_poolable(metric, runs) or ("" if len(runs) else "a search also trained all runs"):
                raise ValueError(reason)
            tables.append(table := anova(runs, metric, inputs.factors))
            table["groups"] = table["term"].map(lambda term: groups.get(term, []))
        except ValueError as error:
            refusals.append(shorten(f"{metric}: {error}", 500, placeholder=" …"))
    return stack(tables), refusals


def _check(experiments: list[ReportInputs]) -> None:
    """Raise ValueError for an option that names a factor, level or metric that no experiment has."""
    options = experiments[0].options
    factors = sorted({factor for inputs in experiments for factor in inputs.factors})
    for factor, wanted in options.references.items():
        if factor not in factors:
            raise ValueError(f"reference {factor}={wanted}: varied factors are {', '.join(factors) or 'none'}")
        if not any(factor in _named(inputs, options.references) for inputs in experiments):
            known = levels(pd.concat([inputs.runs[factor] for inputs in experiments if factor in inputs.factors]))
            words = [str(without_causality(each)) for each in known]
            raise ValueError(f"reference {factor}={wanted}: allowed are {', '.join(dict.fromkeys(words))}")
    metrics = [column for column in experiments[0].loaded if "/" in column]
    for metric in options.metrics:
        if metric not in metrics:
            raise unknown("metric", metric, metrics)
        if not any(metric in inputs.tested for inputs in experiments):
            raise ValueError(f"metric {metric}: {null_everywhere(metric)}")
    tested = dict.fromkeys((*TESTED, *options.metrics, *(name for inputs in experiments for name in inputs.tested)))
    for metric, margin in options.margins.items():
        if metric not in tested:
            raise ValueError(f"margin {metric}={margin}: tested metrics are {', '.join(tested)}")
        key, allowed = f"margin {metric}", "positive, in units of the metric or a text such as 1%"
        require(amount_of(margin, key=key).at(1.0) > 0, key, margin, allowed)


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
    return _named(inputs, of_claims) | _named(inputs, inputs.options.references)


def _named(inputs: ReportInputs, references: dict[str, Any]) -> dict[str, Any]:
    """Return those references that are levels of these runs, with the level's full name.

    The full name of a router is, for example, "expert_choice (not causal)". The reader writes only "expert_choice".
    """
    found = {}
    for factor, wanted in references.items():
        for name in levels(inputs.runs[factor]) if factor in inputs.factors else []:
            same = factor in NAMED_ROUTERS and without_causality(name) == wanted
            if name == readable_level(factor, wanted) or same:
                found[factor] = name
    return found
