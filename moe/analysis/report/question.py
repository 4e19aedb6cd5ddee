"""The question that a report answers, in parts, each with the claims that answer it."""

import json

import yaml

from moe.analysis.report.inputs import ReportInputs, league_metric
from moe.analysis.report.sections.league import standings
from moe.analysis.sentences import noun
from moe.config.options import sources
from moe.config.question import Part, parts_of, text_of
from moe.files import read_text


def question_of(inputs: ReportInputs) -> list[Part]:
    """Return the parts of the question that the runs recorded; without a question, one that their factors suggest.

    Runs from before questions had parts recorded a text. Then the experiment's file tells the parts, if its parts
    together are this text.
    """
    column = inputs.loaded["question"].dropna() if "question" in inputs.loaded else ()
    written = [text for text in dict.fromkeys(map(str, column)) if text.strip()]
    if not written:
        return [Part(_suggested(inputs))]
    by_text = {text_of(parts): parts for parts in sorted(map(_read, written), key=len)}
    if len(by_text) > 1:
        return [Part(" ".join(by_text))]
    [parts] = by_text.values()
    for name in dict.fromkeys(str(each).partition(": ")[0] for each in inputs.loaded["experiment"].dropna()):
        in_file = _of_experiment(name)
        if len(parts) == 1 and text_of(in_file) == text_of(parts):
            return in_file
    return parts


def _read(text: str) -> list[Part]:
    """Return the parts of a question as the table of runs has it: a text, or the JSON of a list."""
    try:
        return parts_of(json.loads(text))
    except (ValueError, RecursionError):  # no JSON, or no list of parts
        return [Part(text)]


def _of_experiment(name: str) -> list[Part]:
    """Return the parts in the file of an experiment; none if there is no such file, or if it cannot be read."""
    try:
        path = sources("experiment").get(name)
        content = yaml.safe_load(read_text(path)) if path else None
        return parts_of(content["question"] if isinstance(content, dict) else None)
    except (OSError, ValueError, LookupError, yaml.YAMLError):
        return []


def _suggested(inputs: ReportInputs) -> str:
    """Return a question that the factors of the runs suggest."""
    if inputs.runs["folder"].nunique() == 1:
        return "How well does this one run do?"
    if not inputs.factors:
        return "How much do runs differ by chance alone, if nothing but the seed varies?"
    units = [each.unit for each in inputs.judgments] or [noun(each) for each in inputs.tested[:1]]
    if standings(inputs) and not any(each.planned for each in inputs.judgments):
        units = [noun(str(league_metric(inputs)))]  # the league is the answer
    outcome = " and ".join(dict.fromkeys(units)) or "the model"
    return f"What does a change of {' and '.join(inputs.factors)} do to {outcome}?"
