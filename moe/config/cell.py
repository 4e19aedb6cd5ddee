"""A cell of a sweep, and the grid that it belongs to."""

from pathlib import Path
from typing import Any, NamedTuple

from moe.config.schema import Config
from moe.config.words import as_word

CHOOSES = "val/loss"  # its mean over the seeds for tuning decides which values of tuned keys are the best


class Grid(NamedTuple):
    """Runs that belong together: all combinations of levels of some factors, with several seeds.

    name: the experiment, followed by what distinguishes the grid from the experiment's own. factors: the keys that it
    varies, without the seed. fixed: other settings that differ from those of the experiment; one that each cell
    computes is the text of the command, such as ${equal_flops:64}. cells: the names of the run folders, in the order of
    the levels. search: such as "minimize val/loss", if results decided which combinations of levels there are; such
    runs are no factorial grid. typed: the levels of a factor as the command wrote them, if cells compute some of them.
    replaced: the values in the file of the experiment that the command overrules, by their keys, as words.
    """

    name: str
    factors: list[str]
    fixed: dict[str, Any]
    cells: list[str]
    search: str | None = None
    typed: dict[str, list[str]] = {}
    replaced: dict[str, str] = {}

    def replacements(self) -> list[str]:
        """Return in words what the command overrules, such as "noise=0.5 instead of 0.1"."""
        now = {key: f"{key}={as_word(self.fixed[key])}" for key in self.replaced if key in self.fixed}
        return [
            f"{now.get(key, f'several values of {key}')} instead of {before}" for key, before in self.replaced.items()
        ]


class Cell(NamedTuple):
    """One cell of a sweep, or a single run.

    config: its configuration. folder: its run folder. choices: the option chosen from each group. ignored: the keys
    that do not apply to this run (`run_routers.ignored_keys`); they are switched off in `config`. overrides: the words
    from which a launcher composes this cell again. twins: those of other cells of the command that are the same run in
    the same folder, because the keys that tell them apart do not apply. grid: all cells of the command; None for a
    single run.
    """

    config: Config
    folder: Path
    experiment: str
    choices: dict[str, str | None]
    ignored: frozenset[str] = frozenset()
    overrides: tuple[str, ...] = ()
    twins: tuple[tuple[str, ...], ...] = ()
    grid: Grid | None = None

    def identity(self) -> dict[str, Any]:
        """Return the keys that decide what the run computes, flat, without those that do not apply to it."""
        return {key: value for key, value in self.config.identity().items() if key not in self.ignored}
