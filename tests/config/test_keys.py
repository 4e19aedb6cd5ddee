"""Tests that every key of the groups data and logger changes something, or is declared: free, unused, or refused."""

import dataclasses
import hashlib
import inspect
import json
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest

from moe.checks import ConfigError
from moe.config.classes import build
from moe.config.keys import is_free
from moe.config.sections import DataConfig, LoggerConfig
from moe.data.blocks import Prepared, prepare
from moe.data.documents import Document
from moe.data.embedded import DOMAINS, Embedded, Solutions
from moe.data.limits import BlockSettings
from moe.data.sources import Conversations, Files, Hub
from moe.launch.command_line import read_cells
from moe.runs import mirrors

SETTINGS = {"tokenizer": "bpe", "vocab_size": 300, "seq_len": 16, "val_percent": 20, "max_val_blocks": None}
SETTINGS |= {"test_percent": 20, "max_test_blocks": None}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with texts, rows and conversations, in which one text and one conversation occur twice."""
    place = tmp_path_factory.mktemp("texts")
    rows: list[dict[str, Any]] = []
    for number in [*range(12), 3]:
        text = " ".join(f"word{number * 20 + each}" for each in range(20))
        said = [{"role": "user", "content": f"ask {text}"}, {"role": "assistant", "content": f"say {text}"}]
        title = f"title {number}"
        rows.append({"text": text, "title": title, "half": f"half{number % 2}", "messages": said, "short": said[1:]})
    for name, part in (("a", rows[:5]), ("b", rows[5:9]), ("c", rows[9:])):
        (place / f"{name}.jsonl").write_text("\n".join(map(json.dumps, part)))
        (place / f"{name}.txt").write_text(rows[name == "b"]["text"])
    (place / "all.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return place


def files(folder: Path, *names: str, **changes: Any) -> Files:
    return Files(**{"paths": [str(folder / name) for name in names], "column": "text", "domain": "half"} | changes)


def blocks(prepared: Prepared) -> str:
    """Return a digest of all blocks."""
    splits = [split for split in (prepared.train, prepared.val, prepared.test) if split is not None]
    parts = [split[:][column].tolist() for split in splits for column in ("input_ids", "domain")]
    return hashlib.sha256(json.dumps([parts, prepared.domains]).encode()).hexdigest()


def test_every_key_of_the_data_changes_the_blocks_or_is_free_or_refused(folder: Path, tmp_path: Path) -> None:
    source = files(folder, "a.jsonl", "b.jsonl", "c.jsonl")
    first = prepare(source, BlockSettings(**SETTINGS), cache=str(tmp_path))
    first.tokenizer.add_tokens(["word1"])
    first.tokenizer.save_pretrained(tmp_path / "tokenizer")
    changes: dict[str, dict[str, Any]] = {
        "tokenizer": {"tokenizer": str(tmp_path / "tokenizer"), "vocab_size": None},
        "vocab_size": {"vocab_size": 260},
        "seq_len": {"seq_len": 8},
        "val_percent": {"val_percent": 40},
        "max_val_blocks": {"max_val_blocks": 2},
        "test_percent": {"test_percent": 10},
        "max_test_blocks": {"max_test_blocks": 2},
    }
    assert changes.keys() | {"tokenizer_revision"} == {each.name for each in dataclasses.fields(BlockSettings)}
    for key, change in changes.items():
        other = prepare(source, BlockSettings(**SETTINGS | change), cache=str(tmp_path))
        assert blocks(other) != blocks(first), key
    other = prepare(files(folder, "a.jsonl", "b.jsonl"), BlockSettings(**SETTINGS), cache=str(tmp_path))
    assert blocks(other) != blocks(first)
    assert is_free("data.cache")
    with pytest.raises(ConfigError, match=r"^data.tokenizer_revision=main: must be null, because data.tokenizer=bpe"):
        read_cells(["data.tokenizer_revision=main"])
    elsewhere = {"source", "cache", "tokenizer_revision"}
    elsewhere |= {"train_domains"}  # tests/training/test_train_domains.py
    assert {*changes, *elsewhere} == {field.name for field in dataclasses.fields(DataConfig)}


needs_problems = pytest.mark.skipif(bool(DOMAINS["problems"].missing()), reason="needs the package of the domain")
HUB = {"path": "all.jsonl", "name": "x", "split": "train", "domain": None}
CHANGES: dict[str, Any] = {  # another value of each key of a source
    "column": "title",
    "domain": "half",
    "drop_duplicates": False,
    "path": "a.jsonl",
    "name": "y",
    "split": "test",
    "text": "title",
    "messages": "short",
    "revision": "main",
    "max_documents": 3,
    "max_samples": 3,
    "domains": ["speech"],
    "chars_per_domain": 9000,
}


@pytest.mark.parametrize(
    ("kind", "settings", "unused", "refused"),
    [
        (Files, {"paths": ["a.jsonl", "b.jsonl", "c.jsonl"], "column": "text", "domain": None}, [], []),
        (Files, {"paths": ["a.txt", "b.txt", "c.txt"], "column": "text", "domain": None}, ["column", "domain"], []),
        (Hub, {**HUB, "text": "text", "max_documents": 99}, ["name"], ["revision"]),
        (Conversations, {**HUB, "messages": "messages", "max_samples": 99}, ["name"], ["revision"]),
        (Embedded, {"domains": ["scripture"], "chars_per_domain": 3000}, [], []),
        pytest.param(Solutions, {"max_samples": 2}, [], [], marks=needs_problems),
    ],
)
def test_every_key_of_a_source_changes_the_documents_or_is_declared(
    kind: type, settings: dict[str, Any], unused: list[str], refused: list[str], folder: Path, monkeypatch: Any
) -> None:
    """A key that the files make useless is named in `unused`, so that a sweep over it is refused."""
    monkeypatch.chdir(folder)

    def documents(**change: Any) -> list[Document]:
        spec = {"_target_": f"{kind.__module__}.{kind.__qualname__}", **settings, **change}
        source: Any = build(spec, "data.source", trusted=True)
        assert list(getattr(source, "unused", ())) == unused
        return list(source.documents())

    first = documents()
    for key in inspect.signature(kind).parameters:
        change = {key: settings[key][:1] if key == "paths" else CHANGES[key]}
        if key in refused:
            with pytest.raises(ConfigError, match=rf"^data\.source\.{key}="):
                documents(**change)
        else:
            assert (documents(**change) != first) == (key not in unused), key


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "data=text data.source.paths=[a.txt,b.txt] data.source.column=text,title",
            "^data.source.column=text,title: changes nothing, because this source of text does not use it; leave",
        ),
        (
            "data=cosmopedia data.source.path=all.jsonl data.source.name=x,y",
            "^data.source.name=x,y: changes nothing, because this source",
        ),
        (
            "data.source.domains=[docs,cpp],[cpp,docs]",
            "^two cells of this sweep are the same run: data.source.domains=.docs,cpp. and .*cpp,docs.;",
        ),
    ],
)
def test_a_sweep_over_what_the_source_does_not_use_is_refused(
    words: str, message: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    with pytest.raises(ConfigError, match=message):
        read_cells(["-m", *words.split()])


def copies(read: Any, monkeypatch: pytest.MonkeyPatch, *words: str) -> Any:
    """Return what a run with these settings of the logger hands on: the places, and what W&B is told."""
    started: list[Any] = []
    monkeypatch.setattr("wandb.init", lambda **settings: started.append(settings) or MagicMock())
    monkeypatch.setattr("moe.runs.wandb_mirror._log_model", lambda run, cell: started.append("model"))
    for name in ("tensorboard", "csv"):
        monkeypatch.setitem(mirrors.MIRRORS, name, (name, lambda cell, name=name: started.append(name) or MagicMock()))
    one = read("logger.mode=offline", *words)
    one.folder.mkdir(parents=True, exist_ok=True)
    mirrors.Mirrors(one).finish({"val/loss": 1.0})
    told = ("project", "entity", "mode")
    return [{key: each[key] for key in told} if isinstance(each, dict) else each for each in started]


def test_every_key_of_the_logger_changes_what_is_copied(cell: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {
        "to": "logger.to=[wandb,csv]",
        "mode": "logger.mode=online",
        "project": "logger.project=mine",
        "entity": "logger.entity=us",
        "log_model": "logger.log_model=true",
    }
    first = copies(cell, monkeypatch)
    assert first == [{"project": "moe-routing", "entity": None, "mode": "offline"}]
    for key, word in changes.items():
        assert copies(cell, monkeypatch, word) != first, key
    assert changes.keys() == {field.name for field in dataclasses.fields(LoggerConfig)}
