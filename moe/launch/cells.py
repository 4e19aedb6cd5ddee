"""Turn the overrides of a command into checked cells, so that every mistake is refused before the first run starts."""

import logging
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any, NamedTuple

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from moe.checks import ConfigError, require
from moe.config import layer_experts, layer_routers, run_routers
from moe.config.cell import Cell
from moe.config.keys import DEFAULTED, DENSE_IGNORES, OFF, RATES, flatten
from moe.config.options import CLASSES, GROUPS, use
from moe.config.question import applicable
from moe.config.schema import Config
from moe.distributed import ranks
from moe.launch import slurm
from moe.launch.claims import check_claims, check_question
from moe.launch.compose import compose_config, levels_of, override_dirname, typed
from moe.launch.distinct import check_distinct, each_run_once, with_overrides
from moe.launch.explain import explain, group_choices, unusable_path
from moe.launch.grids import grid_of, replacements
from moe.launch.hydra_errors import FAULTS
from moe.launch.option_files import default_of
from moe.launch.overrides import (
    DEFAULTS,
    ONE_PER_COMMAND,
    PLACES,
    check_discrete,
    check_number,
    check_type,
    is_group,
    lines_of,
    parse_override,
    parsed,
    values_of,
)
from moe.launch.resolvers import run_name
from moe.routing.loss_table import LOSSES
from moe.runs.folder import finished, same_run, stored_record

log = logging.getLogger(__name__)


class Start(NamedTuple):
    """What a command asks for before its cells are known.

    launch: the overrides of Hydra's own settings. own: all others. base: the configuration with Hydra's settings and
    with the groups of which the command chooses one option. multirun: whether the command is a sweep. presets: the grid
    of the experiment.
    """

    launch: list[Override]
    own: list[Override]
    base: DictConfig
    multirun: bool
    presets: list[Override]

    @classmethod
    def of(cls, overrides: list[Override], *, multirun: bool) -> "Start":
        """Read the overrides of a command. The keys of a group depend on its option, so no values are set yet.

        Only `PLACES` are, since a grid may follow from the results of another experiment.
        """
        launch = [o for o in overrides if o.is_hydra_override()]
        own = [o for o in overrides if not o.is_hydra_override()]
        places = [o for o in own if o.key_or_group in PLACES and isinstance(o.value(), str)]
        early = [*places, *(o for o in own if is_group(o) and not o.is_sweep_override())]
        arguments = lines_of([*launch, *early])
        base = compose_config(arguments)
        presets = [parse_override(f"{key}={value}") for key, value in levels_of(base, arguments).items()]
        return cls(launch, own, base, multirun or str(base.hydra.mode) == "RunMode.MULTIRUN", presets)

    def replacing(self, word: str) -> "Start":
        """Return the start with an override in place of those of the same key, in the experiment's grid if it is there.

        What the command gives itself comes after the grid.
        """
        new = parse_override(word)
        own, presets = ([o for o in part if o.key_or_group != new.key_or_group] for part in (self.own, self.presets))
        if len(presets) < len(self.presets) and len(own) == len(self.own):
            return self._replace(presets=[*presets, new])
        return self._replace(own=[*own, new])

    @property
    def launcher(self) -> str:
        return str(self.base.hydra.runtime.choices["hydra/launcher"])


class SayThatTorchLoads(MetaPathFinder):
    """Print a line before the seconds in which PyTorch is imported and nothing else can be seen.

    Several checks of a command may import it first, and others only ask whether `torch` is there, so the first of its
    modules counts. A command whose runs are all finished never does.
    """

    def find_spec(self, name: str, path: object, target: object = None) -> None:
        """Find nothing, so that Python goes on to search in the usual way."""
        if name.startswith("torch."):
            sys.meta_path.remove(self)
            print("checking the settings and loading PyTorch", flush=True)


def expand(
    overrides: list[Override], *, multirun: bool, planned: bool = True, in_vain: bool = False
) -> tuple[list[Cell], list[str]]:
    """Return the checked cells that the overrides of a command span, and what Hydra needs to launch exactly these.

    planned: whether the experiment's own grid counts. in_vain: whether keys may be set that apply to no cell.
    """
    return expand_start(Start.of(overrides, multirun=multirun), planned=planned, in_vain=in_vain)


