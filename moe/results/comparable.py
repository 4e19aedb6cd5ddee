"""Say which metrics of runs cannot be compared, because the runs read other text or cut it into other tokens."""

from collections.abc import Iterable

import pandas as pd

from moe.metrics.catalog import METRICS, lookup

NOT_COMPARABLE = "not comparable"
TOKENIZER = "data.tokenizer_sha256"
# What determines the validation text, and the test text.
TEXT = ("data.corpus_sha256", "data.val_percent", "data.max_val_blocks")
TEST_TEXT = (*TEXT, "data.test_sha256", "data.test_percent", "data.max_test_blocks")


def incomparable(metric: str, one: pd.DataFrame, other: pd.DataFrame) -> str:
    """Return why a metric of the runs `one` and `other` cannot be compared; an empty text if it can.

    Two tokenizers cut a text into different tokens, so means over tokens are means over different things. A loss or
    accuracy on other text does not measure the same thing either. Runs without a value of the metric play no part.
    """
    entry = METRICS.get(metric) or METRICS.get(metric.rpartition("/")[0])
    if entry is None:
        return ""
    one, other = (runs[runs[metric].notna()] if metric in runs else runs[:0] for runs in (one, other))
    if one.empty or other.empty:
        return ""
    keys = {"quality": TEXT, "capacity limit": TEXT, "test": TEST_TEXT}.get(entry.group, ())
    if any(_levels(one, key) != _levels(other, key) for key in keys):
        kind = "test" if entry.group == "test" else "validation"
        return f"{NOT_COMPARABLE}: the {kind} texts differ, so {metric} does not measure the same thing"
    other_unit = "test/bits_per_byte" if entry.group == "test" else "val/bits_per_byte"
    if entry.per_token and _levels(one, TOKENIZER) != _levels(other, TOKENIZER):
        return f"{NOT_COMPARABLE}: the tokenizers differ, and {metric} is a mean over tokens; compare {other_unit}"
    return ""


def not_poolable(metric: str, runs: pd.DataFrame) -> str:
    """Return why the values of a metric of all these runs cannot be analyzed together; an empty text if they can."""
    runs = runs[runs[metric].notna()] if metric in runs else runs[:0]
    keys = [key for key in (TOKENIZER, *TEST_TEXT) if key in runs]
    groups = [members for _, members in runs.groupby(keys, dropna=False)] if keys else []
    return next(filter(None, (incomparable(metric, groups[0], other) for other in groups[1:])), "")


def several_tokenizers(runs: pd.DataFrame) -> bool:
    """Return whether the tokens of these runs are not the same, so that bits per byte replace the perplexity."""
    return TOKENIZER in runs and runs[TOKENIZER].nunique() > 1


def shown_together(runs: pd.DataFrame, metrics: Iterable[str]) -> list[str]:
    """Return those of `metrics` that can stand in one table about these runs.

    If the runs have several tokenizers, these are all but means over tokens. Where the layers of a run have different
    numbers of experts, it has no load of all layers together; then the mean over layers stands for it in all runs.
    Where results choose settings, as in a search, nothing about the test text is shown.
    """
    metrics = [with_every_run(runs, metric) for metric in metrics]
    if search_goal(runs):
        metrics = [metric for metric in metrics if not metric.startswith("test/")]
    if not several_tokenizers(runs):
        return metrics
    return [metric for metric in metrics if not ((entry := lookup(metric)) and entry.per_token)]


def with_every_run(runs: pd.DataFrame, metric: str) -> str:
    """Return a metric, or the mean over layers in place of `.../pooled` if a run has only that."""
    over_layers = metric.removesuffix("/pooled")
    if over_layers == metric or over_layers not in runs:
        return metric
    without = runs[metric].isna() if metric in runs else True
    return over_layers if (runs[over_layers].notna() & without).any() else metric


def _levels(runs: pd.DataFrame, key: str) -> set[object]:
    return set(runs[key].dropna()) if key in runs else set()


def search_goal(runs: pd.DataFrame) -> str | None:
    """Return what a search aimed at that chose some of these runs, such as "minimize val/loss"; None if none did.

    No test is valid on such runs, because results decided which of them there are.
    """
    goals = runs["search"].dropna() if "search" in runs else ()
    return str(next(iter(goals))) if len(goals) else None
