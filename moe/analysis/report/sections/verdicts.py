"""Verdicts in sentences: how they are made, on the planned claims, and on every other comparison of two levels."""

from collections.abc import Iterator

import pandas as pd

from moe.analysis.claims import contrasts_without_claim, evidence_sentence, planned_claims
from moe.analysis.comparisons import as_spelled
from moe.analysis.learned import NO_VERDICT, without_doubt
from moe.analysis.power import SIGNIFICANCE
from moe.analysis.report.blocks import (
    BulletList,
    Details,
    Heading,
    Paragraph,
    ReportBlock,
    csv_file,
    literal,
    long_list,
)
from moe.analysis.report.inputs import OF_CLAIMS, Family, ReportInputs
from moe.analysis.report.judgments import on_contrast
from moe.analysis.report.sections.comparisons import even_loads
from moe.analysis.report.sections.headline import later_tokens
from moe.analysis.report.sections.planned import earlier_verdict
from moe.analysis.sentences import (
    DETECTABLE,
    DETERMINISTIC,
    EQUIVALENT,
    SIGNIFICANT,
    UNDECIDED,
    UNTESTED,
    contrast_sentence,
    directions,
    level_text,
    levels_compared,
    noun,
    standing,
    with_capital,
)
from moe.config.claim import OURS
from moe.metrics.catalog import lookup
from moe.results.comparable import several_tokenizers

TITLES = {
    SIGNIFICANT: "Significant after correction",
    EQUIVALENT: "Equivalent",
    DETERMINISTIC: with_capital(DETERMINISTIC),
    UNDECIDED: "Undecided",
    UNTESTED: "Not tested",
}
DECIDES = (
    "Runs that differ in the seed alone differ in their results too. So a difference between two settings may be "
    "chance.",
    "Each comparison has a p: how often chance alone would give a difference at least as large.",
    "A report makes many tests, and many tests find something by chance. Therefore every p is corrected for all tests "
    'of this report with Holm\'s method ("Holm" in sentences, `p Holm` in tables).',
    "A result counts as more than chance if its p after correction is at most 5 %. Then a claim is supported or "
    "contradicted, and a direction such as better or worse is significant. Otherwise it is undecided.",
    "If no setting made a difference, chance would make a report call anything significant in at most 5 % of cases.",
)
FAMILIES = """\
The tests form families, and each family has a share of the 5 %. The share is divided among its tests. What one test
gets is its level: a p below it is significant, whatever the other tests show."""
HANDED_ON = """\
When a test is significant, its part of the 5 % goes to the tests of its family that are left. When all tests of a
family are significant, its share goes to the other families."""
LOOKS = """\
Whoever adds seeds and looks again has more chances of an error. Therefore each report is written down as a look, in
looks.json beside the runs, and the looks share the level of a test. Up to the planned number of seeds the shares add
up to 1: an early look gets little, and the last one nearly everything. If nobody planned a number, that of the first
look decides. The first look after that number was reached gets a fifth of the whole level, and each later one a fifth
of the one before. What counts is how many runs a setting had in all reports, on average, so a report about other runs,
or about fewer, is a look too. So is a report about a metric or a reference level that no report before had asked
for."""
ONLY_DESCRIBES = """\
All other numbers describe and test nothing. An interval such as [-1, 2] after a difference holds for itself alone, and
for a single look: other looks at these runs do not widen it. Only the intervals of a league have the level of the look.
What is read from intervals, figures or tables is not tested."""
EQUIVALENCE = (
    "A metric with a margin has a second question: is the difference smaller than the margin?",
    "Two one-sided tests (TOST) answer it. A contrast is equivalent if their p is at most 5 % after Holm's correction "
    "over all contrasts of this report that have a margin.",
    "These tests have 5 % of their own, take nothing from the other tests, and divide their 5 % among looks.",
    "A margin that was not given at the first look at these runs is left out, because results may have chosen it.",
    "A difference that is not significant is no proof of equivalence.",
)
CLAIMS_EXPLAINED = """\
These claims were written down in advance, in the experiment's YAML file or on the command line, and every run recorded
them before its first step. Each difference is taken between runs of the same seed and averaged over all combinations of
the other factors. Its 95 % interval, in brackets, is for this difference alone; the verdict is corrected for all tests
of this report. A claim has two tests: that it holds, and that it does not hold. The smaller p is shown, and "against
the claim" follows it if it is that of the second test."""
SECOND_P = """\
The p in parentheses is corrected with Holm's method, because all tests of this report share 5 %: {shares}. So the
smallest p is multiplied by up to {most} to give the p in parentheses, and no other p by more."""
THE_REST = "other comparisons have the rest"
SOURCES = """\
In parentheses after a claim is its source: an earlier study, and the part of it that says so. "Our own" marks a claim
of the experiment's author. The page `docs/sources.md` of the project introduces the studies that its experiments
repeat: what each of them did, and what we do instead."""
POST_HOC = """\
Each level of a factor is compared with the factor's reference level: "A vs B" is A minus B, and B is the reference.
The reference levels are {references}: those that `--reference` names, or else those that claims compare with most
often, if there are any. These comparisons are post hoc: no claim predicted their results before the runs. The 95 %
interval of a difference, in brackets, is for this difference alone. The verdict is corrected for all tests of this
report, so it can be undecided although the interval leaves out 0."""

COVERED = """\
{covered} of {all} contrasts have no sentence here, because a planned claim compares the same two levels, averaged over
the other factors or within the levels that the claim names. They were tested like the others: the table of contrasts
has their numbers."""
TOKENIZERS = """\
The runs have different tokenizers, so losses, perplexities and accuracies per token are not comparable; bits per byte
take their place."""


