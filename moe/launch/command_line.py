"""Turn a command line into checked cells, so that every mistake is refused before the first run starts."""

import argparse
import csv
import hashlib
import json
import logging
import os
import pickle
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from functools import cache
from inspect import signature
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple, NoReturn

import yaml
from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl, get_overrides_dirname
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override, Quote, QuotedString, RangeSweep
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from moe.checks import ConfigError, describe, first_line, locate, one_of, require, unknown
from moe.config import dense_checkpoint
from moe.config.claim import ClaimConfig
from moe.config.options import CONF, GROUPS, options, search_path, sources, use
from moe.config.schema import (
    DENSE_IGNORES,
    OFF,
    Cell,
    Config,
    DataConfig,
    LoggerConfig,
    ModelConfig,
    OptimizerConfig,
    allowed_values,
    fingerprint,
    flatten,
    is_free,
)
from moe.distributed import ranks
from moe.files import open_file
from moe.launch import slurm
from moe.launch.claims import check_claims
from moe.launch.grids import grid_of
from moe.launch.hints import hint
from moe.runs.folder import finished, same_run, stored_record

log = logging.getLogger(__name__)

FAULTS = (
    HydraException,
    OmegaConfBaseException,
    ArithmeticError,
    ValueError,
)  # what a wrong override makes Hydra raise
EXAMPLES = {"data.source.paths": "[notes/*.txt]"}  # values of keys that have no default
CLAIM = (  # an example, whole, because a claim has several keys without a default
    "claims=[{text: Noise raises the loss, metric: val/loss, factor: noise, levels: [0.5], than: [0.0], kind: higher}]"
)
HYDRA_KEYS = ("hydra/launcher", "hydra.sweeper.max_batch_size", "hydra.launcher.")  # those that a user may set
ONE_PER_COMMAND = ("experiment", "out")
# Nodes of the configuration that name a class, each with its config group. Their other keys are those of the class.
CLASSES = {"router": "router", "schedule": "schedule", "data.source": "data"}
DEFAULTS = ("variant=null",)  # defaults that are no option; Hydra cannot choose them, so they are left out
KEYWORDS = ("null", "none", "true", "false", "inf", "nan")  # words that Hydra's grammar does not read as text
MOST_CELLS = 10_000  # of one sweep
LONGEST_NAME = 150  # bytes in the name of a run folder; file systems allow 255


def run_name(overrides: str) -> str:
    """Return the folder name of a run from its sorted overrides: never empty, one level deep, safe on any file system.

    A name that had to be changed or cut ends in a digest.
    """
    overrides = re.sub(r"(^|,)\+\+", r"\1", overrides)  # marks of added keys
    name = re.sub(r"[^\w.,=+-]+", "_", overrides, flags=re.ASCII).strip(".") or "base"
    if name == overrides and len(name) <= LONGEST_NAME:
        return name
    digest = hashlib.sha256(overrides.encode()).hexdigest()[:8]
    return name if not overrides else f"{name[:LONGEST_NAME]}-{digest}"


def best_level(results: str, factor: str) -> Any:
    """Return the level of `factor` with the lowest mean final val/loss in a sweep's results.csv.

    Raises ConfigError if there is no such file, or if a run in it is not finished, or if it has several grids.
    """
    if not Path(results).exists():
        raise ConfigError(f"{factor} comes from {results}, which does not exist: run that experiment first")
    losses: dict[str, list[float]] = defaultdict(list)
    with open_file(Path(results), newline="") as file:
        rows = list(csv.DictReader(file))
        if len(grids := dict.fromkeys(row["experiment"] for row in rows)) > 1:
            several = f"which has several grids: {'; '.join(grids)}"
            raise ConfigError(f"{factor} comes from {results}, {several}. Give {factor}=VALUE instead")
        for row in rows:
            if row["status"] != "finished":
                raise ConfigError(f"{factor} comes from {results}, where {row['run']} is {row['status']}: finish it")
            losses[row[factor]].append(float(row["val/loss"]))
    return json.loads(min(losses, key=lambda level: fmean(losses[level])))


ConfigStore.instance().store(name="schema", node=Config)
OmegaConf.register_new_resolver("run_name", run_name, replace=True)
OmegaConf.register_new_resolver("search_path", lambda: [f"file://{path}" for path in search_path()], replace=True)
OmegaConf.register_new_resolver("best_level", best_level, replace=True)
OmegaConf.register_new_resolver("twice", lambda number: 2 * number, replace=True)
OmegaConf.register_new_resolver("folder", lambda out, default: os.path.expanduser(out or default), replace=True)


