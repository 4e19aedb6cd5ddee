"""Tests of data sets and files as sources: documents without duplicates, and one-line errors."""

import gzip
import json
import logging
import re
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from moe.data.documents import Document, DuplicateFilter
from moe.data.hub import RETRYING, _patient
from moe.data.sources import Files, Hub


def words(start: int, count: int) -> str:
    return " ".join(f"word{number}" for number in range(start, start + count))


# ---- Duplicates --------------------------------------------------------------------------------------------------


def test_copies_that_differ_in_case_and_white_space_only_are_refused():
    duplicates = DuplicateFilter()
    assert duplicates.admits("One  two\nthree")
    assert not duplicates.admits("one two THREE")
    assert duplicates.admits("one two four")


@pytest.mark.parametrize(("copied", "admitted"), [(100, False), (60, False), (30, True), (0, True)])
def test_documents_that_share_more_than_30_percent_of_their_shingles_are_refused(copied, admitted):
    duplicates = DuplicateFilter()
    duplicates.admits(words(0, 100))
    assert duplicates.admits(words(0, copied) + " " + words(1000, 100 - copied)) is admitted


# ---- Hub ---------------------------------------------------------------------------------------------------------


def cosmopedia(path: Path, rows: int) -> Path:
    columns = {
        "prompt": ["Write."] * rows,
        "text_token_length": [30] * rows,
        "text": [words(100 * row, 30) for row in range(rows)],
        "seed_data": ["web"] * rows,
        "format": [("blogpost", "textbook")[row % 2] for row in range(rows)],
        "audience": ["general"] * rows,
    }
    parquet.write_table(pa.table(columns), path)
    return path


def hub(path: Path, **changes) -> Hub:
    fields = {"name": "cosmopedia-v2", "split": "train", "text": "text", "domain": "format", "max_documents": 6}
    return Hub(**{"path": str(path), **fields, **changes})


def test_hub_reads_the_first_documents_of_a_file_or_folder(tmp_path):
    file = cosmopedia(tmp_path / "shard.parquet", 10)
    documents = list(hub(file).documents())
    assert [document.text for document in documents] == [words(100 * row, 30) for row in range(6)]
    assert [document.domain for document in documents] == ["blogpost", "textbook"] * 3
    assert len({document.group for document in documents}) == 6
    assert list(hub(tmp_path).documents()) == documents
    assert {document.domain for document in hub(file, domain=None).documents()} == {"shard"}


def test_the_description_of_local_data_sets_depends_on_their_bytes(tmp_path):
    before = hub(cosmopedia(tmp_path / "shard.parquet", 10)).describe()
    assert hub(cosmopedia(tmp_path / "shard.parquet", 9)).describe() != before


def test_errors_of_hub_name_the_missing_column_or_file(tmp_path):
    file = cosmopedia(tmp_path / "shard.parquet", 10)
    with pytest.raises(
        ValueError, match=r"data\.source\.text=body: row 1 of .*shard\.parquet has no such column, only prompt, "
    ):
        list(hub(file, text="body").documents())
    with pytest.raises(ValueError, match=r"data\.source\.domain=topic: "):
        list(hub(file, domain="topic").documents())
    with pytest.raises(ValueError, match=r"data\.source\.path=.*gone\.parquet: no such file"):
        hub(tmp_path / "gone.parquet").describe()
    with pytest.raises(ValueError, match=r"data\.source\.max_documents=0"):
        hub(file, max_documents=0)


@pytest.mark.parametrize(("logged", "why"), [((), "gone"), (("HTTP 429", "HTTP 503"), "gone, after: HTTP 429")])
def test_a_hub_that_gives_up_names_what_it_answered_first(
    logged: tuple[str, ...], why: str, caplog: pytest.LogCaptureFixture
) -> None:
    def read() -> None:
        for text in logged:
            logging.getLogger(RETRYING[0]).warning(text)
        raise ConnectionError("gone")

    message = re.escape(f"data.source.path=a/b: cannot be read from the hub ({why}); the same command tries again")
    with pytest.raises(ValueError, match=message), _patient("a/b"):
        read()
    said = "a/b: the hub does not answer (HTTP 429); trying again for up to three minutes"
    assert caplog.messages == [said] * bool(logged)


# ---- Files -------------------------------------------------------------------------------------------------------


