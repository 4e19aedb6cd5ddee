"""Judge planned claims: predictions that were written down before the runs of an experiment were trained.

A claim (`moe.config.claim.ClaimConfig`) is written in the experiment's YAML file or on the command line, and every run
records it before its first step. Contrasts that no claim predicts are post hoc. Differences are taken between runs of
the same seed and averaged over all combinations of the other factors, or of those of their levels that the claim names.
Every claim states a range for the true difference: above zero, below zero, closer to zero than a margin, or within the
claimed size. An interaction is such a claim about how much the metric changes between two levels of another factor.
"""

import json
import math
from dataclasses import replace
from functools import lru_cache
from itertools import chain
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from moe.analysis.comparisons import as_spelled, compared
from moe.analysis.estimates import BETWEEN, NAN, Comparison
from moe.analysis.learned import TOO_LITTLE
from moe.analysis.power import SIGNIFICANCE, Prediction, detectable_effect, seeds_for
from moe.analysis.sentences import (
    AGAINST,
    UNDECIDED,
    UNTESTED,
    claimed_range,
    detectable_note,
    deterministic_verdict,
    enumerated,
    noun,
    p_equals,
    p_text,
    percent,
)
from moe.analysis.statistics import (
    corrected,
    divisors,
    spread_interval,
)
from moe.checks import parse, plain
from moe.config.claim import OURS, ClaimConfig
from moe.metrics.catalog import is_quality, span
from moe.results.conditions import (
    MARKED,
    readable_level,
    with_causality,
    without_causality,
)
from moe.results.learned import learned_little
from moe.results.table import level

SHOWN, SHOWN_UNTESTED = "shown is the comparison on which p depends", "shown is a comparison that is not tested"
BEST = ("lowest", "highest")  # kinds that fail only if one rival beats all named levels


def planned_claims(runs: pd.DataFrame) -> list[tuple[ClaimConfig, pd.DataFrame]]:
    """Return every claim in the records of these runs, each with the runs of one experiment that recorded it.

    A claim that was added after some seeds had run is judged by the other seeds alone.
    """
    recorded: dict[tuple[str, str], tuple[ClaimConfig, list[Any]]] = {}
    readable = runs[~runs["status"].isin(["missing", "unreadable"])]
    for index, text, experiment in readable[["claims", "experiment"]].itertuples():
        for claim in _read_claims(text):
            recorded.setdefault((experiment, repr(claim)), (claim, []))[1].append(index)
    return [(claim, runs.loc[indices]) for claim, indices in recorded.values()]


def _was_changed(claim: ClaimConfig, members: pd.DataFrame, planned: list[tuple[ClaimConfig, pd.DataFrame]]) -> bool:
    """Return whether later runs of the same experiment recorded another claim in the same words."""
    return any(
        other.text == claim.text
        and others["experiment"].iloc[0] == members["experiment"].iloc[0]
        and others["started"].astype(str).min() > members["started"].astype(str).min()
        for other, others in planned
    )


@lru_cache
def _read_claims(text: str) -> list[ClaimConfig]:
    return [parse(ClaimConfig, claim, f"claims[{number}]") for number, claim in enumerate(json.loads(text))]


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


def measured_claims(runs: pd.DataFrame, evals: pd.DataFrame | None = None) -> pd.DataFrame:
    """Return a row for every planned claim, before the correction for other tests; `decided` completes it.

    Claims about quality have no p if no model of their experiment is better than a unigram model. `own` are the runs
    on which its test depends, for `moe.analysis.looks.Study`. evals: see `moe.analysis.comparisons.compared`.
    """
    rows: dict[str, list[dict[str, Any]]] = {}
    planned = planned_claims(runs)
    for claim, members in planned:
        experiment = members["experiment"].iloc[0]
        row = {"experiment": experiment} | _judge_alone(claim, members, evals)
        rows.setdefault(experiment, []).append(row | {"changed": _was_changed(claim, members, planned)})
    of_claim = (*_claim_row("", "", "", ""), *_row("", Comparison(0), NAN, "", ""))
    columns = ["experiment", *of_claim, "own", "changed"]
    table = pd.DataFrame(list(chain.from_iterable(rows.values())), columns=columns)
    little = {name for name in rows if learned_little(runs[runs["experiment"] == name])}
    withheld = table["experiment"].isin(little) & table["metric"].map(is_quality).astype(bool) & table["p"].notna()
    return table.assign(p=table["p"].mask(withheld), doubt=table["doubt"].mask(withheld, TOO_LITTLE))


