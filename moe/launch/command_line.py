"""Read a command line: Hydra's flags, and the overrides from which the cells follow."""

import argparse
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import OmegaConf, open_dict

from moe.checks import ConfigError, require, unknown
from moe.config.cell import Cell
from moe.config.options import GROUPS, use
from moe.config.schema import allowed_values
from moe.launch import help, listing
from moe.launch.cells import Start
from moe.launch.compose import compose_config, composing
from moe.launch.explain import check_name, explain
from moe.launch.hints import hint
from moe.launch.hydra_errors import FAULTS
from moe.launch.implied import implied_by_checkpoint
from moe.launch.overrides import (
    check_grid,
    check_override,
    check_type,
    lines_of,
    only_last_of_each_key,
    parse_override,
    with_added_keys,
)
from moe.launch.search import Search, is_search, read_search
from moe.launch.tuning import expand_tuned

LIST = "--list"  # lists the experiments


class Command(NamedTuple):
    """A checked command line.

    cells: the runs that it asks for; None where Hydra answers by itself (`--cfg`, `--info`, ...). arguments: what Hydra
    is given instead of the command line, so that it launches exactly these cells. search: the search whose results
    decide which cells there are; `cells` is then empty.
    """

    cells: list[Cell] | None
    arguments: list[str]
    search: Search | None = None

    def run_folders(self) -> list[Path]:
        """Return the folders of the runs that the command asks for; of a search, those that there are so far."""
        return [cell.folder for cell in self.cells or []] if self.search is None else self.search.run_folders()

    def batches(self, overrides: object, size: int | None) -> list[list[list[str]]]:
        """Return the overrides of each cell, `size` cells at a time. Stands in for `BasicSweeper.split_arguments`."""
        cells = [list(cell.overrides) for cell in in_turns(self.cells or [])]
        return list(BasicSweeper.split_overrides_to_chunks(cells, size))


def in_turns(cells: list[Cell]) -> list[Cell]:
    """Return the cells in the order in which they start: seed by seed, and every second seed in reverse order.

    So the settings of a seed run close in time, and a load of the machine that rises or falls during the sweep slows
    none of them more than the others. A sweep that is stopped has whole seeds. The order of the seeds, and that of the
    cells of the first one, stay.
    """
    seeds = dict.fromkeys(cell.config.seed for cell in cells)
    of_seed = [[cell for cell in cells if cell.config.seed == seed] for seed in seeds]
    return [cell for number, each in enumerate(of_seed) for cell in (each[::-1] if number % 2 else each)]


def read_cells(arguments: list[str]) -> list[Cell] | None:
    """Return the checked cells of a command line, like `read_command`."""
    return read_command(arguments).cells


def read_command(arguments: list[str], *, prepare: Callable[[Start], Start] = lambda start: start) -> Command:
    """Read and check a command line.

    prepare: returns the start from which the cells are composed, which takes long. It raises ConfigError for one that
    the caller cannot use.

    Raises ConfigError, or RecordError for a run folder that cannot be read, both with a message of one line.
    """
    args = _parse_flags(arguments)
    left_out = (*args.overrides, "--", "--config-dir", "-cd", args.config_dir, f"--config-dir={args.config_dir}")
    flags = [word for word in arguments if word not in left_out]
    args.overrides, folders = _folders(args)
    use(folders)
    if args.hydra_help or args.shell_completion:
        return Command(None, flags if args.hydra_help else arguments)
    with composing():
        words = [*implied_by_checkpoint(args.overrides), *args.overrides]
        overrides = with_added_keys(only_last_of_each_key([parse_override(word) for word in words]))
        searching = is_search(overrides)
        if not searching:
            check_grid(overrides)
        for override in overrides:  # before Hydra composes, which takes longer
            check_override(override)
            check_name(override)
            if not searching:
                check_type(override)
        if args.cfg or args.info:
            _check_shown(overrides, args)
            return Command(None, [*lines_of(overrides), *flags])
        if searching:
            return Command([], [], read_search(overrides, multirun=args.multirun))
        return Command(*expand_tuned(prepare(Start.of(overrides, multirun=args.multirun))))