def how_it_decides(inputs: ReportInputs) -> Iterator[ReportBlock]:
    """Yield when a result counts as more than chance, once for the whole report."""
    if inputs.families:
        yield Heading("When a result is more than chance")
        yield BulletList(list(DECIDES))
        yield Heading("How the tests share the 5 %")
        yield Paragraph(FAMILIES)
        yield BulletList([f"{_share_of(family)}." for family in inputs.families])
        yield Paragraph(HANDED_ON)
        yield Paragraph(LOOKS)
        yield Paragraph(ONLY_DESCRIBES)
    if inputs.options.margins:
        yield Heading("When a difference is small enough")
        yield BulletList(list(EQUIVALENCE))


def _share_of(family: Family) -> str:
    """Return how many tests of a family share how much of the 5 %."""
    share = f"{100 * SIGNIFICANCE * family.share:.3g} %"
    levels = dict.fromkeys(level_text(family.tests / family.share / look) for look in family.looks)
    applied = f"its level in this look is {' to '.join(levels)}"
    if family.tests == 1:
        return f"1 test of {family.name} has {share}" + (f"; {applied}" if family.looks != (1, 1) else "")
    each = level_text(family.tests / family.share)
    earlier = f" ({family.earlier} of them were made by earlier reports alone)" if family.earlier else ""
    text = f"{family.tests} tests of {family.name}{earlier} share {share}"
    return f"{text}, {each} each" if family.looks == (1, 1) else f"{text}, {each} for all looks of each; {applied}"


def claim_verdicts(inputs: ReportInputs) -> Iterator[ReportBlock]:
    """Yield every planned claim with its verdict."""
    if inputs.claims.empty:
        return
    judged = inputs.claims
    yield Heading("Planned claims")
    yield Paragraph(CLAIMS_EXPLAINED)
    shares = [_share_of(family) for family in inputs.families if family.name in OF_CLAIMS]
    divisors = judged.loc[judged["p"] > 0, "tests"]
    if shares and len(divisors):
        shares += [THE_REST] if len(inputs.families) > len(shares) else []
        yield Paragraph(SECOND_P.format(shares="; ".join(shares), most=f"{divisors.max():.3g}"))
    if not judged["source"].str.fullmatch(OURS).all():
        yield Paragraph(SOURCES)
    if inputs.learned_little:
        yield Paragraph(NO_VERDICT)
        judged = judged.assign(reason=judged["reason"].map(without_doubt))
    if (judged["verdict"] == UNDECIDED).any():
        yield Paragraph(DETECTABLE)
    advice = {each.row: each.advice for each in inputs.judgments}
    titles = {each.row: each.title for each in inputs.judgments}
    sentences = []
    for number, (_, row) in enumerate(judged.iterrows()):
        verdict = f"{literal(titles[number])} ({literal(row['source'])}): **{row['verdict']}**"
        doubt = later_tokens(row["metric"], row["compared"], inputs)
        evidence = evidence_sentence(row)
        more = "" if advice[number] in evidence else advice[number]
        sentences.append("; ".join(filter(None, [verdict, literal(evidence), doubt, more])))
    yield BulletList(sentences)
    yield csv_file("claims", inputs.claims, "every claim with its numbers.")


def contrast_verdicts(inputs: ReportInputs) -> Iterator[ReportBlock]:
    """Yield a sentence for every contrast that no claim predicts, the most certain ones first."""
    yield Heading("Verdicts")
    if several_tokenizers(inputs.runs):
        yield Paragraph(TOKENIZERS)
    if inputs.crosses_seeds:
        yield Paragraph("None: only seeds vary, and no seed is better than another.")
        return
    if inputs.contrasts.empty:
        yield Paragraph("None: no factor varies among the runs with results.")
        return
    rows = contrasts_without_claim(inputs.contrasts, [as_spelled(*each) for each in planned_claims(inputs.loaded)])
    references = rows if len(rows) else inputs.contrasts
    names = dict.fromkeys(f"{row.factor}={row.reference}" for row in references.itertuples())
    yield Paragraph(POST_HOC.format(references=literal(", ".join(names))))
    if inputs.learned_little:
        yield Paragraph(NO_VERDICT)
    if any(metric is not None and metric.group == "balance" for metric in map(lookup, rows["metric"].unique())):
        yield from even_loads(inputs)
    sentences: dict[str, list[str]] = {}
    for _, contrast in rows.iterrows():
        sentences.setdefault(standing(contrast), []).append(_verdict(contrast, inputs))
    explained = len(inputs.claims) and (inputs.claims["verdict"] == UNDECIDED).any()
    if UNDECIDED in sentences and not explained:
        yield Paragraph(DETECTABLE)
    for name, title in TITLES.items():
        if name not in sentences:
            continue
        count = f"**{title}**: {len(sentences[name])} of {len(rows)} contrasts."
        if name == UNTESTED:  # they are many, and say little
            yield Details(count, [BulletList(sentences[name])])
        else:
            yield Paragraph(count)
            yield from long_list(sentences[name])
    covered = len(inputs.contrasts) - len(rows)
    if covered:
        yield Paragraph(COVERED.format(covered=covered, all=len(inputs.contrasts)))


def _verdict(contrast: pd.Series, inputs: ReportInputs) -> str:
    c, compared = contrast, levels_compared(contrast)
    up, down = directions(c["metric"])
    text = contrast_sentence(c, literal(compared), unit=noun(c["metric"]), up=up, down=down)
    earlier = earlier_verdict(on_contrast(c), inputs) if inputs.study.earlier else ""
    return "; ".join(filter(None, (text, earlier, later_tokens(c["metric"], compared, inputs))))
