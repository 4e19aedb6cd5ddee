"""Judge planned claims: predictions that were written down before the runs of an experiment were trained.

A claim (`moe.config.claim.ClaimConfig`) is written in the experiment's YAML file, and every run records it before its
first step. Contrasts that no claim predicts are post hoc. Differences are taken between runs of the same seed and
averaged over all combinations of the other factors, or of those of their levels that the claim names. Every claim
states a range for the true difference: above zero, below zero, closer to zero than a margin, or within the claimed
size. An interaction is such a claim about how much the metric changes between two levels of another factor.
"""

import math
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from moe.analysis.sentences import UNDECIDED, UNTESTED, detectable_note, deterministic_verdict, unit_of
from moe.analysis.statistics import (
    CONFIDENCE,
    SIGNIFICANCE,
    completed,
    corrected,
    detectable_effect,
    divisors,
    has_no_spread,
    mean_difference,
    name_cell,
    range_test,
    seeds_needed,
    spread_interval,
)
from moe.checks import plain
from moe.config.claim import DOMAIN, OURS, ClaimConfig, absolute
from moe.results.comparable import incomparable
from moe.results.conditions import (
    NAMED_ROUTERS,
    by_seed,
    conditions,
    levels,
    two_levels,
    varied_factors,
    with_causality,
    without_causality,
)
from moe.results.table import level
from moe.runs.record import RunRecord

NAN = float("nan")


class _Comparison(NamedTuple):
    """Comparison of one level with one reference level, over n seeds.

    low, high: the 95 % t interval of the difference of the two means.
    p_for, p_against: p-value of the test that the claim holds, and of the test that it does not hold.
    favor: how far inside the claimed range the difference lies; negative if it lies outside.
    spread: standard deviation of the paired differences, if a larger difference could be detected.
    gap: distance of the difference from the nearest end of the claimed range, in standard deviations of the paired
        differences; `ends` is the number of ends that the range has.
    claimed_low, claimed_high: the ends of the claimed range, which may be infinite.
    deterministic: whether the difference is the same in every seed. Both p-values are then 0 or 1.
    note: a remark for the reader, such as a run that is missing.
    doubt: why the comparison is undecided, if it is.
    """

    n: int
    mean: float = NAN
    reference_mean: float = NAN
    low: float = NAN
    high: float = NAN
    p_for: float = NAN
    p_against: float = NAN
    favor: float = NAN
    spread: float = NAN
    gap: float = NAN
    ends: int = 1
    claimed_low: float = NAN
    claimed_high: float = NAN
    deterministic: bool = False
    note: str = ""
    doubt: str = ""


def planned_claims(runs: pd.DataFrame) -> list[tuple[ClaimConfig, pd.DataFrame]]:
    """Return every claim in the records of these runs, each with the runs of one experiment that recorded it.

    A claim that was added after some seeds had run is judged by the other seeds alone.
    """
    recorded: dict[tuple[str, str], tuple[ClaimConfig, list[Any]]] = {}
    readable = runs[~runs["status"].isin(["missing", "unreadable"])]
    for index, folder, experiment in readable[["folder", "experiment"]].itertuples():
        for claim in RunRecord.read(Path(folder) / RunRecord.FILE).claims():
            recorded.setdefault((experiment, repr(claim)), (claim, []))[1].append(index)
    return [(claim, runs.loc[indices]) for claim, indices in recorded.values()]


def judge_planned(runs: pd.DataFrame) -> pd.DataFrame:
    """Return `judge` of every planned claim, with the experiment as the first column.

    The probability that chance makes any verdict wrong is at most 5 %. The claims of sources and our own are two
    families of `moe.analysis.statistics.corrected`. A report divides the 5 % among these claims and its other tests.
    """
    table = measured_claims(runs)
    if table.empty:
        return decided(table, table["p"].to_numpy(), table["p"].to_numpy())
    families = claim_families(table)
    return decided(table, corrected(table["p"], families), divisors(table["p"], families))