def typed(composed: DictConfig, choices: dict[str, str | None]) -> Config:
    """Return a composed configuration as a `Config`. Everything after this works without OmegaConf.

    choices: the option of each group. Where the class of an option was replaced by another one, the entry becomes the
    name of that class, and the keys of the option are left out that the class does not take.
    """
    config: DictConfig = pickle.loads(pickle.dumps(composed))  # takes half the time of OmegaConf's copy
    with open_dict(config):
        config.pop("hydra", None)
    if config.model.get("dense") is not None:
        given = {str(k): None if OmegaConf.is_missing(config.model, k) else config.model[k] for k in config.model}
        config.model.update(dense_checkpoint.resolve(given))
    sized = not OmegaConf.is_missing(config.model, "dim")
    require(sized, "model.dense", None, "the folder or hub name of a dense Llama-type checkpoint, with its sizes")
    settings = OmegaConf.to_object(config)
    assert isinstance(settings, Config)
    for key, group in CLASSES.items():
        holder, name = (settings.data, "source") if key == "data.source" else (settings, key)
        spec, preset = getattr(holder, name), _preset(key, choices.get(group))
        if preset is not None and isinstance(spec, dict) and spec.get("_target_") != preset.get("_target_"):
            taken = signature(locate(spec.get("_target_"), key, trusted=True)).parameters
            own = {k: v for k, v in spec.items() if k in taken or k == "_target_" or preset.get(k, ...) != v}
            setattr(holder, name, own)
            choices[group] = str(spec["_target_"])
    return settings


@cache
def _preset(key: str, option: str | None) -> dict[str, Any] | None:
    """Return what the yaml of an option says at `key`, which is one of `CLASSES`; None if there is no such option."""
    path = sources(CLASSES[key]).get(str(option))
    content: Any = {} if path is None else OmegaConf.to_container(_read_option(path))
    node: Any = content.get("source") if key == "data.source" else content
    return node if isinstance(node, dict) and "_target_" in node else None


def _read_option(path: Path) -> DictConfig:
    """Return what the yaml file of an option says. Raises ConfigError, with file and line, if it cannot be read."""
    try:
        content: Any = OmegaConf.load(path)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{path}{line}: {error.problem or first_line(error)}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: must be UTF-8") from None
    except (yaml.YAMLError, OSError) as error:
        raise ConfigError(f"{path}: {getattr(error, 'strerror', None) or first_line(error)}") from None
    if not isinstance(content, DictConfig):
        raise ConfigError(f"{path}: must hold keys and values, as key: value")
    return content


def _check_option_files() -> None:
    """Raise ConfigError for the first option outside of this project whose file cannot be read."""
    for group in GROUPS:
        for path in sources(group).values():
            if not path.is_relative_to(CONF):
                _read_option(path)


class Command(NamedTuple):
    """A checked command line.

    cells: the runs that it asks for; None where Hydra answers by itself (`--cfg`, `--info`, ...). arguments: what Hydra
    is given instead of the command line, so that it launches exactly these cells.
    """

    cells: list[Cell] | None
    arguments: list[str]

    def batches(self, overrides: object, size: int | None) -> list[list[list[str]]]:
        """Return the overrides of each cell, `size` cells at a time. Stands in for `BasicSweeper.split_arguments`."""
        cells = [list(cell.overrides) for cell in self.cells or []]
        return list(BasicSweeper.split_overrides_to_chunks(cells, size))


def read_cells(arguments: list[str]) -> list[Cell] | None:
    """Return the checked cells of a command line, like `read_command`."""
    return read_command(arguments).cells


def read_command(arguments: list[str]) -> Command:
    """Read and check a command line.

    Raises ConfigError, or RecordError for a run folder that cannot be read, both with a message of one line.
    """
    args = _parse_flags(arguments)
    left_out = (*args.overrides, "--", "--config-dir", "-cd", args.config_dir, f"--config-dir={args.config_dir}")
    flags = [word for word in arguments if word not in left_out]
    args.overrides, folders = _folders(args)
    use(folders)
    if args.hydra_help or args.shell_completion:
        return Command(None, flags if args.hydra_help else arguments)
    with initialize_config_dir(str(CONF), version_base="1.3", job_name="train"):
        try:
            overrides = _with_added_keys(_only_last_of_each_key([_parse_override(word) for word in args.overrides]))
            _check_number(overrides)
            for override in overrides:
                _check_override(override)
            if args.cfg or args.info:
                _check_shown(overrides, args)
                return Command(None, [*_lines(overrides), *flags])
            return _expand(overrides, multirun=args.multirun)
        finally:
            GlobalHydra.instance().clear()


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
        raise ConfigError(f"{' and '.join(asked)} cannot be used together")
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
    composed = _compose(_lines(overrides))
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
            raise _explain(error, _lines(overrides)) from None


