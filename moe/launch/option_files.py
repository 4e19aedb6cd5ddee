"""Read the yaml files of options: their keys and values."""

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from moe.checks import ConfigError, first_line, require
from moe.config.keys import flatten, is_free
from moe.config.options import CLASSES, CONF, GROUPS, WHOLE, names_its_group, sources, spec_of
from moe.config.schema import defaults

FAST = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the loader in C, if it is installed; it reads no objects either
OF_FIELDS = defaults()  # the value of each key that has one without an option


def read_option(path: Path) -> DictConfig:
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


def check_option_files() -> None:
    """Raise ConfigError for the first option outside of this project whose file cannot be read."""
    for group in GROUPS:
        for path in sources(group).values():
            if not path.is_relative_to(CONF):
                read_option(path)


@cache
def require_content(group: str, option: str | None) -> None:
    """Raise ConfigError for an option whose keys Hydra would put in a wrong place, and for one without keys.

    The keys of an experiment or a variant belong to the whole configuration, which the first line of its file says. So
    do those of an option that names its class at the name of its group, beside other keys: `router: {_target_: ...}`.
    Only options outside of this project may be empty by mistake.
    """
    path = sources(group).get(str(option))
    content = DictConfig({}) if path is None else read_option(path)
    if path is not None and content and (group in WHOLE or names_its_group(group, content)):
        first = path.read_text(encoding="utf-8").lstrip().partition("\n")[0]
        required = "`# @package _global_` in the first line"
        require(re.fullmatch(r"#\s*@package _global_\s*", first) is not None, str(path), first, required)
    examples = {
        "router": "topk",
        "schedule": "linear",
        "model": "tiny",
        "data": "text",
        "optimizer": "adamw",
        "experiment": "noise_lb_seed",
        "variant": "spectra_no_quota",
    }
    example = examples.get(group)
    if path is not None and example is not None and not path.is_relative_to(CONF) and not content:
        raise ConfigError(f"{path}: is empty; write keys and values as in conf/{group}/{example}.yaml")


def default_of(key: str, choices: Mapping[str, str | None]) -> Any:
    """Return the value of a key that is set nowhere but in the chosen option of its group; None if it has none.

    choices: the option of each group.
    """
    group, dot, _ = key.partition(".")
    owner = group if dot else "router"  # of all parts of a run, a router alone may set keys of the whole configuration
    default = OF_FIELDS.get(key)
    path = sources(owner).get(str(choices.get(owner)))
    return default if path is None else values_of(owner, path).get(key, default)


@cache
def values_of(group: str, path: Path) -> dict[str, Any]:
    """Return the keys that the file of an option sets, flat, by their names in the whole configuration."""
    return named_in(group, OmegaConf.to_container(read_option(path)))


def named_in(group: str, content: Any) -> dict[str, Any]:
    """Return what the file of an option says as flat keys of the whole configuration."""
    whole = group in WHOLE or names_its_group(group, content)
    return flatten(content, "" if whole else f"{group}.")


def settings_of_experiment(name: str) -> dict[str, Any]:
    """Return what the file of an experiment, and those of other ones that it builds on, set for every run, flat.

    Its own grid and keys that change no result are left out. Options of groups are by the name of the group.
    """
    path = sources("experiment").get(name)
    if path is None:
        return {}
    content: Any = OmegaConf.to_container(read_option(path))
    found: dict[str, Any] = {}
    for entry in content.pop("defaults", []):
        for group, option in entry.items() if isinstance(entry, dict) else [("experiment", entry)]:
            place = str(group).removeprefix("override ").strip("/ ")
            found |= settings_of_experiment(option) if place == "experiment" else {place: option}
    content.pop("hydra", None)
    return found | {key: value for key, value in flatten(content).items() if not is_free(key)}


@cache
def preset_of(key: str, option: str | None) -> dict[str, Any] | None:
    """Return what the yaml of an option says at `key`, which is one of `CLASSES`; None if there is no such option."""
    path = sources(CLASSES[key]).get(str(option))
    content: Any = {} if path is None else OmegaConf.to_container(read_option(path))
    node: Any = content.get(key.partition(".")[2]) if "." in key else spec_of(key, content)
    return node if isinstance(node, dict) and "_target_" in node else None


def keys_of(group: str, option: str) -> set[str]:
    """Return the keys of an option without the name of its group, such as k and gate of router=topk.

    An option whose file cannot be read has none: only a command that chooses it is refused.
    """
    try:
        content = yaml.load(sources(group)[option].read_text(encoding="utf-8"), Loader=FAST)
    except (yaml.YAMLError, OSError, UnicodeDecodeError):
        return set()
    return set(flatten(spec_of(group, content))) if isinstance(content, dict) else set()
