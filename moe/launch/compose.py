"""Compose the configuration that overrides ask for, and turn it into a `Config`."""

import pickle
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf, open_dict

from moe.checks import require
from moe.config.checkpoints import dense, imported, replayed
from moe.config.classes import locate
from moe.config.options import CLASSES, CONF, GROUPS
from moe.config.schema import Config
from moe.launch import resolvers  # noqa: F401 (the files in conf/ call them)
from moe.launch.explain import explain
from moe.launch.groups import compose_groups, read_files_once
from moe.launch.hydra_errors import FAULTS
from moe.launch.implied import without_implied
from moe.launch.option_files import preset_of, require_content
from moe.launch.overrides import parsed

REPLAY = "moe.routers.replay.Replay"


@contextmanager
def composing() -> Iterator[None]:
    """Prepare Hydra for the composition of configurations, and clear its state afterwards."""
    with initialize_config_dir(str(CONF), version_base="1.3", job_name="train"):
        read_files_once()
        try:
            yield
        finally:
            GlobalHydra.instance().clear()


def compose_config(arguments: list[str]) -> DictConfig:
    """Return what Hydra composes from these overrides, with its own settings."""
    try:
        overrides = [*map(parsed, arguments)]
        if all(_is_group_choice(o) or _sets_value(o) for o in overrides):
            composed = _compose_values(overrides)
        else:
            composed = compose("config", overrides=arguments, return_hydra_config=True)
            composed.hydra.job.override_dirname = override_dirname(overrides, composed.hydra)
        return composed
    except (*FAULTS, yaml.YAMLError, OSError) as error:
        raise explain(error, arguments) from None


def levels_of(base: DictConfig, arguments: list[str]) -> dict[str, Any]:
    """Return the values of each key in the grid of an experiment, as text. `arguments` are what composed `base`."""
    try:
        return dict((base.hydra.sweeper.params or {}).items())
    except FAULTS as error:
        raise explain(error, arguments) from None


def _compose_values(overrides: list[Override]) -> DictConfig:
    """Compose the groups once for all cells of a sweep, and set the other values in a copy, as Hydra does it.

    This takes a seventh of the time of composing each cell.
    """
    groups = [o for o in overrides if _is_group_choice(o)]
    composed = compose_groups([str(o.input_line) for o in groups])
    ConfigLoaderImpl._apply_overrides_to_config([o for o in overrides if o not in groups], composed)
    composed.hydra.overrides.task = [o.input_line for o in overrides if not o.is_hydra_override()]
    composed.hydra.job.override_dirname = override_dirname(overrides, composed.hydra)
    return composed


def _is_group_choice(override: Override) -> bool:
    return (override.key_or_group in GROUPS or "/" in override.key_or_group) and isinstance(override.value(), str)


def _sets_value(override: Override) -> bool:
    """Return whether an override sets one value of this project or of a launcher. Hydra itself composes all others."""
    key = override.key_or_group
    ours = not (key == "hydra" or key.startswith(("hydra.", "hydra/"))) or key.startswith("hydra.launcher.")
    return ours and key not in GROUPS and override.package is None and not isinstance(override.value(), dict)


def override_dirname(overrides: list[Override], hydra: Any, without: Iterable[str] = ()) -> str:
    """Return what Hydra calls `override_dirname`: the overrides that name a run, without what a checkpoint implies.

    without: keys and groups of keys that are left out.
    """
    naming = hydra.job.config.override_dirname
    named = [override for override in overrides if not override.is_hydra_override()]
    keys = [override.key_or_group for override in named]
    excluded = [*naming.exclude_keys, *(key for key in keys if {key, key.partition(".")[0]} & {*without})]
    given = [override for override in without_implied(named) if override.key_or_group not in excluded]
    lines = sorted(str(override.input_line) for override in given)
    return str(naming.item_sep.join(lines).replace("=", naming.kv_sep))


def typed(composed: DictConfig, choices: dict[str, str | None]) -> Config:
    """Return a composed configuration as a `Config`. Everything after this works without OmegaConf.

    choices: the option of each group. Where the class of an option was replaced by another one, the entry becomes the
    name of that class, and the keys of the option are left out that the class does not take.
    """
    for group, option in choices.items():
        require_content(group, option)
    config: DictConfig = pickle.loads(pickle.dumps(composed))  # takes half the time of OmegaConf's copy
    with open_dict(config):
        hydra = config.pop("hydra", None)
    model = config.model
    read = [key for key in ("dense", "checkpoint") if model.get(key) is not None]
    if read:  # only then all values are needed here, and some, such as a width of equal FLOPs, take long to compute
        given = {str(k): None if OmegaConf.is_missing(model, k) else model[k] for k in model}
        if "dense" in read:
            model.update(dense.resolve(given))
        if "checkpoint" in read:
            told = [line.partition("=")[0].lstrip("+") for line in (hydra.overrides.task if hydra else ())]
            model.update(imported.resolve(given, told))
    sized = not OmegaConf.is_missing(config.model, "dim")
    key = "model.checkpoint" if choices.get("model") == "imported" else "model.dense"
    require(sized, key, None, f"the folder or hub name of a checkpoint, which has the sizes; add {key}=NAME")
    settings = OmegaConf.to_object(config)
    assert isinstance(settings, Config)
    if settings.router.get("_target_") == REPLAY and isinstance(settings.router.get("run"), str):
        run = str(Path(settings.router["run"]))  # RUN/ is RUN
        settings.router |= {"run": run, "digest": replayed.digest_of(run, settings.router.get("digest"))}
    for key, group in CLASSES.items():
        place, _, name = key.rpartition(".")
        holder = vars(settings) if not place else settings.adapter if place == "adapter" else vars(settings.data)
        spec, preset = holder.get(name), preset_of(key, choices.get(group))
        if preset is not None and isinstance(spec, dict) and spec.get("_target_") != preset.get("_target_"):
            taken = signature(locate(spec.get("_target_"), key, trusted=True)).parameters
            own = {k: v for k, v in spec.items() if k in taken or k == "_target_" or preset.get(k, ...) != v}
            holder[name] = own
            if key != "adapter.router":
                choices[group] = str(spec["_target_"])
    return settings