def _expand(overrides: list[Override], *, multirun: bool) -> Command:
    launch = [o for o in overrides if o.is_hydra_override()]
    own = [o for o in overrides if not o.is_hydra_override()]
    # The keys of a group depend on its option, so values are set only where the options of a cell are known.
    base = _compose(_lines([*launch, *(o for o in own if _is_group(o) and not o.is_sweep_override())]))
    launcher = base.hydra.runtime.choices["hydra/launcher"]
    allowed = f"basic, or left out: this launch has {ranks.world_size()} processes, which train one cell after another"
    require(launcher == "basic" or ranks.world_size() == 1, "hydra/launcher", launcher, allowed)
    multirun = multirun or str(base.hydra.mode) == "RunMode.MULTIRUN"
    require(multirun or launcher == "basic", "hydra/launcher", launcher, "used with -m: it starts the cells of a sweep")
    require(launcher != "submitit_slurm", "hydra/launcher", launcher, "slurm, which has the settings of this project")
    swept = [str(o.input_line) for o in own if o.is_sweep_override()]
    if swept and not multirun:
        _compose(
            [f"{o.get_key_element()}={_values(o)[0]}" if o.is_sweep_override() else str(o.input_line) for o in own]
        )
        raise ConfigError(f"{swept[0]}: several values need a sweep; add -m")
    batch, jobs = base.hydra.sweeper.get("max_batch_size"), base.hydra.launcher.get("n_jobs")
    require(batch is None or batch > 0, "hydra.sweeper.max_batch_size", batch, "a whole number > 0, or null")
    require(jobs != 0, "hydra.launcher.n_jobs", jobs, "a whole number > 0, or -1 for all processors")
    params = (base.hydra.sweeper.params or {}).items() if multirun else ()
    presets = [_parse_override(f"{key}={value}") for key, value in params]
    for override in presets + own:
        _check_type(override)
    _check_number(presets + own)
    [grid] = BasicSweeper.split_arguments(presets + own, None)
    varied = {o.key_or_group for o in presets + own if o.is_sweep_override()}
    same_keys_apply = not {key.partition(".")[0] for key in varied} & {*GROUPS, "capacity"}
    cells: list[Cell] = []
    composed: list[DictConfig] = []
    for arguments in grid:  # a cell is checked before the next one is composed, so that a wrong sweep is refused soon
        arguments[:] = [line for line in arguments if line not in DEFAULTS]
        composed.append(_compose(arguments))
        cell = _cell(composed[-1], arguments, multirun=multirun)
        if not finished(cell):  # the router of a finished run is known to be valid, and this check imports torch
            cell.config.check_router()
            if same_keys_apply and not cells:
                _refuse_given_in_vain([cell], [_switch_off_ignored(cell)], varied)
        cells.append(cell)
    described = [_without_ignored(*each) for each in zip(cells, composed, grid, strict=True)]
    _refuse_given_in_vain(cells, described, varied)
    check_claims(cells, presets, sweep=multirun)
    _check_distinct(cells)
    cells = described
    for override in own if all(cell.config.is_dense for cell in cells) else ():
        if not override.is_hydra_override() and override.key_or_group.partition(".")[0] in DENSE_IGNORES:
            line = override.input_line
            raise ConfigError(f"{line}: must be left out, because no layer of this model is a Mixture of Experts")
    if launcher == "slurm" and not all(map(finished, cells)):
        slurm.prepare(base.hydra.launcher)
    key = "hydra.sweep.subdir" if multirun else "hydra.run.dir"
    unique: dict[Path, Cell] = {}
    for cell, arguments in zip(cells, grid, strict=True):
        place = _quote(cell.folder.name if multirun else str(cell.folder))
        unique.setdefault(cell.folder, cell._replace(overrides=(*arguments, f"{key}={place}")))
    cells = list(unique.values())
    if not multirun:
        return Command(cells, [*_lines(launch), *cells[0].overrides])
    grid_of_cells = grid_of(cells, presets, own, _usual_settings(base, own))
    cells = [cell._replace(grid=grid_of_cells) for cell in cells]
    common = [o for o in own if o.key_or_group in ONE_PER_COMMAND]
    return Command(cells, ["--multirun", *_lines([*launch, *common])])


def _check_number(overrides: Iterable[Override]) -> None:
    """Raise ConfigError if overrides span too many cells. Nothing is listed, so that this takes no time."""
    number = 1.0
    for override in overrides:
        value = override.value()
        if isinstance(value, RangeSweep):
            if value.step == 0:
                raise ConfigError(f"{override.input_line}: the step must not be 0")
            number *= max(0.0, (float(value.stop or 0) - float(value.start or 0)) / float(value.step))
        elif isinstance(value, ChoiceSweep):
            number *= len(value.list)
        if number > MOST_CELLS:
            limit = f"a sweep has at most {MOST_CELLS:,} cells, and this one has {number:,.0f}"
            raise ConfigError(f"{override.input_line}: {limit}")


