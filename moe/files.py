"""Open files for reading and writing, and read the shapes of stored tensors.

Reading never waits for a pipe. Writing is atomic, so that a reader never sees half a file, and never goes through a
link. Files that a stranger may have placed are opened by these functions only.
"""

import errno
import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError, safe_open

ADAPTER = "adapter_config.json"  # PEFT's name


class LinkError(ValueError):
    """A file cannot be written, because a link or a pipe is in its place. The message is one line."""


def shown(path: Path) -> Path:
    """Return a path as it is printed: relative to the working folder if it lies below it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def open_file(path: Path, mode: str = "r", **options: Any) -> IO[Any]:
    """Open a file for reading like `open`; the default encoding is UTF-8.

    Raises OSError for a pipe or a device, from which a reader could wait for ever.
    """
    return open(path, mode, opener=_regular, **options if "b" in mode else {"encoding": "utf-8", **options})


def read_text(path: Path) -> str:
    """Return the text of a UTF-8 file. Raises OSError like `open_file`, and UnicodeDecodeError."""
    with open_file(path) as file:
        return str(file.read())


def require_files(folder: Path) -> None:
    """Raise OSError if a pipe or a device lies in `folder`, before a library reads its files. A name is no folder."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.exists() and not path.is_file() and not path.is_dir():
            raise _no_file(path)


def require_no_adapter(folder: Path) -> None:
    """Raise ValueError if `folder` has an adapter of PEFT, which transformers would add to the model that it reads."""
    if os.path.lexists(folder / ADAPTER):
        raise ValueError(
            f"has {ADAPTER}, so that libraries change the weights that they read: merge the adapter, or move it"
        )


def open_unlinked(path: Path, mode: str, **options: Any) -> IO[Any]:
    """Open a file for writing like `open`, but never through a link, which could lead to any file of the user.

    Raises LinkError if `path` is a link, a pipe or a device.
    """
    try:
        return open(path, mode, opener=_without_links, **options)
    except OSError as error:
        if path.is_symlink():
            raise LinkError(f"{path} is a link: delete it, because files are not written through links") from error
        if path.exists() and not path.is_file() and not path.is_dir():
            raise LinkError(f"{path} is a pipe or a device: delete it") from error
        raise


def _without_links(path: str, flags: int) -> int:
    return _regular(path, flags | getattr(os, "O_NOFOLLOW", 0))


def _regular(path: str, flags: int) -> int:
    """Open a regular file without waiting, which the opening of a pipe would do until its other end is opened."""
    descriptor = os.open(path, flags | getattr(os, "O_NONBLOCK", 0), 0o666)
    if stat.S_ISREG(mode := os.fstat(descriptor).st_mode) or stat.S_ISDIR(mode):  # `open` itself refuses a folder
        return descriptor
    os.close(descriptor)
    raise _no_file(path)


def _no_file(path: object) -> OSError:
    return OSError(errno.EINVAL, "it is a pipe or a device, not a file", str(path))


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Open a new binary file that takes the place of `path` when the `with` block ends without an error.

    A reader sees the old file or the new one. If `path` is a link, the link is replaced and its target stays as it is.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    if not temporary.is_symlink():
        temporary.unlink(missing_ok=True)  # of a killed process that had the same number
    with open_unlinked(temporary, "xb") as file:
        try:
            yield file
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    os.replace(temporary, path)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` with `replacing`. A file that has this content is left untouched."""
    content = text.encode()
    if path.is_file() and not path.is_symlink() and path.read_bytes() == content:
        return
    with replacing(path) as file:
        file.write(content)


def write_json(path: Path, value: object) -> None:
    """Write `value` atomically as indented JSON."""
    write_text(path, json.dumps(value, indent=1, default=str) + "\n")


def walk(folder: Path) -> Iterator[Path]:
    """Yield every file, folder and link below `folder`. Links to folders are not followed.

    Another process may delete files and folders meanwhile. `Path.rglob` raises FileNotFoundError then.
    """
    for name, folders, files in os.walk(folder):
        yield from (Path(name, entry) for entry in (*folders, *files))


def apply_umask(folder: Path) -> None:
    """Give every file below `folder` the permissions of a new file. Some libraries make theirs readable by one user."""
    mask = os.umask(0o077)  # there is no way to read it without setting it
    os.umask(mask)
    for path in walk(folder):
        if path.is_file() and not path.is_symlink():
            path.chmod(0o666 & ~mask)


def shared_mode(folder: Path) -> int:
    """Return the mode of a file which everybody can write to who may write to its folder, such as that of a lock."""
    return folder.stat().st_mode & 0o666 | 0o600


def sync(path: Path) -> None:
    """Wait until the system has written a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Return the checksum of a file's content: its sha256, in hexadecimal digits."""
    with open(path, "rb", opener=_regular) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksums(files: Iterable[Path]) -> dict[str, str]:
    """Return the sha256 of each file's bytes, by path."""
    return {path.as_posix(): sha256(path) for path in files}


Find = Callable[[str], Path | None]  # returns the path of the file of a name, or None


def weight_files(find: Find) -> list[Path]:
    """Return the files with a model's weights: `model.safetensors`, or what `model.safetensors.index.json` lists.

    Raises ValueError, with one line, for files that are missing or torn.
    """
    if (single := find("model.safetensors")) is not None:
        return [single]
    if (index := find("model.safetensors.index.json")) is None:
        raise ValueError("it has no weights in model.safetensors or model.safetensors.index.json")
    try:
        names = sorted(set(json.loads(read_text(index))["weight_map"].values()))
        found = {name: find(name) for name in names}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"its weights cannot be read ({error})") from error
    for name, path in found.items():
        if path is None:
            raise ValueError(f"{name} is missing")
    return [path for path in found.values() if path is not None]


def tensor_shapes(find: Find) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor in `weight_files`, by name. Only the headers of the files are read.

    Raises ValueError, with one line, for files that are missing or torn.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for path in weight_files(find):
        try:
            with safe_open(path, "numpy") as file:
                shapes |= {tensor: tuple(file.get_slice(tensor).get_shape()) for tensor in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise ValueError(f"its weights cannot be read ({error})") from error
    return shapes
