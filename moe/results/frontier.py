"""Quality against speed of sweeps over routers or capacity, as one table with the column names of the routing bench.

Speed is that of training steps alone, without evaluation. FLOPs are those that the steps spent. For runs from before
these were recorded they are three times those of a forward pass (`moe.model.cost.flops_per_token`), with the experts
that tokens of the last validation asked for, and count assignments that a capacity limit drops.
"""

import math
import re
from pathlib import Path

import pandas as pd

from moe.results.conditions import varied_factors
from moe.results.table import ABSENT, EventTables
from moe.results.training_flops import SPENT, training_tokens

STEMS = {"experiment_c": "expC"}  # experiment -> how its files' names begin; by default with its own name
COMPARED = ("router", "capacity")  # a sweep over one of these factors has this table and its figures

# Column in the routing bench's table -> column in the table of runs. `with_training_means` adds some of the latter. The
# last two columns, seed and causal, did not exist in the bench.
COLUMNS = {
    "run": "run",
    "router": "router",
    "top_k": "router.k",
    "capacity_factor": "capacity",
    "num_experts": "model.num_experts",
    "dim": "model.dim",
    "world_size": "world_size",
    "final_val_ppl": "val/perplexity",
    "final_val_loss": "val/loss",
    "best_val_ppl": "best_val_perplexity",
    "best_val_loss": "best_val_loss",
    "best_step": "best_step",
    "median_tokens_per_s": "tokens_per_s",
    "median_eff_tflops": "tflops",
    "mean_drop_rate": "drop_rate",
    "mean_load_cv": "load_cv",
    "log_path": "log_path",
    "seed": "seed",
    "causal": "causal",
}


# Metric of an event -> the column that `with_training_means` makes of it. `BEST`: the value at the best evaluation.
# `LATE`: the mean over the second half of training.
BEST = {"val/perplexity": "best_val_perplexity", "val/loss": "best_val_loss", "step": "best_step"}
LATE = {"train/routing/drop_rate": "drop_rate", "train/routing/load_cv": "load_cv"}


def stem(runs: pd.DataFrame) -> str | None:
    """Return how the names of the files about quality and speed begin; None for runs that compare neither factor."""
    experiment = str(runs["experiment"].iloc[0]).partition(": ")[0]  # without what distinguishes its grid
    named_so = experiment in ("experiment_a", "experiment_c")  # also if only a part of the experiment was run
    if not (named_so or set(COMPARED) & set(varied_factors(runs))):
        return None
    return STEMS.get(experiment, re.sub(r"[^\w-]+", "_", experiment))


def with_training_means(runs: pd.DataFrame, past: EventTables) -> pd.DataFrame:
    """Return the finished runs with columns about speed, load, and the best evaluation; NaN where events lack them.

    past: the events of the runs, read with the columns `LATE`.

    `tflops`: training FLOPs per token * `time/tokens_per_s` / 1e12; `drop_rate` and `load_cv` (of the offered load):
    means over the second half of the training steps.
    """
    runs = runs[runs["status"] == "finished"]
    evals = past.evals.reindex(columns=["folder", *BEST]).dropna(subset=["val/loss"])
    best = evals.sort_values("val/loss", kind="stable").drop_duplicates("folder").set_index("folder")
    trains = past.trains.reindex(columns=["folder", "step", *LATE])
    late = trains[trains["step"] > trains.groupby("folder")["step"].transform("max") / 2].groupby("folder")
    columns = {name: runs["folder"].map(best[column]) for column, name in BEST.items()}
    columns |= {name: runs["folder"].map(late[column].mean()) for column, name in LATE.items()}
    speed, spent = (runs.get(column, pd.Series(math.nan, runs.index)) for column in ("time/tokens_per_s", SPENT))
    flops_of_token = spent / training_tokens(runs)
    return runs.assign(
        **columns,
        world_size=runs["ranks.number"].astype("Int64"),
        log_path=runs["folder"].map(lambda folder: str(Path(folder) / "events.jsonl")),
        tokens_per_s=speed,
        tflops=flops_of_token.fillna(3 * runs["flops_per_token"].astype(float)) * speed / 1e12,
    )


def bench_table(measured: pd.DataFrame) -> pd.DataFrame:
    """Return the runs under the routing bench's column names; top_k and capacity are missing where absent."""
    table = measured.reindex(columns=list(COLUMNS.values())).set_axis(list(COLUMNS), axis=1)
    return table.assign(**{name: table[name].where(table[name] != ABSENT) for name in ("top_k", "capacity_factor")})


def pareto_front(points: pd.DataFrame, more: str, less: str) -> pd.DataFrame:
    """Return the points that no other point beats in both columns: `more` should be large, `less` small.

    They are in rising order of `more`. Of equal points one is kept.
    """
    ordered = points.dropna(subset=[more, less]).sort_values([more, less], ascending=[False, True])
    best_so_far = ordered[less].cummin().shift(fill_value=math.inf)
    return ordered[ordered[less] < best_so_far][::-1]
