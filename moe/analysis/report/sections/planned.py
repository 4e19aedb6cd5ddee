"""What was planned before the runs, and what follows from earlier looks at their results."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import asdict
from datetime import datetime

import pandas as pd

from moe.analysis.looks import FURTHER, Looks, Question, Seen, Study, level_as_text
from moe.analysis.power import SIGNIFICANCE
from moe.analysis.recorded import alike
from moe.analysis.report.blocks import literal
from moe.analysis.report.inputs import ReportInputs
from moe.analysis.report.judgments import Judgment, judgments
from moe.analysis.report.sections.commands import claims_of
from moe.analysis.sentences import DETERMINISTIC, EQUIVALENT, directions, enumerated, noun
from moe.checks import printable
from moe.config.claim import ClaimConfig
from moe.config.words import as_word
from moe.runs.planned import PlannedStudy, digest_of, short

CHANGED = """\
**Other claims were planned before.** On {time}, {experiment} had other claims ({claims}), planned for {runs} of these
runs{changes}. Runs with the same settings give the same results, so the present claims may have been chosen by
results."""
CHANGED_SINCE = """\
**The claims were changed between two commands.** On {time}, {experiment} was planned with {claims}, and on {newest}
with others{changes}. Each claim is judged by the runs that recorded it alone. But the newer claims may have been chosen
by results of the earlier runs."""
OLD = " A comparison that an earlier look made with the same runs keeps at least the share that it had."
NEW = " No earlier look at these runs had asked for {what}."
BEYOND = """\
**This is look {number}{of} at these runs, after {reached}.** On {time}, the results of {which} could be seen, in a
report or because a command had ended.{new} In this look, {tests} together have {share:.3g} % instead of 5 %.{old}
Together with the looks before, chance decides something in at most {total:.3g} % of studies.{keep}"""
KEEP_RUNS = " To keep 5 %, plan the number of seeds before the first run (for example `planned_seeds=8`)."
KEEP_QUESTIONS = " To keep 5 %, name all metrics and references in the first report."
NO_RECORD = """\
unknown: no record of a plan or of an earlier look was found beside the runs, so this report takes its look for the
first one. If the runs are a copy, copy `plans.json`, `looks.json` and `ended.jsonl` too"""
NO_PLAN = "unknown: no record of a plan was found beside the runs"
ENDS_UNKNOWN = """\
**There is no `ended.jsonl` beside `plans.json`.** So this report does not know which runs had ended before a later
command, and its tests may have too large a share of the 5 %. If the runs are a copy, copy this file too."""
NO_CLAIMS = pd.DataFrame()  # for judgments on comparisons alone
FINGERPRINT = r" \[[0-9a-f]{8}\]$"  # ends the name of a claim in looks
NUMBER = r"(?<==)-?\d+(\.\d+)?(e[-+]?\d+)?(?=,|$)"  # a level in the name of a combination of levels
MOST_LOST = 5  # verdicts of an earlier look that a warning names
REACHED = "the planned number of seeds ({planned}) was reached"
FIRST_LOOK = "the {seeds}, which decide because no number was planned"
NOT_PLANNED = "These runs had no `planned_seeds`, so the number of the first look decides. "
WITHIN = """\
This is look {number} at these runs: a setting has {now} of the {seeds}, on average.{absent} In this look, {tests}
together have {share:.3g} % instead of 5 %, and all looks up to that number together {error}.{old}"""
NOTHING_NEW = """\
**This is look {number} at these runs, and a setting has no more seeds than before, on average** ({now} of the
{seeds}).{absent}{new} Nothing of the 5 % is left for comparisons that are new in this look, so these decide
nothing.{old} Reports about more seeds, up to that number, decide."""
ABSENT = """\
 This counts runs of earlier looks that are not in this report ({number}): left out, gone or trained again."""
KEPT = "keep the 5 %"
EXCEEDED = "err in up to {total:.3g} % of studies, because one of them did not know of another"
USED_UP = """\
All of the {seeds} have been used. In a report on more seeds, the new tests together have {share:.3g} % instead of 5 %,
so they need a smaller p. The numbers of seeds above allow for that. The looks so far and all such reports together err
in up to {total:.3g} % of studies."""
LEFT = """\
{left} of the {seeds} {are} left.{absent} Reports up to that number, all together, {error}. With reports on more
seeds, all together err in up to {total:.3g} % of studies."""
BEYOND_PLAN = """\
That makes {number:.0f} seeds, more than the {seeds}. A report on so many seeds is stricter: see “More seeds”."""
DECIDED = """\
**An earlier look decided what this one does not.** On {time}, with {seeds:.3g} seeds on average, {found}. That verdict
stays valid: the looks share the 5 %, so that each may decide. If you quote it, quote its date, its seeds and this
report too."""
NOT_COMPARED = """\
**An earlier look decided what this report does not compare.** On {time}, with {seeds:.3g} seeds on average, {found}.
That verdict is about what that look compared, and stays valid. This report has other metrics, claims or levels, or
makes a comparison at each level of another factor. If you quote one of them, quote both."""
LATE_MARGIN = """\
**The margin {margin} of {metric} was not given at the first look at these runs**, before {time}. Results may have
chosen it, so there is no verdict on it. A claim of kind `equivalent` states a margin before the runs."""
NEXT_LOOK = """\
look {number} at {runs}; in the next look{at}, new tests together have {share:.3g} % instead of 5 %"""
NOT_WRITTEN = """\
**This look was not written down** ({why}). A later report will not know of it, so its tests will have too large a share
of the 5 %."""
NOT_WRITTEN_IN_SHORT = "look {number} at {runs}, which was not written down ({why}): a later report will not know of it"


def margin_facts(inputs: ReportInputs) -> list[tuple[str, str]]:
    """Return the margins that are judged, and that they were given in time, as a fact of the set-up."""
    given = ", ".join(f"{margin} of {metric}" for metric, margin in inputs.margins.items())
    return [("Margin", literal(f"{given}, given at the first look at these runs"))] if given else []


def warnings_of_margins(inputs: ReportInputs) -> Iterator[str]:
    """Yield for each margin that was given after the first look that it is not judged."""
    for metric in inputs.study.late(inputs.options.margins):
        margin, time = literal(str(inputs.options.margins[metric])), _to_second(inputs.study.earlier[0].time)
        yield LATE_MARGIN.format(margin=margin, metric=metric, time=time)


def decisions(inputs: ReportInputs) -> dict[str, str]:
    """Return the verdicts that tests decided, on claims and comparisons of the report, by the names of looks.

    A difference that is the same in every seed was not tested, so that more seeds may refute it.
    """
    decided = [each for each in _judged(inputs) if each.decided and each.verdict != DETERMINISTIC]
    return {name_in_looks(each, inputs): _as_in_looks(each.verdict, each) for each in decided}


def name_in_looks(judged: Judgment, inputs: ReportInputs) -> str:
    """Return the name under which a look records a verdict: of a claim, the words and the fingerprint.

    A comparison has the name of its metric and levels, whatever claims there are and whichever level is the reference.
    A later command may change a claim and keep its words. A field that has its default does not change the fingerprint,
    so that later code can add fields.
    """
    if judged.levels:
        factor, *levels, within = judged.levels
        first, second = sorted(map(level_as_text, levels))
        return f"{judged.metric}: {factor} {second} vs {first}" + (f" at {_numbers_alike(within)}" if within else "")
    known, defaults = claims_of(inputs) if judged.planned else [], asdict(ClaimConfig())
    if judged.row is None or judged.row >= len(known):
        return _title(judged, inputs)
    claim = {key: value for key, value in asdict(known[judged.row][0]).items() if value != defaults[key]}
    return f"{judged.text} [{short(digest_of(claim))}]"


def _numbers_alike(cell: object) -> str:
    """Return "lb=0.0, router=topk" with each level as `level_as_text` has it: "lb=0, router=topk"."""
    return re.sub(NUMBER, lambda number: level_as_text(float(number[0])), str(cell))


def _as_in_looks(verdict: str, judged: Judgment) -> str:
    """Return a verdict on a comparison in the order of levels that its name in looks has, or back from there."""
    if not judged.levels:
        return verdict
    up, down = directions(judged.metric)
    _, level, reference, _ = judged.levels
    turned = level_as_text(level) < level_as_text(reference)
    return {up: down, down: up}.get(verdict, verdict) if turned else verdict


def earlier_verdict(judged: Judgment, inputs: ReportInputs) -> str:
    """Return what the looks that decided a claim or comparison said of it, if this one does not; "" if none did."""
    if judged.decided or not inputs.study.earlier:
        return ""
    name = name_in_looks(judged, inputs)
    verdicts = [look.decided[name] for look in inputs.study.earlier if name in look.decided]
    found = dict.fromkeys(_as_in_looks(verdict, judged) for verdict in verdicts)
    if not found:
        return ""
    if len(found) > 1:
        return f"but earlier looks found it {enumerated([*found])}, which all stay valid"
    return f"but an earlier look found it {next(iter(found))}, which stays valid"


def _judged(inputs: ReportInputs) -> list[Judgment]:
    """Return the judgments of the report, and those on all comparisons of its other metrics."""
    others = [metric for metric in inputs.tested if metric not in _compared_first(inputs)]
    return [*inputs.judgments, *(each for metric in others for each in judgments(NO_CLAIMS, inputs.contrasts, metric))]


def _compared_first(inputs: ReportInputs) -> set[str]:
    """Return the metric whose comparisons are the judgments of a report without claims; with claims, there is none."""
    return {each.metric for each in inputs.judgments if not each.planned}


def _title(judged: Judgment, inputs: ReportInputs) -> str:
    """Return a claim, or the levels of a comparison, after the metric if that is not the first of the report."""
    first = judged.planned or judged.metric in _compared_first(inputs)
    return judged.title if first else f"{noun(judged.metric)}: {judged.title}"


def warnings_of_decisions(inputs: ReportInputs) -> Iterator[str]:
    """Yield each look whose verdict on some claim or comparison is another than the present one, or has none here."""
    if not any(look.decided for look in inputs.study.earlier):
        return
    judged = {name_in_looks(each, inputs): each for each in _judged(inputs)}
    said, gone_before = set[tuple[str, str, frozenset[str]]](), set[tuple[str, str]]()
    for look in inputs.study.earlier:
        known = [(judged[name], verdict) for name, verdict in look.decided.items() if name in judged]
        earlier = [(now, _as_in_looks(verdict, now)) for now, verdict in known]
        runs = frozenset(look.runs)
        changed = [(now, verdict) for now, verdict in earlier if not now.decided or now.verdict != verdict]
        lost = [(_title(now, inputs), _with_margin(verdict, now.metric, look)) for now, verdict in changed]
        lost = [each for each in lost if (*each, runs) not in said]
        said.update((*each, runs) for each in lost)
        if lost:
            yield _decided_then(DECIDED, look, lost)
        gone = [(name, verdict) for name, verdict in look.decided.items() if name not in judged]
        new = [each for each in gone if each not in gone_before]
        gone_before.update(new)
        if new:
            found = [(_without_id(name), _with_margin(verdict, name.partition(": ")[0], look)) for name, verdict in new]
            yield _decided_then(NOT_COMPARED, look, found)


def _with_margin(verdict: str, metric: str, look: Seen) -> str:
    """Return a verdict of a look; one that two levels are equivalent with the margin that the look had."""
    return f"{verdict} within {look.margins[metric]}" if verdict == EQUIVALENT and metric in look.margins else verdict


def _without_id(name: str) -> str:
    """Return a name of looks as a text: a claim without its fingerprint, or a comparison with its metric in words."""
    if re.search(FINGERPRINT, name):
        return re.sub(FINGERPRINT, "", name)
    metric, _, levels = name.partition(": ")
    return f"{noun(metric)}: {levels}"


def _decided_then(warning: str, look: Seen, verdicts: Sequence[tuple[str, str]]) -> str:
    """Return a warning about verdicts of an earlier look, by the claims and comparisons that it names."""
    found = [f"“{text}” was {verdict}" for text, verdict in verdicts]
    found[MOST_LOST:] = [f"{len(found) - MOST_LOST} more were decided"] if found[MOST_LOST:] else []
    seeds = len(look.runs) / len({*look.runs.values()})
    return warning.format(time=_to_second(look.time), seeds=seeds, found=literal(enumerated(found)))


def planned_facts(study: Study) -> list[tuple[str, str]]:
    """Return what was planned before the first step, as a fact of the set-up; that no record tells it, if none does.

    Without a plan there is no such fact about runs of one seed, because no test is possible, and about shipped tables.
    """
    if not study.plans:
        records = NO_PLAN if study.earlier else NO_RECORD
        return [("Planned", records)] if study.here and study.testable else []
    until = f"planned number of seeds: {study.planned or 'none'}"
    if len({plan.planned_seeds for plan in study.plans}) > 1:
        until += " (that of the first plan of which a run has ended)"
    first, *later = (_plan_in_words(plan, study.starts) for plan in study.plans)
    newest = f"; the newest of {len(study.plans)} plans: {later[-1]}" if later else ""
    return [("Planned", literal(f"{first}{newest}; {until}"))]


def _plan_in_words(plan: PlannedStudy, starts: Mapping[int, datetime]) -> str:
    """Return what a plan says, and before the first step of which runs. starts: when the first run of a seed started.

    Runs that had begun when the plan was written down are not among the runs that it names by their fingerprints.
    """
    time = datetime.fromisoformat(plan.time)
    new = [seed for seed in plan.seeds if starts.get(seed, time) >= time]
    which = f"the runs of seed{'s' * (len(new) > 1)} {_numbers(new)}" if new else f"{len(plan.runs)} of its runs"
    before = "before the first step" + (f" of {which}" if new != plan.seeds else "")
    written = f"written down {plan.time}, {before}, fingerprint {short(plan.digest)}"
    decides = f", planned_seeds={plan.planned_seeds}" if plan.planned_seeds else ""
    return f"{_claims(len(plan.claims))}, seeds {_numbers(plan.seeds)}{decides}, {written}"


def _numbers(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def warnings_of_looks(study: Study) -> Iterator[str]:
    """Yield what a reader has to know of earlier looks and of changed claims."""
    for earlier, runs in study.changed[:3]:
        yield CHANGED.format(
            time=earlier.time,
            experiment=literal(earlier.experiment),
            claims=len(alike(earlier, study.plans[-1])),
            runs=runs,
            changes=_changes(earlier, study.plans[-1]),
        )
    of_same_runs, newest = [plan for plan, _ in study.changed], study.plans[-1:]
    others = [plan for plan in study.plans if plan.claims != newest[0].claims and plan not in of_same_runs]
    for earlier in others[-1:]:
        yield CHANGED_SINCE.format(
            time=earlier.time,
            experiment=literal(earlier.experiment),
            claims=_claims(len(earlier.claims)),
            newest=newest[0].time,
            changes=_changes(earlier, newest[0]),
        )
    looks = study.looks
    if not study.testable:
        return
    if not study.ends_known:
        yield ENDS_UNKNOWN
    if study.unwritten:
        yield NOT_WRITTEN.format(why=literal(study.unwritten))
    now, before = looks.seeds[looks.place], looks.seeds[: looks.place]
    if not before and now >= looks.planned:
        return
    facts = {
        "number": looks.place + 1,
        "of": _of_all(looks),
        "now": f"{now:.3g}",
        "planned": f"{looks.planned:.3g}",
        "seeds": _decisive_seeds(study),
        "absent": _absent(study, looks.place),
        "error": _error_of_planned(study),
        "share": 100 * SIGNIFICANCE * looks.share(),
        "tests": "all new comparisons" if before else "the tests of a report",
        "old": OLD if before else "",
        "new": NEW.format(what=_asked(study.new)) if study.new else "",
        "keep": KEEP_QUESTIONS if study.new else "" if _is_planned(study) else KEEP_RUNS,
    }
    if any(each >= looks.planned for each in before):
        total = 100 * SIGNIFICANCE * study.spent
        reached = (REACHED if _is_planned(study) else FIRST_LOOK).format(**facts)
        time, which = _seen_before(study)
        yield BEYOND.format(**facts, reached=reached, time=time, which=which, total=total)
    elif now in before:
        yield NOTHING_NEW.format(**facts)
    else:
        yield WITHIN.format(**facts)


def _of_all(looks: Looks) -> str:
    """Return how many looks there are, after the number of the present one; "" if it is the last of them."""
    return f" of {len(looks.seeds)}" if looks.place + 1 < len(looks.seeds) else ""


def _seen_before(study: Study) -> tuple[str, str]:
    """Return when the look before this one was, and which runs it saw."""
    last = study.distinct[study.looks.place - 1]
    known = last.runs.keys() <= study.runs.keys()
    seeds = sorted({study.runs[folder].seed for folder in last.runs}) if known else []
    of = f" (seed{'s' * (len(seeds) > 1)} {_numbers(seeds)})" if seeds else ""
    return _to_second(last.time), f"{len(last.runs)} run{'s' * (len(last.runs) != 1)}{of}"


def _to_second(time: str) -> str:
    """Return the time of a look without the parts of its second."""
    return datetime.fromisoformat(time).isoformat(timespec="seconds")


def _asked(new: Set[Question]) -> str:
    """Return the metrics and references of questions, such as "train/loss, and noise=0.5 as the reference"."""
    known = {each.metric for each in new if not each.factor}
    references = sorted({f"{each.factor}={each.reference}" for each in new if each.factor and each.metric not in known})
    compared = f"{', '.join(references)} as the reference" if references else ""
    return literal(" and ".join(each for each in (", ".join(sorted(known)), compared) if each))


def _changes(earlier: PlannedStudy, newest: PlannedStudy) -> str:
    """Return what became of claims whose words stayed, such as ": “A” had kind higher then, and has lower now"."""
    now = {claim.get("text"): claim for claim in newest.claims}
    found = []
    for claim in earlier.claims:
        new = now.get(claim.get("text"), claim)
        fields = [key for key in new if new[key] != claim.get(key)]
        if fields:
            before = enumerated([f"{key} {as_word(claim.get(key))}" for key in fields])
            after = enumerated([as_word(new[key]) for key in fields])
            found.append(f"“{claim.get('text')}” had {before} then, and has {after} now")
    return literal(f": {'; '.join(found)}") if found else ""


def price_of_more(study: Study) -> str:
    """Return what a report about more seeds costs, as a share of the 5 %; if planned seeds are left, how many."""
    if not study.testable:
        return ""
    seeds, total = _decisive_seeds(study), 100 * SIGNIFICANCE * (1 / (1 - FURTHER) + study.excess)
    if left := seeds_left(study):
        are, absent = "is" if left == 1 else "are", _absent(study, len(study.distinct) - 1)
        error = _error_of_planned(study)
        return LEFT.format(left=left, seeds=seeds, are=are, absent=absent, error=error, total=total)
    share = 100 * SIGNIFICANCE * study.looks.next_share
    return ("" if _is_planned(study) else NOT_PLANNED) + USED_UP.format(seeds=seeds, share=share, total=total)


def _is_planned(study: Study) -> bool:
    """Return whether the number of seeds after which the study decides was planned, and is not that of a first look."""
    return study.planned == study.looks.planned


def _decisive_seeds(study: Study) -> str:
    """Return the seeds after which the study decides, in words. Runs of the first look that had not ended count too."""
    number = f"{study.looks.planned:.3g}"
    noun = "seed" if number == "1" else "seeds"
    return f"{number} planned {noun}" if _is_planned(study) else f"{number} {noun} of the first look"


def _absent(study: Study, place: int) -> str:
    """Return that the number of seeds at a look counts runs that this report does not have; "" if it does not."""
    absent = study.absent_at(place)
    return ABSENT.format(number=len(absent)) if absent else ""


def _error_of_planned(study: Study) -> str:
    """Return how often all looks up to the planned number of seeds err together."""
    return EXCEEDED.format(total=100 * SIGNIFICANCE * (1 + study.excess)) if study.excess else KEPT


def look_in_words(inputs: ReportInputs) -> str:
    """Return a line for the terminal: which look a report is, and what the next one costs; "" for what is no look."""
    study, looks = inputs.study, inputs.study.looks
    if inputs.search or inputs.observed or not study.testable:
        return ""
    facts = {"number": f"{looks.place + 1}{_of_all(looks)}", "runs": printable(study.name or "these runs")}
    if study.unwritten:
        return NOT_WRITTEN_IN_SHORT.format(**facts, why=printable(study.unwritten))
    at = f" (at the {_decisive_seeds(study)})" if seeds_left(study) else ""
    share = 100 * SIGNIFICANCE * looks.next_share
    return NEXT_LOOK.format(**facts, at=at, share=share)


def seeds_left(study: Study) -> int:
    """Return how many of the planned seeds no look has seen."""
    return max(0, math.ceil(study.looks.planned - study.looks.seeds[-1]))


def error_of_more(study: Study, seeds: int | float) -> str:
    """Return that so many seeds are more than planned; "" up to the planned number, and for NaN."""
    return BEYOND_PLAN.format(number=seeds, seeds=_decisive_seeds(study)) if seeds > study.looks.planned else ""


def _claims(number: int) -> str:
    return {0: "no claims", 1: "1 claim"}.get(number, f"{number} claims")
