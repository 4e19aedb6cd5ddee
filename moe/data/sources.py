"""Sources of documents: a data set on the Hugging Face hub, or the user's own files. Duplicates are removed.

A source is a frozen dataclass that yields `Document`s in a fixed order. It imports the library that reads its files
only when it reads them. `moe.data.embedded` has sources that need no download.
"""

import glob
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from itertools import chain, islice
from pathlib import Path
from typing import Any, ClassVar

from moe.data import hub, readers
from moe.data.documents import Document, Turn, without_duplicates
from moe.files import checksums

EMPTY = "files or rows without text"
PATHS = "data.source.paths"  # the key, for messages


class _Rows:
    """What the sources have in common whose documents are rows of a dataset, from the hub or from a folder."""

    path: str
    drop_duplicates: bool

    def _rows(self, percent: int) -> Iterator[Document | str]:
        """Yield the documents and those of `percent` percent more rows; a text says why a row gives none."""
        raise NotImplementedError

    def documents(self) -> Iterator[Document]:
        return self.with_test(0)

    def with_test(self, percent: int) -> Iterator[Document]:
        """Yield the documents, and then those of `percent` percent more rows, for the test."""
        return without_duplicates(self._rows(percent), drop_duplicates=self.drop_duplicates)

    @property
    def unused(self) -> tuple[str, ...]:
        """The field that only the hub knows, if the files are local."""
        return () if on_the_hub(self.path) else ("name",)

    def describe(self) -> dict[str, dict[str, Any]]:
        return _describe_hub(self.path)


@dataclass(frozen=True)
class Hub(_Rows):
    """Source that streams the first `max_documents` rows of a data set. Each row is a document and its own group.

    path: the name of a data set on the hub, a local .parquet or .jsonl file, or a folder of such files. Local files
        need neither `name` nor `split`.
    text, domain: names of columns. Without `domain`, the file name of `path` without its suffix is the only domain.
    drop_duplicates: leave out duplicates, see `DuplicateFilter`. Rows without text are left out in any case.
    revision: a commit, branch or tag on the hub; None is the newest commit. A run records the commit.

    Raises ValueError for a missing file or column.

    name: the part of the data set, if it has several.
    split: the split of the data set, such as train.
    max_documents: most rows that are read.
    """

    path: str
    name: str | None
    split: str
    text: str
    domain: str | None
    max_documents: int
    drop_duplicates: bool = True
    revision: str | None = None

    def __post_init__(self) -> None:
        _check_revision(self.path, self.revision)
        if self.max_documents < 1:
            raise ValueError(f"data.source.max_documents={self.max_documents}: must be at least 1")

    def _rows(self, percent: int) -> Iterator[Document | str]:
        for id, where, row, beyond in _hub_rows(self, [self.text], self.max_documents, percent):
            if text := _text(row, self.text, key="data.source.text", where=where):
                domain = _domain(row, self.domain, default=Path(self.path).stem, where=where)
                yield Document(domain, id, text, id, beyond=beyond)
            else:
                yield EMPTY


@dataclass(frozen=True)
class Conversations(_Rows):
    """Source that streams the first `max_samples` conversations of a data set, with a `path` as in `Hub`.

    messages: the name of a column that holds lists of {role, content}. Roles are system, user and assistant.
    domain: the name of a column. Without it, the file name of `path` without its suffix is the only domain.

    Rows without messages are left out in any case.

    Raises ValueError for a missing file or column, for another role, and for a conversation in which the assistant says
    nothing.

    path: the name of a data set on the hub, a local .parquet or .jsonl file, or a folder of such files.
    name: the part of the data set, if it has several.
    split: the split of the data set, such as train.
    max_samples: most conversations that are read.
    revision: a commit, branch or tag on the hub; None is the newest commit.
    drop_duplicates: leave out duplicates, see `DuplicateFilter`.
    """

    conversations: ClassVar[bool] = True

    path: str
    name: str | None
    split: str
    messages: str
    domain: str | None
    max_samples: int
    drop_duplicates: bool = True
    revision: str | None = None

    def __post_init__(self) -> None:
        _check_revision(self.path, self.revision)
        if self.max_samples < 1:
            raise ValueError(f"data.source.max_samples={self.max_samples}: must be at least 1")

    def _rows(self, percent: int) -> Iterator[Document | str]:
        for id, where, row, beyond in _hub_rows(self, [self.messages], self.max_samples, percent):
            if turns := _turns(row, self.messages, where=where):
                domain = _domain(row, self.domain, default=Path(self.path).stem, where=where)
                yield Document.conversation(domain, id, turns)._replace(beyond=beyond)
            else:
                yield EMPTY