def claim_families(table: pd.DataFrame) -> np.ndarray:
    """Return the family of each claim in a table of claims: 0 if it is of a source, 1 if it is our own."""
    return table["source"].str.startswith(OURS).to_numpy(dtype=int)


def judge(runs: pd.DataFrame, claims: list[ClaimConfig]) -> pd.DataFrame:
    """Return a row for each claim: supported, contradicted or undecided by these runs, or not tested, and why.

    `runs` is a table of `moe.results.table.load_runs`. `difference` is `mean` minus `reference mean` over n paired
    seeds, with its 95 % t interval. Of an interaction, the two means are those of the difference at the second and at
    the first level of the other factor, and `level` and `reference` are these two. A claim can make several
    comparisons. The columns `compared`, `level`, `reference`,
    `mean`, `reference mean`, `difference`, its interval and `reason` show the one on which `p` depends. `choice` says
    which ones there are, and `p` covers all:

    - The claim holds if every comparison holds. Its p is then the largest p of the comparisons (intersection-union).
    - The claim fails if one comparison fails. Its p is then the smallest p of the comparisons, after Bonferroni's
      correction. A claim of kind lowest or highest fails if some other level beats all levels that it names.

    The smaller of the two is `p`, and `side` says whether it is "for" or "against" the claim. A p is two-sided; if the
    claimed range has two ends, the p that the claim holds is that of two one-sided tests (TOST). A claim is decided if
    `p Holm` is at most 5 %. It is corrected for all these claims, except that our own claims are corrected apart, so
    that they cannot take significance from the claims of a source. If a difference is the same in every seed
    (`deterministic`), nothing tells how far chance could move it, and there is no p. `estimates` says where the means
    lie, which may be by chance: "as claimed", "against", or "mixed" if the named levels differ in this.
    """
    table = pd.DataFrame([_judge_alone(claim, runs) for claim in claims])
    if table.empty:
        return table
    apart = table["p"].groupby(claim_families(table))
    return decided(table, apart.transform(corrected).to_numpy(), apart.transform(divisors).to_numpy())


def decided(
    table: pd.DataFrame, holm: np.ndarray, tests: np.ndarray, tests_later: np.ndarray | None = None
) -> pd.DataFrame:
    """Return a table of claims with their verdicts, and with the number of seeds that an undecided claim needs.

    The arguments are what `corrected` and `divisors` of `moe.analysis.statistics` return for these rows; `tests` is a
    column too. tests_later: the same numbers in a later report with more seeds, if they differ. `seeds needed` decides
    the claim with power 0.8 (`moe.analysis.power.Prediction.deciding`), if the spread is as estimated. To support a
    claim, every true difference is taken to be the one that is shown, in units of its spread; to contradict it, that
    one is. It is NaN if a claim is decided, if its spread is unknown, if 1,000 seeds are not
    enough, or if the estimates are mixed, so that no number of seeds decides it.
    """
    table = table.drop(columns="own")
    table.insert(table.columns.get_loc("p") + 1, "p Holm", holm)
    table.insert(table.columns.get_loc("p Holm") + 1, "tests", tests)
    significant = table["p Holm"] <= SIGNIFICANCE
    only_before = (table["p"] <= SIGNIFICANCE) & ~significant
    before = table["verdict"] + " before the correction for other tests and looks, not after it"
    later = tests if tests_later is None else tests_later
    spreads, offs, predicted = (table.pop(name) for name in ("spread", "off", "predicted"))
    changes = table["kind"].map({"interaction": 2}).fillna(1)  # two differences differ by twice as much at most
    spans = table["metric"].map(span).astype(float) * changes
    units = table["metric"].map(noun)
    corrected = _corrected_for(predicted, tests)
    known = zip(table.pop("doubt"), table["n"], spreads, offs, corrected, units, spans, strict=True)
    doubt = pd.Series([doubt or _detectable(*rest) for doubt, *rest in known], index=table.index, dtype=object)
    doubt = doubt.mask(only_before, before).mask(significant, "")
    reason = ["; ".join(filter(None, parts)) for parts in zip(table["reason"], doubt, strict=True)]
    needed = [seeds_for(claim.deciding()) for claim in _corrected_for(predicted, later)]
    table["seeds needed"] = pd.Series(needed, index=table.index, dtype=float).mask(significant | table["p"].isna())
    verdict = table["verdict"].where(significant, UNDECIDED).mask(table["p"].isna(), UNTESTED)
    tested = table["p"].notna()
    choice = [
        f"{text}; {SHOWN if has_p else SHOWN_UNTESTED}" if text else ""
        for text, has_p in zip(table["choice"], tested, strict=True)
    ]
    return table.assign(side=table["side"].where(tested, ""), verdict=verdict, reason=reason, choice=choice)


