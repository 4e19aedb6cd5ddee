"""What planned runs have in common with the runs that tell their spread, and what not."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import pandas as pd

from moe.analysis.tuned import tuned_keys
from moe.config.cell import Cell
from moe.config.keys import is_free
from moe.launch.option_files import default_of
from moe.results.table import ABSENT, level

IGNORED = ("seed", "init_seed", "data_seed", "trainable")


def differences(cells: list[Cell], runs: pd.DataFrame, *, of_factors: bool = True) -> list[str]:
    """Return in words the settings that planned runs have and the other runs lack, such as the number of steps.

    Options of groups come first, and what only follows from another option is left out. The factors of the plan come
    next. Runs with further levels tell about the planned ones too, so these are no difference. Neither is a key with
    its default that the runs' version of this project did not have yet. A run to which a key does not apply says
    nothing about it. A key that only one of the two tunes is a difference. of_factors: also name the levels of factors
    that the other runs lack.
    """
    here, there = [*(cells[0].config.tune or {})], tuned_keys(runs)
    planned = {key: used for key, used in _planned(cells).items() if key not in (*here, *there)}
    known = {key: _of_runs(runs, used.choices, key) for key, used in planned.items()}
    differing = [key for key, used in planned.items() if not {*used.levels} <= {*known[key]}]
    causes = [key for key in differing if not _follows(key, differing, planned)]
    found = [f"{key} is tuned in the plan, and not there" for key in here if key not in there]
    found += [f"{key} is tuned there, and not in the plan" for key in there if key not in here]
    if not of_factors:
        causes = [key for key in causes if len(planned[key].levels) < 2]
    for key in sorted(causes, key=lambda key: (key not in cells[0].choices, len(planned[key].levels) < 2)):
        texts = (", ".join(map(str, levels)) for levels in (known[key], planned[key].levels))
        found.append("{} is {} there, and {} in the plan".format(key, *texts))
    return found


class _Used(NamedTuple):
    """The levels of a key in the planned runs to which it applies, and the options that the first of them has."""

    levels: list[Any]
    choices: dict[str, str | None]


def _planned(cells: list[Cell]) -> dict[str, _Used]:
    """Return the settings of planned runs. What a group is does not matter to a run that ignores it."""
    found: dict[str, _Used] = {}
    for cell in cells:
        for key, value in (cell.choices | cell.identity()).items():
            if key in cell.ignored or not _is_setting(key):
                continue
            used = found.setdefault(key, _Used([], cell.choices))
            if (here := level(value)) not in used.levels:
                used.levels.append(here)
    return found


def _of_runs(runs: pd.DataFrame, choices: dict[str, str | None], key: str) -> list[Any]:
    """Return the levels of a key in the other runs. If it is absent from all, it has its default.

    choices: the options of the planned runs, by group. A key of another option than theirs has no default. A group that
    the version of these runs did not have is no difference.
    """
    known = _levels(runs[key].dropna()) if key in runs else []
    if found := [each for each in known if each != ABSENT]:
        return found
    group = key.partition(".")[0]
    if group != key and group in runs and level(choices.get(group)) not in _levels(runs[group]):
        return [ABSENT]
    return [level(choices[key] if key in choices else default_of(key, choices))]


def _follows(key: str, differing: list[str], planned: dict[str, _Used]) -> bool:
    """Return whether a key differs only because its group has another option, whose values the plan leaves as they are.

    A checksum differs because that of which it is the checksum does.
    """
    group = key.partition(".")[0]
    used = planned[key]
    of_option = group != key and group in differing and used.levels == [level(default_of(key, used.choices))]
    return of_option or (key.endswith("_digest") and key.removesuffix("_digest") in differing)


def _is_setting(key: str) -> bool:
    return key not in IGNORED and "/" not in key and not key.endswith("._target_") and not is_free(key)


def _levels(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(map(level, values)))
