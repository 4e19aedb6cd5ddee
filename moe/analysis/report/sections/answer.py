"""The first screen of a report: question, answer, verdicts, the best setting and its cost, set-up, and warnings."""

import math
from collections import Counter
from collections.abc import Iterator

import pandas as pd

from moe.analysis.report.blocks import (
    BulletList,
    Card,
    Cards,
    Details,
    Facts,
    Heading,
    Paragraph,
    ReportBlock,
    TableBlock,
    literal,
)
from moe.analysis.report.inputs import ReportInputs
from moe.analysis.report.judgments import cards
from moe.analysis.report.question import question_of
from moe.analysis.report.sections.answers import answers
from moe.analysis.report.sections.asked import asked
from moe.analysis.report.sections.best_setting import about_same_settings, best_setting, ranking
from moe.analysis.report.sections.commands import command_for_more, seeds_to_complete, training_command
from moe.analysis.report.sections.experts import findings
from moe.analysis.report.sections.headline import headline, later_tokens
from moe.analysis.report.sections.planned import (
    earlier_verdict,
    error_of_more,
    price_of_more,
    seeds_left,
    warnings_of_decisions,
    warnings_of_looks,
    warnings_of_margins,
)
from moe.analysis.report.sections.search import levels_from_a_search, search_result
from moe.analysis.report.sections.setup import setup
from moe.analysis.sentences import enumerated, noun, numbers_in_words
from moe.config.question import text_of
from moe.metrics.catalog import lookup
from moe.results.comparable import several_tokenizers

MOST_CARDS = 6  # that are visible at once
PICTURES_EXPLAINED = """\
Dot: the estimated difference, in bold below. Line: its 95 % interval, in brackets below. It is for this difference
alone; the verdict is corrected for all tests of the report. Dashed: no difference. Pictures of one metric have one
scale."""
NUMBERS = """\
**Numbers:** {units}.{shares}"""
SHARES = " A percentage in parentheses is the difference as a share of the mean of the second setting."
CLAIMED = " Box: the differences that the claim allows; an arrow at its end means that all beyond it are allowed too."
UNCERTAINTY = """\
Pairs in brackets are 95 % intervals over the validation documents: how much other texts of the kind could change a
number. What is counted is corrected for the number of layers, of experts, or of numbers of experts (tokens excepted).
Layers and experts are counted from 0."""
UNIGRAM = "A unigram model only knows how often each token occurs. What counts is the mean over the seeds of a setting."
NOT_CAUSAL = """\
Settings marked (not causal) may use later tokens of the text, perhaps in training alone. Their losses are not \
comparable with those of the others."""
ONE_SEED = "With one seed nothing tells a difference from chance. Train three or more: `seed=42,43,44`"
INCOMPLETE = """\
**Some settings lack seeds that others have** (runs that are missing: {runs}; {seeds}). These seeds come
first.{command}"""
TOGETHER = " A command above that lists its seeds trains them too."
ALONE = " This command trains them alone: `{command}`"
UNEVEN = """\
**Differences and means are over different seeds**, because some settings have no result of {seeds}. A difference,
with its interval and test, is over the seeds that all of its settings have; only a mixed model uses other seeds too. A
mean in a table or figure is over all seeds of its setting, so two means can differ by another number."""
TIED = "{keys} {change} only together with {leader}, so {its} effect cannot be told apart from that of {leader}."
OTHER_CODE = """\
**The settings were not all trained by the same code**: commits {commits}. A difference between two settings may be due
to the code."""