def test_files_reads_text_jsonl_and_parquet(tmp_path):
    (tmp_path / "poems").mkdir()
    for number in range(2):
        (tmp_path / "poems" / f"{number}.txt").write_text(words(100 * number, 20))
    rows = [{"body": words(1000 + 100 * row, 20), "topic": f"topic{row}"} for row in range(2)]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    parquet.write_table(
        pa.Table.from_pylist([{**row, "body": row["body"] + " end"} for row in rows]), tmp_path / "p.parquet"
    )

    def read(paths: list[str], domain: str | None) -> list[tuple[str, str]]:
        source = Files([str(tmp_path / path) for path in paths], "body", domain)
        return [(document.domain, document.text) for document in source.documents()]

    assert read(["**/*.txt"], None) == [("poems", words(0, 20)), ("poems", words(100, 20))]
    assert read(["chat.jsonl"], None) == [("chat", row["body"]) for row in rows]
    assert read(["chat.jsonl"], "topic") == [(row["topic"], row["body"]) for row in rows]
    assert read(["p.parquet"], "topic") == [(row["topic"], row["body"] + " end") for row in rows]
    assert len(read(["chat.jsonl", "p.parquet", "chat.jsonl"], None)) == 2, "copies are dropped across files"
    ids = [document.id for document in Files([str(tmp_path / "chat.jsonl")], "body", None).documents()]
    assert ids == [f"{tmp_path.name}/chat.jsonl:{row}" for row in range(2)], "they decide the split"


def test_the_description_of_files_depends_on_their_bytes(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one")
    before = Files([str(path)], "text", None).describe()
    path.write_text("two")
    assert Files([str(path)], "text", None).describe() != before


GOOD = '{"text": "one two three"}\n'
TORN_PARQUET = b"PAR1" + bytes(40)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"\xff\xfe\xff", r"data\.source\.paths=.*a\.txt: must be UTF-8 .* UTF-16"),
        (
            "a.txt",
            "words".encode("utf-16-le"),
            r"data\.source\.paths=.*a\.txt: must be UTF-8 text; it holds zero bytes",
        ),
        ("a.jsonl", GOOD.encode("utf-16"), r"data\.source\.paths=.*a\.jsonl: must be UTF-8 .* UTF-16"),
        ("a.csv", b"text\nna\xefve\n", r"data\.source\.paths=.*a\.csv: must be UTF-8"),
        ("a.docx", "x", r"data\.source\.paths=.*a\.docx: must be a \.txt, \.md, \.jsonl, \.csv or \.parquet file"),
        ("a.parquet.gz", "x", r"data\.source\.paths=.*a\.parquet\.gz: must be a \.txt"),
        ("a.jsonl", GOOD + '{"text": "fo', r"data\.source\.paths=.*a\.jsonl: cannot be read: line 2 is no JSON object"),
        ("a.jsonl", "[1]\n", r"data\.source\.paths=.*a\.jsonl: cannot be read: line 1 is no JSON object, but \[1\]"),
        (
            "a.jsonl.gz",
            gzip.compress(GOOD.encode(), mtime=0)[:-9],
            r"data\.source\.paths=.*a\.jsonl\.gz: cannot be read",
        ),
        ("a.jsonl.gz", GOOD, r"data\.source\.paths=.*a\.jsonl\.gz: cannot be read: Not a gzipped file"),
        ("a.csv", 'text\n"torn', r"data\.source\.paths=.*a\.csv: cannot be read: unexpected end of data"),
        ("a.csv", "text\na,b\n", r"data\.source\.paths=.*a\.csv: cannot be read: line 2 has more values"),
        ("a.parquet", TORN_PARQUET, r"data\.source\.paths=.*a\.parquet: cannot be read: "),
        ("a.jsonl", '{"body": "x"}\n', r"data\.source\.column=text: row 1 of .*a\.jsonl has no such column, only body"),
        ("a.jsonl", '{"text": 3}\n', r"data\.source\.column=text: row 1 of .*a\.jsonl holds 3 there, which is no text"),
        (
            "a.jsonl",
            GOOD + r'{"text": "a \ud83d"}',
            r"data\.source\.column=text: row 2 of .*a\.jsonl holds half a character, '\\ud83d'",
        ),
    ],
)
def test_wrong_files_are_refused(tmp_path, name, content, message):
    """A file that is torn, in another encoding or of another format is refused with its name and what is wrong."""
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        list(Files([str(tmp_path / name)], "text", None).documents())


