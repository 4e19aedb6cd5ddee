"""What a report withholds about models that learned too little (`moe.results.learned`)."""

import pandas as pd

from moe.metrics.catalog import is_quality

TOO_LITTLE = "no setting is better than a unigram model, which is too little for a verdict"
NO_VERDICT = """\
Claims and comparisons about losses, and about what follows from them, have no verdict here: no setting is better than a
unigram model."""


def withheld(table: pd.DataFrame) -> pd.DataFrame:
    """Return a table of tests without the p of those about quality, for models that learned little."""
    of_quality = table["metric"].map(is_quality).astype(bool)
    columns = [name for name in table if name == "p" or name.startswith("p ")]
    return table.assign(**{name: table[name].mask(of_quality) for name in columns})


def without_doubt(reason: str) -> str:
    """Return the reason of a verdict without `TOO_LITTLE`, where the page has said that already."""
    return "; ".join(part for part in reason.split("; ") if part != TOO_LITTLE)