def evidence_sentence(judged: pd.Series) -> str:
    """Return a row of `judge` in words: levels, metric and its means, the difference, its p, and the reason.

    Of an interaction the two means are differences, and the level of the other factor stands beside each.
    """
    j = judged
    if j["n"] == 0:
        return str(j["reason"])
    text = f"{j['compared']}: {noun(j['metric'])} "
    if j["kind"] == "interaction":
        text += f"{j['mean']:+.4g} at {j['level']} vs {j['reference mean']:+.4g} at {j['reference']}"
    else:
        text += f"{j['mean']:.4g} vs {j['reference mean']:.4g}"
    if j["reference mean"] and j["kind"] != "interaction":
        text += f" ({percent(j['difference'] / j['reference mean'])})"
    if j["deterministic"] and math.isnan(j["p"]):
        text += f", {deterministic_verdict(j['difference']).replace('**', '')}"
    elif not math.isnan(j["p"]):
        text += f", difference {j['difference']:+.3g} [{j['ci_low']:.3g}, {j['ci_high']:.3g}]"
        if math.isfinite(j["claimed_low"]) and math.isfinite(j["claimed_high"]):
            reference = math.nan if j["kind"] == "interaction" else j["reference mean"]
            text += f" where {claimed_range(j['claimed_low'], j['claimed_high'], reference)} is claimed"
        text += f", {p_equals(j['p'])}{AGAINST if j['side'] == 'against' else ''} (Holm {p_text(j['p Holm'])})"
    return plain("; ".join(filter(None, (f"{text}, n={j['n']}", j["choice"], j["reason"]))))


def contrasts_without_claim(contrasts: pd.DataFrame, claims: list[ClaimConfig]) -> pd.DataFrame:
    """Return those rows of a table of contrasts whose comparison no claim makes."""
    return contrasts[[not any(_about(claim, row) for claim in claims) for _, row in contrasts.iterrows()]]


def _corrected_for(predicted: pd.Series, tests: np.ndarray) -> list[Prediction]:
    """Return the predictions of claims with the number by which a report divides 5 % for each."""
    return [claim._replace(tests=max(number, 1)) for claim, number in zip(predicted, tests.tolist(), strict=True)]


def _detectable(n: int, spread: float, off: float, claim: Prediction, unit: str, most: float) -> str:
    """Return which difference would have been detected; an empty text if there is no spread to tell it from.

    off: how far the difference may be off, see `Comparison`. most: how much the metric can change.
    """
    if math.isnan(spread):
        return ""
    effect = detectable_effect(n, tests=claim.tests, named=claim.named, rivals=claim.rivals, freedom=claim.freedom)
    low, high = spread_interval(spread, claim.freedom.at(n))
    effects = tuple(effect * each + off for each in (spread, low, high))
    return detectable_note(*effects, tests=claim.tests, unit=unit, most=most)


