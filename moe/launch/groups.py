"""Let Hydra compose the options of the config groups, once in a process for each choice of them."""

import os
import pickle
from copy import copy
from functools import cache

import omegaconf.base
from hydra import compose
from hydra._internal.config_repository import ConfigRepository
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.plugins.config_source import ConfigResult, ConfigSource
from omegaconf import DictConfig

_READ: dict[tuple[object, ...], bytes] = {}
# OmegaConf parses the text of an interpolation such as ${seed} whenever its value is read. That takes a tenth of the
# time of composing a sweep, and the values of all cells have the same few texts.
omegaconf.base.parse = cache(omegaconf.base.parse)


class FilesReadOnce(ConfigRepository):
    """Hydra's reader of option files, which reads a file again only after it has changed.

    Hydra reads some thirty files for each composition, which takes a third of its time.
    """

    def __deepcopy__(self, memo: dict[int, object]) -> "FilesReadOnce":
        """Return a reader to which other folders can be given. Hydra makes one for each composition."""
        reader = copy(self)
        reader.sources = [*self.sources]
        return reader

    def load_config(self, config_path: str) -> ConfigResult | None:
        """Return a copy of what Hydra reads from the first folder that has this option, or None."""
        source = self._find_object_source(config_path, ObjectType.CONFIG)
        if source is None:
            return None
        key = (source.scheme(), source.path, source.provider, config_path, _version(source, config_path))
        if key not in _READ:
            _READ[key] = pickle.dumps(super().load_config(config_path))
        result: ConfigResult = pickle.loads(_READ[key])
        return result


def _version(source: ConfigSource, config_path: str) -> tuple[int, ...]:
    """Return what changes if the file of an option does. The options of packages and classes never change."""
    if source.scheme() != "file":
        return ()
    stat = os.stat(os.path.join(source.path, source._normalize_file_name(config_path)))
    return stat.st_mtime_ns, stat.st_size, stat.st_ino


def read_files_once() -> None:
    """Make the compositions of this command read each option file once."""
    loader = GlobalHydra.instance().config_loader()
    loader.repository = FilesReadOnce(loader.config_search_path)  # type: ignore[attr-defined]


def compose_groups(groups: list[str]) -> DictConfig:
    """Return what Hydra composes from these overrides, which choose options, with its own settings."""
    composed: DictConfig = pickle.loads(_pickled(tuple(groups)))
    return composed


@cache
def _pickled(groups: tuple[str, ...]) -> bytes:
    """Return the composed configuration, pickled: a copy of it then takes a sixth of OmegaConf's time."""
    return pickle.dumps(compose("config", overrides=list(groups), return_hydra_config=True))
