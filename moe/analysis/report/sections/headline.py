"""The answer of a report in one sentence: what was found, how large it is, and how sure."""

import math
from collections import Counter

from moe.analysis.report.inputs import ReportInputs
from moe.analysis.report.judgments import EVALUATE, Judgment, on_contrast
from moe.analysis.report.sections.experts import findings
from moe.analysis.report.sections.planned import earlier_verdict
from moe.analysis.report.sections.seed_components import spread_sentence
from moe.analysis.sentences import (
    EQUIVALENT,
    SIGNIFICANT,
    UNTESTED,
    claimed_range,
    enumerated,
    noun,
    standing,
    with_capital,
)
from moe.checks import plain
from moe.metrics.catalog import is_quality
from moe.results.comparable import NOT_COMPARABLE, other_causality
from moe.results.conditions import by_seed, without_causality

LATER_TOKENS = "settings that see later tokens have losses that are not comparable with those of the others"
NO_COMPARISON = """\
not comparable, because one of the settings may use later tokens of the text, perhaps in training alone: this compares \
the numbers as they are, and does not say which model predicts better"""
MOST_NAMED = 5  # levels that a sentence names


def headline(inputs: ReportInputs) -> str:
    """Return the answer that the runs give, as one sentence that is true for any runs."""
    if not (inputs.runs["status"] == "finished").any():
        return "No run has finished, so there is no answer yet."
    if inputs.search:
        settings = inputs.condition.nunique()
        what = "Tuning" if len(inputs.trials) else "A search"
        return f"{what} tried {settings} settings to {inputs.search}; this report tests none of them against chance."
    if inputs.observed:
        return plain(_of_observed(inputs))
    if not inputs.judgments:
        return plain(_without_comparison(inputs))
    judged = [each for each in inputs.judgments if not later_tokens(each.metric, each.compared, inputs)]
    left_out = len(inputs.judgments) - len(judged)
    if not left_out:
        return plain(_of_judgments(inputs, judged))
    kind = "planned claim" if inputs.judgments[0].planned else "comparison"
    kinds = f"{kind} is" if left_out == 1 else f"{kind}s are"
    why = f"left out of this answer, because {LATER_TOKENS}"
    if judged:
        return plain(f"{_of_judgments(inputs, judged).removesuffix('.')}; {left_out} {kinds} {why}.")
    surest = _surest_contrast(inputs)
    return plain(f"{'The' if left_out == 1 else 'All'} {kinds} {why}" + (f", but {surest}." if surest else "."))


def _of_observed(inputs: ReportInputs) -> str:
    """Return the answer about one model that was evaluated and not trained: what its routing and its experts do."""
    clauses = []
    if inputs.tested and len(values := by_seed(inputs.runs, inputs.tested[0])):
        clauses.append(f"the {noun(inputs.tested[0])} is {values.mean():.4g}")
    clauses += [each.clause for each in findings(inputs) if each.clause]
    return with_capital(f"{'; '.join(clauses)}.")


def _of_judgments(inputs: ReportInputs, judged: list[Judgment]) -> str:
    """Return the answer that these judgments give. That two names of one setting have equal results is no answer."""
    judged = [each for each in judged if each.planned or not _same(each)] or judged
    decided = [each for each in judged if each.decided]
    if decided:
        return _of_decided(min(decided, key=_rank), judged)
    if all(each.verdict == UNTESTED for each in judged):
        return _of_untested(inputs, judged)
    return _of_undecided(inputs, judged)


def later_tokens(metric: str, compared: str, inputs: ReportInputs) -> str:
    """Return what a comparison of losses means if only one side has routers that see later tokens; otherwise ""."""
    if not is_quality(metric) or inputs.runs["causal"].nunique() < 2:
        return ""
    subject, _, place = compared.partition(" at ")
    factor, _, sides = subject.partition(", change")[0].partition(" ")
    if factor not in inputs.runs:
        return ""
    runs = inputs.runs[inputs.runs["status"] == "finished"]
    there = inputs.condition.reindex(runs.index).map(lambda cell: set(place.split(", ")) <= set(str(cell).split(", ")))
    names, members = runs[factor].map(without_causality).map(str), []
    for side in map(without_causality, sides.split(" vs ")):
        named = names == side
        members.append(runs[named & there if (named & there).any() else named])
    return NO_COMPARISON if other_causality(members[0], members[-1]) else ""


