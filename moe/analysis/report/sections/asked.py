"""What a report found about the metrics that its reader asked for with `--metric`, on the first screen."""

import math
from collections import Counter
from collections.abc import Iterator

import pandas as pd

from moe.analysis.report.blocks import literal
from moe.analysis.report.inputs import ReportInputs
from moe.analysis.report.judgments import cards, judgments
from moe.analysis.report.sections.planned import earlier_verdict
from moe.analysis.report.sections.seed_components import spread_sentence
from moe.analysis.sentences import noun
from moe.checks import plain


def asked(inputs: ReportInputs) -> Iterator[str]:
    """Yield a sentence for each metric that was asked for and that these runs have."""
    for metric in inputs.options.metrics:
        if metric in inputs.tested:
            yield f"**Asked for, {literal(noun(metric))}:** {_found(inputs, metric)}"


def _found(inputs: ReportInputs, metric: str) -> str:
    """Return the verdicts on the comparisons of a metric, and the surest one, if a test tells which; or its mean.

    Where only seeds vary, return the sources of its spread.
    """
    judged = judgments(pd.DataFrame(), inputs.contrasts, metric)
    if inputs.crosses_seeds:
        return plain(spread_sentence(inputs.runs, metric))
    if not judged:
        values = inputs.runs[metric].astype(float)
        values = values[values.map(math.isfinite)]
        return plain(f"{values.mean():.4g} in the mean of all runs; there is no comparison of it.")
    verdicts = Counter(each.verdict for each in judged)
    counts = ", ".join(f"{count} {verdict}" for verdict, count in verdicts.items())
    number = "1 comparison" if len(judged) == 1 else f"{len(judged)} comparisons"
    if math.isnan(judged[0].p):
        return f"{number} ({counts})."
    [card] = cards(judged[:1])
    found = f"{number} ({counts}). The surest is {card.text}: {card.effect}"
    return f"{'; '.join(filter(None, (found, earlier_verdict(judged[0], inputs))))}."