def _judge_alone(claim: ClaimConfig, runs: pd.DataFrame, evals: pd.DataFrame | None = None) -> dict[str, Any]:
    """Return the row of one claim, before the correction for the other claims."""
    row = _claim_row(claim.text, claim.source, claim.metric, claim.kind)
    if claim.kind == "interaction" and claim.margin is None and claim.direction is None:
        rise, fall = (_judge_levels(replace(claim, direction=each), runs, evals) for each in ("higher", "lower"))
        return row | (fall if rise["verdict"] == "contradicted" else rise)
    return row | _judge_levels(claim, runs, evals)


def _judge_levels(claim: ClaimConfig, runs: pd.DataFrame, evals: pd.DataFrame | None) -> dict[str, Any]:
    """Return the columns about the comparisons of the named levels of a claim with their rivals."""
    claim = as_spelled(claim, runs)
    found = compared(claim, runs, evals)
    named, rivals, pairs, absent = found
    if absent:
        sides = [_listed(_label(claim, runs, each) for each in side) for side in (named, rivals)]
        text = f"{claim.factor} {' vs '.join(sides)}"
        return _row(text, Comparison(0, doubt="; ".join(absent)), NAN, "undecided", "") | {"own": found.runs}
    favor, p_for, p_against = (
        np.array([[getattr(pair, field) for pair in line] for line in pairs])
        for field in ("favor", "p_for", "p_against")
    )
    best = claim.kind in BEST  # fails only if one rival beats all named levels
    against = p_against.max(axis=0) if best else p_against
    p_holds, p_fails = p_for.max(), min(1.0, against.size * against.min())
    verdict = "supported" if p_holds < p_fails else "contradicted"
    lost = favor.max(axis=0).min() if best else favor.min()
    estimates = "as claimed" if favor.min() > 0 else "against" if lost < 0 else "mixed"
    labels = [[_label(claim, runs, each) for each in side] for side in (named, rivals)]
    a, b = _deciding(p_for, p_against, favor, supported=verdict == "supported", best=best)
    shown_sides = (labels[0][a], labels[1][b])
    text = f"{claim.factor} {' vs '.join(shown_sides)}{_where(claim)}"
    if claim.kind == "interaction":
        first, second = claim.within[claim.moderator]
        shown_sides = (f"{claim.moderator}={level(second)}", f"{claim.moderator}={level(first)}")
    shown = pairs[a][b]
    if shown.off and abs(shown.favor) <= shown.off:
        estimates = BETWEEN
    predicted = _predicted(shown if estimates in ("as claimed", "against") else shown._replace(mean=NAN))._replace(
        named=len(named), rivals=len(rivals), freedom=shown.freedom, best=best
    )
    row = _row(text, shown, float(np.minimum(p_holds, p_fails)), verdict, estimates, _choice(claim, *labels))
    shown_ends = dict(zip(("level", "reference"), shown_sides, strict=True))
    return row | shown_ends | {"predicted": predicted, "own": found.runs}


def _deciding(
    p_for: Float[np.ndarray, "A B"],
    p_against: Float[np.ndarray, "A B"],
    favor: Float[np.ndarray, "A B"],
    *,
    supported: bool,
    best: bool,
) -> tuple[int, int]:
    """Return the place of the comparison whose p is that of the claim, or of one that was impossible.

    The least favor is shown among equal p. best: whether the claim fails only if one rival beats all named levels.
    """
    if (untested := np.isnan(p_for)).any():
        a, b = np.unravel_index(int(untested.argmax()), p_for.shape)
    elif supported:
        a, b = np.unravel_index(int(np.lexsort((favor.ravel(), -p_for.ravel()))[0]), p_for.shape)
    elif best:
        b = np.lexsort((favor.max(axis=0), p_against.max(axis=0)))[0]
        a = np.lexsort((-favor[:, b], -p_against[:, b]))[0]
    else:
        a, b = np.unravel_index(int(np.lexsort((favor.ravel(), p_against.ravel()))[0]), p_for.shape)
    return int(a), int(b)


