"""Changes during training: contrasts of the validation loss, learning curves, and gradients."""

import math
from collections.abc import Iterator

import pandas as pd
from matplotlib.figure import Figure

from moe.analysis.figures import curves
from moe.analysis.figures.drawing import drawing
from moe.analysis.report.blocks import Heading, Paragraph, ReportBlock, TableBlock, csv_file, figure_section
from moe.analysis.report.inputs import GRADIENT_METRICS, NOT_TRAINED, ReportInputs
from moe.analysis.sentences import with_interval
from moe.analysis.simultaneous import interval, over_time
from moe.analysis.statistics import COMPARED, NAMES, comparisons, mean_difference, table_of_comparisons
from moe.results.comparable import incomparable
from moe.results.conditions import narrowed
from moe.runs.traces import MILESTONES

VALIDATION_LOSS = "val/loss"
CONTRASTS_EXPLAINED = """\
Difference of the validation loss from that of the reference level, in nats per token, paired by seed. The columns are
shares of training: those of the evaluations that are nearest to {shares} of it. The intervals of a row hold together:
in 95 % of cases each of them contains its true difference (max-t). So a row is above or below 0 somewhere if one of its
intervals is. They are wider than the t intervals of single columns, which `progress.csv` has too. They are intervals
of a single look, which other looks at these runs do not widen. This table describes; only final values are tested."""
GRADIENTS_CAPTION = """\
Gradient norms of routers and experts, and how much an optimizer step changes their weights relative to the weights'
size."""


def contrasts_over_training(inputs: ReportInputs) -> Iterator[ReportBlock]:
    """Yield the contrasts of the validation loss, a row for each contrast and a column for each share of training."""
    table = contrasts_at_shares(inputs)
    if table.empty:
        return
    cells = [with_interval(c.difference, c.together_low, c.together_high, least=3) for c in table.itertuples()]
    shown = table.assign(cell=cells, share=table["share"].map("{:.0%}".format))
    yield Heading("Over training")
    *first, last = (f"{share:.0%}".removesuffix("%") for share in MILESTONES)
    yield Paragraph(CONTRASTS_EXPLAINED.format(shares=f"{', '.join(first)} and {last} %"))
    yield TableBlock(shown.pivot_table("cell", NAMES, "share", aggfunc="first", sort=False).reset_index())
    yield csv_file("progress", table, "this table, with n.")


def contrasts_at_shares(inputs: ReportInputs) -> pd.DataFrame:
    """Return the differences of the validation loss of all comparisons at shares of training, a row for each share.

    Columns: those of `NAMES`, `share`, `n`, `difference`, its 95 % t interval `ci_low` and `ci_high`, and the interval
    `together_low` and `together_high`, which holds at all shares together. The shares are those of the evaluations
    nearest to `MILESTONES`, in whole percent. A seed counts if both of its runs were evaluated at all of these shares
    at which any run of the comparison was. The evaluation before the first step belongs to no share. The table is empty
    if there is one share, and nothing is tested.
    """
    runs, evals = inputs.runs, inputs.past.evals  # all runs, so that every reference is a level of theirs
    if inputs.contrasts.empty or VALIDATION_LOSS not in evals:
        return pd.DataFrame()
    pairs = inputs.contrasts[["factor", "reference"]].drop_duplicates("factor")
    references = dict(pairs.itertuples(index=False, name=None))
    losses = evals.pivot(index="step", columns="folder", values=VALIDATION_LOSS).astype(float)
    by_run = {
        folder: _by_share(losses[folder].dropna()) if status == "finished" and folder in losses else {}
        for folder, status in zip(runs["folder"], runs["status"], strict=True)
    }
    known = sorted({share for run in by_run.values() for share in run})
    shares = sorted({min(known, key=lambda each: abs(each - milestone)) for milestone in MILESTONES}) if known else []
    if len(shares) < 2:
        return pd.DataFrame()  # the last evaluation alone: the final values, which other tables have
    rows = []
    compared = narrowed(runs, (VALIDATION_LOSS, *inputs.factors, *COMPARED))
    for names, treated, baseline in comparisons(compared, inputs.factors, references):
        if not incomparable(VALIDATION_LOSS, treated, baseline):
            sides = [_by_seed(side, by_run, shares) for side in (treated, baseline)]
            rows += [names | row for row in _at_shares(sides[0] - sides[1])]
    return table_of_comparisons(rows)


def _by_seed(side: pd.DataFrame, by_run: dict[str, dict[float, float]], shares: list[float]) -> pd.DataFrame:
    """Return the losses of the runs at one level, a row for each seed and a column for each share."""
    rows = {seed: by_run[folder] for seed, folder in zip(side["seed"], side["folder"], strict=True) if by_run[folder]}
    return pd.DataFrame.from_dict(rows, orient="index", columns=None).reindex(columns=shares)


def _at_shares(differences: pd.DataFrame) -> Iterator[dict[str, float]]:
    """Yield the row of each share from the differences by seed."""
    differences = differences.dropna(how="all", axis=1).dropna()
    factor = over_time(differences.to_numpy()) if differences.size else math.nan
    for share, column in differences.items():
        values = column.to_numpy()
        (low, high), (together_low, together_high) = interval(values), interval(values, factor)
        if len(values):
            yield {
                "share": float(str(share)),
                "n": len(values),
                "difference": mean_difference(values, scale=1.0),
                "ci_low": low,
                "ci_high": high,
                "together_low": together_low,
                "together_high": together_high,
            }


def _by_share(losses: pd.Series) -> dict[float, float]:
    """Return the losses of a run, given by step, by share of its training in whole percent, without those at 0 %."""
    last = max(1, losses.index.max())
    found = {round(step / last, 2): loss for step, loss in losses.items()}
    return {share: loss for share, loss in found.items() if share > 0}


def learning_curves(inputs: ReportInputs) -> Iterator[ReportBlock]:
    """Yield the validation loss against the step."""
    events = inputs.with_condition(narrowed(inputs.past.evals, ("folder", "step", VALIDATION_LOSS)))
    if VALIDATION_LOSS not in events or not events[VALIDATION_LOSS].notna().any():
        result: Figure | str = f"no run has an evaluation with {VALIDATION_LOSS}"
    elif not inputs.trained:
        result = NOT_TRAINED
    else:
        result = inputs.too_many_lines() or curves.learning_curves(events, "condition")
    caption = "Validation loss against optimizer step: every run, and the mean of each condition."
    yield from figure_section("Learning curves", [drawing("learning_curves", caption, result)])


def gradient_norms(inputs: ReportInputs) -> Iterator[ReportBlock]:
    """Yield the gradient norms of routers and experts, and how much a step changes their weights."""
    trains = inputs.past.trains
    absent = "" if set(GRADIENT_METRICS) <= set(trains) else f"no run has {', '.join(GRADIENT_METRICS)}"
    result = inputs.too_many_lines() or absent or curves.gradient_norms(inputs.with_condition(trains))
    yield from figure_section("Gradients", [drawing("gradients", GRADIENTS_CAPTION, result)])
