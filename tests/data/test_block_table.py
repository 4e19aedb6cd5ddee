"""Tests of the table of token blocks: it is what was saved, in any selection and order, and its files run no code."""

from pathlib import Path

import numpy as np
import pytest

from moe.data.table import BlockTable

IDS = np.random.default_rng(0).integers(0, 2**31, (7, 5))
COLUMNS = {"domain": np.array([0, 0, 1, 1, 2, 2, 2]), "input_ids": IDS}


@pytest.fixture(params=["made", "read"])
def table(request: pytest.FixtureRequest, tmp_path: Path) -> BlockTable:
    made = BlockTable(COLUMNS)
    if request.param == "made":
        return made
    made.save(tmp_path / "table")
    return BlockTable.load(tmp_path / "table")


@pytest.mark.parametrize("rows", [3, slice(1, 6, 2), slice(None), range(2, 4), [6, 0, 0], np.array([5, 2])], ids=str)
def test_rows_are_those_of_the_columns(table: BlockTable, rows) -> None:
    found = table[rows]
    assert table.column_names == list(found) == list(COLUMNS)
    for name, column in COLUMNS.items():
        assert found[name].dtype == np.int64
        assert np.array_equal(found[name], column[rows])


def test_columns_can_be_read_whole_and_in_parts(table: BlockTable) -> None:
    assert len(table) == 7
    assert np.array_equal(table["input_ids"], IDS)
    parts = [*table.parts("input_ids", 3)]
    assert [len(part) for part in parts] == [3, 3, 1]
    assert np.array_equal(np.concatenate(parts), IDS)


def test_a_selection_of_a_selection_has_its_rows_and_can_be_saved(table: BlockTable, tmp_path: Path) -> None:
    chosen = table.select(np.array([6, 1, 4, 3])).select(np.array([2, 0]))
    chosen.save(tmp_path / "chosen")
    for each in (chosen, BlockTable.load(tmp_path / "chosen")):
        assert np.array_equal(each["input_ids"], IDS[[4, 6]])
        assert each[:]["domain"].tolist() == [2, 2]


def test_what_is_read_is_a_copy(table: BlockTable) -> None:
    for copy in (table["domain"], table[:]["domain"], next(table.parts("domain", 9))):
        copy[:] = 9
    assert table["domain"].tolist() == COLUMNS["domain"].tolist()


def test_columns_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^the columns have \[1, 2\] rows: they must have equally many$"):
        BlockTable({"a": np.zeros(1), "b": np.zeros(2)})


def test_a_file_with_objects_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "domain.npy", np.array([{}, {}]), allow_pickle=True)
    with pytest.raises(ValueError, match=r"pickle|object"):
        BlockTable.load(tmp_path)
