"""Say which metrics of runs cannot be compared: the runs read other text, cut it into other tokens, or ran apart."""

import itertools
from collections.abc import Iterable

import numpy as np
import pandas as pd

from moe.metrics.catalog import METRICS, lookup
from moe.metrics.metric import Metric
from moe.results.conditions import varied_factors

NOT_COMPARABLE = "not comparable"
LATER_TOKENS = "one side alone may use later tokens of the text"
TOKENIZER = "data.tokenizer_sha256"
# What determines the validation text, and the test text.
TEXT = ("data.corpus_sha256", "data.val_percent", "data.max_val_blocks")
TEST_TEXT = (*TEXT, "data.test_sha256", "data.test_percent", "data.max_test_blocks")
WHEN = ("seed", "started", "seconds")  # what tells when the runs of each seed took place
SIDES = ("one setting", "the other")
SECOND = 1.0  # records have the start of a run in whole seconds


def incomparable(
    metric: str, one: pd.DataFrame, other: pd.DataFrame, *, timed: bool = False, names: tuple[str, str] = SIDES
) -> str:
    """Return why a metric of the runs `one` and `other` cannot be compared; an empty text if it can.

    Two tokenizers cut a text into different tokens, so means over tokens are means over different things. A loss or
    accuracy on other text does not measure the same thing either. A speed or a time depends on what else the machine
    did, so the runs must have taken turns (`apart`). Runs without a value of the metric play no part.

    timed: whether the metric was read at a time, and so depends on the speed. names: of the two settings.
    """
    one, other = (runs[runs[metric].notna()] if metric in runs else runs[:0] for runs in (one, other))
    if reason := _other_text(metric, one, other):
        return reason
    known = _entry(metric) is not None and len(one) and len(other)
    reason = apart(one, other, names) if known and (timed or is_timed(metric)) else ""
    return f"{NOT_COMPARABLE}: {reason}" if reason else ""


def _entry(metric: str) -> Metric | None:
    return METRICS.get(metric) or METRICS.get(metric.rpartition("/")[0])


def _other_text(metric: str, one: pd.DataFrame, other: pd.DataFrame) -> str:
    """Return why a metric of runs that all have it is not one of the same text and tokens; an empty text if it is."""
    if (entry := _entry(metric)) is None or one.empty or other.empty:
        return ""
    keys = {"quality": TEXT, "capacity limit": TEXT, "test": TEST_TEXT}.get(entry.group, ())
    if any(_levels(one, key) != _levels(other, key) for key in keys):
        kind = "test" if entry.group == "test" else "validation"
        return f"{NOT_COMPARABLE}: the {kind} texts differ, so {metric} does not measure the same thing"
    other_unit = "test/bits_per_byte" if entry.group == "test" else "val/bits_per_byte"
    if entry.per_token and _levels(one, TOKENIZER) != _levels(other, TOKENIZER):
        return f"{NOT_COMPARABLE}: the tokenizers differ, and {metric} is a mean over tokens; compare {other_unit}"
    return ""


def other_causality(one: pd.DataFrame, other: pd.DataFrame) -> bool:
    """Return whether losses are not comparable because the routers of one side alone may see later tokens.

    A side whose causality is not known is taken as comparable.
    """
    sides = [_levels(runs, "causal") for runs in (one, other)]
    return all(sides) and sides[0] != sides[1]


def is_timed(metric: str) -> bool:
    """Return whether a metric is a time, or a number per second."""
    return metric.startswith("time/")


def apart(one: pd.DataFrame, other: pd.DataFrame, names: tuple[str, str] = SIDES) -> str:
    """Return why the load of the machine may differ between two settings; an empty text if they took turns.

    Each has a run of a seed at most. They took turns if two things hold. In each seed but one at most, no run of
    another seed took place between the two runs, among the runs of the two settings. And each setting came first in at
    least a third of the seeds (rounded down, but in one of two or three). A seed whose runs shared half of the time of
    the shorter one counts for neither. Runs whose records do not say when they took place are left out.
    """
    if not {*WHEN} <= {*one} & {*other}:
        return ""
    return _apart(_times(one), _times(other), names)


def _apart(first: pd.DataFrame, second: pd.DataFrame, names: tuple[str, str] = SIDES) -> str:
    """Return what `apart` does, from the times of the runs of two settings by seed."""
    seeds = first.index.intersection(second.index)
    if len(seeds) < 2:
        return ""
    a, b = first.loc[seeds].to_numpy(), second.loc[seeds].to_numpy()  # (seeds, begin and end)
    ends, begins = np.minimum(a[:, 1], b[:, 1]), np.maximum(a[:, 0], b[:, 0])  # of the time between two runs
    turns = ends - begins < np.minimum(a[:, 1] - a[:, 0], b[:, 1] - b[:, 0]) / 2
    for before, after, (early, late) in ((a, b, names), (b, a, names[::-1])):
        if turns.all() and before[:, 1].max() <= after[:, 0].min() + SECOND:
            return f"all runs of {early} ended before those of {late} began, so the load of the machine may differ"
    runs, of_seed = np.concatenate([a, b]), np.concatenate([np.eye(len(seeds), dtype=bool)] * 2)
    between = (runs[:, :1] >= ends - SECOND) & (runs[:, 1:] <= begins + SECOND) & ~of_seed
    far = between[:, turns].any(axis=0)
    if far.sum() > 1:
        where = f"in {far.sum()} of {len(seeds)} seeds"
        return f"{where}, other seeds ran between {names[0]} and {names[1]}, so the load of the machine may differ"
    led, number = int((a[turns, 0] < b[turns, 0]).sum()), int(turns.sum())
    early, late = names if led > number - led else names[::-1]
    most = max(led, number - led)
    if number - most < min(number // 2, max(1, number // 3)):
        return f"{early} ran before {late} in {most} of {number} seeds, so a load that rises or falls looks the same"
    return ""


def _times(runs: pd.DataFrame) -> pd.DataFrame:
    """Return when the run of each seed began and ended, in seconds since 1970, without runs that do not tell it."""
    begun = pd.to_datetime(runs["started"], utc=True, format="ISO8601").rename("begin")
    began = (begun - pd.Timestamp(0, tz="UTC")).dt.total_seconds()
    times = pd.DataFrame({"begin": began, "end": began + runs["seconds"].astype(float).fillna(0.0)})
    return times.set_axis(runs["seed"]).dropna().groupby(level=0).first()


def not_poolable(metric: str, runs: pd.DataFrame, *, timed: bool = False) -> str:
    """Return why the values of a metric of all these runs cannot be analyzed together; an empty text if they can.

    timed: see `incomparable`.
    """
    runs = runs[runs[metric].notna()] if metric in runs else runs[:0]
    reasons = (_other_text(metric, *pair) for pair in itertools.combinations(_groups(runs, [TOKENIZER, *TEST_TEXT]), 2))
    if reason := next(filter(None, reasons), ""):
        return reason
    if not (timed or is_timed(metric)) or _entry(metric) is None or not {*WHEN} <= {*runs}:
        return ""
    factors = [factor for factor in varied_factors(runs) if factor != "seed"]
    times = [_times(members) for members in _groups(runs, factors)]
    reason = next(filter(None, (_apart(*pair) for pair in itertools.combinations(times, 2))), "")
    return f"{NOT_COMPARABLE}: {reason}" if reason else ""


def _groups(runs: pd.DataFrame, keys: list[str]) -> list[pd.DataFrame]:
    keys = [key for key in keys if key in runs]
    return [members for _, members in runs.groupby(keys, dropna=False)] if keys else [runs]


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
