"""The contrasts of the validation loss on the way to the end, at the same shares of every run."""

from collections.abc import Iterator

import pandas as pd

from moe.analysis.report.blocks import Attachment, Block, Heading, Table, Text
from moe.analysis.report.inputs import ReportInputs, stack
from moe.analysis.statistics import contrasts

LOSS = "val/loss"
SHARES = (0.1, 0.25, 0.5, 0.75, 1.0)  # of the steps of a run
EXPLAINED = """\
Difference of the validation loss from the reference's, in nats per token, at shares of training at which every finished
run was evaluated: paired by seed, with its 95 % t interval; *: p <= 0.05 after Holm's correction over the column."""


def progress(inputs: ReportInputs) -> Iterator[Block]:
    """A row a contrast, a column a share of training."""
    table = over_training(inputs)
    if table.empty:
        return
    cells = [
        f"{c.difference:+.3f}"
        + (f" [{c.ci_low:.3f}, {c.ci_high:.3f}]" if c.n > 1 else "")
        + (" *" if c.significant else "")
        for c in table.itertuples()
    ]
    shown = table.assign(cell=cells, share=table["share"].map("{:.0%}".format))
    names = ["factor", "level", "reference", "within"]
    yield Heading("Over training")
    yield Text(EXPLAINED)
    yield Table(shown.pivot_table("cell", names, "share", aggfunc="first", sort=False).reset_index())
    yield Attachment("progress.csv", table.to_csv(index=False), "this table, with n and p.")


def over_training(inputs: ReportInputs) -> pd.DataFrame:
    """`moe.analysis.statistics.contrasts` of the validation loss at those of `SHARES` at which every finished run was
    evaluated, a family for Holm each; with the columns `share` and `significant`."""
    runs, evals = inputs.runs[inputs.runs["status"] == "finished"], inputs.past.evals
    if inputs.contrasts.empty or LOSS not in evals:
        return pd.DataFrame()
    pairs = inputs.contrasts[["factor", "reference"]].drop_duplicates("factor")
    references = dict(pairs.itertuples(index=False, name=None))
    losses = evals.pivot(index="step", columns="folder", values=LOSS).astype(float)
    tables = []
    for share in SHARES:
        at = [losses[folder].dropna() if folder in losses else pd.Series(dtype=float) for folder in runs["folder"]]
        values = [of_run.get(round(share * of_run.index.max())) if len(of_run) else None for of_run in at]
        if None not in values:
            table = contrasts(runs.assign(**{LOSS: values}), LOSS, inputs.factors, references=references)
            tables.append(table.assign(share=share))
    table = stack(tables)
    return table if table.empty else table.assign(significant=table["p Holm"] <= 0.05)