def measured_claims(runs: pd.DataFrame) -> pd.DataFrame:
    """Return a row for every planned claim, before the correction for other tests; `decided` completes it."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for claim, members in planned_claims(runs):
        experiment = members["experiment"].iloc[0]
        rows.setdefault(experiment, []).append({"experiment": experiment} | _judge_alone(claim, members))
    columns = ["experiment", *_claim_row("", "", "", ""), *_row("", _Comparison(0), NAN, "", "")]
    return pd.DataFrame(list(chain.from_iterable(rows.values())), columns=columns)


def claim_families(table: pd.DataFrame) -> np.ndarray:
    """Return the family of each claim in a table of claims: 0 if it is of a source, 1 if it is our own."""
    return table["source"].str.startswith(OURS).to_numpy(dtype=int)


def judge(runs: pd.DataFrame, claims: list[ClaimConfig]) -> pd.DataFrame:
    """Return a row for each claim: supported, contradicted or undecided by these runs, or not tested, and why.

    `runs` is a table of `moe.results.table.load_runs`. `difference` is `mean` minus `reference mean` over n paired
    seeds, with its 95 % t interval. A claim can make several comparisons. The columns `compared`,
    `mean`, `reference mean`, `difference` and its interval show the least favorable one, while `p` covers all of them:

    - The claim holds if every comparison holds. Its p is then the largest p of the comparisons (intersection-union).
    - The claim fails if one comparison fails. Its p is then the smallest p of the comparisons, after Bonferroni's
      correction. A claim of kind lowest or highest fails if some other level beats all levels that it names.

    p is two-sided, or that of two one-sided tests (TOST) if the claimed range has two ends. A claim is decided if
    `p Holm` is at most 5 %. It is corrected for all these claims, except that our own claims are corrected apart, so
    that they cannot take significance from the claims of a source. If a difference is the same in every seed
    (`deterministic`), chance has no part in it, and p is 0. `estimates` says where the means lie, which may be by
    chance: "as claimed", "against", or "mixed" if the named levels differ in this.
    """
    table = pd.DataFrame([_judge_alone(claim, runs) for claim in claims])
    if table.empty:
        return table
    apart = table["p"].groupby(claim_families(table))
    return decided(table, apart.transform(corrected).to_numpy(), apart.transform(divisors).to_numpy())


def decided(table: pd.DataFrame, holm: np.ndarray, tests: np.ndarray) -> pd.DataFrame:
    """Return a table of claims with their verdicts, and with the number of seeds that an undecided claim needs.

    The arguments are what `corrected` and `divisors` of `moe.analysis.statistics` return for these rows. `seeds needed`
    decides the claim with power 0.8, if difference and spread are as estimated. It is NaN if a claim is decided, if its
    spread is unknown, or if 1,000 seeds are not enough.
    """
    table = table.copy()
    table.insert(table.columns.get_loc("p") + 1, "p Holm", holm)
    significant = table["p Holm"] <= SIGNIFICANCE
    only_before = (table["p"] <= SIGNIFICANCE) & ~significant
    before = table["verdict"] + " before Holm's correction, not after it"
    spreads = zip(table.pop("doubt"), table["n"], table.pop("spread"), tests.tolist(), table["metric"], strict=True)
    doubt = pd.Series([doubt or _detectable(*spread) for doubt, *spread in spreads], index=table.index)
    doubt = doubt.mask(only_before, before).mask(significant, "")
    reason = ["; ".join(filter(None, parts)) for parts in zip(table["reason"], doubt, strict=True)]
    # A claim with two ends is tested by two one-sided tests: each has twice the level of a two-sided test.
    gaps = zip(table.pop("gap"), table.pop("ends"), tests.tolist(), strict=True)
    needed = [seeds_needed(gap, tests=max(number, 1) / ends) for gap, ends, number in gaps]
    table["seeds needed"] = pd.Series(needed, index=table.index, dtype=float).mask(significant)
    verdict = table["verdict"].where(significant, UNDECIDED).mask(table["p"].isna(), UNTESTED)
    return table.assign(verdict=verdict, reason=reason)


def evidence_sentence(judged: pd.Series) -> str:
    """Return a row of `judge` in words: the levels compared, the means, the difference, its p, and the reason."""
    j = judged
    if j["n"] == 0:
        return str(j["reason"])
    text = f"{j['compared']}: {j['mean']:.4g} vs {j['reference mean']:.4g}"
    if j["reference mean"] and j["kind"] != "interaction":
        text += f" ({j['difference'] / j['reference mean']:+.1%})"
    if j["deterministic"]:
        text += f", {deterministic_verdict(j['difference']).replace('**', '')}"
    elif not math.isnan(j["p"]):
        text += f", difference {j['difference']:+.3g} [{j['ci_low']:.3g}, {j['ci_high']:.3g}]"
        text += f", p={j['p']:.2g} (Holm {j['p Holm']:.2g})"
    return plain(f"{text}, n={j['n']}" + (f"; {j['reason']}" if j["reason"] else ""))


def contrasts_without_claim(contrasts: pd.DataFrame, claims: list[ClaimConfig]) -> pd.DataFrame:
    """Return those rows of a table of contrasts whose comparison no claim makes."""
    return contrasts[[not any(_about(claim, row) for claim in claims) for _, row in contrasts.iterrows()]]


def _detectable(n: int, spread: float, tests: int, metric: str) -> str:
    """Return which difference would have been detected; an empty text if there is no spread to tell it from."""
    if math.isnan(spread):
        return ""
    effect = detectable_effect(n, tests=tests)
    low, high = spread_interval(spread, n)
    return detectable_note(effect * spread, effect * low, effect * high, tests=tests, unit=unit_of(metric))


def _judge_alone(claim: ClaimConfig, runs: pd.DataFrame) -> dict[str, Any]:
    """Return the row of one claim, before the correction for the other claims."""
    runs = _selected(claim, runs)
    present = levels(runs[claim.factor]) if claim.factor in runs else []
    named = [level(each) for each in claim.levels]
    rivals = [level(each) for each in claim.than] or [each for each in present if each not in named]
    absent = [
        f"{factor}={level(each)} is in no run"
        for factor, wanted in (claim.compared_levels | {claim.factor: [*named, *rivals]}).items()
        for each in wanted
        if factor not in runs or level(each) not in levels(runs[factor])
    ]
    absent += [] if rivals else [f"no other level of {claim.factor}"]
    absent += [f"no run has {metric}" for metric in _metrics(claim) if metric not in runs]
    row = _claim_row(claim.text, claim.source, claim.metric, claim.kind)
    if absent:
        sides = [_listed(_label(claim, runs, each) for each in side) for side in (named, rivals)]
        compared = f"{claim.factor} {' vs '.join(sides)}"
        return row | _row(compared, _Comparison(0, doubt="; ".join(absent)), NAN, "undecided", "")
    if claim.kind != "interaction":
        return row | _judge_levels(claim, _with_mean_of_domains(claim, runs), named, rivals, _where(claim))
    judge_changes = partial(_judge_levels, runs=_changes(claim, runs), named=named, rivals=rivals, where=_where(claim))
    if claim.margin is not None:
        first = _at_first_level(claim, runs)
        reference = first.loc[first[claim.factor].isin(rivals), claim.metric].mean()
        margin = absolute(claim.margin, reference)
        return row | judge_changes(replace(claim, kind="equivalent", margin=margin))
    rise, fall = (judge_changes(replace(claim, kind=kind)) for kind in ("higher", "lower"))
    falls = claim.direction == "lower" or (claim.direction is None and rise["verdict"] == "contradicted")
    return row | (fall if falls else rise)


def _judge_levels(
    claim: ClaimConfig, runs: pd.DataFrame, named: list[Any], rivals: list[Any], where: str
) -> dict[str, Any]:
    """Return the columns about the comparisons of the named levels of a claim with their rivals.

    where: end of the text that says what is compared.
    """
    others = [factor for factor in varied_factors(runs) if factor not in (claim.factor, "seed")]
    comparisons = [[_compare(claim, runs, others, a, b) for b in rivals] for a in named]
    favor, p_for, p_against = (
        np.array([[getattr(pair, field) for pair in line] for line in comparisons])
        for field in ("favor", "p_for", "p_against")
    )
    if claim.kind in ("lowest", "highest"):  # fails if one rival beats all named levels
        b = int(favor.max(axis=0).argmin())
        a, against = int(favor[:, b].argmax()), p_against.max(axis=0)
    else:
        a, b = divmod(int(favor.argmin()), len(rivals))
        against = p_against.ravel()
    p_holds, p_fails = p_for.max(), min(1.0, len(against) * against.min())
    estimates = "as claimed" if favor.min() > 0 else "against" if favor[a, b] < 0 else "mixed"
    compared = f"{claim.factor} {_label(claim, runs, named[a])} vs {_label(claim, runs, rivals[b])}"
    compared += where
    compared += f", the least favorable of {favor.size} comparisons" if favor.size > 1 else ""
    untested = [pair.doubt for line in comparisons for pair in line if math.isnan(pair.p_for)]
    shown = comparisons[a][b]._replace(doubt=untested[0]) if untested else comparisons[a][b]
    verdict = "supported" if p_holds < p_fails else "contradicted"
    return _row(compared, shown, float(np.minimum(p_holds, p_fails)), verdict, estimates)


def _selected(claim: ClaimConfig, runs: pd.DataFrame) -> pd.DataFrame:
    """Return the runs at those levels of other factors that the claim names."""
    for factor, wanted in claim.within.items():
        if factor in runs:
            runs = runs[runs[factor].isin([level(each) for each in wanted])]
    return runs


def _metrics(claim: ClaimConfig) -> list[str]:
    """Return the columns from which a claim is judged: the metric, or its variants for the domains of the text."""
    return [f"{claim.metric}/{domain}" for domain in claim.within.get(DOMAIN, [])] or [claim.metric]


def _with_mean_of_domains(claim: ClaimConfig, runs: pd.DataFrame) -> pd.DataFrame:
    return runs.assign(**{claim.metric: runs[_metrics(claim)].mean(axis=1, skipna=False)})


def _at_first_level(claim: ClaimConfig, runs: pd.DataFrame) -> pd.DataFrame:
    """Return the runs at the first of the two levels between which an interaction compares, with the metric there."""
    runs = runs.assign(**{claim.metric: runs[_metrics(claim)[0]]})
    factor = claim.moderator
    return runs if factor == DOMAIN else runs[runs[factor] == level(claim.within[factor][0])]


def _changes(claim: ClaimConfig, runs: pd.DataFrame) -> pd.DataFrame:
    """Return the runs at the first of the two levels of an interaction.

    In place of the metric they have its change from there to the run at the second level that has all else in common.
    """
    first, factor = _at_first_level(claim, runs), claim.moderator
    if factor == DOMAIN:
        return first.assign(**{claim.metric: runs[_metrics(claim)[1]] - first[claim.metric]})
    second = _with_mean_of_domains(claim, runs[runs[factor] == level(claim.within[factor][1])])
    keys = list(dict.fromkeys([claim.factor, "seed", *varied_factors(first), *varied_factors(second)]))
    pairs = first.merge(second[[*keys, claim.metric]], on=keys, suffixes=("", " at the second level"))
    return pairs.assign(**{claim.metric: pairs.pop(f"{claim.metric} at the second level") - pairs[claim.metric]})


def _where(claim: ClaimConfig) -> str:
    """Return at which levels of other factors a claim compares, as the end of a text; empty if it names none."""
    fixed, change = dict(claim.within), ""
    if claim.kind == "interaction":
        first, second = fixed.pop(claim.moderator)
        change = f", change from {claim.moderator}={level(first)} to {level(second)}"
    places = "; ".join(f"{factor}={_listed(map(level, wanted))}" for factor, wanted in fixed.items())
    return (f" at {places}" if places else "") + change


def _claim_row(text: str, source: str, metric: str, kind: str) -> dict[str, Any]:
    return {"claim": text, "source": source, "metric": metric, "kind": kind}


def _row(compared: str, comparison: _Comparison, p: float, verdict: str, estimates: str) -> dict[str, Any]:
    return {
        "compared": compared,
        "n": comparison.n,
        "mean": comparison.mean,
        "reference mean": comparison.reference_mean,
        "difference": comparison.mean - comparison.reference_mean,
        "ci_low": comparison.low,
        "ci_high": comparison.high,
        "claimed_low": comparison.claimed_low,
        "claimed_high": comparison.claimed_high,
        "p": p,
        "deterministic": comparison.deterministic,
        "estimates": estimates,
        "verdict": verdict,
        "spread": comparison.spread,
        "gap": comparison.gap,
        "ends": comparison.ends,
        "reason": comparison.note,
        "doubt": comparison.doubt,
    }


def _compare(claim: ClaimConfig, runs: pd.DataFrame, others: list[str], treated: Any, reference: Any) -> _Comparison:
    """Compare two levels: the mean difference over all combinations of the other factors, for each seed.

    Every pair of runs counts that differs in the two levels alone. What a missing pair would have shown is estimated
    from the seed's other pairs and from the combination's other seeds, so that it shifts no mean.
    """
    pairs: dict[str, pd.DataFrame] = {}
    for cell, members in conditions(two_levels(runs, claim.factor, (treated, reference), others), others):
        sides = [members[members[claim.factor] == side] for side in (treated, reference)]
        if all(map(len, sides)):
            if reason := incomparable(claim.metric, *sides):
                return _Comparison(0, doubt=reason)
            a, b = (by_seed(rows, claim.metric) for rows in sides)
            pairs[name_cell(cell)] = pd.DataFrame({"difference": a - b, "reference": b})
    if not pairs:
        return _Comparison(0, doubt=f"no runs differ in {claim.factor} alone")
    table = pd.concat(pairs, axis=1)  # a row for each seed; NaN where a run is missing
    differences, references = (table.xs(column, axis=1, level=1) for column in ("difference", "reference"))
    note = _lost(differences)
    references = references.where(differences.notna())
    differences = differences.dropna(how="all").dropna(how="all", axis=1)
    n = len(differences)
    if n == 0:
        return _Comparison(0, note=note, doubt="no seed is left")
    by_seeds = completed(differences).mean(axis=1).to_numpy()
    reference_mean = references.mean().mean()
    scale = max(values.abs().max().max() for values in (differences, references))
    effect = mean_difference(by_seeds, scale=scale)
    low, high = _range(claim, reference_mean)
    favor = min(effect - low, high - effect)
    found = _Comparison(n, reference_mean + effect, reference_mean, favor=favor, note=note)
    found = found._replace(claimed_low=low, claimed_high=high)
    if n == 1:
        return found._replace(doubt="one seed: nothing to test a difference against")
    if has_no_spread(by_seeds, scale=scale):
        return found._replace(p_for=float(favor <= 0), p_against=float(favor > 0), deterministic=True)
    p_inside, p_outside = range_test(by_seeds, low, high)
    two_ends = math.isfinite(low) and math.isfinite(high)
    ends = stats.ttest_1samp(by_seeds, 0).confidence_interval(CONFIDENCE)
    return found._replace(
        low=ends.low,
        high=ends.high,
        p_for=p_inside if two_ends else min(1.0, 2 * p_inside),
        p_against=p_outside,
        spread=NAN if two_ends else by_seeds.std(ddof=1),
        gap=abs(favor) / by_seeds.std(ddof=1),
        ends=1 + two_ends,
        doubt=f"the interval is neither inside nor outside {low:.3g} ... {high:.3g}" if two_ends else "",
    )


def _lost(differences: pd.DataFrame) -> str:
    """Return which pairs of runs are missing from a table of seeds by combinations; an empty text if none is."""
    places = [
        f"seed {seed}" + (f" at {cell}" if cell else "")
        for cell, missing in differences.isna().items()
        for seed in differences.index[missing]
    ]
    return f"{len(places)} of {differences.size} pairs have no value on a side: {'; '.join(places)}" if places else ""


def _range(claim: ClaimConfig, reference: float) -> tuple[float, float]:
    """Return the range in which the true difference lies according to the claim."""
    if claim.kind == "equivalent":
        margin = absolute(claim.margin, reference)
        return -margin, margin
    least, most = [absolute(amount, reference) for amount in claim.size] or (0.0, math.inf)
    return (least, most) if claim.kind in ("higher", "highest") else (-most, -least)


def _about(claim: ClaimConfig, contrast: pd.Series) -> bool:
    """Return whether a claim compares the two levels of a contrast, in either direction."""
    if (contrast["metric"], contrast["factor"]) != (claim.metric, claim.factor) or claim.kind == "interaction":
        return False
    at = dict(part.partition("=")[::2] for part in contrast.get("within", "").split(", ") if part)
    if any(at.get(factor) not in [str(level(each)) for each in wanted] for factor, wanted in claim.within.items()):
        return False
    named = [level(each) for each in claim.levels]
    rivals = [level(each) for each in claim.than]
    sides = [without_causality(each) for each in contrast[["level", "reference"]]]
    return any(a in named and (b in rivals if rivals else b not in named) for a, b in (sides, sides[::-1]))


def _label(claim: ClaimConfig, runs: pd.DataFrame, side: Any) -> str:
    """Return a level as the report shows it: the name of a router or arm is followed by its causality."""
    if claim.factor not in NAMED_ROUTERS or claim.factor not in runs:
        return str(side)
    return " / ".join(with_causality(runs[runs[claim.factor] == side])[claim.factor].unique()) or str(side)


def _listed(items: Any) -> str:
    return ", ".join(map(str, items))