def _same(judged: Judgment) -> bool:
    """Return whether both sides have the same result in every seed."""
    return bool(judged.deterministic and not judged.difference)


def _rank(judged: Judgment) -> tuple[bool, bool, float]:
    """Sort what shows a difference before what shows that there is none, and then by p; equal results come last."""
    none = judged.within or not judged.difference
    return _same(judged), none, judged.p if math.isfinite(judged.p) else 0.0


def _of_decided(first: Judgment, judged: list[Judgment]) -> str:
    """Return the answer if something is decided: the most certain judgment, and how many there are of each kind."""
    text = effect(first) + (f", so the claim {first.quoted} is {first.verdict}" if first.planned else "")
    if len(judged) == 1:
        return f"{text}."
    of_each = Counter(each.verdict for each in judged)
    counts = enumerated([f"{count} {'is' if count == 1 else 'are'} {verdict}" for verdict, count in of_each.items()])
    kind = "planned claims" if first.planned else f"comparisons of {first.unit}"
    return f"Of {len(judged)} {kind}, {counts}; the most certain result is that {text}."


def _of_untested(inputs: ReportInputs, judged: list[Judgment]) -> str:
    """Return the answer if no test was possible."""
    none = _none(judged, "could", "be tested")
    if surest := _surest_contrast(inputs):
        return with_capital(f"{none}, but {surest}.")
    if all(each.n == 0 for each in judged):
        return with_capital(f"{none}: {judged[0].reason.rstrip('.')}.")
    seen = [each for each in judged if each.n]
    largest = _largest(seen)
    text = f"{none}; the largest difference that was seen is that of {_instead(largest)} ({_amount(largest)})."
    if inputs.runs.loc[inputs.runs["status"] == "finished", "seed"].nunique() == 1:
        return f"With one seed no difference can be told from chance, and {text}"
    if all(each.n == 1 for each in seen):
        return f"Each pair of settings shares only one seed, so no difference can be told from chance, and {text}"
    return with_capital(text)


def _of_undecided(inputs: ReportInputs, judged: list[Judgment]) -> str:
    """Return the answer if tests were possible, but decided nothing."""
    tested = [each for each in judged if each.verdict != UNTESTED]
    none = _none(judged, "is", f"decided with {max(each.n for each in tested)} seeds")
    if surest := _surest_contrast(inputs):
        return with_capital(f"{none}, but {surest}.")
    largest = _largest(tested)
    needed = (
        "more than 1,000 seeds"
        if math.isnan(largest.needed)
        else f"about {largest.more} more {'seed' if largest.more == 1 else 'seeds'}"
    )
    text = f"{none}; the largest estimated difference is that of {_instead(largest)} ({_amount(largest)}); "
    decides = f"{needed} would decide it, if the true difference is that large"
    text += largest.advice if largest.outcome in ("", EVALUATE) else decides
    text = "; ".join(filter(None, (text, earlier_verdict(largest, inputs)))) + "."
    if all(each.low <= 0 <= each.high for each in tested):
        units = " or the ".join(dict.fromkeys(each.unit for each in tested))
        return f"No difference that was tested is more than chance explains, in the {units}: {text}"
    return with_capital(text)


def _surest_contrast(inputs: ReportInputs) -> str:
    """Return how many contrasts chance does not explain, and the most certain one; an empty text if there is none."""
    rows = [(row, on_contrast(row, inputs.tests_later)) for _, row in inputs.contrasts.iterrows()]
    rows = [(row, judged) for row, judged in rows if not later_tokens(judged.metric, judged.compared, inputs)]
    found = [judged for row, judged in rows if standing(row) == SIGNIFICANT]
    if not found:
        return ""
    show = "shows" if len(found) == 1 else "show"
    compared = "comparison" if len(rows) == 1 else "comparisons"
    first = min(found, key=_rank)
    return f"{len(found)} of {len(rows)} {compared} that nobody planned {show} more than chance: {effect(first)}"


def _without_comparison(inputs: ReportInputs) -> str:
    """Return the answer if no two settings can be compared."""
    if not inputs.tested:
        return "The finished runs have no metric that a report compares."
    if inputs.crosses_seeds:
        return spread_sentence(inputs.runs, inputs.tested[0])
    if inputs.factors:
        return f"Nothing can be compared, because {_why_not_compared(inputs)}."
    values, unit = by_seed(inputs.runs, inputs.tested[0]), noun(inputs.tested[0])
    if len(values) < 2:
        value = f"has a {unit} of {values.mean():.4g}" if len(values) else f"has no finite {unit}"
        return plain(f"The only setting {value}, and there is nothing to compare it with.")
    return plain(
        f"Nothing but the seed varies: the {unit} is {values.mean():.4g} ± {values.std(ddof=1):.2g} "
        f"(standard deviation) over {len(values)} seeds, which is what chance alone does."
    )


