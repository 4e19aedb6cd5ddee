"""Whether the models of an experiment have learned enough for a verdict about their quality."""

import pandas as pd

from moe.checks import plain
from moe.metrics.catalog import is_quality
from moe.results.conditions import conditions, varied_factors

LEARNED_LITTLE = """\
In the mean over seeds, no setting is better than a unigram model (val perplexity {}): these models have learned too
little for a verdict about their quality."""
TOO_LITTLE = "no setting is better than a unigram model, which is too little for a verdict"
NO_VERDICT = """\
Claims and comparisons about losses, and about what follows from them, have no verdict here: no setting is better than a
unigram model."""
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


def withheld(table: pd.DataFrame) -> pd.DataFrame:
    """Return a table of tests without the p of those about quality, for models that learned little."""
    of_quality = table["metric"].map(is_quality).astype(bool)
    columns = [name for name in table if name == "p" or name.startswith("p ")]
    return table.assign(**{name: table[name].mask(of_quality) for name in columns})


def without_doubt(reason: str) -> str:
    """Return the reason of a verdict without `TOO_LITTLE`, where the page has said that already."""
    return "; ".join(part for part in reason.split("; ") if part != TOO_LITTLE)
