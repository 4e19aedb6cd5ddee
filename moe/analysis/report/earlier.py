"""The list of the files that a report consists of, by which the next report in its folder removes what it leaves."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from moe.files import read_text, sha256, write_json

FILE = "report_files.json"


class Listing(NamedTuple):
    """A report in a folder: its title, and the checksum of each file beside it, by name relative to the folder."""

    title: str
    files: dict[str, str]

    @classmethod
    def read(cls, folder: Path) -> "Listing | None":
        """Return the list of the report in `folder`; None without a list that can be read."""
        try:
            found = json.loads(read_text(folder / FILE))
            return cls(str(found["title"]), {str(name): str(checksum) for name, checksum in found["files"].items()})
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return None

    def write(self, folder: Path) -> None:
        """Write the list into `folder`."""
        write_json(folder / FILE, self._asdict())

    def remove(self, folder: Path, *, but: Collection[str]) -> None:
        """Remove the files of this report from `folder`, except those named in `but`, and folders that become empty.

        A file that has changed since it was written stays, and so does all that is outside of `folder`.
        """
        for name in self.files.keys() - set(but):
            path = folder / name.replace("\0", "")
            inside = path.parent.resolve().is_relative_to(folder.resolve())
            if not inside or path.is_symlink() or not path.is_file() or sha256(path) != self.files[name]:
                continue
            path.unlink()
            if path.parent != folder and not any(path.parent.iterdir()):
                path.parent.rmdir()
