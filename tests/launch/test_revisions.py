"""Tests of the commits that a cell gets: the given one, the recorded one, or the newest one, in this order."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from run_folders import write_cells

from moe.checks import ConfigError
from moe.config.cell import Cell
from moe.data import hub
from moe.launch.revisions import pinned, pinned_by_first_rank
from moe.launch.run import write_run_record

OLD, NEW, TAGGED = "a" * 40, "b" * 40, "c" * 40


@pytest.fixture
def hub_cell(cell: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Cell:
    """Return a cell of `data=cosmopedia`, on a hub whose newest commit is NEW and whose tag "v1" is TAGGED."""

    class Api:
        def repo_info(self, name: str, *, revision: str | None, **_: object) -> Any:
            if revision not in (None, "v1"):
                raise OSError(f"no revision {revision}\nsecond line")
            return type("Info", (), {"sha": TAGGED if revision else NEW})

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_, **__: None)
    hub.commit.cache_clear()
    one = cell()
    source = {"_target_": "moe.data.sources.Hub", "path": "someone/texts", "name": None, "split": "train"}
    source |= {"text": "text", "domain": None, "max_documents": 9, "drop_duplicates": True, "revision": None}
    data = replace(one.config.data, source=source, tokenizer="someone/tokenizer", vocab_size=None)
    return one._replace(config=replace(one.config, data=data), folder=tmp_path / "sweep" / "seed=1")


def commits(cell: Cell) -> tuple[str, str | None]:
    data = pinned(cell).config.data
    return data.source["revision"], data.tokenizer_revision


def with_revision(cell: Cell, revision: str | None) -> Cell:
    data = replace(cell.config.data, source={**cell.config.data.source, "revision": revision})
    return cell._replace(config=replace(cell.config, data=replace(data, tokenizer_revision=revision)))


def test_without_a_record_a_cell_gets_the_newest_commits(hub_cell: Cell) -> None:
    assert commits(hub_cell) == (NEW, NEW)
    assert commits(with_revision(hub_cell, "v1")) == (TAGGED, TAGGED)
    assert commits(with_revision(hub_cell, OLD)) == (OLD, OLD)


def test_a_resume_uses_the_commits_in_the_record_of_the_run(hub_cell: Cell) -> None:
    hub_cell.folder.mkdir(parents=True)
    write_run_record(with_revision(hub_cell, OLD), "interrupted")
    assert commits(hub_cell) == (OLD, OLD)


def test_a_new_cell_uses_the_commits_of_the_other_cells_of_the_sweep(hub_cell: Cell) -> None:
    hub_cell.folder.parent.mkdir(parents=True)
    other = with_revision(hub_cell, OLD).config.identity()
    write_cells(hub_cell.folder.parent, {"seed=9": other})
    assert commits(hub_cell) == (OLD, OLD)
    write_cells(hub_cell.folder.parent, {"seed=9": other | {"data.source.path": "another/text"}})
    assert commits(hub_cell) == (NEW, OLD)


def test_an_unknown_revision_is_one_line(hub_cell: Cell) -> None:
    with pytest.raises(ConfigError, match=r"^data\.source\.path=someone/texts: .*\(no revision v2\).*$"):
        pinned(with_revision(hub_cell, "v2"))


def test_a_missing_folder_whose_name_cannot_be_on_the_hub_is_one_line(cell: Any) -> None:
    missing = "/x/lb=0.0,seed=1/model"
    one = cell()
    data = replace(one.config.data, tokenizer=missing, vocab_size=None)
    with pytest.raises(ConfigError, match=f"^data.tokenizer={missing}: no such folder, and none on the hub") as raised:
        pinned(one._replace(config=replace(one.config, data=data)))
    assert "\n" not in str(raised.value)


def test_local_data_have_no_revision(cell: Any) -> None:
    one = cell()
    assert pinned(one).config == one.config
    with pytest.raises(ConfigError, match=r"data\.tokenizer_revision=v1: must be null, because data\.tokenizer=bpe"):
        replace(one.config, data=replace(one.config.data, tokenizer_revision="v1")).check()


def test_the_other_ranks_use_what_the_first_one_resolved(hub_cell: Cell, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the first rank asks the hub, which may change between two requests."""
    sent: list[Any] = []
    monkeypatch.setattr("moe.distributed.ranks.broadcast", lambda value: sent.append(value) or sent[0])
    assert pinned_by_first_rank(hub_cell) == pinned(hub_cell)
    monkeypatch.setattr("moe.distributed.ranks.is_first", lambda: False)
    monkeypatch.setattr("moe.data.hub.commit", lambda *_, **__: pytest.fail("another rank asked the hub"))
    assert pinned_by_first_rank(hub_cell) == sent[0] != hub_cell
    assert sent[1] is None