def read(paths: list[Path], domain: str | None = None, **settings) -> tuple[list[Document], dict[str, int]]:
    """Return the documents of files, and what was left out."""
    documents = Files([str(path) for path in paths], "text", domain, **settings).documents()
    found = []
    while True:
        try:
            found.append(next(documents))
        except StopIteration as end:
            return found, {reason: number for reason, number in end.value.items() if number}


def write_rows(path: Path, rows: list[dict]) -> Path:
    """Write rows in the format that the suffix names."""
    if path.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(rows, pa.schema([("text", pa.string()), ("label", pa.int64())])), path)
    elif path.suffix == ".csv":
        path.write_text("text,label\n" + "".join(f'"{row["text"] or ""}",{row["label"]}\n' for row in rows))
    else:
        lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
        path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)
    return path


ROWS = [{"text": words(100 * number, 20), "label": number % 2} for number in range(3)]


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet", "a.jsonl.gz", "A.JSONL"])
def test_rows_without_text_are_left_out_and_counted(tmp_path, name):
    """In every format, a row that is null or blank is left out and counted, and the other rows are read."""
    empty = [{"text": text, "label": 0} for text in (None, "", " \t")]
    documents, left_out = read([write_rows(tmp_path / name, [*empty[:2], *ROWS, empty[2]])])
    assert [document.text for document in documents] == [row["text"] for row in ROWS]
    assert {document.domain.lower() for document in documents} == {"a"}
    assert left_out == {"files or rows without text": 3}


def test_a_row_without_text_needs_no_domain_either(tmp_path):
    """A row in which every column is null is left out and counted, from the user's own files and from a data set."""
    path = write_rows(tmp_path / "a.jsonl", [{"text": None, "label": None}, *ROWS])
    _, left_out = read([path], domain="label")
    assert left_out == {"files or rows without text": 1}
    assert len(list(Hub(str(path), None, "train", "text", "label", 9).documents())) == 3


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet", "a.jsonl.gz"])
def test_a_file_without_rows_takes_nothing_from_the_others(tmp_path, name):
    """An empty shard beside a full one is no error."""
    full = write_rows(tmp_path / "full.jsonl", ROWS)
    for empty in (tmp_path / name, write_rows(tmp_path / f"0{name}", [])):
        empty.touch()
        assert len(read([empty, full])[0]) == 3
        assert len(read([full, empty])[0]) == 3


def test_whole_numbers_are_names_of_domains(tmp_path):
    for name in ("a.jsonl", "a.csv", "a.parquet"):
        documents, _ = read([write_rows(tmp_path / name, ROWS)], "label")
        assert [document.domain for document in documents] == ["0", "1", "0"]


@pytest.mark.parametrize("name", ["a.txt", "a.TXT", "a.md", "a.txt.gz"])
def test_text_files_of_every_supported_name_are_one_document(tmp_path, name):
    content = f"\ufeff{words(0, 20)} na\u00efve".encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    [document], _ = read([tmp_path / name])
    assert document.text == f"{words(0, 20)} na\u00efve"


def test_names_may_hold_brackets_and_begin_with_the_home_directory(tmp_path, monkeypatch):
    """A path that exists is meant itself even if it reads like a pattern; other paths are patterns."""
    folder = tmp_path / "a [x]"
    folder.mkdir()
    for name in ("b.jsonl", "b [1].jsonl"):
        write_rows(folder / name, ROWS)
    (folder / "sub").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(read([folder / "b [1].jsonl"])[0]) == 3
    assert len(read([Path("~/a [[]x]/*.jsonl")], drop_duplicates=False)[0]) == 6
    assert len(read([Path("~/a*/**")])[0]) == 3
    with pytest.raises(
        ValueError, match=r"data\.source\.paths=.*: is a folder; name its files, such as .*\*\*/\*\.txt"
    ):
        Files([str(folder)], "text", None)


def test_duplicates_are_counted_and_can_be_kept(tmp_path):
    file = write_rows(tmp_path / "a.jsonl", ROWS * 2)
    documents, left_out = read([file])
    assert (len(documents), left_out) == (3, {"duplicates": 3})
    documents, left_out = read([file], drop_duplicates=False)
    assert (len(documents), left_out) == (6, {})


@pytest.mark.parametrize("paths", [["gone.txt"], ["*.gone"], []])
def test_patterns_without_a_file_are_refused(tmp_path, monkeypatch, paths):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"data\.source\.paths="):
        Files(paths, "text", None).describe()
