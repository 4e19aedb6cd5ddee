"""Write files atomically, so that a reader never sees half a file, and compute their digests."""

import hashlib
import json
import os
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` atomically: a reader sees the old file or the new one. An equal file is left untouched."""
    content = text.encode()
    if path.exists() and path.read_bytes() == content:
        return
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def write_json(path: Path, value: object) -> None:
    """Write `value` atomically as indented JSON."""
    write_text(path, json.dumps(value, indent=1, default=str) + "\n")


def apply_umask(folder: Path) -> None:
    """Give every file below `folder` the permissions of a new file. Some libraries make theirs readable by one user."""
    mask = os.umask(0o077)  # there is no way to read it without setting it
    os.umask(mask)
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(0o666 & ~mask)


def sync(path: Path) -> None:
    """Wait until the system has written a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Return the hexadecimal sha256 digest of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
