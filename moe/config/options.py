"""The options of each config group: the yaml files in conf/, and those in folders outside of this project."""

import importlib.util
import os
import re
import sys
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import yaml

from moe.checks import ConfigError

# An installed package holds them in the folder moe/conf; a checkout has them beside moe/.
_PLACES = [Path(__file__).resolve().parents[level] / "conf" for level in (1, 2)]
CONF = next((place for place in _PLACES if (place / "config.yaml").exists()), _PLACES[-1])
# Nodes of the configuration that name a class, each with its config group. Their other keys are those of the class.
CLASSES = {
    "router": "router",
    "schedule": "schedule",
    "data.source": "data",
    "adapter": "adapter",
    "adapter.router": "adapter",
}
GROUPS = ("router", "schedule", "adapter", "model", "data", "optimizer", "logger", "experiment", "variant")
WHOLE = ("experiment", "variant")  # groups whose options set keys of the whole configuration

SEARCH_PATH = "MOE_SEARCH_PATH"  # environment variable: folders that hold router/, experiment/ and so on, as in conf/
ENTRY_POINTS = "moe.conf"  # group of entry points: an installed package names such a folder in itself, as a package


def search_path() -> list[Path]:
    """Return the folders outside of this project that hold options: those of `SEARCH_PATH`, then of packages.

    Raises ConfigError for one that does not exist or holds no folder with the name of a config group.
    """
    named = named_folders()
    of_packages = _folders_of_packages(tuple(sys.path))
    several = os.pathsep in os.environ.get(SEARCH_PATH, "")
    advice = f"; a '{os.pathsep}' in {SEARCH_PATH} separates folders, so no name can have one" if several else ""
    for folder in named:
        _check_folder(folder, advice=advice)
    for folder in of_packages:
        _check_folder(folder, origin=f", named by the entry point {ENTRY_POINTS} of a package")
    return [folder.resolve() for folder in named + of_packages]


def _check_folder(folder: Path, *, origin: str = "", advice: str = "") -> None:
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder of options{origin}{advice}")
    if not any((folder / group).is_dir() for group in GROUPS):
        raise ConfigError(f"{folder}: must hold at least one of the folders {', '.join(GROUPS)}{origin}")


@cache
def _folders_of_packages(import_path: tuple[str, ...]) -> list[Path]:
    """Return the folders that packages name. This reads all installed packages, so once for each `import_path`."""
    return [_folder_of(point.value) for point in entry_points(group=ENTRY_POINTS)]


def named_folders() -> list[Path]:
    """Return the folders in `SEARCH_PATH`, which a command or the environment names."""
    return [Path(os.path.abspath(word)) for word in _named()]


def _named() -> list[str]:
    """Return the folders in `SEARCH_PATH`. A colon before two slashes belongs to a source, such as file:///home/me."""
    words = re.split(rf"{re.escape(os.pathsep)}(?!//)", os.environ.get(SEARCH_PATH, ""))
    return [str(_folder_of(word)) if "://" in word else word for word in words if word]


def use(folders: Iterable[str] = ()) -> None:
    """Add folders to `SEARCH_PATH`, for this process and those that it starts, and make their code importable.

    A folder is a path, or a Hydra source: file://DIR or pkg://PACKAGE. Code is imported from a folder itself and from
    the one that holds it, after all other places. Raises ConfigError as `search_path` does, and for other sources.
    """
    added = []
    for word in folders:
        added.append(os.path.abspath(_folder_of(word)))
        if os.pathsep in added[-1]:
            raise ConfigError(f"{word}: a folder of options cannot have '{os.pathsep}' in its path; rename it")
        _check_folder(Path(added[-1]))
    search_path()  # before `added` joins it, so that a message about the variable is about what the user wrote there
    if words := list(dict.fromkeys(os.path.abspath(word) for word in [*_named(), *added])):
        os.environ[SEARCH_PATH] = os.pathsep.join(words)
    sys.path += [str(folder) for folder in code_folders() if str(folder) not in sys.path]


def code_folders() -> list[Path]:
    """Return the folders from which `use` makes code importable: those of `SEARCH_PATH`, and those that hold them."""
    return list(dict.fromkeys(place for folder in named_folders() for place in (folder, folder.parent)))


def _folder_of(source: str) -> Path:
    """Return the folder that a path, a file:// or a pkg:// source, or the dotted name of a package stands for."""
    address = urlparse(source)
    if source in ("file://", "pkg://"):
        raise ConfigError(f"{source}: the name is missing; must be a folder, file://DIR or pkg://PACKAGE")
    if address.scheme == "file":
        return Path(unquote(address.netloc + address.path))
    if "://" in source and address.scheme != "pkg":
        raise ConfigError(f"{source}: must be a folder, file://DIR or pkg://PACKAGE")
    if address.scheme != "pkg" and (os.sep in source or source.startswith(("~", ".")) or Path(source).exists()):
        return Path(source).expanduser()
    top, *below = source.removeprefix("pkg://").split(".")
    try:
        found = importlib.util.find_spec(top)  # does not run the code of the package
    except (ImportError, ValueError):
        found = None
    places = list(found.submodule_search_locations or ()) if found else []
    if address.scheme == "pkg" and not places:
        raise ConfigError(f"{source}: no package {top}")
    return Path(places[0], *below) if places else Path(source)


def sources(group: str) -> dict[str, Path]:
    """Return the yaml file of each option of a config group. Raises ConfigError if two files have the same name."""
    found: dict[str, Path] = {}
    for folder in [CONF, *search_path()]:
        for path in sorted((folder / group).glob("*.yaml")):
            if path.stem in found:
                raise ConfigError(f"{group}={path.stem} is both {found[path.stem]} and {path}: rename the second file")
            found[path.stem] = path
    return dict(sorted(found.items()))


def spec_of(group: str, content: dict[str, Any]) -> dict[str, Any]:
    """Return the class and the settings that the file of an option names.

    content: what the file says. One whose keys belong to the whole configuration (`# @package _global_`) has them at
    the name of its group, beside other keys, such as the balance weight that suits a router.
    """
    spec: dict[str, Any] = content[group] if names_its_group(group, content) else content
    return spec


def names_its_group(group: str, content: Mapping[str, Any]) -> bool:
    """Return whether the file of an option has its class and settings at the name of its group.

    Its keys then belong to the whole configuration, so its first line must be `# @package _global_`.
    """
    return "_target_" not in content and isinstance(content.get(group), Mapping)


def router_spec(option: str) -> dict[str, Any]:
    """Return the class and the settings of an option of `router`. Raises KeyError if there is none."""
    return spec_of("router", yaml.safe_load(_text(sources("router")[option])))


def options(group: str) -> dict[str, str]:
    """Return the options of a config group, each with its purpose, which is the first comment of its YAML file."""
    return {name: _purpose(path) for name, path in sources(group).items()}


def complete(group: str) -> list[str]:
    """Return the options of a config group that can be chosen without a further key, because none has the value ???."""
    return [name for name, path in sources(group).items() if not re.search(r":\s+\?\?\?", _content(path))]


@cache
def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


@cache
def _content(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:  # a command that uses this option says what is wrong
        return ""


@cache
def _purpose(path: Path) -> str:
    comments = [line for line in _content(path).splitlines() if line.startswith("# ") and "@package" not in line]
    return comments[0].removeprefix("# ") if comments else ""