def expand_start(
    start: Start,
    *,
    planned: bool = True,
    in_vain: bool = False,
    chosen: Callable[[list[list[str]]], list[list[str]]] = list,
    merge: bool = True,
) -> tuple[list[Cell], list[str]]:
    """Return what `expand` returns.

    chosen: completes the overrides of all cells, with what only single cells have. merge: see `each_run_once`.
    """
    if "torch" not in sys.modules and ranks.is_first():
        sys.meta_path.insert(0, SayThatTorchLoads())
    launch, own, base, multirun, presets = start
    _check_launch(start)
    presets = presets if multirun and planned else []
    for override in presets + own:
        check_discrete(override)
        check_type(override)
    check_number(presets + own)
    grid = chosen(combinations(presets + own))
    varied = {o.key_or_group for o in presets + own if o.is_sweep_override()}
    given = {o.key_or_group for o in presets + own if not is_group(o)}
    same_keys_apply = not {key.partition(".")[0] for key in varied} & {*GROUPS, "capacity", "trainable"}
    cells: list[Cell] = []
    composed: list[DictConfig] = []
    for arguments in grid:  # a cell is checked before the next one is composed, so that a wrong sweep is refused soon
        arguments[:] = [line for line in arguments if line not in DEFAULTS]
        composed.append(compose_config(arguments))
        cell = _cell(composed[-1], arguments, multirun=multirun)
        if not finished(cell):  # the router of a finished run is known to be valid, and this check imports torch
            run_routers.check(cell.config)
            _check_model(cell.config)
            if same_keys_apply and not cells and not in_vain:
                _refuse_given_in_vain([cell], [_ignored(cell)], given, varied)
        cells.append(cell)
    ignored = [*map(_ignored, cells)]
    if not in_vain:
        _refuse_given_in_vain(cells, ignored, given, varied)
    cells = [*map(_explicit, cells)]
    described = [_without_ignored(*each) for each in zip(cells, ignored, composed, grid, strict=True)]
    check_distinct(cells, grid, presets + own)
    if all(cell.config.is_dense for cell in described):
        _refuse_keys_of_routing(own)
    runs = each_run_once(with_overrides(described, grid, multirun=multirun), say=planned, merge=merge)
    folders = {cell.folder for cell in runs}
    written = [cell for cell, each in zip(cells, described, strict=True) if each.folder in folders]
    check_claims(written, presets, sweep=multirun)
    check_question(written[0], own)
    if planned:
        for key, (now, before) in replacements(cells, presets, own).items():
            log.warning("%s=%s replaces the experiment's %s=%s", key, now, key, before)
    if start.launcher == "slurm" and not all(map(finished, runs)):
        slurm.prepare()
    if not multirun:
        return runs, [*lines_of(launch), *runs[0].overrides]
    grid_of_runs = grid_of(runs, presets, own, _usual_settings(base, own))
    common = [o for o in own if o.key_or_group in ONE_PER_COMMAND]
    return [cell._replace(grid=grid_of_runs) for cell in runs], ["--multirun", *lines_of([*launch, *common])]


def _check_model(config: Config) -> None:
    from moe.runs.wandb_mirror import mode_of

    if mode_of(config.logger) != "disabled":
        # The run needs it later. But classes of W&B look for their source in every module that is already imported,
        # which takes a second longer after the thousands of modules of transformers.
        with suppress(Exception):  # an error of W&B stops no run, and the run names it
            import wandb.apis.public  # noqa: F401
    from moe.training.setup import check_model  # imports torch

    check_model(config)


def _check_launch(start: Start) -> None:
    """Raise ConfigError for a launcher or a sweeper that cannot train these cells, and for a grid without a sweep."""
    own, base, launcher = start.own, start.base, start.launcher
    allowed = f"basic, or left out: this launch has {ranks.world_size()} processes, which train one cell after another"
    require(launcher == "basic" or ranks.world_size() == 1, "hydra/launcher", launcher, allowed)
    swept_only = "used with -m: it starts the cells of a sweep"
    require(start.multirun or launcher == "basic", "hydra/launcher", launcher, swept_only)
    require(launcher != "submitit_slurm", "hydra/launcher", launcher, "slurm, which has the settings of this project")
    if launcher == "slurm":
        slurm.check_times(base.hydra.launcher)
    swept = [str(o.input_line) for o in own if o.is_sweep_override()]
    if swept and not start.multirun:
        compose_config(
            [f"{o.get_key_element()}={values_of(o)[0]}" if o.is_sweep_override() else str(o.input_line) for o in own]
        )
        raise ConfigError(f"{swept[0]}: several values need a sweep; add -m")
    if base.hydra.sweeper.params and not start.multirun:
        ways = "add -m, or write `mode: MULTIRUN` below `hydra:` in the file with these params"
        raise ConfigError(
            f"hydra.sweeper.params: a grid of {', '.join(base.hydra.sweeper.params)} needs a sweep; {ways}"
        )
    batch, jobs = base.hydra.sweeper.get("max_batch_size"), base.hydra.launcher.get("n_jobs")
    require(batch is None or batch > 0, "hydra.sweeper.max_batch_size", batch, "a whole number > 0, or null")
    require(jobs != 0, "hydra.launcher.n_jobs", jobs, "a whole number > 0, or -1 for all processors")
    sweeper = base.hydra.runtime.choices["hydra/sweeper"]
    require(sweeper == "basic", "hydra/sweeper", sweeper, "chosen in the command, not in an experiment")