def answer(inputs: ReportInputs) -> Iterator[ReportBlock]:
    """Yield what a reader wants to know first."""
    parts = question_of(inputs)
    if not inputs.search:
        yield Paragraph(f"**Question:** {literal(text_of(parts))}")
    if inputs.learned_little:
        yield Paragraph(f"**{inputs.learned_little}** {UNIGRAM}")
    found = answers(inputs, parts)
    if len(found) > 1:
        yield Paragraph("**Answer:**")
        yield BulletList([f"**{literal(ask)}** {literal(text)}" for ask, text in found])
    else:
        yield Paragraph(f"**Answer:** {literal(found[0][1] if found else headline(inputs))}")
    if inputs.observed:
        yield Facts([(each.name, each.fact) for each in findings(inputs)])
        yield Paragraph(UNCERTAINTY)
    if inputs.search:
        yield from search_result(inputs)
        yield Facts(setup(inputs))
        return
    shown = _cards(inputs)
    if shown and (inputs.judgments[0].planned or not found):  # a league or a law says more than its comparisons
        yield from map(Paragraph, _numbers(inputs))
        yield Cards(shown[:MOST_CARDS], PICTURES_EXPLAINED + (CLAIMED if inputs.judgments[0].planned else ""))
        if shown[MOST_CARDS:]:
            yield Details(f"{len(shown) - MOST_CARDS} more", [Cards(shown[MOST_CARDS:])])
        price = price_of_more(inputs.study)
        if price and any(each.advice and math.isfinite(each.needed) for each in inputs.judgments):
            left = command_for_more(inputs, number) if (number := seeds_left(inputs.study)) else ""
            yield Paragraph(f"**More seeds:** {price}" + (f" `{left}`" if left else ""))
    yield from map(Paragraph, asked(inputs))
    yield from map(Paragraph, best_setting(inputs))
    yield Facts(setup(inputs))
    if warnings := list(_warnings(inputs)):
        yield BulletList(warnings)
    yield from levels_from_a_search(inputs)


def _numbers(inputs: ReportInputs) -> Iterator[str]:
    """Yield what the numbers of the answer and of the cards are: the unit of each metric, and the percentages."""
    metrics = {noun(each.metric): lookup(each.metric) for each in inputs.judgments if each.n}
    units = [
        f"{name} is {'a' if metric.unit.startswith(('share', 'token', 'std')) else 'in'} {metric.unit}"
        for name, metric in metrics.items()
        if metric and metric.unit
    ]
    if without := [name for name, metric in metrics.items() if metric and not metric.unit]:
        names = "the other metrics" if units and len(without) > 2 else enumerated(without)
        units.append(f"{names} {'is a number' if len(without) == 1 else 'are numbers'} without a unit")
    if units:
        shares = SHARES if any(each.percent for each in inputs.judgments) else ""
        yield NUMBERS.format(units=literal("; ".join(units)), shares=shares)


def _cards(inputs: ReportInputs) -> list[Card]:
    """Return the cards. One says if it advises more seeds than planned, or if an earlier look decided what it does not.

    One that compares losses of other causality says that too.
    """
    shown = cards(
        inputs.judgments,
        lambda each: command_for_more(inputs, each.more, each.row, n=each.n),
        lambda each: error_of_more(inputs.study, each.n + each.more),
    )
    notes = [
        (earlier_verdict(each, inputs), later_tokens(each.metric, each.compared, inputs)) for each in inputs.judgments
    ]
    return [
        card._replace(effect="; ".join(filter(None, (card.effect, *of_card))))
        for card, of_card in zip(shown, notes, strict=True)
    ]


def index_of_verdicts(experiments: dict[str, ReportInputs]) -> Iterator[ReportBlock]:
    """Yield a table with a row for each experiment: its answer, its verdicts and its best setting."""
    rows = []
    for name, inputs in experiments.items():
        counts = Counter(each.verdict for each in inputs.judgments)
        found = None if inputs.learned_little else ranking(inputs)
        rows.append(
            {
                "experiment": name,
                "answer": " ".join(filter(None, (inputs.learned_little, *_answer_in_words(inputs)))),
                "verdicts": ", ".join(f"{count} {verdict}" for verdict, count in counts.items()) or "none",
                "best setting": found.settings[0].name if found and found.settings else "–",
                "runs finished": f"{(inputs.runs['status'] == 'finished').sum()} of {len(inputs.runs)}",
            }
        )
    yield Heading("Verdicts of all experiments")
    yield TableBlock(pd.DataFrame(rows))


