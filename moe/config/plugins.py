"""Classes from outside of this project that a run uses: which package they come from, and its exact code."""

import hashlib
import importlib.util
import subprocess
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import NamedTuple

from moe.checks import ConfigError


class Plugin(NamedTuple):
    """The code of a package from outside: the sha256 of its Python files, and its commit, null outside of git."""

    sha256: str
    commit: str | None


def plugins(targets: Iterable[str]) -> dict[str, Plugin]:
    """Return the packages outside of this project that hold the classes `targets`, by the name of the package."""
    return {name: _read(name) for name in sorted({target.partition(".")[0] for target in targets} - {"moe"})}


@cache
def _read(package: str) -> Plugin:
    """Return the code of a package, found without running it. Raises ConfigError if there is none of this name."""
    try:
        found = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        found = None
    folders = list(found.submodule_search_locations or ()) if found else []
    if found is None or (found.origin is None and not folders):
        raise ConfigError(f"no package {package} can be imported: install it, or name its folder in MOE_SEARCH_PATH")
    files = [path for folder in folders for path in sorted(Path(folder).rglob("*.py"))]
    files = files or [Path(str(found.origin))]
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.name}\n".encode() + path.read_bytes())
    return Plugin(digest.hexdigest(), _commit(files[0]))


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
