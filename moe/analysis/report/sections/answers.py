"""The answer to each part of an experiment's question: what its claims show, or else a league or a scaling law."""

from collections.abc import Callable

from moe.analysis.report.inputs import ReportInputs
from moe.analysis.report.judgments import Judgment
from moe.analysis.report.sections.headline import effect, later_tokens
from moe.analysis.report.sections.league import order_of_routers
from moe.analysis.report.sections.planned import earlier_verdict
from moe.analysis.report.sections.scaling import laws_in_words
from moe.analysis.sentences import UNDECIDED, UNTESTED, enumerated
from moe.checks import plain
from moe.config.question import Part

NO_CLAIM = "The runs do not decide this: no claim is about it, and no table ranks its settings."
# What answers a part of a question without a claim, in this order.
WITHOUT_CLAIM: tuple[Callable[[ReportInputs], str], ...] = (order_of_routers, laws_in_words)


def answers(inputs: ReportInputs, parts: list[Part]) -> list[tuple[str, str]]:
    """Return each part of a question, as a question of its own, with its answer.

    There are none if no run has finished, or if nobody said what answers the question: no part names a claim of these
    runs, and they have no league and no scaling law.
    """
    finished = (inputs.runs["status"] == "finished").any()
    named = {each.text for each in inputs.judgments if each.planned} & {text for part in parts for text in part.claims}
    if not finished or inputs.search or inputs.observed:
        return []
    if named:
        return [(part.alone, plain(_of_claims(inputs, part) or _without_claim(inputs) or NO_CLAIM)) for part in parts]
    found = "" if any(each.planned for each in inputs.judgments) else _without_claim(inputs)
    return [(" ".join(part.alone for part in parts), plain(found))] if found else []


def _without_claim(inputs: ReportInputs) -> str:
    return next(filter(None, (found(inputs) for found in WITHOUT_CLAIM)), "")


def _of_claims(inputs: ReportInputs, part: Part) -> str:
    """Return what the claims of a part say, the decided ones first; an empty text if the runs have none of them."""
    judged = [each for text in part.claims for each in inputs.judgments if each.planned and each.text == text]
    decided = [_decided(each, inputs) for each in judged if each.decided]
    waiting, untested = (
        [f"{each.quoted} ({_open(each, inputs)})" for each in judged if each.verdict == verdict]
        for verdict in (UNDECIDED, UNTESTED)
    )
    open_ = [f"The runs do not decide {enumerated(waiting)}."] if waiting else []
    return " ".join([*decided, *open_, *([f"Not tested: {enumerated(untested)}."] if untested else [])])


def _decided(judged: Judgment, inputs: ReportInputs) -> str:
    return f"{judged.quoted} is {judged.verdict}: {_clauses(effect(judged), *_notes(judged, inputs))}."


def _open(judged: Judgment, inputs: ReportInputs) -> str:
    """Return the estimate behind a claim without a decision, and what would decide it or why it is not tested."""
    if judged.n == 0:
        return judged.reason.rstrip(".")
    estimate = ", ".join(filter(None, (judged.compared, judged.amount, judged.percent)))
    why = judged.reason if judged.verdict == UNTESTED else ""
    return _clauses(estimate, earlier_verdict(judged, inputs), *_notes(judged, inputs), judged.advice, why)


def _notes(judged: Judgment, inputs: ReportInputs) -> tuple[str, str]:
    """Return which one of several comparisons is shown, and whether it says little because of routers that look ahead.

    Which comparisons there are is said where the claim is listed.
    """
    return judged.choice.rpartition("; ")[2], later_tokens(judged.metric, judged.compared, inputs)


def _clauses(*clauses: str) -> str:
    return "; ".join(filter(None, clauses))
