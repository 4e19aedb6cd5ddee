"""The terms of a report, each in a sentence, for readers who have the page alone."""

from collections.abc import Iterator

import pandas as pd

from moe.analysis.report.blocks import Details, Glossary, ReportBlock, TableBlock, Term
from moe.analysis.report.inputs import ReportInputs
from moe.metrics.catalog import select

# Where the first use of a word is to be a link, its pattern says which forms of the word count.
TERMS = [
    Term(
        "Mixture of Experts, router",
        "a layer with several networks (experts), of which a small network, the router, chooses a few for each token",
        "[Rr]outers?|[Ee]xperts?",
    ),
    Term(
        "seed",
        "the number that decides initial weights and data order; runs that differ in it alone show what chance is",
        "[Ss]eeds?",
    ),
    Term(
        "setting (condition)",
        "one combination of levels of all factors; its runs differ in the seed alone",
        "[Ss]ettings?|[Cc]onditions?",
    ),
    Term(
        "factor, level",
        "what was varied on purpose, such as noise, and one of its values, such as 0.1",
        "factors?|reference level|levels of",
    ),
    Term(
        "contrast",
        "the difference between two levels of a factor with everything else equal",
        "[Cc]ontrasts?|comparisons?",
    ),
    Term(
        "paired difference",
        "the difference between two runs of the same seed, which share data order and initial weights, so that much "
        "of the chance cancels",
        "[Pp]aired(?: differences?)?|same seed",
    ),
    Term("n", "the number of seeds", "n(?==)"),
    Term(
        "95 % interval",
        "a range that contains the true value in 95 % of repetitions of the whole study; a pair such as [-1, 2] after "
        "a difference is its interval",
        "95 % (?:t )?intervals?|intervals?",
    ),
    Term(
        "p",
        "how often chance alone would give a difference at least as large, if there were none",
        "p(?==)|(?<= )p(?= is)",
    ),
    Term(
        "p after correction (Holm)",
        "p multiplied up for the number of tests in this report, because many tests find something by chance",
        "after correction|Holm",
    ),
    Term(
        "family, level of a test",
        "tests that share a part of the 5 %; the level is what one test gets, and a p below it is significant",
        "famil(?:y|ies)|level(?= \\d)|level of the test",
    ),
    Term(
        "supported, contradicted",
        "the verdict on a claim that these runs confirm, or whose opposite they show, beyond what chance explains",
        "supported|contradicted",
    ),
    Term(
        "undecided",
        "neither shown to differ nor shown to be equal; it does not mean that there is no difference",
        "[Uu]ndecided|not decided",
    ),
    Term("not tested", "a test was impossible, as with one seed or without runs to compare", "[Nn]ot tested"),
    Term("equivalent", "shown to differ by less than the margin that was chosen beforehand", "[Ee]quivalent"),
    Term("claim", "a prediction that was written down before the first run", "(?:[Pp]lanned )?[Cc]laims?"),
    Term(
        "source",
        "an earlier study whose sentence a claim repeats; docs/sources.md in the project introduces its own",
        "[Ss]ources?",
    ),
    Term(
        "smallest detectable effect",
        "the true difference that so many seeds would have found in 80 % of cases",
        "smallest detectable effect",
    ),
    Term("d_z", "the mean paired difference in standard deviations of the paired differences", "d_z"),
    Term(
        "perplexity",
        "exp of the validation loss: among how many equally likely tokens the model seems to choose",
        "[Pp]erplexity",
    ),
    Term(
        "load, load CV",
        "how many tokens an expert gets; its coefficient of variation is 0 if all get the same. The terminal prints "
        "its mean over layers; pooled means that the loads of all layers are added first",
        "load CV|[Ll]oad(?!-)",
    ),
    Term(
        "drop rate",
        "the share of assignments that were not carried out, because the expert was full",
        "[Dd]rop rate|dropped",
    ),
    Term(
        "(not causal)",
        "a router, or a rule for drops, whose choice for a token depends on later tokens; its loss cannot be compared "
        "with that of causal ones, and it cannot generate text in the same way",
        r"\(not causal\)",
    ),
]


def terms(inputs: ReportInputs) -> Iterator[ReportBlock]:
    """Yield what the words of the report mean, and then the names of the metrics that these runs have."""
    yield Glossary(TERMS)
    known = {str(name) for name in inputs.runs.dropna(axis="columns", how="all")}
    entries = [metric for metric in select(written="evaluation") if metric.name in known]
    rows = [{"metric": metric.name, "unit": metric.unit, "meaning": metric.meaning} for metric in entries]
    if rows:
        yield Details(f"{len(rows)} names of metrics", [TableBlock(pd.DataFrame(rows))])