@dataclass(frozen=True)
class Files:
    """Source that reads the user's own files: .txt, .md, .jsonl, .csv and .parquet, all but the last also as .gz.

    A .txt or .md file is one document; its domain is the name of its folder. A row of another file is one document,
    read from `column`; its domain is read from the column `domain`, or is the file name without its suffix if `domain`
    is None.

    paths: names of files, or patterns such as `notes/**/*.txt`. `~` is the home directory.
    drop_duplicates: leave out duplicates, see `DuplicateFilter`. Files and rows without text are left out in any case.

    Raises ValueError for a missing file, another suffix, a missing column, and a file that is torn or not UTF-8.

    column: the column of .jsonl, .csv and .parquet files that holds the text.
    domain: the column that names the domain of a row; None: the name of the file.
    """

    paths: Sequence[str]
    column: str
    domain: str | None
    drop_duplicates: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "paths", tuple(self.paths))
        self._files()  # Refuses a wrong path before any work.

    def documents(self) -> Iterator[Document]:
        return without_duplicates(self._rows(), drop_duplicates=self.drop_duplicates)

    @property
    def unused(self) -> tuple[str, ...]:
        """The fields about rows, if no file has rows."""
        rows = any(readers.kind(file) not in readers.TEXTS for file in self._files())
        return () if rows else ("column", "domain")

    def describe(self) -> dict[str, dict[str, Any]]:
        return {"files": {"license": "the user's own", "files": checksums(self._files())}}

    def _rows(self) -> Iterator[Document | str]:
        for file in self._files():
            folder = file.resolve().parent.name
            name = f"{folder}/{file.name}"  # Not the whole path, so that a moved folder keeps its split.
            if readers.kind(file) in readers.TEXTS:
                text = readers.read_text(file, PATHS)
                yield Document(folder, name, text, name) if text.strip() else EMPTY
                continue
            for number, (where, row) in enumerate(_named(readers.read_rows(file, PATHS), file)):
                id = f"{name}:{number}"
                if row_text := _text(row, self.column, key="data.source.column", where=where):
                    domain = _domain(row, self.domain, default=readers.stem(file), where=where)
                    yield Document(domain, id, row_text, id)
                else:
                    yield EMPTY

    def _files(self) -> list[Path]:
        if not self.paths:
            raise ValueError(f"{PATHS}=[]: name at least one file")
        files = []
        for pattern in self.paths:
            try:
                path = Path(pattern).expanduser()
            except RuntimeError:
                raise ValueError(f"{PATHS}={pattern}: there is no home directory for ~") from None
            # A file whose name holds [ or * is meant itself. A pattern such as notes/** matches folders too.
            try:
                matches = [path] if path.exists() else map(Path, sorted(glob.glob(str(path), recursive=True)))
            except (OSError, ValueError) as error:
                raise ValueError(f"{PATHS}={pattern:.100}: {getattr(error, 'strerror', error)}") from None
            found = [match for match in matches if match == path or match.is_file()]
            if not found:
                raise ValueError(f"{PATHS}={pattern}: no such file")
            files += found
        for file in files:
            if file.is_dir():
                raise ValueError(f"{PATHS}={file}: is a folder; name its files, such as {file}/**/*.txt")
            if not file.is_file():
                raise ValueError(f"{PATHS}={file}: is a pipe or a device, not a file")
            if not readers.kind(file):
                raise ValueError(f"{PATHS}={file}: must be {readers.ALLOWED}")
        return list(dict.fromkeys(files))


def on_the_hub(path: str) -> bool:
    """Return whether a path names a data set on the hub. Raises ValueError for a local path without files to read."""
    return not _local_files(path)