def _usual_settings(base: DictConfig, own: list[Override]) -> dict[str, Any]:
    """Return the values in `base`, which has the groups of the command, and the groups that the experiment chooses."""
    values = OmegaConf.to_container(OmegaConf.masked_copy(base, [str(key) for key in base if key != "hydra"]))
    if not any(_is_group(o) and o.key_or_group not in ONE_PER_COMMAND for o in own):
        return flatten(values) | group_choices(base.hydra)  # type: ignore[arg-type]
    experiment = _compose(_lines([o for o in own if o.key_or_group == "experiment"]))
    return flatten(values) | group_choices(experiment.hydra)  # type: ignore[arg-type]


def job_cell(composed: DictConfig, hydra: Any) -> Cell:
    """Return the cell that a process of a launcher trains, the same as `read_cells` returns. Its folder was passed."""
    use()
    choices = group_choices(hydra)
    config = typed(composed, choices)
    return _switch_off_ignored(Cell(config, Path(hydra.runtime.output_dir), str(choices.pop("experiment")), choices))


def _switch_off_ignored(cell: Cell) -> Cell:
    """Return the cell with every key switched off that does not apply to it."""
    record = stored_record(cell)
    if record is not None and finished(cell) and not cell.config.is_dense:  # its record tells, without torch
        ignored = frozenset({*OFF, *cell.config.identity()} - record.identity.keys())
    else:
        ignored = cell.config.ignored_keys()
    return cell._replace(config=cell.config.without(ignored), ignored=ignored)


def _without_ignored(cell: Cell, composed: DictConfig, arguments: list[str]) -> Cell:
    """Return the cell with every key switched off that does not apply to it, and without these keys in its name."""
    cell = _switch_off_ignored(cell)
    overrides = OverridesParser.create().parse_overrides(arguments)
    if cell.folder.name != run_name(_dirname(overrides, composed.hydra)):  # the user chose the name
        return cell
    return cell._replace(folder=cell.folder.with_name(run_name(_dirname(overrides, composed.hydra, cell.ignored))))


def _dirname(overrides: list[Override], hydra: Any, without: Iterable[str] = ()) -> str:
    """Return what Hydra calls `override_dirname`: the overrides that name a run.

    without: keys and groups of keys that are left out.
    """
    naming = hydra.job.config.override_dirname
    named = [override for override in overrides if not override.is_hydra_override()]
    keys = [override.key_or_group for override in named]
    excluded = [*naming.exclude_keys, *(key for key in keys if {key, key.partition(".")[0]} & {*without})]
    return str(get_overrides_dirname(named, kv_sep=naming.kv_sep, item_sep=naming.item_sep, exclude_keys=excluded))


def _refuse_given_in_vain(cells: list[Cell], described: list[Cell], swept: set[str]) -> None:
    """Raise ConfigError for a key that was set to another value than its default and applies to no cell.

    cells: as the user wrote them. described: the same cells with the keys that do not apply to each.
    """
    for key in sorted(frozenset.intersection(*(cell.ignored for cell in described)) - {*DENSE_IGNORES}):
        owners = [cell.config.router if key not in OFF else vars(cell.config) for cell in cells]
        values = dict.fromkeys(owner[key.removeprefix("router.")] for owner in owners)
        quiet = [OFF[key], _default(key, cells[0])] if key in OFF else [_default(key, cell) for cell in cells[:1]]
        vain = [value for value in values if value not in quiet]
        if key in swept and len(values) > 1:
            vain += [value for value in values if value not in quiet[:1]]
        if vain:
            raise ConfigError(f"{key}={vain[0]}: {_why_ignored(key, cells[0])}; leave it out")


def _default(key: str, cell: Cell) -> Any:
    """Return the value of a root key of the configuration, or of the router, that is not set anywhere."""
    if key in OFF:
        return next(field.default for field in fields(Config) if field.name == key)
    path = sources("router").get(str(cell.choices["router"]))
    return None if path is None else OmegaConf.select(_read_option(path), key.removeprefix("router."))


def _why_ignored(key: str, cell: Cell) -> str:
    if cell.config.is_dense:
        return "no layer of this model is a Mixture of Experts"
    if key == "drop" and cell.config.capacity is None:
        return "nothing is dropped without a capacity limit"
    settings = "" if key in OFF else " with its other settings"
    return f"router={cell.choices['router']} ignores {key}{settings}"


def _check_distinct(cells: list[Cell]) -> None:
    """Raise ConfigError, naming both, if two cells compute the same, whatever the spelling of their settings."""
    seen: dict[str, Cell] = {}
    for cell in cells:
        written = {key: value for key, value in flatten(asdict(cell.config)).items() if not is_free(key)}
        other = seen.setdefault(fingerprint(written), cell)
        if other is not cell:
            names = cell.folder.name if other.folder == cell.folder else f"{other.folder.name} and {cell.folder.name}"
            raise ConfigError(f"two cells of this sweep are the same run: {names}; leave one out")


