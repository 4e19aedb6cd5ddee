"""What a pilot's runs have in common with planned ones, and what not."""

from collections.abc import Iterable
from typing import Any

import pandas as pd

from moe.config.cell import Cell
from moe.results.table import ABSENT, level

MOST = 8  # differing settings that are named
IGNORED = ("seed", "init_seed", "data_seed", "trainable")


def differences(cells: list[Cell], pilot: pd.DataFrame) -> list[str]:
    """Return in words the settings that planned runs have and the pilot's lack, such as the number of steps.

    The factors of the plan come first. A pilot with further levels tells about the planned ones too, so these are no
    difference.
    """
    known = [cell.choices | cell.identity() for cell in cells]
    keys = [key for key in dict.fromkeys(key for each in known for key in each) if _is_setting(key)]
    planned = {key: _levels(each.get(key, ABSENT) for each in known) for key in keys}
    found = []
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
