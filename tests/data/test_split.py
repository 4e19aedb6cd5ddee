"""Tests of the split: test text is never trained on, and costs no training text where the source has more."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from moe.data.blocks import Prepared, prepare
from moe.data.documents import Document, DuplicateFilter
from moe.data.embedded import Embedded
from moe.data.limits import BlockSettings
from moe.data.sources import Conversations, Files, Hub
from moe.data.split import Corpus, divide

SETTINGS = {"tokenizer": "bpe", "vocab_size": 300, "seq_len": 16, "val_percent": 20, "max_val_blocks": None}


def corpus(files: int, *, size: int = 100, prefix: str = "") -> Corpus:
    """Return two domains, each with so many source files of two documents with `size` characters."""
    return {
        domain: [
            Document(domain, f"{prefix}{file}:{part}", "x" * size, f"{prefix}{file}")
            for file in range(files)
            for part in range(2)
        ]
        for domain in ("a", "b")
    }


def files_of(part: Corpus) -> set[tuple[str, str]]:
    return {(domain, document.group) for domain, documents in part.items() for document in documents}


@pytest.mark.parametrize("percent", [10, 30])
def test_no_source_file_is_in_two_splits_and_each_split_has_its_share(percent: int) -> None:
    found = divide(corpus(50), {}, val_percent=percent, test_percent=percent)
    parts = [files_of(part) for part in (found.train, found.val, found.test)]
    assert [len(part) for part in parts] == [100 - 2 * percent, percent, percent]  # of 2 x 50 files of equal size
    assert len(set.union(*parts)) == 100
    assert (found.rule, found.test_rule) == ("by source file", "by source file")


def test_validation_text_does_not_depend_on_the_test() -> None:
    without = divide(corpus(50), {}, val_percent=10, test_percent=0)
    assert without.val == divide(corpus(50), {}, val_percent=10, test_percent=20).val
    assert not files_of(without.test)
    assert without.test_rule is None


def test_text_beyond_the_limit_is_the_test_text_and_costs_no_training_text() -> None:
    beyond = corpus(4, prefix="more")
    without = divide(corpus(50), {}, val_percent=10, test_percent=0)
    found = divide(corpus(50), beyond, val_percent=10, test_percent=10)
    assert (found.train, found.val, found.test) == (without.train, without.val, beyond)
    assert found.test_rule == "beyond the limit"


def test_a_domain_with_little_text_beyond_the_limit_gives_training_text() -> None:
    beyond = {"a": corpus(4, prefix="more")["a"], "b": corpus(2, prefix="more")["b"]}
    found = divide(corpus(50), beyond, val_percent=10, test_percent=10)
    assert found.test["a"] == beyond["a"]
    assert {document.group for document in found.test["b"]} <= {document.group for document in corpus(50)["b"]}
    assert [len(found.train[domain]) for domain in ("a", "b")] == [90, 80]
    assert found.test_rule == "beyond the limit and by source file"


@pytest.mark.parametrize(("files", "test_rule"), [(3, "by source file"), (2, "by position")])
def test_training_keeps_text_if_there_are_few_source_files(files: int, test_rule: str) -> None:
    """The second of two files is for validation, so the test text is the end of the first one."""
    found = divide(corpus(files), {}, val_percent=40, test_percent=40)
    assert found.test_rule == test_rule
    for part in (found.train, found.val, found.test):
        assert all(sum(len(document.text) for document in documents) for documents in part.values())


def test_one_source_file_is_divided_into_training_test_and_validation_text_in_this_order() -> None:
    text = " ".join(f"w{number:03}" for number in range(1000))
    found = divide({"a": [Document("a", "1", text, "1")]}, {}, val_percent=10, test_percent=20)
    [train], [val], [test] = (part["a"] for part in (found.train, found.val, found.test))
    assert train.text + test.text + val.text == text
    assert [round(len(part.text) / len(text), 2) for part in (train, val, test)] == [0.7, 0.1, 0.2]


# ---- Sources -----------------------------------------------------------------------------------------------------


def test_embedded_text_beyond_the_limit_is_of_other_files_and_no_duplicate() -> None:
    source = Embedded(["speech", "math", "docs"], 30_000)
    found = list(source.with_test(20))
    within = [document for document in found if not document.beyond]
    assert within == list(source.documents())
    beyond = [document for document in found if document.beyond]
    assert not {(d.domain, d.group) for d in within} & {(d.domain, d.group) for d in beyond}
    for domain in source.domains:
        assert sum(len(document.text) for document in beyond if document.domain == domain) >= 6000
    seen = DuplicateFilter()
    assert all(seen.admits(document.text) for document in found)


def rows(number: int) -> list[dict]:
    """Return rows whose texts have no word in common."""
    return [{"text": " ".join(f"r{row}w{word}" for word in range(20)), "topic": f"t{row % 2}"} for row in range(number)]


def test_rows_beyond_the_limit_of_a_data_set_are_for_the_test(tmp_path: Path) -> None:
    question = {"role": "user", "content": "q"}
    chats = [{"m": [question, {"role": "assistant", "content": row["text"]}]} for row in rows(30)]
    for name, content in (("texts", rows(30)), ("chats", chats)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    texts = Hub(str(tmp_path / "texts.jsonl"), None, "train", "text", "topic", 20)
    for source in (texts, Conversations(str(tmp_path / "chats.jsonl"), None, "train", "m", None, 20)):
        found = list(source.with_test(10))
        assert [document.beyond for document in found] == [False] * 20 + [True] * 2
        assert found[:20] == list(source.documents())
    few = dataclasses.replace(texts, max_documents=40)
    assert not any(document.beyond for document in few.with_test(10))


# ---- Blocks ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Prepared:
    folder = tmp_path_factory.mktemp("split")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(60)))
    source = Files([str(folder / "rows.jsonl")], "text", "topic")
    settings = BlockSettings(test_percent=20, max_test_blocks=9, **SETTINGS)
    return prepare(source, settings, cache=str(folder / "cache"))


def words(prepared: Prepared, name: str) -> Iterator[str]:
    for row in getattr(prepared, name)["input_ids"][:]:
        yield from prepared.tokenizer.decode(row).replace("<|endoftext|>", " ").split()[1:-1]


def test_the_blocks_of_the_test_have_no_text_of_the_other_splits(prepared: Prepared) -> None:
    assert prepared.test is not None
    documents = {name: {word.partition("w")[0] for word in words(prepared, name)} for name in ("train", "val", "test")}
    assert not documents["test"] & (documents["train"] | documents["val"])
    assert len(prepared.test) == 9
    assert set(np.asarray(prepared.test["domain"])) == {0, 1}


def test_the_manifest_counts_and_names_the_test_text(prepared: Prepared) -> None:
    assert sum(counts["test"]["blocks"] for counts in prepared.manifest["domains"].values()) == 9
    assert all(prepared.predicted_bytes("test"))
    assert prepared.digests["test_sha256"] == prepared.manifest["test_sha256"]
    assert prepared.manifest["test_split"] == "by source file"


def test_a_text_too_short_for_a_test_block_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(" ".join(f"w{number}" for number in range(200)))
    source = Files([str(tmp_path / "a.txt")], "text", None)
    with pytest.raises(ValueError, match=r"no test block is that long; .*, or data\.test_percent=0"):
        prepare(source, BlockSettings(test_percent=1, **SETTINGS), cache=str(tmp_path / "cache"))