def _why_not_compared(inputs: ReportInputs) -> str:
    """Return why no level has a value beside one of the level that it would be compared with."""
    metric, runs = inputs.tested[0], inputs.runs
    rows = inputs.contrasts[inputs.contrasts["metric"] == metric] if len(inputs.contrasts) else inputs.contrasts
    if rows.empty:
        return "no two finished runs with the same seed differ in one factor alone"
    for note in rows["note"]:
        if note.startswith(NOT_COMPARABLE):
            return note.removeprefix(f"{NOT_COMPARABLE}: ")
    has_value = (runs["status"] == "finished") & runs[metric].astype(float).map(math.isfinite)
    of_rows = {(row.factor, each) for row in rows.itertuples() for each in (row.level, row.reference)}
    without = {(factor, each) for factor, each in of_rows if not has_value[runs[factor] == each].any()}
    if all(without & {(row.factor, row.level), (row.factor, row.reference)} for row in rows.itertuples()):
        names = sorted(f"{factor}={each}" for factor, each in without)
        more = f" or {len(names) - MOST_NAMED} more" if names[MOST_NAMED:] else ""
        return f"no run with {' or '.join(names[:MOST_NAMED])}{more} finished with a finite {noun(metric)}"
    return f"no two runs that a report compares both finished with a finite {noun(metric)}"


def _largest(judged: list[Judgment]) -> Judgment:
    """Return the judgment on the largest difference, as a share of its reference if this is known."""
    known = [each for each in judged if math.isfinite(each.share)]
    return max(known or judged, key=lambda each: abs(each.share if known else each.difference))


def effect(judged: Judgment) -> str:
    """Return an effect with its certainty as a clause."""
    j, (compared, _, change) = judged, judged.compared.partition(", change ")
    interval = [j.percent, f"95 % interval {j.low:.3g} to {j.high:.3g}", f"{j.n} seeds"]
    sure = f" in each of {j.n} seeds" if j.deterministic else f" ({', '.join(filter(None, interval))})"
    if math.isnan(j.margin) and all(map(math.isfinite, j.claimed)):
        sure += f", where {claimed_range(*j.claimed, j.reference)} is claimed"
    equivalent = j.within and not j.deterministic and (j.planned or j.verdict == EQUIVALENT)
    margin = ""
    if math.isfinite(j.margin):
        place = "within" if j.within else "beyond" if j.beyond else "not shown to exceed"
        margin = f", {place} the margin of {j.margin:.3g}" + ("," if j.deterministic else "")
    if change:
        by = f"less than the margin of {j.margin:.3g}" if equivalent else f"{j.difference:+.3g}"
        return f"the effect of {compared} on the {j.unit} changes by {by} {change}{'' if equivalent else margin}{sure}"
    subject = _instead(j)
    if equivalent:
        return f"{subject} changes the {j.unit} by less than the margin of {j.margin:.3g}{sure}"
    if not j.difference:
        return f"{subject} leaves the {j.unit} as it is{sure}"
    if j.low <= 0 <= j.high:  # decided by a claimed size, so the direction may be chance
        return f"{subject} changes the {j.unit} by {j.difference:+.3g}{margin}{sure}"
    verb = "raises" if j.difference > 0 else "lowers"
    return f"{subject} {verb} the {j.unit} by {abs(j.difference):.3g}{margin}{sure}"


def _instead(judged: Judgment) -> str:
    """Return the levels that are compared as the subject of a clause."""
    return judged.compared.replace(" vs ", " instead of ", 1)


def _amount(judged: Judgment) -> str:
    return ", ".join(filter(None, [judged.amount, judged.percent]))


def _none(judged: list[Judgment], verb: str, rest: str) -> str:
    """Return that none of the judgments is what `verb` and `rest` say."""
    one, several = ("planned claim", "planned claims") if judged[0].planned else ("comparison", "comparisons")
    of = "" if judged[0].planned else f" of {judged[0].unit}"
    if len(judged) == 1:
        return f"the {one}{of} {verb} not {rest}"
    return f"none of the {len(judged)} {several}{of} {verb} {rest}"