def _refuse_keys_of_routing(overrides: list[Override]) -> None:
    """Raise ConfigError for a key that needs a layer with experts."""
    for override in overrides:
        if override.key_or_group.partition(".")[0] in DENSE_IGNORES:
            line = override.input_line
            raise ConfigError(f"{line}: must be left out, because no layer of this model is a Mixture of Experts")


def combinations(overrides: list[Override]) -> list[list[str]]:
    """Return the overrides of each cell that the overrides of a command span, without keys that its options lack."""
    [grid] = BasicSweeper.split_arguments(overrides, None)
    return _with_keys_that_exist(grid)


def _with_keys_that_exist(grid: list[list[str]]) -> list[list[str]]:
    """Return the overrides of each cell without keys that its options lack, and each cell once.

    Such a key does not apply to the cell, as `router.temp` of a router without a temperature. A key that no cell has
    stays, so that it is refused.
    """
    some = frozenset[str]().union(*map(keys_of_options, grid))
    cells: list[list[str]] = []
    for arguments in grid:
        missing = lacking(arguments, some)
        kept = [line for line in arguments if line.partition("=")[0].lstrip("+") not in missing]
        if kept == arguments or kept not in cells:
            cells.append(kept)
    return cells


def lacking(arguments: Sequence[str], keys: frozenset[str]) -> frozenset[str]:
    """Return those of `keys` that the options of these overrides lack. A class that they name knows its own keys."""
    names = {line.partition("=")[0] for line in arguments}
    own = {node for node in CLASSES if f"{node}._target_" in names}
    return frozenset(key for key in keys - keys_of_options(arguments) if key.rpartition(".")[0] not in own)


def keys_of_options(arguments: Iterable[str]) -> frozenset[str]:
    """Return the keys of the configuration with the options that these overrides choose, one for each group."""
    return _keys_of_groups(tuple(line for line in arguments if line.partition("=")[0] in GROUPS))


@cache
def _keys_of_groups(groups: tuple[str, ...]) -> frozenset[str]:
    """Return the keys of the configuration with these options."""
    composed = compose_config([line for line in groups if line not in DEFAULTS])
    keys = [str(key) for key in composed if key != "hydra"]
    return frozenset(flatten(OmegaConf.to_container(OmegaConf.masked_copy(composed, keys))))


def _usual_settings(base: DictConfig, own: list[Override]) -> dict[str, Any]:
    """Return the values in `base`, which has the groups of the command, and the groups that the experiment chooses."""
    values = OmegaConf.to_container(OmegaConf.masked_copy(base, [str(key) for key in base if key != "hydra"]))
    if not any(is_group(o) and o.key_or_group not in ONE_PER_COMMAND for o in own):
        return flatten(values) | group_choices(base.hydra)
    experiment = compose_config(lines_of([o for o in own if o.key_or_group == "experiment"]))
    return flatten(values) | group_choices(experiment.hydra)


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
        raise explain(error, arguments) from None
    except OSError as error:
        raise unusable_path(error, arguments) from None


def job_cell(composed: DictConfig, hydra: Any) -> Cell:
    """Return the cell that a process of a launcher trains, the same as `read_cells` returns. Its folder was passed."""
    use()
    choices = group_choices(hydra)
    config = typed(composed, choices)
    cell = Cell(config, Path(hydra.runtime.output_dir), str(choices.pop("experiment")), choices)
    return _switch_off(_explicit(cell), _ignored(cell))


def _switch_off(cell: Cell, ignored: frozenset[str]) -> Cell:
    """Return the cell with the keys switched off that do not apply to it, and the parts of a question likewise."""
    question = applicable(cell.config.question, [claim.text for claim in cell.config.claims])
    config = replace(cell.config.without(ignored), question=question)
    return cell._replace(config=config, ignored=ignored)


def _ignored(cell: Cell) -> frozenset[str]:
    """Return the keys that do not apply to a cell. The record of a finished run tells, without torch.

    It does not tell whether the run ignores a key that it lacks: this is a newer key, or one of the router.
    """
    record = stored_record(cell)
    if record is not None and finished(cell) and not cell.config.is_dense:
        ignored = frozenset({*OFF, *cell.config.identity()} - record.identity.keys())
        if ignored <= flatten(record.config).keys():
            return ignored
    return run_routers.ignored_keys(cell.config)


