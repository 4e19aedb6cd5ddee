"""Whether the models of an experiment have learned enough for a verdict about their quality."""

import pandas as pd

from moe.checks import plain
from moe.results.conditions import conditions, varied_factors

LEARNED_LITTLE = """\
In the mean over seeds, no setting is better than a unigram model (val perplexity {}): these models have learned too
little for a verdict about their quality."""
COLUMNS = ["val/perplexity", "unigram_perplexity"]


def learned_little(runs: pd.DataFrame) -> str:
    """Return that no setting has a mean validation perplexity below that of a unigram model; empty if one has.

    runs: of one experiment. It is empty too if that of the unigram model is not known for every run, as in runs
    recorded before format 8.
    """
    runs = runs[runs["status"] == "finished"]
    if not {*COLUMNS} <= {*runs} or runs["unigram_perplexity"].isna().any():
        return ""
    factors = [factor for factor in varied_factors(runs) if factor != "seed"]
    means = pd.DataFrame([members[COLUMNS].astype(float).mean() for _, members in conditions(runs, factors)]).dropna()
    if means.empty or (means["val/perplexity"] < means["unigram_perplexity"]).any():
        return ""
    unigram = means["unigram_perplexity"]
    different = dict.fromkeys(f"{value:.4g}" for value in (unigram.min(), unigram.max()))
    return " ".join(plain(LEARNED_LITTLE.format(" to ".join(different))).splitlines())
