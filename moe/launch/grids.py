"""Name the grid of a sweep: what it varies, and what it sets otherwise than its experiment."""

import hashlib
import json
import re
from collections.abc import Sequence
from typing import Any

from hydra.core.override_parser.types import Override

from moe.checks import printable
from moe.config.cell import Cell, Grid
from moe.config.keys import flatten, is_free
from moe.config.options import GROUPS
from moe.config.words import as_word
from moe.launch.option_files import settings_of_experiment
from moe.launch.overrides import ONE_PER_COMMAND, values

LONGEST_NAME = 120  # W&B allows 128 characters in the name of a group


def grid_of(cells: Sequence[Cell], presets: Sequence[Override], own: Sequence[Override], usual: dict[str, Any]) -> Grid:
    """Return the grid of a command.

    presets: the overrides that span the experiment's own grid. own: those of the command line. usual: the settings of
    the experiment without those of the command line. A factor of the experiment's grid remains a factor if the command
    gives a single level of it. The seed is neither a factor nor a fixed setting. A setting that each cell computes
    is fixed as the command writes it, because cells may differ in its value.
    """
    planned, swept = ({o.key_or_group for o in part if o.is_sweep_override()} - {"seed"} for part in (presets, own))
    factors = sorted(planned | swept)
    settings: dict[str, Any] = {}
    for cell in reversed(cells):
        settings |= cell.identity() | cell.choices
    settings |= {name: text for name, text in _computed(own).items() if name in settings}
    # The usual value of a key depends on the options of the groups. If these vary, every given value counts as fixed.
    unusual = {o.key_or_group for o in presets} | (settings.keys() - set(GROUPS) if swept & {*GROUPS} else set())
    fixed = {}
    for key in sorted({o.key_or_group for o in own} - {*factors, "seed"}):
        below = () if key in GROUPS else (name for name in settings if name.startswith(f"{key}."))
        for name in (key, *below):
            given = name in settings and not is_free(name)
            if given and (name in unusual or name not in usual or usual[name] != settings[name]):
                fixed[name] = settings[name]
    parts = [" x ".join(factors)] if swept - planned else []
    for key in sorted(fixed, key=lambda key: ("." in key, key)):  # steps=20 is not cut off after many sizes of a model
        parts.append(f"{key}={fixed[key] if isinstance(fixed[key], str) else json.dumps(fixed[key])}")
    name = printable(": ".join(filter(None, (cells[0].experiment, ", ".join(parts)))))
    if len(name) > LONGEST_NAME:
        parts = [re.sub(r"^[^=]*\.(?=[^=]*=)", "", part) for part in parts]  # such as layers=1
        name = _cut(printable(": ".join(filter(None, (cells[0].experiment, ", ".join(parts))))), factors, fixed)
    computed = [o for o in own if o.is_sweep_override() and "${" in str(o.input_line)]
    typed = {o.key_or_group: [*map(as_word, values(o))] for o in computed}
    replaced = {key: before for key, (_, before) in replacements(cells, presets, own).items()}
    return Grid(name, factors, fixed, [cell.folder.name for cell in cells], typed=typed, replaced=replaced)


def replacements(
    cells: Sequence[Cell], presets: Sequence[Override], own: Sequence[Override]
) -> dict[str, tuple[str, str]]:
    """Return key -> (the values of a command, the one of its experiment's file that they replace), as words.

    Claims and question of the experiment may rest on that value. Levels of a factor of the experiment are not among
    them: their number shows what is trained. An option that the command chooses may overrule the experiment too.
    """
    constants = settings_of_experiment(cells[0].experiment)
    constants |= {o.key_or_group: values(o)[0] for o in presets if len(values(o)) == 1}
    given = {o.key_or_group: values(o) for o in own}
    options = [o.key_or_group for o in own if o.key_or_group in GROUPS and o.key_or_group not in ONE_PER_COMMAND]
    found = {}
    for key, before in constants.items():
        settings = [settings[key] for cell in cells if key in (settings := cell.identity() | cell.choices)]
        of_option = options and settings and "${" not in str(before) and before not in settings
        if given[key] != [before] if key in given else of_option:
            now = dict.fromkeys(map(as_word, given.get(key, settings)))
            found[key] = ",".join(now), as_word(before)
    return found


def _computed(overrides: Sequence[Override]) -> dict[str, Any]:
    """Return the values of overrides that refer to other settings or call a function, as written, by their full key."""
    single = {o.key_or_group: o.value() for o in overrides if not o.is_sweep_override()}
    return {name: value for name, value in flatten(single).items() if "${" in str(value)}


def with_part(grid: Grid, text: str, settings: dict[str, Any]) -> Grid:
    """Return the grid with a text at the end of its name, and with settings that tell it from others."""
    fixed = grid.fixed | settings
    name = f"{grid.name}{', ' if ': ' in grid.name else ': '}{text}"
    return grid._replace(name=name if len(name) <= LONGEST_NAME else _cut(name, grid.factors, fixed), fixed=fixed)


def _cut(name: str, factors: list[str], fixed: dict[str, Any]) -> str:
    """Return the start of a name that is too long, and a checksum of what it says."""
    digest = hashlib.sha256(json.dumps([factors, fixed]).encode()).hexdigest()[:8]
    return f"{name[: LONGEST_NAME - 10]}… {digest}"
