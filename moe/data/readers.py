"""Read the user's own files: texts, and the rows of tables. Every error names the key, the file and the line."""

import csv
import gzip
import json
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from typing import IO, Any, cast

from moe.checks import first_line
from moe.files import open_file

TEXTS = (".txt", ".md")
TABLES = (".jsonl", ".csv", ".parquet")
ALLOWED = "a .txt, .md, .jsonl, .csv or .parquet file (all but .parquet may end in .gz too)"


def kind(file: Path) -> str:
    """Return the suffix that tells the format, such as ".txt" for a.TXT and b.txt.gz; "" if it is not supported."""
    *others, last = ["", *(suffix.lower() for suffix in file.suffixes)]
    suffix = others[-1] if last == ".gz" and others else last
    return suffix if suffix in TEXTS + TABLES and (last != ".gz" or suffix != ".parquet") else ""


def stem(file: Path) -> str:
    """Return the name of a file without the suffixes that tell its format."""
    return Path(file.stem).stem if file.suffix.lower() == ".gz" else file.stem


def read_text(file: Path, key: str) -> str:
    """Return the text of a UTF-8 file. Raises ValueError, naming `key` and the file, for another encoding."""
    with _errors_name(file, key), _open(file) as stream:
        text = stream.read()
    if "\0" in text:
        raise ValueError(f"{key}={file}: must be UTF-8 text; it holds zero bytes, as UTF-16 and binary files do")
    return text


def read_rows(file: Path, key: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a .jsonl, .csv or .parquet file as {column: value}. An empty file has no rows.

    Raises ValueError, naming `key`, the file and if possible the line, for a file that is torn or of another format.
    """
    reader = {".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}[kind(file)]
    with _errors_name(file, key):
        yield from reader(file)


def _read_jsonl(file: Path) -> Iterator[dict[str, Any]]:
    with _open(file) as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise ValueError(f"line {number} is no JSON object ({first_line(error)})") from None
                if not isinstance(row, dict):
                    raise ValueError(f"line {number} is no JSON object, but {line.strip():.40}")
                yield row


def _read_csv(file: Path) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # the default refuses texts of more than 128 kB
    with _open(file) as stream:
        rows = csv.DictReader(stream, strict=True)
        for row in rows:
            if None in row:  # where DictReader puts values without a column
                raise ValueError(f"line {rows.line_num} has more values than the first line has columns")
            yield row


def _read_parquet(file: Path) -> Iterator[dict[str, Any]]:
    from pyarrow import parquet

    with open_file(file, "rb") as opened:
        if file.stat().st_size:
            with parquet.ParquetFile(opened) as table:
                for batch in table.iter_batches(batch_size=1000):
                    yield from batch.to_pylist()


@contextmanager
def _open(file: Path) -> Iterator[TextIOWrapper]:
    newline = "" if kind(file) == ".csv" else None  # the csv module reads line ends itself
    with open_file(file, "rb") as raw:
        content = cast(IO[bytes], gzip.GzipFile(fileobj=raw)) if file.suffix.lower() == ".gz" else raw
        with TextIOWrapper(content, encoding="utf-8-sig", newline=newline) as text:
            yield text


@contextmanager
def _errors_name(file: Path, key: str) -> Iterator[None]:
    """Turn every error of a reader into a ValueError of one line that names `key` and the file."""
    try:
        yield
    except UnicodeDecodeError as error:
        utf16 = error.object[:2] in (b"\xff\xfe", b"\xfe\xff")
        advice = "; it begins like UTF-16, convert it: iconv -f UTF-16 -t UTF-8" if utf16 else ""
        raise ValueError(f"{key}={file}: must be UTF-8 ({error}){advice}") from None
    except (OSError, EOFError, zlib.error, csv.Error, ValueError) as error:  # pyarrow raises ValueError and OSError
        raise ValueError(f"{key}={file}: cannot be read: {first_line(error)}") from None
