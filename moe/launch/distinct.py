"""Find the cells of a command that are the same run."""

import logging
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Override

from moe.checks import ConfigError
from moe.config import run_routers
from moe.config.cell import Cell
from moe.config.keys import fingerprint, flatten, is_free
from moe.config.schema import Config
from moe.launch.overrides import quote, values_of
from moe.runs.folder import finished
from moe.training.schedules import same_values

log = logging.getLogger(__name__)


def with_overrides(cells: list[Cell], grid: list[list[str]], *, multirun: bool) -> list[Cell]:
    """Return a cell for each folder, with the overrides from which Hydra composes it and those of its `twins`."""
    key = "hydra.sweep.subdir" if multirun else "hydra.run.dir"
    unique: dict[Path, Cell] = {}
    for cell, arguments in zip(cells, grid, strict=True):
        place = quote(cell.folder.name if multirun else str(cell.folder))
        words = (*arguments, f"{key}={place}")
        first = unique.get(cell.folder)
        unique[cell.folder] = (
            cell._replace(overrides=words) if first is None else first._replace(twins=(*first.twins, words))
        )
    return list(unique.values())


def each_run_once(cells: list[Cell], *, say: bool, merge: bool) -> list[Cell]:
    """Return the cells without those that compute the same as another one under another name.

    They are equal once the keys that do not apply are switched off, such as router=softk and router=topk without a
    capacity limit, or two quotas that limit nothing. The cell stays to which more keys apply, or else the first one.

    say: log which cells are the same run. merge: false keeps all cells, where each setting is tuned on its own.
    """
    same: dict[str, list[Cell]] = {}
    trained = all(map(finished, cells))  # then torch is not imported, and there is nothing to save
    for cell in cells:
        settings = cell.config.identity() if trained else run_routers.settings_in_effect(cell.config)
        same.setdefault(fingerprint(settings), []).append(cell)
    everywhere = set.intersection(*({*cell.overrides} for cell in cells))
    shared: dict[tuple[str, str], set[str]] = {}  # what all cells have in which two words mean the same run
    for alike in same.values():
        alike.sort(key=lambda cell: len(cell.ignored))
        first, *others = ([*cell.overrides[:-1]] for cell in alike)  # the last one names the folder
        for other in others:
            pair = [",".join(line for line in a if line not in b) for a, b in ((other, first), (first, other))]
            here, there = (words or "no override" for words in pair)
            both = {*first} & {*other} - everywhere
            shared[here, there] = shared.get((here, there), both) & both
    for (here, there), both in sorted(shared.items()) if say else ():
        where = f"with {','.join(sorted(both))}" if both else "here"
        once = f"and is trained once, as {there}" if merge else "and both are trained, because each is tuned"
        log.warning(f"{here} is the same run as {there} {where}, {once}")
    return [alike[0] for alike in same.values()] if merge else cells


def check_distinct(cells: list[Cell], grid: list[list[str]], overrides: list[Override]) -> None:
    """Raise ConfigError if two cells compute the same, whatever the spelling of their settings.

    It names what differs in the overrides of the two cells, or the override that has a value twice.
    """
    seen: dict[str, list[tuple[Cell, list[str]]]] = {}
    for cell, arguments in zip(cells, grid, strict=True):
        unused = cell.config.unused_keys()
        settings = flatten(cell.config) | _text_settings(cell.config)
        settings = {key: value for key, value in settings.items() if not is_free(key) and key not in unused}
        written = {key: value for key, value in settings.items() if not key.startswith("schedule.")}
        alike = seen.setdefault(fingerprint(written), [])
        other = next((words for each, words in alike if same_values(each.config, cell.config)), None)
        alike.append((cell, arguments))
        if other is None:
            continue
        pair = [[line for line in a if line not in b] for a, b in ((other, arguments), (arguments, other))]
        if not any(pair):
            swept = [o for o in overrides if o.is_sweep_override()]
            twice = next(o for o in reversed(swept) if len({*values_of(o)}) < len(values_of(o)))
            raise ConfigError(f"{twice.input_line}: two of these values are the same; leave one out")
        names = [",".join(sorted(lines)) or "no override" for lines in (pair if all(pair) else (other, arguments))]
        varied = {o.get_key_element() for o in overrides if o.is_sweep_override()}
        shared = [line for line in arguments if all(pair) and line in other and line.partition("=")[0] in varied]
        where = f", both with {','.join(shared)}" if shared else ""
        raise ConfigError(f"two cells of this sweep are the same run: {' and '.join(names)}{where}; leave one out")


def _text_settings(config: Config) -> dict[str, Any]:
    """Return the settings of the source of the text as the source has them, such as domains in the order of reading."""
    source, spec = config.build_source(), config.data.source
    found = {f"data.source.{name}": getattr(source, name, None) for name in spec if name != "_target_"}
    return {key: value for key, value in found.items() if isinstance(value, (bool, int, float, str, list, tuple))}
