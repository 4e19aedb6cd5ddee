"""Read the yaml files of options, which lie in conf/ or in a user's folders, and report what is wrong in one."""

from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from moe.checks import ConfigError, first_line
from moe.config.options import CONF, GROUPS, sources


def read(path: Path) -> DictConfig:
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


def check_files() -> None:
    """Raise ConfigError for the first option outside of this project whose file cannot be read."""
    for group in GROUPS:
        for path in sources(group).values():
            if not path.is_relative_to(CONF):
                read(path)
