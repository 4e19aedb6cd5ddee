"""The runs of a pilot, and what planned runs have in common with them and what not."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from moe.analysis.tuned import tuned_keys
from moe.checks import ConfigError, require
from moe.config.cell import Cell
from moe.results.table import ABSENT, level, load_runs

MOST = 8  # differing settings that are named
IGNORED = ("seed", "init_seed", "data_seed", "trainable")


def runs_of_pilot(folder: Path) -> pd.DataFrame:
    """Return the finished runs in a folder that results did not choose; of a pilot that tuned, those that judge.

    Chosen values of tuned keys belong to a setting, and are no factor, so these columns are left out. Raises
    ConfigError unless there are runs of two seeds.
    """
    try:
        runs = load_runs([folder])
    except ValueError as error:
        raise ConfigError(f"--pilot {folder}: {error}") from None
    searched = runs["folder"].isin(runs.loc[runs["search"].notna(), "folder"])
    left_out = ", beside those that tune or search" if searched.any() else ""
    runs = runs[(runs["status"] == "finished") & ~searched].drop_duplicates("folder")
    allowed = f"a folder with finished runs of two seeds at least{left_out}"
    require(len(runs) > 1 and runs["seed"].nunique() > 1, "--pilot", folder, allowed)
    return runs.drop(columns=tuned_keys(runs), errors="ignore")


def differences(cells: list[Cell], pilot: pd.DataFrame) -> list[str]:
    """Return in words the settings that planned runs have and the pilot's lack, such as the number of steps.

    The factors of the plan come first. A pilot with further levels tells about the planned ones too, so these are no
    difference. A key that only one of the two tunes is one.
    """
    known = [cell.choices | cell.identity() for cell in cells]
    here, there = [*(cells[0].config.tune or {})], tuned_keys(pilot)
    keys = [key for key in dict.fromkeys(key for each in known for key in each) if _is_setting(key)]
    keys = [key for key in keys if key not in (*here, *there)]
    planned = {key: _levels(each.get(key, ABSENT) for each in known) for key in keys}
    found = [f"{key} is tuned in the plan, and not in the pilot" for key in here if key not in there]
    found += [f"{key} is tuned in the pilot, and not in the plan" for key in there if key not in here]
    for key in sorted(keys, key=lambda key: len(planned[key]) < 2):
        of_pilot = _levels(pilot[key]) if key in pilot else [ABSENT]
        if not {*planned[key]} <= {*of_pilot}:
            texts = (", ".join(map(str, levels)) for levels in (of_pilot, planned[key]))
            found.append("{} is {} in the pilot, and {} in the plan".format(key, *texts))
    more = len(found) - MOST
    return found[:MOST] + ([f"and {more} more settings"] if more > 0 else [])


def _is_setting(key: str) -> bool:
    return key not in IGNORED and "/" not in key and not key.endswith("._target_")


def _levels(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(map(level, values)))
