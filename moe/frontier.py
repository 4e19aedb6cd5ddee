"""Quality against speed: experiments A and C as one table under the routing bench's own column names.

Speed is that of training steps alone, without evaluation. FLOPs are those of `moe.cost.flops_per_token`, a forward
pass, times 3 for a training step; an assignment that a capacity limit drops counts as if it were kept.
"""

import json
import math
from pathlib import Path
from typing import Any

import pandas as pd

from moe.results import ABSENT, history

STEMS = {"experiment_a": "experiment_a", "experiment_c": "expC"}  # experiment -> how its files' names begin

# Column of the routing bench's own table -> our column, some of which `measured` makes; ours alone at the end.
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


def measured(runs: pd.DataFrame) -> pd.DataFrame:
    """The finished runs of a table, with what their folders say of speed, load and the best evaluation.

    `tflops`: 3 * forward FLOPs per token * `time/tokens_per_s` / 1e12; `drop_rate` and `load_cv` (of the offered load):
    means over the second half of the training steps.
    """
    runs = runs[runs["status"] == "finished"]
    rows = [_measure(Path(folder)) for folder in runs["folder"]]
    runs = runs.assign(**{column: [row[column] for row in rows] for column in _MEASURED})
    speed = runs.get("time/tokens_per_s", pd.Series(math.nan, runs.index))
    return runs.assign(tokens_per_s=speed, tflops=3 * runs["flops_per_token"] * speed / 1e12)


def bench_table(measured: pd.DataFrame) -> pd.DataFrame:
    """The runs under the routing bench's column names; a router without a k, such as expert choice, has no top_k."""
    table = measured.reindex(columns=list(COLUMNS.values())).set_axis(list(COLUMNS), axis=1)
    return table.assign(top_k=table["top_k"].where(table["top_k"] != ABSENT))


def pareto_front(points: pd.DataFrame, more: str, less: str) -> pd.DataFrame:
    """The points that none beats in both, having more of `more` and less of `less`; by rising `more`, equals once."""
    ordered = points.dropna(subset=[more, less]).sort_values([more, less], ascending=[False, True])
    best_so_far = ordered[less].cummin().shift(fill_value=math.inf)
    return ordered[ordered[less] < best_so_far][::-1]


_MEASURED = (
    *("best_val_perplexity", "best_val_loss", "best_step", "world_size"),
    *("flops_per_token", "drop_rate", "load_cv", "log_path"),
)


def _measure(folder: Path) -> dict[str, Any]:
    """The columns `_MEASURED` of one finished run; NaN for what its folder does not say."""
    flops = json.loads((folder / "run.json").read_text(encoding="utf-8")).get("flops_per_token", math.nan)
    evals = _series(folder, "eval", "val/loss", "val/perplexity")
    best = evals.sort_values("val/loss", kind="stable", ignore_index=True).reindex([0])  # NaN are sorted last
    train = _series(folder, "train", "train/routing/drop_rate", "train/routing/load_cv")
    late = train[train["step"] > train["step"].max() / 2]
    return {
        "best_val_perplexity": best["val/perplexity"].item(),
        "best_val_loss": best["val/loss"].item(),
        "best_step": best["step"].item(),
        "world_size": 1,  # a run is one process
        "flops_per_token": flops,
        "drop_rate": late["train/routing/drop_rate"].mean(),
        "load_cv": late["train/routing/load_cv"].mean(),
        "log_path": str(folder / "events.jsonl"),
    }


def _series(folder: Path, kind: str, *columns: str) -> pd.DataFrame:
    """`step` and these columns of a run's events of one kind, as numbers; what is not there is NaN, or has no row."""
    events = history([folder], kind=kind, columns=columns).events.reindex(columns=["step", *columns])
    return events.astype(dict.fromkeys(columns, float))
