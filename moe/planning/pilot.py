"""The runs of a pilot, and what planned runs have in common with them and what not."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from moe.analysis.tuned import tuned_keys
from moe.checks import ConfigError, require
from moe.config.cell import Cell
from moe.config.keys import is_free
from moe.launch.option_files import default_of
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

    Options of groups come first, and what only follows from another option is left out. The factors of the plan come
    next. A pilot with further levels tells about the planned ones too, so these are no difference. Neither is a key
    with its default that the pilot's version of this project did not have yet. A key that only one of the two tunes is
    one.
    """
    here, there = [*(cells[0].config.tune or {})], tuned_keys(pilot)
    keys = dict.fromkeys(key for cell in cells for key in (*cell.choices, *cell.identity()) if _is_setting(key))
    planned = {key: _levels(_value(cell, key) for cell in cells) for key in keys if key not in (*here, *there)}
    of_pilot = {key: _levels(_of_pilot(pilot, cells[0], key)) for key in planned}
    differing = [key for key in planned if not {*planned[key]} <= {*of_pilot[key]}]
    causes = [key for key in differing if not _follows(key, differing, cells)]
    found = [f"{key} is tuned in the plan, and not in the pilot" for key in here if key not in there]
    found += [f"{key} is tuned in the pilot, and not in the plan" for key in there if key not in here]
    for key in sorted(causes, key=lambda key: (key not in cells[0].choices, len(planned[key]) < 2)):
        texts = (", ".join(map(str, levels)) for levels in (of_pilot[key], planned[key]))
        found.append("{} is {} in the pilot, and {} in the plan".format(key, *texts))
    more = len(found) - MOST
    return found[:MOST] + ([f"and {more} more settings"] if more > 0 else [])


def _value(cell: Cell, key: str) -> Any:
    """Return the value of a key in a planned run; its default if the key does not apply there."""
    known = cell.choices | cell.identity()
    return known[key] if key in known else default_of(key, cell.choices)


def _of_pilot(pilot: pd.DataFrame, cell: Cell, key: str) -> list[Any]:
    """Return the values of a key in the pilot's runs. Where it is absent, it has its default.

    A key of another option than the plan's has none. A group that the pilot's version did not have is no difference.
    """
    group = key.partition(".")[0]
    default = _value(cell, key) if key in cell.choices else default_of(key, cell.choices)
    if group != key and group in pilot and level(cell.choices.get(group)) not in _levels(pilot[group]):
        default = ABSENT
    return [default if value == ABSENT else value for value in pilot[key]] if key in pilot else [default]


def _follows(key: str, differing: list[str], cells: list[Cell]) -> bool:
    """Return whether a key differs only because its group has another option, whose values the plan leaves as they are.

    A digest differs because that of which it is the digest does.
    """
    group = key.partition(".")[0]
    of_option = group != key and group in differing
    usual = all(level(_value(cell, key)) == level(default_of(key, cell.choices)) for cell in cells)
    return (of_option and usual) or (key.endswith("_digest") and key.removesuffix("_digest") in differing)


def _is_setting(key: str) -> bool:
    return key not in IGNORED and "/" not in key and not key.endswith("._target_") and not is_free(key)


def _levels(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(map(level, values)))