def _cell(composed: DictConfig, arguments: list[str], *, multirun: bool) -> Cell:
    """Return a checked cell. If its run is found under another spelling, the cell gets that folder."""
    hydra = composed.hydra
    choices = group_choices(hydra)
    try:
        config = typed(composed, choices)
        config.check()
        folder = Path(hydra.sweep.dir, hydra.sweep.subdir) if multirun else Path(hydra.run.dir)
        cell = Cell(config, folder, str(choices.pop("experiment")), choices)
        return cell._replace(folder=same_run(cell) or folder)
    except FAULTS as error:
        raise _explain(error, arguments) from None
    except OSError as error:
        raise _unusable_path(error, arguments) from None


def _unusable_path(error: OSError, arguments: list[str]) -> ConfigError:
    """Return an error of the file system as one line that begins with the argument whose path caused it."""
    name = str(error.filename)
    for line in arguments:
        value = os.path.expanduser(line.partition("=")[2].strip("\"'[]"))
        if value and (value in name or name in value):
            return ConfigError(f"{line:.100}: {error.strerror}")
    return ConfigError(f"{name:.100}: {error.strerror}")


def group_choices(hydra: Any) -> dict[str, str | None]:
    """Return the option chosen from each config group, given Hydra's own configuration."""
    return {group: hydra.runtime.choices.get(group) for group in GROUPS}


def _compose(arguments: list[str]) -> DictConfig:
    """Return what Hydra composes from these overrides, with its own settings resolved as far as folders need them."""
    try:
        overrides = OverridesParser.create().parse_overrides(arguments)
        if all(_is_group_choice(o) or _sets_value(o) for o in overrides):
            composed = _compose_values(overrides)
        else:
            composed = compose("config", overrides=arguments, return_hydra_config=True)
        OmegaConf.resolve(composed.hydra.run)
        OmegaConf.resolve(composed.hydra.sweep)
        return composed
    except (*FAULTS, yaml.YAMLError, OSError) as error:
        raise _explain(error, arguments) from None


def _compose_values(overrides: list[Override]) -> DictConfig:
    """Compose the groups once for all cells of a sweep, and set the other values in a copy, as Hydra does it.

    This takes a seventh of the time of composing each cell.
    """
    groups = [o for o in overrides if _is_group_choice(o)]
    composed: DictConfig = pickle.loads(_compose_groups(tuple(str(o.input_line) for o in groups)))
    ConfigLoaderImpl._apply_overrides_to_config([o for o in overrides if o not in groups], composed)
    composed.hydra.overrides.task = [o.input_line for o in overrides if not o.is_hydra_override()]
    composed.hydra.job.override_dirname = _dirname(overrides, composed.hydra)
    return composed


@cache
def _compose_groups(groups: tuple[str, ...]) -> bytes:
    """Return what Hydra composes from these options, pickled: a copy of it then takes a sixth of OmegaConf's time."""
    return pickle.dumps(compose("config", overrides=list(groups), return_hydra_config=True))


def _is_group_choice(override: Override) -> bool:
    return (override.key_or_group in GROUPS or "/" in override.key_or_group) and isinstance(override.value(), str)


def _sets_value(override: Override) -> bool:
    """Return whether an override sets one value of this project or of a launcher. Hydra itself composes all others."""
    key = override.key_or_group
    ours = not (key == "hydra" or key.startswith(("hydra.", "hydra/"))) or key.startswith("hydra.launcher.")
    return ours and key not in GROUPS and override.package is None and not isinstance(override.value(), dict)


def _quote(text: str) -> str:
    return QuotedString(text, Quote.double).with_quotes()


def _lines(overrides: list[Override]) -> list[str]:
    """Return overrides as words of a command line for Hydra, without `DEFAULTS`."""
    return [str(override.input_line) for override in overrides if override.input_line not in DEFAULTS]


def _parse_override(word: str) -> Override:
    """Read one word of the command line, with Hydra's grammar.

    A value that this grammar cannot read, such as a path with "ä" or "=", is taken as text if it has no character that
    means something in the grammar.
    """
    parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
    key, equals, value = word.partition("=")
    commas = [part.strip() for part in value.split(",")] if value[:1] not in ("", "'", '"', "[", "{") else [value]
    if "" in commas[1:]:
        place = "after the last comma" if commas[-1] == "" else "between two commas"
        raise ConfigError(f"{word:.200}: a value is missing {place}")
    if any("\ud800" <= character <= "\udfff" for character in word):
        raise ConfigError(f"cannot read the command line: {word:.200}: must be UTF-8")
    items = [_quote(item.strip()) for item in value[1:-1].split(",")] if value[:1] + value[-1:] == "[]" else None
    quoted = f"{key}={_quote(value)}" if items is None else f"{key}=[{','.join(items)}]"
    try:
        return parser.parse_overrides([word])[0]
    except FAULTS as error:
        cause = _cause(error)
        if error.__cause__ is not None:  # the value is a function of this grammar, or looks like one
            cause = f"{first_line(error.__cause__)}; a text needs quotes"
            raise ConfigError(f"cannot read the command line: {word:.200}: {cause:.300}") from None
    if not equals:
        example = f"{word}=OPTION" if word in GROUPS else "key=value"
        raise ConfigError(f"cannot read the command line: {word:.200}: write {example}")
    try:
        override = parser.parse_overrides([quoted])[0]
    except FAULTS:
        raise ConfigError(f"cannot read the command line: {word:.200}: {cause:.300}") from None
    if set(value) & set("""'"()[]{},$\\""") or len(value) > 1000:
        raise ConfigError(f"cannot read the command line: {word:.200}: put a text in quotes, like '{quoted:.200}'")
    return override


