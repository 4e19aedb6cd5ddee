"""The functions that files in conf/ can call, as ${NAME:ARGUMENTS}, and the types that Hydra checks values by."""

import csv
import gzip
import hashlib
import io
import json
import math
import os
import re
from collections import defaultdict
from pathlib import Path
from statistics import fmean
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from moe.checks import ConfigError
from moe.config.options import CONF, search_path
from moe.config.schema import Config
from moe.files import open_file, shown
from moe.launch.flops import equal_flops, steps_of

SHIPPED = "runs.csv.gz"  # as `moe.results.shipped.RUNS`, which imports pandas
MISSING = "run that experiment first, or name the folder above its own by results=DIR"
STUDIES = CONF.parent / "docs" / "studies"  # as `moe.results.shipped.STUDIES`
LONGEST_NAME = 150  # bytes in the name of a run folder; file systems allow 255
OF_ROUTING = re.compile(r"(router|schedule|noise|lb|capacity|drop|seed|variant)[.\w]*=")  # what most sweeps vary


def run_name(overrides: str) -> str:
    """Return the folder name of a run from its sorted overrides: never empty, one level deep, safe on any file system.

    A name that had to be changed or cut ends in a checksum. It is cut at a comma, so every value in it is whole, and
    settings of routing and the seed stand first, so that they stay. Of the path of a checkpoint, it has the last two
    parts.
    """
    overrides = re.sub(r"(^|,)\+\+", r"\1", overrides)  # marks of added keys
    short = re.sub(r"(^|,)(model\.checkpoint)=[^,]*/([^,/]+/[^,/]+)", r"\1\2=\3", overrides)
    name = re.sub(r"[^\w.,=+-]+", "_", short, flags=re.ASCII).strip(".") or "base"
    if name == overrides and len(name) <= LONGEST_NAME:
        return name
    digest = hashlib.sha256(overrides.encode()).hexdigest()[:8]
    if len(name) > LONGEST_NAME:
        pairs = re.split(r",(?=[\w.]+=)", name)
        name = ",".join(sorted(pairs, key=lambda pair: OF_ROUTING.match(pair) is None))
        name = name[: LONGEST_NAME + 1].rpartition(",")[0] or name[:LONGEST_NAME]
    return f"{name}-{digest}" if overrides else name


def results_of(experiment: str, config: Any) -> str:
    """Return the path of results.csv of another experiment, below `results`, or else below `out`.

    A folder of shipped tables, such as docs/studies, has `SHIPPED` in its place.
    """
    folder = os.path.join(os.path.expanduser(config.results or config.out or "multirun"), experiment)
    found, shipped = (os.path.join(folder, name) for name in ("results.csv", SHIPPED))
    return shipped if os.path.exists(shipped) and not os.path.exists(found) else found


def best_level(results: str, factor: str, other: Any = None) -> Any:
    """Return the level of `factor` with the lowest mean final val/loss in a sweep's results.csv.

    other: a level with which the best one will be compared, so that it must be another one.

    Raises ConfigError if there is no such file, if a run in it is not finished or has no finite loss, if it has
    several grids, or if the best level is `other`.
    """
    rows, losses = _rows(results, factor, column=factor), defaultdict[str, list[float]](list)
    if len(grids := dict.fromkeys(row["experiment"] for row in rows)) > 1:
        several = f"which has several grids: {'; '.join(grids)}"
        raise ConfigError(f"{factor} comes from {results}, {several}; keep the runs of one of them there")
    for row in rows:
        if row["status"] != "finished":
            raise ConfigError(f"{factor} comes from {results}, where {row['run']} is {row['status']}: finish it")
        losses[row[factor]].append(_loss(row, results, factor))
    best = json.loads(min(losses, key=lambda level: fmean(losses[level])))
    if best == other:
        raise ConfigError(f"{factor}={best} has the lowest val/loss in {results}: no other one is better")
    return best


def seeds_in(results: str) -> list[int]:
    """Return the seeds in a sweep's results.csv, those of `init_seed` and `data_seed` included.

    Raises ConfigError if there is no such file.
    """
    rows = _rows(results, "tune_seeds", column="seed")
    parts = [row.get(key) or "none" for row in rows for key in ("init_seed", "data_seed")]
    found = [*(row["seed"] for row in rows), *(seed for seed in parts if seed != "none")]
    return sorted({int(seed.removesuffix(".0")) for seed in found})


def _rows(results: str, key: str, *, column: str) -> list[dict[str, str]]:
    """Return the rows of a sweep's results.csv.

    Raises ConfigError, naming the key that needs it, if there is no such file, or if it has no rows or no such column.
    """
    if not Path(results).exists():
        known = (STUDIES / Path(results).parent.name / SHIPPED).exists()
        shipped = f", such as results={shown(STUDIES)}, which has its shipped runs" if known else ""
        raise ConfigError(f"{key} comes from {results}, which does not exist: {MISSING}{shipped}")
    with open_file(Path(results), "rb") as file:
        content = file.read()
    text = (gzip.decompress(content) if results.endswith(".gz") else content).decode()
    rows = list(csv.DictReader(io.StringIO(text, newline="")))
    for needed in ("experiment", "status", "val/loss", column):
        if not rows or needed not in rows[0]:
            raise ConfigError(f"{key} comes from {results}, which has no column {needed} or no rows")
    return rows


def _loss(row: dict[str, str], results: str, factor: str) -> float:
    """Return the final val/loss of a run in a results.csv. Raises ConfigError if it is no finite number."""
    try:
        loss = float(row["val/loss"])
    except ValueError:
        loss = math.nan
    if not math.isfinite(loss):
        raise ConfigError(f"{factor} comes from {results}, where the val/loss of {row['run']} is {row['val/loss']!r}")
    return loss


ConfigStore.instance().store(name="schema", node=Config)
OmegaConf.register_new_resolver("run_name", run_name, replace=True)
OmegaConf.register_new_resolver("search_path", lambda: [f"file://{path}" for path in search_path()], replace=True)
OmegaConf.register_new_resolver(
    "best_level",
    lambda experiment, factor, other=None, *, _root_: best_level(results_of(experiment, _root_), factor, other),
    replace=True,
)
OmegaConf.register_new_resolver(
    "seeds_in", lambda experiment, *, _root_: seeds_in(results_of(experiment, _root_)), replace=True
)
# Unlike `oc.env`, a variable that is empty counts as one that is not set.
OmegaConf.register_new_resolver("environment", lambda name, default: os.environ.get(name) or default, replace=True)
OmegaConf.register_new_resolver("twice", lambda number: 2 * number, replace=True)
OmegaConf.register_new_resolver("equal_flops", lambda ffn, *, _root_: equal_flops(ffn, _root_), replace=True)
OmegaConf.register_new_resolver("steps_of", lambda flops, *, _root_: steps_of(flops, _root_), replace=True)
OmegaConf.register_new_resolver("folder", lambda out, default: os.path.expanduser(out or default), replace=True)
