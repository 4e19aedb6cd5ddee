"""The terms of a report, each in a sentence, for readers who have the page alone."""

from collections.abc import Iterator

from moe.analysis.report.blocks import Facts, ReportBlock
from moe.analysis.report.inputs import ReportInputs

TERMS = {
    "Mixture of Experts, router": "a layer with several networks (experts), of which a small network, the router, "
    "chooses a few for each token",
    "seed": "the number that decides initial weights and data order; runs that differ in it alone show what chance is",
    "setting (condition)": "one combination of levels of all factors; its runs differ in the seed alone",
    "factor, level": "what was varied on purpose, such as noise, and one of its values, such as 0.1",
    "contrast": "the difference between two levels of a factor with everything else equal",
    "paired difference": "the difference between two runs of the same seed, which share data order and initial "
    "weights, so that much of the chance cancels",
    "n": "the number of seeds",
    "95 % interval": "a range that contains the true value in 95 % of repetitions of the whole study",
    "p": "how often chance alone would give a difference at least as large, if there were none",
    "p after correction (Holm)": "p multiplied up for the number of tests in this report, because many tests find "
    "something by chance",
    "undecided": "neither shown to differ nor shown to be equal; it does not mean that there is no difference",
    "equivalent": "shown to differ by less than the margin that was chosen beforehand",
    "claim": "a prediction that was written down before the first run",
    "d_z": "the mean paired difference in standard deviations of the paired differences",
    "perplexity": "exp of the validation loss: among how many equally likely tokens the model seems to choose",
    "load, load CV": "how many tokens an expert gets; its coefficient of variation is 0 if all get the same",
    "drop rate": "the share of assignments that were not carried out, because the expert was full",
    "(not causal)": "a router whose choice for a token depends on later tokens; its loss cannot be compared with that "
    "of causal routers, and it cannot generate text in the same way",
}


def terms(_: ReportInputs) -> Iterator[ReportBlock]:
    """Yield what the words of the report mean."""
    yield Facts(list(TERMS.items()))