def _only_last_of_each_key(overrides: list[Override]) -> list[Override]:
    """Return the overrides without those that a later one overrules, and log these."""
    last = {override.get_key_element(): override for override in overrides}
    for override in overrides:
        if (overruling := last[override.get_key_element()]) is not override:
            log.warning("%s is given twice: %s counts", override.key_or_group, overruling.input_line)
    return [override for override in overrides if last[override.get_key_element()] is override]


def _with_added_keys(overrides: list[Override]) -> list[Override]:
    """Return the overrides with the keys of a class that the command names itself marked as added, by "++".

    Only the class knows which keys it takes. So `router._target_=a.B router.k=1`, `+router.k=1` and
    `router={_target_: a.B, k: 1}` all become `router._target_=a.B ++router.k=1`.
    """
    parts: list[Override] = []
    for override in overrides:
        value = None if override.is_sweep_override() else override.value()
        if override.key_or_group in CLASSES and isinstance(value, dict) and "_target_" in value:
            words = [f"{override.key_or_group}.{name}={_word(each)}" for name, each in value.items()]
            parts += map(_parse_override, words)
        else:
            parts.append(override)
    own = {key for key in CLASSES if any(part.key_or_group == f"{key}._target_" for part in parts)}

    def is_added(part: Override) -> bool:
        node, _, name = part.key_or_group.rpartition(".")
        return name != "_target_" and (node in own or (part.is_add() and node in CLASSES)) and not part.is_delete()

    return [_parse_override(f"++{str(part.input_line).lstrip('+')}") if is_added(part) else part for part in parts]


def _word(value: Any) -> str:
    """Return a value as Hydra's grammar writes it."""
    if isinstance(value, dict):
        return f"{{{','.join(f'{name}:{_word(each)}' for name, each in value.items())}}}"
    if isinstance(value, list):
        return f"[{','.join(map(_word, value))}]"
    if isinstance(value, str):
        return (
            value if re.fullmatch(r"[A-Za-z_]\w*(\.\w+)*", value) and value.lower() not in KEYWORDS else _quote(value)
        )
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _is_group(override: Override) -> bool:
    return override.key_or_group in GROUPS


def _check_override(override: Override) -> None:
    """Raise ConfigError for an override whose key or kind is not allowed, and for an unknown option of a group."""
    line, key = override.input_line, override.key_or_group
    adds_or_deletes = override.is_add() or override.is_force_add() or override.is_delete()
    if adds_or_deletes and not key.startswith(tuple(f"{each}." for each in CLASSES)):
        places = ", ".join(CLASSES)
        raise ConfigError(f"{line}: keys can be added and deleted only in {places}; set others as key=value")
    if override.is_add() and key.endswith("._target_"):
        raise ConfigError(f"{line}: write {str(line).lstrip('+')}, without +")
    if override.package is not None:
        raise ConfigError(f"{line}: a group cannot be moved; write {key}=...")
    if not key:
        raise ConfigError(f"{line}: the key is missing; write key=value")
    if not key.startswith(HYDRA_KEYS) and key.partition(".")[0].partition("/")[0] == "hydra":
        raise ConfigError(
            f"{line}: of Hydra's settings only {', '.join(HYDRA_KEYS)}... can be set; out=DIR sets the folder"
        )
    if override.is_sweep_override():
        if key in ONE_PER_COMMAND or override.is_hydra_override():
            raise ConfigError(f"{line}: a command has one {key}; give one command for each")
        if not override.is_discrete_sweep():
            raise ConfigError(
                f"{line}: an interval has no list of values; write them as a,b,c or range(start,stop,step)"
            )
    values = _values(override)
    if not values:
        raise ConfigError(f"{line}: this stands for no value")
    if "{}" in values and key not in GROUPS:
        raise ConfigError(
            f"{line}: an object without keys changes nothing; set the keys that differ, as {key}.KEY=VALUE"
        )
    for value in values if key in GROUPS else ():
        if value not in options(key) and f"{key}={value}" not in DEFAULTS:
            others = [f"{group}={value}" for group in GROUPS if group != key and value in options(group)]
            if others:
                raise ConfigError(f"unknown option of {key} '{value}'; there is {' and '.join(others)}")
            raise _unknown_option(key, value)


