"""Read the errors that Hydra and OmegaConf raise, each as one line."""

import re
from dataclasses import fields

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from moe.checks import describe, first_line, unknown
from moe.config.claim import ClaimConfig
from moe.config.model import ModelConfig
from moe.config.options import CONF, sources
from moe.config.schema import Config
from moe.config.sections import DataConfig, LoggerConfig, OptimizerConfig

# What a wrong override makes Hydra raise.
FAULTS = (HydraException, OmegaConfBaseException, ArithmeticError, ValueError)


def cause_of(error: Exception) -> str:
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
    return f"{file}: " + (f"{full_key[1]}: " if full_key else "") + cause_of(ValueError(error))