def _explicit(cell: Cell) -> Cell:
    """Return the cell with the texts for single layers as a record has them. Errors before it quote what was typed."""
    return cell._replace(config=replace(cell.config, model=cell.config.model.explicit()))


def _without_ignored(cell: Cell, ignored: frozenset[str], composed: DictConfig, arguments: list[str]) -> Cell:
    """Return the cell with the keys switched off that do not apply to it, and without these keys in its name."""
    cell = _switch_off(cell, ignored)
    overrides = [*map(parsed, arguments)]
    if cell.folder.name != run_name(override_dirname(overrides, composed.hydra)):  # the user chose the name
        return cell
    return cell._replace(
        folder=cell.folder.with_name(run_name(override_dirname(overrides, composed.hydra, cell.ignored)))
    )


def _refuse_given_in_vain(cells: list[Cell], ignored: list[frozenset[str]], given: set[str], swept: set[str]) -> None:
    """Raise ConfigError for a key that was given another value than its default and applies to no cell.

    cells: as the user wrote them. ignored: the keys that do not apply to each. given: the keys that the command, or the
    sweep of its experiment, sets to one value or to several. swept: those with several.

    A key for which model or data have no use (`Config.unused_keys`) is refused only with several values. A layer of
    `model.routers` must have another router than the others in one cell at least, and so with the number of experts of
    `model.experts_by_layer`.
    """
    numbers = [(cell.config.model.experts_by_layer, cell.config.model.num_experts) for cell in cells]
    for text in dict.fromkeys(text for text, _ in numbers if text is not None):
        layer_experts.check_changes(text, [number for each, number in numbers if each == text])
    of_layers = [(cell.config.model.routers, cell.config.router) for cell in cells]
    for text in dict.fromkeys(text for text, _ in of_layers if text is not None):
        layer_routers.check_changes(text, [router for each, router in of_layers if each == text])
    nowhere = frozenset.intersection(*ignored) - {*DENSE_IGNORES}
    for key in sorted(key for key in nowhere if any(f"{key}.".startswith(f"{name}.") for name in given)):
        values = dict.fromkeys(flatten(cell.config)[key] for cell in cells)
        quiet = [OFF[key], default_of(key, cells[0].choices)] if key in OFF else [default_of(key, cells[0].choices)]
        vain = [value for value in values if value not in quiet]
        if key in swept and len(values) > 1:
            vain += [value for value in values if value not in quiet[:1]]
        if vain:
            for cell in filter(finished, cells):  # it was not checked, because its run is found without the vain key
                run_routers.check(cell.config)
            raise ConfigError(f"{key}={vain[0]}: {_why_ignored(key, cells[0])}; leave it out")
    for key in sorted(swept & frozenset.intersection(*(cell.config.unused_keys() for cell in cells))):
        first, *others = dict.fromkeys(flatten(cell.config)[key] for cell in cells)
        if others:  # one value does no harm: nobody takes it for a factor
            kind = "dense" if key == "model.dense_ffn" else "a Mixture of Experts"
            ours = f"no layer of this model is {kind}"
            why = "this source of text does not use it" if key.startswith("data.") else ours
            raise ConfigError(f"{key}={first},{others[0]}: changes nothing, because {why}; leave it out")


def _why_ignored(key: str, cell: Cell) -> str:
    if cell.config.is_dense:
        return "no layer of this model is a Mixture of Experts"
    if key in ("drop", "router.after_drops") and cell.config.capacity is None:
        return "nothing is dropped without a capacity limit"
    muon = cell.config.optimizer.muon_lr
    if key in cell.config.without_effect():
        adapter = f"adapter={cell.choices['adapter']} and " if cell.config.adapter else ""
        return f"with {adapter}trainable={cell.config.trains} it changes nothing"
    if key == "optimizer.experts_lr" and muon is not None:
        return f"Muon trains these matrices, with optimizer.muon_lr={muon}"
    if key in RATES:
        return f"router={cell.choices['router']} has no weights to train"
    if key == "optimizer.expert_step" and muon is not None:
        return "there is one expert"
    if key in DEFAULTED:
        return f"optimizer={cell.choices['optimizer']} has no Muon, and AdamW does not use this key"
    loss = next((loss for loss in LOSSES.values() if loss.weight == key), None)
    if loss and cell.config.router.get(key) is not None:
        return f"this router has a loss of its own for it, router.{key}"
    ignores = f"router={cell.choices['router']} ignores {key}"
    if key not in OFF:
        return f"{ignores} with its other settings"
    why = run_routers.build_all(cell.config)[0].why_ignored()[key]
    return f"{ignores}, because {why}" if why else ignores