def _finished_with_setting(inputs: ReportInputs) -> pd.DataFrame:
    """Return the finished runs with their setting as a column; no rows if no run has finished."""
    runs = inputs.runs.assign(setting=inputs.condition)  # before the filter: pandas gives an empty table these rows
    return runs[runs["status"] == "finished"]


def _uneven_seeds(inputs: ReportInputs) -> list[int]:
    """Return the seeds of which some settings have a finished run, and others, which have any, do not."""
    runs = _finished_with_setting(inputs)
    if inputs.crosses_seeds or "seed" not in runs or runs["setting"].nunique() < 2:
        return []
    seeds = runs.groupby("setting")["seed"].agg(set)
    return sorted(int(seed) for seed in set.union(*seeds) - set.intersection(*seeds))


def _commits_of_settings(inputs: ReportInputs) -> str:
    """Return the commits of the code that trained these settings; "" if it was the same for all of them."""
    runs = _finished_with_setting(inputs).dropna(subset="commit")
    of_setting = runs.groupby("setting")["commit"].agg(lambda commits: frozenset(str(each)[:7] for each in commits))
    if of_setting.nunique() < 2:
        return ""
    number = Counter(commit for commits in of_setting for commit in commits)
    return ", ".join(f"{commit} ({count} setting{'s' * (count > 1)})" for commit, count in number.most_common())


def _answer_in_words(inputs: ReportInputs) -> list[str]:
    return [text for _, text in answers(inputs, question_of(inputs))] or [headline(inputs)]


def _warnings(inputs: ReportInputs) -> Iterator[str]:
    """Yield what changes how the page is to be read."""
    runs = inputs.runs.drop_duplicates("folder")
    lost = len(runs) - (runs["status"] == "finished").sum()
    if lost:
        missing = (runs["status"] == "missing").sum()
        what = "did not finish" + (" or are missing" if missing else "")
        what = what if missing < lost else "is missing" if missing == 1 else "are missing"
        yield f"**{lost} of {len(runs)} runs {what}**, and no result includes {'it' if lost == 1 else 'them'}."
    if inputs.study.testable and (lacking := seeds_to_complete(inputs)):
        command, advised = training_command(inputs.runs, list(lacking)), any(each.advice for each in inputs.judgments)
        yield INCOMPLETE.format(
            seeds=f"seed{'s' * (len(lacking) > 1)} {enumerated(list(lacking))}",
            runs=sum(lacking.values()),
            command=(TOGETHER if advised else "") + ALONE.format(command=command) if command else "",
        )
    if seeds := _uneven_seeds(inputs):
        yield UNEVEN.format(seeds=f"seed{'s' * (len(seeds) > 1)} {numbers_in_words(seeds)}")
    yield from warnings_of_looks(inputs.study)
    yield from warnings_of_decisions(inputs)
    yield from warnings_of_margins(inputs)
    if commits := _commits_of_settings(inputs):
        yield OTHER_CODE.format(commits=commits)
    if inputs.trained and not inputs.crosses_seeds and "seed" in runs and runs["seed"].nunique() == 1:
        yield ONE_SEED
    if several_tokenizers(runs):
        yield "The runs have different tokenizers, so only bits per byte are comparable between them."
    if (runs["causal"] == False).any() and (runs["causal"] == True).any():  # noqa: E712
        yield NOT_CAUSAL
    yield from about_same_settings(inputs)
    followers: dict[str, list[str]] = {}
    for key, leader in inputs.tied.items():
        if not key.startswith(f"{leader}.") and "experiment" not in (key, leader):
            followers.setdefault(leader, []).append(key)
    for leader, keys in followers.items():
        change, its = ("changes", "its") if len(keys) == 1 else ("change", "their")
        yield TIED.format(keys=literal(enumerated(keys)), change=change, its=its, leader=literal(leader))