def _hub_rows(
    source: Hub | Conversations, columns: list[str], limit: int, percent: int
) -> Iterator[tuple[str, str, dict[str, Any], bool]]:
    """Yield the first `limit` rows of a data set on the hub or of local files, and `percent` percent more.

    Each has its id, where it is, for messages, its content, and whether it is beyond the limit.
    """
    rows: Iterator[tuple[str, dict[str, Any]]]
    count = limit + math.ceil(limit * percent / 100)
    if files := _local_files(source.path):
        rows = chain.from_iterable(_named(readers.read_rows(file, "data.source.path"), file) for file in files)
    else:
        wanted = columns if source.domain is None else [*columns, source.domain]
        rows = _named(hub.rows(source.path, source.name, source.split, source.revision, wanted, count), source.split)
    for number, (where, row) in enumerate(islice(rows, count)):
        yield f"{source.split}/{number}", where, row, number >= limit


def _named(rows: Iterator[dict[str, Any]], place: Path | str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each row with its name for messages, which count from 1. Ids count from 0."""
    for number, row in enumerate(rows, start=1):
        yield f"row {number} of {place}", row


def _check_revision(path: str, revision: str | None) -> None:
    if revision is not None and not on_the_hub(path):
        raise ValueError(f"data.source.revision={revision}: must be null, because {path} is not on the hub")


def _describe_hub(path: str) -> dict[str, dict[str, Any]]:
    """Return the result of `Source.describe` for a data set on the hub or for local files."""
    files = _local_files(path)
    license = "the user's own" if files else "see the dataset's card"
    packages = {} if files else {"datasets": metadata.version("datasets")}
    return {path: {"license": license, "packages": packages, "files": checksums(files)}}


def _local_files(name: str) -> list[Path]:
    """Return the files of a local path, or none if it is the name of a data set on the hub."""
    path = Path(name)
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    files = [file for file in files if file.suffix in (".parquet", ".jsonl")]
    if path.is_dir() and len({file.suffix for file in files}) != 1:
        raise ValueError(f"data.source.path={name}: a folder must hold .parquet files only or .jsonl files only")
    if not all(file.is_file() for file in files):
        raise ValueError(f"data.source.path={name}: no such file")
    return files


def _turns(row: dict[str, Any], column: str, *, where: str) -> list[Turn]:
    """Return the turns in one column; none if it is null or an empty list.

    Raises ValueError, naming the configuration key and the row, if they are wrong.
    """
    where = f"data.source.messages={column}: {where}"
    if column not in row:
        raise ValueError(f"{where} has no such column, only {', '.join(row)}")
    if row[column] is None or row[column] == []:
        return []
    try:
        turns = [Turn(message["role"], message["content"]) for message in row[column]]
    except (TypeError, KeyError):
        raise ValueError(f"{where} holds no list of messages with role and content there") from None
    for turn in turns:
        if turn.role not in ("system", "user", "assistant"):
            raise ValueError(f"{where} has a message of role {turn.role!r}; known: system, user, assistant")
        if not isinstance(turn.content, str):
            raise ValueError(f"{where} has a message of {turn.role} whose content is not text")
    if not any(turn.role == "assistant" and turn.content.strip() for turn in turns):
        raise ValueError(f"{where} has no message of an assistant, so there is nothing to learn from it")
    return turns


def _text(row: dict[str, Any], column: str, *, key: str, where: str) -> str | None:
    """Return the text in one column; None if it is null or blank.

    Raises ValueError, naming the configuration key and the row, if there is no such column or no text in it.
    """
    if column not in row:
        raise ValueError(f"{key}={column}: {where} has no such column, only {', '.join(row)}")
    value = row[column]
    if value is None or value == "":
        return None
    if not isinstance(value, str):
        raise ValueError(f"{key}={column}: {where} holds {value!r:.40} there, which is no text; name another column")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            half = value[error.start : error.end]
            raise ValueError(f"{key}={column}: {where} holds half a character, {half!a}; repair that row") from None
    return value if value.strip() else None


def _domain(row: dict[str, Any], column: str | None, *, default: str, where: str) -> str:
    """Return the domain in one column; whole numbers and truth values are names too. Without a column: `default`."""
    if column is None:
        return default
    value = row.get(column)
    named = {**row, column: str(value)} if isinstance(value, int) else row
    domain = _text(named, column, key="data.source.domain", where=where)
    if domain is None:
        raise ValueError(f"data.source.domain={column}: {where} holds no domain; give it one or drop the row")
    return domain
