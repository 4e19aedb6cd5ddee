"""The files of prepared text: one folder for each recipe, written by one process and checked by all others."""

import json
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from filelock import FileLock

from moe.checks import first_line
from moe.files import apply_umask, checksums, read_text, shared_mode, sync, walk


def locked(root: Path, key: str, cache: str) -> AbstractContextManager[Any]:
    """Wait for the lock of one entry of the cache, and hold it. Raises ValueError if the folder cannot be written."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        return FileLock(root / f"{key}.lock", mode=shared_mode(root)).acquire()
    except (OSError, NotImplementedError) as error:  # the second: the file system has no locks
        raise ValueError(
            f"data.cache={cache}: cannot be written ({first_line(error)}); choose another folder"
        ) from None


def publish(unfinished: Path, folder: Path, manifest: dict[str, Any]) -> None:
    """Rename a complete folder to its final name, so that a folder of that name is complete even after a power cut."""
    manifest["files"] = _file_sums(unfinished)
    (unfinished / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    apply_umask(unfinished)
    for path in [*walk(unfinished), unfinished]:
        sync(path)
    unfinished.rename(folder)
    sync(folder.parent)


def _file_sums(folder: Path) -> dict[str, str]:
    """Return the checksum of every file except the manifest, by path inside the folder."""
    files = [path for path in sorted(walk(folder)) if not path.is_dir() and path.name != "manifest.json"]
    return {Path(path).relative_to(folder).as_posix(): digest for path, digest in checksums(files).items()}


def intact(folder: Path) -> bool:
    """Return whether all files have the checksums that the manifest lists."""
    try:
        manifest = json.loads(read_text(folder / "manifest.json"))
        return manifest["files"] == _file_sums(folder)
    except (OSError, ValueError, KeyError, TypeError):
        return False
