"""Test the claims and comparisons of a report, and correct all tests together, for looks and for each other."""

from collections import Counter
from collections.abc import Mapping, Set
from dataclasses import replace
from textwrap import shorten
from typing import Any

import numpy as np
import pandas as pd

from moe.analysis.claims import claim_families, decided, measured_claims, planned_claims
from moe.analysis.comparisons import timed
from moe.analysis.components import DATA, INIT, is_crossed
from moe.analysis.learned import withheld
from moe.analysis.looks import ENDED, Question, group_of, level_as_text, place_of
from moe.analysis.report.inputs import (
    FAMILIES,
    LEAGUE,
    OF_CLAIMS,
    EarlierTests,
    Family,
    ReportInputs,
    league_metric,
    league_reference,
    reference_levels,
)
from moe.analysis.report.judgments import judgments
from moe.analysis.statistics import (
    NAMES,
    comparisons,
    contrasts,
    corrected,
    divisors,
    false_discovery,
    shares,
    stack,
    with_correction,
)
from moe.analysis.variance import anova, complete_seeds
from moe.results.comparable import is_timed, not_poolable
from moe.results.conditions import levels, narrowed

OF_PAIRS = ("folder", "seed", "status", "causal", "place")  # what tells the pairs of a comparison, beside its factors
UNPLANNED = len(FAMILIES) - 1  # the place of the family of comparisons that nobody planned
P_OF = {"claims": "p", "contrasts": "p", "variance": "p GG"}  # field of the inputs -> the column of its p
EARLIER = "earlier"  # in place of the field of a test that only earlier reports made
SAME_TEST = "{factor} has two levels and no other factor varies, so their comparison is the same test"
MOST_TESTS = 10**9  # by which 5 % are divided, at a look to which next to nothing of a level is left


def with_comparisons(inputs: ReportInputs) -> ReportInputs:
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
    compared = narrowed(runs, (*factors, *OF_PAIRS))
    own = {
        tuple(names.values()): _in_pairs(treated, baseline)
        for names, treated, baseline in comparisons(compared, factors, references)
    }
    for table in tables:
        names = table[NAMES].itertuples(index=False, name=None)
        table["own"] = [own[each] for each in names]
    variance, refusals = _variance(inputs, runs)
    with_p = {
        metric
        for metric, table in zip(inputs.tested, tables, strict=True)
        if table.reindex(columns=["p", "p TOST"]).notna().any(axis=None)
    }
    with_p |= {*variance.loc[variance["p GG"].notna(), "metric"]} if len(variance) else set()
    if inputs.learned_little:
        tables = [withheld(table) for table in tables]
        variance = withheld(variance) if len(variance) else variance
    # Of two levels, one as the reference asks the same as the other.
    asked = {
        factor: min(level_as_text(level), level_as_text(reference))
        if len(known[factor]) == 2
        else level_as_text(reference)
        for factor, level, reference, _ in own
    }
    if league_metric(inputs) is not None:
        asked[LEAGUE] = level_as_text(league_reference(inputs))
        with_p = with_p or {*inputs.tested}  # the league has tests of its own
    found = {"claims": measured_claims(loaded, inputs.past.evals), "contrasts": stack(tables), "variance": variance}
    tested = any(bool(found[field][column].notna().any()) for field, column in P_OF.items() if len(found[field]))
    tests = _number_of_tests(found["claims"], variance)
    metrics = [each for each in inputs.tested if each in with_p]
    speeds = any(map(is_timed, metrics)) or any(timed(claim) for claim, _ in planned_claims(loaded))
    return inputs._replace(
        **found,
        study=replace(inputs.study, metrics=metrics, references=asked, tested=tested, tests=tests, timed=speeds),
        earlier_tests=_earlier_tests(inputs, {*map(_pair, own)}, compared, factors, tests),
        without_variance=refusals,
    )