def _unknown_option(group: str, value: str) -> ConfigError:
    """Return the error for an option that does not exist. It says how a class or an option of the user is named."""
    error = unknown(f"option of {group}", value, options(group))
    node = next((key for key, of_group in CLASSES.items() if of_group == group), None)
    if node and re.fullmatch(r"[A-Za-z_]\w*(\.\w+)+", value):
        return ConfigError(f"unknown option of {group} '{value}'; for a class write {node}._target_={value}")
    if node and value.startswith("{") and "_target_" in value:
        swept = f"{node}._target_=A,B, and their keys as {node}.KEY=VALUE"
        return ConfigError(f"{group}={value}: a sweep of classes is written as {swept}")
    if "; nearest: " in str(error) or search_path() or not value.isidentifier() or value in KEYWORDS:
        return error
    return ConfigError(f"{error}; name a folder that holds {group}/{value}.yaml by --config-dir or MOE_SEARCH_PATH")


def _check_type(override: Override) -> None:
    """Raise ConfigError for a value that does not fit the type of its key in `Config`."""
    key = override.key_or_group
    allowed = None if key in GROUPS or override.is_hydra_override() else allowed_values(key)
    if allowed is None:
        return
    values = list(override.sweep_iterator()) if override.is_sweep_override() else [override.value()]
    typed_words = str(override.input_line).partition("=")[2].split(",")
    if len(typed_words) != len(values):
        typed_words = _values(override)
    for value, word in zip(values, typed_words, strict=True):
        if (error := _misfit(key, value)) is None:
            continue
        if isinstance(value, (list, dict)) and _misfit(key, type(value)()) is None:  # one of its parts is wrong
            raise ConfigError(f"{override.input_line:.200}: {_cause(error)}")
        parts = value if isinstance(value, list) else []
        if len(parts) > 1 and all(_misfit(key, part) is None for part in parts):
            swept = f"-m {key}={','.join(map(_word, parts))}"
            raise ConfigError(f"{key}={word}: must be {allowed}; for several values in a sweep write {swept}")
        require(False, key, word, allowed)


@cache
def _pickled_schema() -> bytes:
    """Return `Config` with its types as OmegaConf's container, pickled, because building it takes long."""
    return pickle.dumps(OmegaConf.structured(Config))


def _misfit(key: str, value: object) -> Exception | None:
    """Return why `Config` does not take a value for a key; None if it does."""
    try:
        OmegaConf.update(pickle.loads(_pickled_schema()), key, value)
    except FAULTS as error:
        return error
    return None


def _values(override: Override) -> list[str]:
    """Return the values of an override as text: several of a sweep, otherwise one."""
    if not override.is_sweep_override():
        return [override.get_value_element_as_str()]
    try:
        return list(override.sweep_string_iterator())
    except FAULTS as error:
        raise ConfigError(f"{override.input_line}: {_cause(error)}") from None


def _explain(error: Exception, overrides: list[str]) -> ConfigError:
    """Return an error of Hydra or OmegaConf as one line that names the override that causes it and what is allowed."""
    if isinstance(error, ConfigError):
        return error
    if isinstance(error, (yaml.YAMLError, UnicodeDecodeError, OSError)):
        _check_option_files()
    for extra, plugin in (("slurm", "submitit"), ("ray", "ray")):
        if f"hydra/launcher/{plugin}" in str(error):
            return ConfigError(f"hydra/launcher: this launcher needs `pip install -e '.[{extra}]'`")
    parsed = [_parse_override(line) for line in overrides]
    groups = [o for o in parsed if _is_group(o) or o.key_or_group == "hydra/launcher"]
    try:
        base = compose("config", overrides=_lines(groups), return_hydra_config=True)
    except FAULTS as cause:
        if launcher := re.search("Could not find 'hydra/launcher/(.*)'", str(cause)):
            launchers = GlobalHydra.instance().config_loader().get_group_options("hydra/launcher")
            one_of("hydra/launcher", launcher[1], sorted({*launchers} - {"submitit_slurm"}))
        return ConfigError(f"{' '.join(_lines(groups))}: {_cause(cause)}")
    choices = group_choices(base.hydra)
    with open_dict(base):
        base.pop("hydra")
    known = flatten(OmegaConf.to_container(base))  # type: ignore[arg-type]
    for override in parsed:
        if override in groups:
            continue
        key = override.key_or_group
        if not override.is_hydra_override() and not any(f"{name}.".startswith(f"{key}.") for name in known):
            return _unknown_key(key, known, choices)
        try:
            compose("config", overrides=_lines([*groups, override]))
        except FAULTS as cause:
            return ConfigError(f"{override.input_line:.200}: {_cause(cause)}")
    place = getattr(error, "full_key", None) or " ".join(overrides)
    if isinstance(error, MissingMandatoryValue) and place.startswith("claims["):
        return ConfigError(f"{place}: required, for example '{CLAIM}'")
    if isinstance(error, MissingMandatoryValue):
        return ConfigError(f"{place}: required, for example '{place}={EXAMPLES.get(place, '...')}'")
    return ConfigError(f"{place}: {_cause(error)}")