def _predicted(comparison: Comparison) -> Prediction:
    """Return what a claim predicts of a comparison whose true difference is the estimated one.

    The range is as narrow, or as wide, as the reading between evaluations may make it.
    """
    c = comparison
    off = math.copysign(c.off, c.favor)
    ends = c.claimed_low + off, c.claimed_high - off, c.difference
    low, high, true = (end / c.spread for end in ends)
    return Prediction(low, high, true, freedom=c.freedom)


def _choice(claim: ClaimConfig, named: list[str], rivals: list[str]) -> str:
    """Return which comparisons a claim makes; an empty text if there is only one. `decided` adds which one is shown."""
    number = len(named) * len(rivals)
    if number == 1:
        return ""
    others = f"each of the {len(rivals)} other levels" if len(rivals) > 1 else "the other level"
    against = others if not claim.than else f"each of {enumerated(rivals)}" if len(rivals) > 1 else rivals[0]
    subject = f"each of {enumerated(named)}" if named[1:] else named[0]
    return f"one of {number} comparisons that must all hold: {subject} with {against}"


def _where(claim: ClaimConfig) -> str:
    """Return at which levels of other factors a claim compares, as the end of a text; empty if it names none."""
    fixed, change = dict(claim.within), ""
    if claim.kind == "interaction":
        first, second = fixed.pop(claim.moderator)
        change = f", change from {claim.moderator}={level(first)} to {level(second)}"
    places = "; ".join(f"{factor}={_listed(map(level, wanted))}" for factor, wanted in fixed.items())
    cost = "" if claim.at is None else f", read at equal training {'FLOPs' if claim.at == 'flops' else claim.at}"
    return (f" at {places}" if places else "") + change + cost


def _claim_row(text: str, source: str, metric: str, kind: str) -> dict[str, Any]:
    return {"claim": text, "source": source, "metric": metric, "kind": kind}


def _row(
    compared: str, comparison: Comparison, p: float, verdict: str, estimates: str, choice: str = ""
) -> dict[str, Any]:
    return {
        "compared": compared,
        "level": "",
        "reference": "",
        "choice": choice,
        "n": comparison.n,
        "mean": comparison.mean,
        "reference mean": comparison.reference_mean,
        "difference": comparison.difference,
        "ci_low": comparison.low,
        "ci_high": comparison.high,
        "claimed_low": comparison.claimed_low,
        "claimed_high": comparison.claimed_high,
        "p": p,
        "side": {"supported": "for", "contradicted": "against"}.get(verdict, ""),
        "deterministic": comparison.deterministic,
        "estimates": estimates,
        "verdict": verdict,
        "spread": comparison.spread,
        "off": comparison.off,
        "predicted": _predicted(comparison),
        "reason": comparison.note,
        "doubt": comparison.doubt,
    }


def _about(claim: ClaimConfig, contrast: pd.Series) -> bool:
    """Return whether a claim compares the two levels of a contrast, in either direction.

    A claim about test text is about the same comparison on validation text too.
    """
    metrics = (claim.metric, claim.metric.replace("test/", "val/"))
    other = claim.kind == "interaction" or claim.at is not None  # than what a contrast compares
    if other or contrast["metric"] not in metrics or contrast["factor"] != claim.factor:
        return False
    at = dict(part.partition("=")[::2] for part in contrast.get("within", "").split(", ") if part)
    if any(at.get(factor) not in [str(level(each)) for each in wanted] for factor, wanted in claim.within.items()):
        return False
    named = [readable_level(claim.factor, level(each)) for each in claim.levels]
    rivals = [readable_level(claim.factor, level(each)) for each in claim.than]
    sides = [without_causality(each) for each in contrast[["level", "reference"]]]
    return any(a in named and (b in rivals if rivals else b not in named) for a, b in (sides, sides[::-1]))


def _label(claim: ClaimConfig, runs: pd.DataFrame, side: Any) -> str:
    """Return a level as the report shows it: the name of a router, arm or drop policy is followed by its causality."""
    if claim.factor not in MARKED or claim.factor not in runs:
        return str(readable_level(claim.factor, side))
    return " / ".join(with_causality(runs).loc[runs[claim.factor] == side, claim.factor].unique()) or str(side)


def _listed(items: Any) -> str:
    return ", ".join(map(str, items))