def _pair(names: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return what a comparison is, whichever of its two levels is the reference. names: those of `comparisons`."""
    factor, level, reference, within = names
    return factor, frozenset(map(level_as_text, (level, reference))), within


def _number_of_tests(claims: pd.DataFrame, variance: pd.DataFrame) -> dict[str, int]:
    """Return how many tests there are of each family of claims, and in the analysis of variance of each metric."""
    tested = claims.loc[claims["p"] > 0] if len(claims) else claims
    families = Counter(OF_CLAIMS[family] for family in claim_families(tested)) if len(tested) else {}
    terms = Counter(variance.loc[variance["p GG"] > 0, "metric"]) if len(variance) else {}
    return {**families, **terms}


def _earlier_tests(
    inputs: ReportInputs, present: set[Any], compared: pd.DataFrame, factors: list[str], tests: Mapping[str, int]
) -> EarlierTests:
    """Count the tests that earlier reports made of these settings, and that this one does not make.

    They count among the tests of this report: whoever asks for less, until something is significant, has had all these
    chances. present: each comparison of this report, as `_pair` has it. compared: the runs, with the columns that tell
    the pairs. tests: how many claims and terms this report tests. An added run can make such a test impossible: a level
    with one run, for example, leaves no seed that is complete.
    """
    if not inputs.study.earlier:
        return EarlierTests()
    places = compared["folder"].map(place_of)

    def pairs(references: Mapping[str, str], seen: Set[str]) -> set[tuple[Any, ...]]:
        """Return the comparisons with these references of the runs that a look saw."""
        runs = compared[places.isin(seen)]
        known = {
            factor: level
            for factor in factors
            for level in levels(runs[factor])
            if level_as_text(level) == references.get(factor)
        }
        return {
            _pair(tuple(names.values())) for names, *_ in comparisons(runs, factors, known) if names["factor"] in known
        }

    asked: dict[tuple[frozenset[Any], frozenset[str]], set[str]] = {}  # references, runs -> the metrics of these looks
    for look in inputs.study.earlier:
        asked.setdefault((frozenset(look.references.items()), frozenset(look.runs)), set()).update(look.metrics)
    now = {(metric, pair) for pair in present for metric in inputs.tested}
    before = {
        (metric, pair)
        for (references, seen), metrics in asked.items()
        for pair in pairs(dict(references), seen)
        for metric in metrics
    }
    usual = max((number for name, number in tests.items() if name not in OF_CLAIMS), default=0)
    made = Counter[str]()  # the most that any look made
    for look in inputs.study.earlier:
        if look.runs.keys() <= inputs.study.present.runs.keys():  # otherwise it gives no share to a test of this one
            made |= Counter(look.tests or dict.fromkeys(set(look.metrics) - {*inputs.tested}, usual))
    made.subtract(tests)
    more = +made
    first = inputs.study.earlier[0].margins
    with_margin = {(metric, pair) for metric, pair in before | now if metric in first}
    tested_now = {(metric, pair) for metric, pair in now if metric in inputs.margins}
    claims = tuple(more.pop(family, 0) for family in OF_CLAIMS)
    return EarlierTests(len(before - now) + more.total(), len(with_margin - tested_now), claims)


def _in_pairs(treated: pd.DataFrame, baseline: pd.DataFrame) -> frozenset[str]:
    """Return the runs that a paired test of two settings uses: those of the seeds that have a result in both."""
    seeds = [set(runs.loc[runs["status"].isin(ENDED), "seed"]) for runs in (treated, baseline)]
    both = pd.concat([treated, baseline])
    return group_of(both[both["seed"].isin(seeds[0] & seeds[1])])


def with_corrections(parts: list[ReportInputs]) -> list[ReportInputs]:
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
        bh=false_discovery(p.where(family == UNPLANNED)),
    )
    earlier = np.sum([inputs.earlier_tests.of_families for inputs in parts], axis=0)
    of_report = tests["share"].where(tests["field"] != EARLIER)
    of_look_by_family = of_report[p > 0].groupby(tests["family"]).agg(["size", "min", "max"]).fillna(1.0)
    families = [
        Family(FAMILIES[number], int(count), share, (float(low), float(high)), int(earlier[number]))
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
        (inputs.contrasts["p TOST"] / _shares(inputs, "contrasts")).clip(upper=1)
        if "p TOST" in inputs.contrasts
        else pd.Series(np.nan, index=inputs.contrasts.index)
        for inputs in parts
    ]
    earlier = pd.Series(1.0, index=range(sum(inputs.earlier_tests.equivalence for inputs in parts)))
    places = np.cumsum([len(each) for each in p])
    return np.split(corrected(pd.concat([*p, earlier], ignore_index=True)), places)[:-1]


def _tests(inputs: ReportInputs) -> pd.DataFrame:
    """Return the p of each test, its family, and the field of the inputs in which it is a row.

    share, next share: the share of its level that this look has, and that the next one will have.
    """
    empty: dict[str, list[float]] = {"p": [], "family": [], "share": [], "next share": [], "field": []}
    tables = [pd.DataFrame(empty).astype({"p": float, "family": int})]
    for field, column in P_OF.items():
        if len(table := getattr(inputs, field)):
            family = claim_families(table) if field == "claims" else UNPLANNED
            both = {"share": _shares(inputs, field), "next share": inputs.study.looks.next_share}
            tests = pd.DataFrame({"p": table[column].to_numpy(dtype=float), "family": family, "field": field} | both)
            tables.append(tests.assign(share=tests["share"].where(tests["p"].notna(), 1.0)))  # no test has no share
    if any((table["p"] > 0).any() for table in tables[1:]):
        facts = {"p": 1.0, "share": 1.0, "next share": 1.0, "field": EARLIER}
        families = np.repeat(range(len(FAMILIES)), inputs.earlier_tests.of_families)
        tables.append(pd.DataFrame([facts | {"family": int(family)} for family in families]))
    return pd.concat(tables[1:] or tables, ignore_index=True)


def _shares(inputs: ReportInputs, field: str) -> np.ndarray:
    """Return the share of its level that each test of a table has in this look.

    Claims are part of every report. A contrast is asked with either of its two levels as the reference.
    """
    table, share = getattr(inputs, field), inputs.study.share
    if field == "claims":
        return table["own"].map(share).to_numpy()
    if field == "variance":
        rows = zip(table["own"], table["metric"], strict=True)
        return np.array([share(own, {Question(metric)}) for own, metric in rows])
    rows = table[["own", "metric", "factor", "level", "reference"]].itertuples(index=False, name=None)
    return np.array(
        [
            share(own, {Question(metric, factor, level_as_text(each)) for each in both})
            for own, metric, factor, *both in rows
        ]
    )


def _corrected(inputs: ReportInputs, tests: pd.DataFrame, equivalence: np.ndarray) -> ReportInputs:
    """Return the inputs with the results of the correction, which `tests` holds in the order of `_tests`."""
    claims, compared, variance = (tests[tests["field"] == field] for field in ("claims", "contrasts", "variance"))
    if len(claims):
        found = [claims[name].to_numpy() for name in ("holm", "tests", "later")]
        inputs = inputs._replace(claims=decided(inputs.claims, *found))
    inputs = inputs._replace(
        contrasts=inputs.contrasts.drop(columns="own", errors="ignore"),
        variance=inputs.variance.drop(columns="own", errors="ignore"),
    )
    if len(compared):
        columns = compared["holm"].to_numpy(), compared["tests"].to_numpy(), compared["bh"].to_numpy(), equivalence
        inputs = inputs._replace(contrasts=with_correction(inputs.contrasts, *columns))
    if len(variance):
        table = inputs.variance.copy()
        table.insert(table.columns.get_loc("p GG") + 1, "p Holm", variance["holm"].to_numpy())
        inputs = inputs._replace(variance=table)
    first = next(iter(inputs.tested), None)
    return inputs._replace(judgments=judgments(inputs.claims, inputs.contrasts, first, tests_later=inputs.tests_later))


def _variance(inputs: ReportInputs, runs: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """Return the analysis of variance of every tested metric over these runs, and why a metric has none."""
    tables, refusals = [], []
    for metric in inputs.tested:
        try:
            if reason := not_poolable(metric, runs) or ("" if len(runs) else "a search also trained all runs"):
                raise ValueError(reason)
            if [runs[factor].nunique(dropna=False) for factor in inputs.factors] == [2]:
                raise ValueError(SAME_TEST.format(factor=inputs.factors[0]))
            table = anova(runs, metric, inputs.factors)
            used = runs["seed"].isin(complete_seeds(runs, metric, inputs.factors))
            tables.append(table.assign(own=[group_of(runs[used])] * len(table)))
        except ValueError as error:
            refusals.append(shorten(f"{metric}: {error}", 500, placeholder=" …"))
    return stack(tables), refusals