def _unknown_key(key: str, known: Iterable[str], choices: dict[str, str | None]) -> ConfigError:
    """Return the error for a key that the chosen options lack. It names other options that have the key, if any."""
    group, _, name = key.partition(".")
    if choices.get(group) is None or group in ("experiment", "variant"):
        others = ("router", "schedule", "data")  # the groups whose options differ in their keys
        keys = {*known, *(f"{each}.{k}" for each in others for option in options(each) for k in _keys(each, option))}
        if meant := hint(key):
            return ConfigError(f"unknown key '{key}'; write {meant}")
        error = unknown("key", key, {*keys, *GROUPS})
        return error if "; nearest: " in str(error) else ConfigError(f"{error}; `--cfg job` prints all keys")
    owner = f"{group}={choices[group]}"
    having = [f"{group}={option}" for option in options(group) if name in _keys(group, option)]
    meant = hint(key)
    if name == "target":
        meant = f"{group}._target_ for a class"
    elif not name.startswith("source.") or (meant and meant.startswith(f"{key},")):
        meant = None if having else meant
    if having:
        elsewhere = f"{', '.join(having)} {'has' if len(having) == 1 else 'have'} it"
        return ConfigError(f"{owner} has no key {name}; {elsewhere}{f'; or write {meant}' if meant else ''}")
    if meant and (meant.startswith(f"{group}.") or name not in _keys(group, str(choices[group]))):
        return ConfigError(f"unknown key of {owner} '{key}'; write {meant}")
    return unknown(f"key of {owner}", key, (each for each in known if each.startswith(f"{group}.")))


def _keys(group: str, option: str) -> set[str]:
    """Return the keys of an option without the name of its group, such as k and gate of router=topk.

    An option whose file cannot be read has none: only a command that chooses it is refused.
    """
    try:
        return set(flatten(OmegaConf.to_container(_read_option(sources(group)[option]))))  # type: ignore[arg-type]
    except ConfigError:
        return set()


def _cause(error: Exception) -> str:
    """Return the first line of an error of Hydra, without what Hydra puts in front of an error of OmegaConf."""
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    if in_file := re.match(r"In '(.*)': \w+ raised while composing config:\n(.*)", str(cause), re.DOTALL):
        return _cause_in_file(*in_file.groups())
    line = first_line(cause).removeprefix("ConfigError raised while resolving interpolation: ")
    kind = re.search(r"could not be converted to (Integer|Float)$", line)
    return line if kind is None else f"must be {describe(int if kind[1] == 'Integer' else float)}"


def _cause_in_file(name: str, error: str) -> str:
    """Return what is wrong in the YAML file of an option as one line.

    name: group and option, such as experiment/mine. error: the lines of OmegaConf's error.
    """
    group, _, option = name.rpartition("/")
    path = sources(group).get(option, CONF / f"{name}.yaml")
    file = path.relative_to(CONF.parent) if path.is_relative_to(CONF) else path
    if key := re.match(r"Key '(.*)' not in '(\w+)'", error):
        kinds = (Config, ModelConfig, DataConfig, OptimizerConfig, LoggerConfig, ClaimConfig)
        [names] = [[field.name for field in fields(kind)] for kind in kinds if kind.__name__ == key[2]] or [[]]
        place = " of a claim" if key[2] == ClaimConfig.__name__ else ""
        return str(unknown(f"key{place} in {file}", key[1], names))
    full_key = re.search(r"full_key: (\S+)", error)
    return f"{file}: " + (f"{full_key[1]}: " if full_key else "") + _cause(ValueError(error))


def help_text(arguments: Sequence[str] = ()) -> str:
    """Return the text of `python train.py --help`: the keys, and every option of every group with its purpose.

    Raises ConfigError for a folder of options in the arguments, or in the environment, that cannot be used.
    """
    _, folders = _folders(_parse_flags(list(arguments)))
    use(folders)
    lines = [
        "Train one Mixture-of-Experts language model, or with -m one for each combination of several values.",
        "",
        "  python train.py router=temperature router.temp=1.5",
        "  python train.py -m noise=0.0,0.1,0.5 lb=0.0,0.01 seed=42,43,44",
        "  python train.py experiment=noise_lb_seed",
        "  python train.py --cfg job            print every key and its value",
        "",
        "Set a key as key=value, a key in a group as group.key=value (router.temp=1.5), a group by the name of",
        "one of its options (router=temperature).",
        "",
        f"Keys: {' '.join(f.name for f in fields(Config) if f.name not in GROUPS)}",
    ]
    for group in GROUPS:
        entries = options(group)
        width = max(map(len, entries), default=0)
        lines += ["", f"{group}="]
        lines += [f"  {name:<{width}}  {purpose}" for name, purpose in entries.items()]
    return "\n".join(lines)
