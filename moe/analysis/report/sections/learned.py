"""Whether the models of an experiment have learned enough for a verdict about routing."""

from moe.analysis.report.inputs import ReportInputs
from moe.checks import plain

LEARNED_LITTLE = """\
No run is better than a unigram model (val perplexity {}): these models have learned too little for a verdict about
routing."""


def learned_little(inputs: ReportInputs) -> str:
    """Return that no setting has a mean validation perplexity below that of a unigram model; empty if one has.

    It is empty too if that of the unigram model is not known for every run, as in runs recorded before format 8.
    """
    runs = inputs.runs.assign(condition=inputs.condition)
    runs = runs[runs["status"] == "finished"].dropna(subset="condition")
    columns = ["val/perplexity", "unigram_perplexity"]
    if not {*columns} <= {*runs} or runs["unigram_perplexity"].isna().any():
        return ""
    means = runs.groupby("condition")[columns].agg(lambda values: values.astype(float).mean()).dropna()
    perplexity, unigram = (means[column] for column in columns)
    if means.empty or (perplexity < unigram).any():
        return ""
    different = dict.fromkeys(f"{value:.4g}" for value in (unigram.min(), unigram.max()))
    return " ".join(plain(LEARNED_LITTLE.format(" to ".join(different))).splitlines())
