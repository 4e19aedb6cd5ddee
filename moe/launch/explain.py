"""Explain why Hydra or the file system refuses a configuration: the override at fault, and what is allowed."""

import os
import re
from collections.abc import Iterable
from typing import Any

import yaml
from hydra import compose
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Override
from omegaconf import OmegaConf, open_dict
from omegaconf.errors import MissingMandatoryValue

from moe.checks import ConfigError, one_of, unknown
from moe.config import meanings
from moe.config.keys import flatten
from moe.config.options import GROUPS, WHOLE, options
from moe.config.schema import allowed_values
from moe.launch.groups import compose_groups
from moe.launch.hints import hint
from moe.launch.hydra_errors import FAULTS, cause_of
from moe.launch.option_files import check_option_files, keys_of, require_content
from moe.launch.overrides import is_group, lines_of, parse_override

MOST_OPTIONS = 5  # that a line of an error names
# Values of keys that have no default.
EXAMPLES = {"data.source.paths": "[notes/*.txt]", "router.run": "outputs/default/base"}
CLAIM = (  # an example, whole, because a claim has several keys without a default
    "claims=[{text: Noise raises the loss, metric: val/loss, factor: noise, levels: [0.5], than: [0.0], kind: higher}]"
)


def group_choices(hydra: Any) -> dict[str, str | None]:
    """Return the option chosen from each config group, given Hydra's own configuration."""
    return {group: hydra.runtime.choices.get(group) for group in GROUPS}


def explain(error: Exception, overrides: list[str]) -> ConfigError:
    """Return an error of Hydra or OmegaConf as one line that names the override that causes it and what is allowed."""
    if isinstance(error, ConfigError):
        return error
    if isinstance(error, (yaml.YAMLError, UnicodeDecodeError, OSError)):
        check_option_files()
    for extra, plugin in (("slurm", "submitit"), ("ray", "ray")):
        if f"hydra/launcher/{plugin}" in str(error):
            return ConfigError(f"hydra/launcher: this launcher needs `pip install -e '.[{extra}]'`")
    parsed = [parse_override(line) for line in overrides]
    for option in filter(is_group, parsed):
        require_content(option.key_or_group, str(option.value()))
    groups = [o for o in parsed if is_group(o) or o.key_or_group == "hydra/launcher"]
    try:
        base = compose_groups(lines_of(groups))
    except FAULTS as cause:
        if launcher := re.search("Could not find 'hydra/launcher/(.*)'", str(cause)):
            launchers = GlobalHydra.instance().config_loader().get_group_options("hydra/launcher")
            one_of("hydra/launcher", launcher[1], sorted({*launchers} - {"submitit_slurm"}))
        return ConfigError(f"{' '.join(lines_of(groups))}: {cause_of(cause)}")
    choices = group_choices(base.hydra)
    with open_dict(base):
        base.pop("hydra")
    known = flatten(OmegaConf.to_container(base))
    for override in parsed:
        if override in groups:
            continue
        key = override.key_or_group
        if not override.is_hydra_override() and not any(f"{name}.".startswith(f"{key}.") for name in known):
            return _unknown_key(key, known, choices)
        try:
            compose("config", overrides=lines_of([*groups, override]))
        except FAULTS as cause:
            return ConfigError(f"{override.input_line:.200}: {cause_of(cause)}")
    place = getattr(error, "full_key", None) or " ".join(overrides)
    if isinstance(error, MissingMandatoryValue) and place.startswith("claims["):
        return ConfigError(f"{place}: required, for example '{CLAIM}'")
    if isinstance(error, MissingMandatoryValue):
        return ConfigError(f"{place}: required, for example '{place}={EXAMPLES.get(place, '...')}'")
    return ConfigError(f"{place}: {cause_of(error)}")


def check_name(override: Override) -> None:
    """Raise ConfigError for a key whose first part is neither a field of `Config` nor a config group."""
    first = override.key_or_group.partition(".")[0]
    if not override.is_hydra_override() and first not in GROUPS and allowed_values(first) is None:
        raise _unknown_name(override.key_or_group, meanings.all_keys())


def _unknown_name(key: str, known: Iterable[str]) -> ConfigError:
    """Return the error for a key that belongs to no chosen option. known: keys besides those of the options."""
    if meant := hint(key):
        return ConfigError(f"unknown key '{key}'; write {meant}")
    others = ("router", "schedule", "data")  # the groups whose options differ in their keys
    keys = {*known, *(f"{each}.{k}" for each in others for option in options(each) for k in keys_of(each, option))}
    error = unknown("key", key, {*keys, *GROUPS})
    return error if "; nearest: " in str(error) else ConfigError(f"{error}; `--cfg job` prints all keys")


def _unknown_key(key: str, known: Iterable[str], choices: dict[str, str | None]) -> ConfigError:
    """Return the error for a key that the chosen options lack. It names other options that have the key, if any."""
    group, _, name = key.partition(".")
    if choices.get(group) is None or group in WHOLE:
        return _unknown_name(key, known)
    owner = f"{group}={choices[group]}"
    having = [f"{group}={option}" for option in options(group) if name in keys_of(group, option)]
    meant = hint(key)
    if name == "target":
        meant = f"{group}._target_ for a class"
    elif not name.startswith("source.") or (meant and meant.startswith(f"{key},")):
        meant = None if having else meant
    if having:
        shown = having if len(having) <= MOST_OPTIONS else [*having[:MOST_OPTIONS], f"and {len(having)} in all"]
        elsewhere = f"{', '.join(shown)} {'has' if len(having) == 1 else 'have'} it"
        return ConfigError(f"{owner} has no key {name}; {elsewhere}{f'; or write {meant}' if meant else ''}")
    if meant and (meant.startswith(f"{group}.") or name not in keys_of(group, str(choices[group]))):
        return ConfigError(f"unknown key of {owner} '{key}'; write {meant}")
    return unknown(f"key of {owner}", key, (each for each in known if each.startswith(f"{group}.")))


def unusable_path(error: OSError, arguments: list[str]) -> ConfigError:
    """Return an error of the file system as one line that begins with the argument whose path caused it."""
    name = str(error.filename)
    for line in arguments:
        value = os.path.expanduser(line.partition("=")[2].strip("\"'[]"))
        if value and (value in name or name in value):
            return ConfigError(f"{line:.100}: {error.strerror}")
    return ConfigError(f"{name:.100}: {error.strerror}")
