"""Tests of data sets and files as sources: documents without duplicates, and one-line errors."""

import json
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from moe.data.sources import DuplicateFilter, Files, Hub


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
    with pytest.raises(ValueError, match=r"data\.source\.text=body: train/0 has no such column, only prompt, "):
        list(hub(file, text="body").documents())
    with pytest.raises(ValueError, match=r"data\.source\.domain=topic: "):
        list(hub(file, domain="topic").documents())
    with pytest.raises(ValueError, match=r"data\.source\.path=.*gone\.parquet: no such file"):
        hub(tmp_path / "gone.parquet").describe()
    with pytest.raises(ValueError, match=r"data\.source\.max_documents=0"):
        hub(file, max_documents=0)


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


def test_the_description_of_files_depends_on_their_bytes(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one")
    before = Files([str(path)], "text", None).describe()
    path.write_text("two")
    assert Files([str(path)], "text", None).describe() != before


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", " \n", r"data\.source\.paths=.*a\.txt: holds no text"),
        ("a.txt", b"\xff\xfe\xff", r"data\.source\.paths=.*a\.txt: must be UTF-8"),
        ("a.csv", "x", r"data\.source\.paths=.*a\.csv: must be a \.txt, \.jsonl or \.parquet file"),
        ("a.jsonl", '{"body": "x"}\n', r"data\.source\.column=text: .*a\.jsonl:0 has no such column, only body"),
        ("a.jsonl", '{"text": ""}\n', r"data\.source\.column=text: .*a\.jsonl:0 holds no text"),
    ],
)
def test_wrong_files_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        list(Files([str(tmp_path / name)], "text", None).documents())


@pytest.mark.parametrize("paths", [["gone.txt"], ["*.gone"], []])
def test_patterns_without_a_file_are_refused(tmp_path, monkeypatch, paths):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"data\.source\.paths="):
        Files(paths, "text", None).describe()