def _parse_flags(arguments: list[str]) -> argparse.Namespace:
    """Return Hydra's flags and, as `overrides`, the other words. Raises ConfigError for flags that cannot be used."""

    def refuse(message: str) -> NoReturn:
        for key, equals, value in (word.partition("=") for word in arguments if f" {word}" in message):
            meant = None if allowed_values(key.lstrip("-")) is not None else hint(key.lstrip("-"))
            if meant:
                raise ConfigError(f"{key}{equals}{value}: write {meant}, as key=value without --")
            if equals or allowed_values(key.lstrip("-")) is not None or key.lstrip("-") in GROUPS:
                following = arguments[arguments.index(key) + 1 :] if not equals else []
                given = value or next((word for word in following if "=" not in word), "VALUE")
                raise ConfigError(f"{key}{equals}{value}: write {key.lstrip('-')}={given}, without --")
        raise ConfigError(message)

    parser = get_args_parser()
    parser.error = refuse  # type: ignore[method-assign]
    args = parser.parse_intermixed_args(arguments)
    experiment = "name a folder with experiment/NAME.yaml by --config-dir, and write experiment=NAME"
    instead = {"config_name": experiment, "config_path": experiment}
    instead["experimental_rerun"] = "the same command again resumes a run, or skips it if it is finished"
    for flag, advice in instead.items():
        if getattr(args, flag):
            raise ConfigError(f"--{flag.replace('_', '-')} is not supported: {advice} (docs/hydra.md)")
    for flag, example in (("resolve", "--resolve"), ("package", "--package optimizer")):
        if getattr(args, flag) and not args.cfg:
            raise ConfigError(f"--{flag} works only with --cfg, such as --cfg job {example}")
    asked = [f"--{flag}" for flag in ("run", "multirun", "cfg", "info", "shell_completion") if getattr(args, flag)]
    if len(asked) > 1:
        advice = ": leave -m out, and give one value for each key" if "--multirun" in asked else ""
        raise ConfigError(f"{' and '.join(asked)} cannot be used together{advice}")
    if args.shell_completion and not re.fullmatch(
        "(install|uninstall|query)=(bash|fish|zsh)", " ".join(args.overrides)
    ):
        raise ConfigError(
            "--shell-completion needs one word such as install=bash: install, uninstall or query, and a shell"
        )
    return args


def _folders(args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Return the overrides without `hydra.searchpath`, and the folders that it and `--config-dir` name."""
    folders = [args.config_dir] if args.config_dir else []
    others = []
    for word in args.overrides:
        key, _, value = word.partition("=")
        if key.lstrip("+") != "hydra.searchpath":
            others.append(word)
            continue
        try:
            named = OverridesParser.create().parse_overrides([f"x={value}"])[0].value()
        except FAULTS:
            named = None
        words = [each for each in named if isinstance(each, str)] if isinstance(named, list) else []
        allowed = "a list of folders, such as [file:///home/me/lab/conf]"
        require(bool(words) and words == named, "hydra.searchpath", value, allowed)
        folders += words
    return others, folders


def _check_shown(overrides: list[Override], flags: argparse.Namespace) -> None:
    """Raise ConfigError unless the overrides give one configuration, which `--cfg` or `--info` can show."""
    for override in overrides:
        if override.is_sweep_override():
            raise ConfigError(f"{override.input_line}: --cfg and --info show one run; give one value")
    composed = compose_config(lines_of(overrides))
    if flags.cfg != "hydra":
        with open_dict(composed):
            composed.pop("hydra")
    package = flags.package
    if package not in (None, "_global_") and OmegaConf.select(composed, package, default=None) is None:
        raise unknown("package", package, map(str, composed))
    if flags.resolve:
        try:
            OmegaConf.resolve(composed)
        except FAULTS as error:
            raise explain(error, lines_of(overrides)) from None


def answer(arguments: Sequence[str]) -> Iterator[str]:
    """Yield the answer to `--list`, to `--help`, or to `--help` with keys and options, such as noise and router=topk.

    Raises ConfigError for an unknown word, and for a folder of options in the arguments, or in the environment, that
    cannot be used.
    """
    args = _parse_flags([word for word in arguments if word != LIST])
    words, folders = _folders(args)
    use(folders)
    if LIST in arguments:
        yield from listing.experiments_lines()
        return
    yield "\n\n".join(map(help.topic_text, words)) or help.help_text()


def help_text(arguments: Sequence[str] = ()) -> str:
    """Return `answer` as one text."""
    return "\n".join(answer(arguments))
