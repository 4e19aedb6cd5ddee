"""Code from outside of this project that a run uses: which source files it consists of, and their checksum."""

import ast
import hashlib
import importlib.util
import subprocess
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

from moe.checks import ConfigError
from moe.config.options import SEARCH_PATH, code_folders

OURS = {"moe", "torch", "__main__"} | sys.stdlib_module_names  # no plug-ins: a run records their versions
INSTALLED = ("site-packages", "dist-packages")  # names of folders that hold packages of many authors


class Plugin(NamedTuple):
    """The code of a package from outside: the sha256 of its Python files, and its commit, null outside of git."""

    sha256: str
    commit: str | None


def plugins(packages: Iterable[str]) -> dict[str, Plugin]:
    """Return the code of packages from outside of this project, and of what they import from the folder beside them.

    A module that is a single file counts as a package. Raises ConfigError if there is none of a name, or two.
    """
    todo, found = sorted({*packages} - OURS), dict[str, Plugin]()
    while todo:
        name = todo.pop()
        if name not in found:
            found[name], imported = _read(name, tuple(code_folders()))
            todo += imported
    return dict(sorted(found.items()))


@cache
def _read(package: str, folders: tuple[Path, ...]) -> tuple[Plugin, list[str]]:
    """Return the code of a package, found without running it, and the names of those beside it that it imports.

    Within one process the first answer holds, because Python imports a module only once.
    """
    digest, imported = hashlib.sha256(), set[str]()
    try:
        found = _source_files(package, folders)
        for place, files in found.items():
            for path in files:
                content = path.read_bytes()
                digest.update(f"{path.relative_to(place).as_posix()}\n".encode() + content)
                imported |= _imports(content) - OURS if place.name not in INSTALLED else set()
        places = (*found, *folders)
        neighbors = sorted(name for name in imported - {package} if any(_offers(place, name) for place in places))
    except OSError as error:
        raise ConfigError(f"{error.filename}: cannot be read ({error.strerror}); it belongs to {package}") from None
    return Plugin(digest.hexdigest(), _commit(next(iter(found.values()))[0])), neighbors


def _source_files(package: str, folders: tuple[Path, ...]) -> dict[Path, list[Path]]:
    """Return the files of which the code of a package consists, by the folder that holds the package.

    folders: those with code of options. Raises ConfigError if there is no such package. If there are two, the order of
    the folders would decide which of them is imported, so this is refused too.
    """
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        spec = None
    parts = [Path(part) for part in spec.submodule_search_locations or ()] if spec else []
    parts = parts or ([Path(spec.origin)] if spec and spec.has_location and spec.origin else [])
    parts = [part.parent.resolve() / part.name for part in parts]
    found = {part.parent: files for part in parts if (files := sorted(_sources(part)))}
    if not found:
        advice = f"install it, or name its folder of options in {SEARCH_PATH}"
        raise ConfigError(f"no package {package} can be imported: {advice}")
    offering = [folder.resolve() for folder in folders if _offers(folder, package)]
    if offering and len(places := [*dict.fromkeys((*found, *offering))]) > 1:
        both = " and ".join(str(place) for place in places[:2])
        raise ConfigError(f"both {both} have a package {package}, and Python would import only one: rename the second")
    return found


def _offers(folder: Path, name: str) -> bool:
    """Return whether code can be imported from `folder` under this name."""
    return (folder / f"{name}.py").is_file() or any(True for _ in _sources(folder / name))


def _sources(path: Path) -> Iterator[Path]:
    """Yield the Python files of a package that can be imported, or the file itself if `path` is one.

    Names that are no identifiers cannot be imported, such as those of hidden folders and of lock files of editors. A
    run folder may lie in a package. Its saved models hold Python files, which are not part of the package.
    """
    if path.is_file():
        yield path
    elif path.is_dir() and not (path / "run.json").exists():
        for entry in path.iterdir():
            leads_back = entry.is_symlink() and path.resolve().is_relative_to(entry.resolve())
            if entry.is_dir() and not leads_back and entry.name.isidentifier() and entry.name != "__pycache__":
                yield from _sources(entry)
            elif entry.suffix == ".py" and entry.stem.isidentifier() and entry.is_file():
                yield entry


def _imports(code: bytes) -> set[str]:
    """Return the packages that the import statements of a file name. A file that is no Python names none."""
    try:
        nodes = [*ast.walk(ast.parse(code))]
    except (SyntaxError, ValueError):
        return set()
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module and not node.level]
    return {name.partition(".")[0] for name in names}


def _commit(file: Path) -> str | None:
    """Return the commit of the repository that tracks a file; None if there is none, or if git is missing."""
    lines = []
    for command in (["ls-files", "--error-unmatch", file.name], ["rev-parse", "HEAD"]):
        try:
            done = subprocess.run(["git", "-C", str(file.parent), *command], capture_output=True, text=True)
        except OSError:
            return None
        if done.returncode:
            return None
        lines.append(done.stdout.strip())
    return lines[-1]
