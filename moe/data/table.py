"""Token blocks as a table of whole numbers that is read from files without loading them into memory."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import overload

import numpy as np

Indices = int | slice | range | Sequence[int] | np.ndarray


class BlockTable:
    """A row for each block: a number or a vector of numbers in each column. What is read of it is a copy, as int64.

    columns: arrays (blocks) or (blocks, seq_len) of 32-bit numbers, by name. rows: the indices of the blocks of this
    table in `columns`; None stands for all of them.
    """

    def __init__(self, columns: Mapping[str, np.ndarray], rows: np.ndarray | None = None) -> None:
        self.columns = {name: column.astype(np.int32, copy=False) for name, column in columns.items()}
        lengths = {len(column) for column in self.columns.values()}
        if len(lengths) != 1:
            raise ValueError(f"the columns have {sorted(lengths)} rows: they must have equally many")
        self.rows = np.arange(lengths.pop()) if rows is None else rows

    @property
    def column_names(self) -> list[str]:
        """Return the names of the columns, in order."""
        return list(self.columns)

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, which: str) -> np.ndarray: ...

    @overload
    def __getitem__(self, which: Indices) -> dict[str, np.ndarray]: ...

    def __getitem__(self, which: str | Indices) -> np.ndarray | dict[str, np.ndarray]:
        """Return the whole column of this name, or all columns of the blocks at these indices."""
        if isinstance(which, str):
            return self.columns[which][self.rows].astype(np.int64)
        rows = self.rows[which if isinstance(which, int | slice) else np.asarray(which, dtype=np.int64)]
        return {name: np.asarray(column[rows], dtype=np.int64) for name, column in self.columns.items()}

    def parts(self, name: str, size: int) -> Iterator[np.ndarray]:
        """Yield a column in parts of `size` blocks, of which the last one may be smaller."""
        for first in range(0, len(self), size):
            yield self.columns[name][self.rows[first : first + size]].astype(np.int64)

    def select(self, indices: np.ndarray) -> "BlockTable":
        """Return the table of the blocks at these indices."""
        return BlockTable(self.columns, self.rows[indices])

    def save(self, folder: Path) -> None:
        """Write each column to the file NAME.npy in a new folder."""
        folder.mkdir(parents=True)
        for name, column in self.columns.items():
            np.save(folder / f"{name}.npy", column[self.rows], allow_pickle=False)

    @classmethod
    def load(cls, folder: Path) -> "BlockTable":
        """Return a table that `save` wrote. Its files are mapped into memory, so they must stay as they are."""
        files = sorted(folder.glob("*.npy"))
        return cls({path.stem: np.load(path, mmap_mode="r", allow_pickle=False) for path in files})
