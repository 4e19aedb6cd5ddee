"""Pin what a run reads from the hub: every cell of a sweep, and every resume, uses the commits that were recorded."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

from moe.config.cell import Cell
from moe.data import hub
from moe.data.sources import on_the_hub
from moe.distributed import ranks
from moe.runs.folder import stored_record
from moe.runs.record import SweepRecord


def pinned(cell: Cell) -> Cell:
    """Return the cell with the commits of its data set and its tokenizer, if they come from the hub.

    A branch or tag in the configuration is replaced by its commit. Null is replaced by the commit that the record of
    the run or of the sweep has, and otherwise by the newest one. Raises ConfigError if the hub does not answer, and
    RecordError for a record that cannot be read.
    """
    data = cell.config.data
    recorded = list(_recorded(cell))
    source, path = dict(data.source), data.source.get("path")
    if "revision" in source and on_the_hub(str(path)):
        known = _find(recorded, "data.source.path", path, "data.source.revision")
        source["revision"] = hub.commit(path, source["revision"] or known, kind="dataset", key="data.source.path")
    revision = data.tokenizer_revision
    if data.loads_tokenizer:
        known = _find(recorded, "data.tokenizer", data.tokenizer, "data.tokenizer_revision")
        revision = hub.commit(data.tokenizer, revision or known, kind="model", key="data.tokenizer")
    return cell._replace(config=replace(cell.config, data=replace(data, source=source, tokenizer_revision=revision)))


def pinned_by_first_rank(cell: Cell) -> Cell:
    """Return, on every rank, the `pinned` cell of the first one: ranks that ask the hub could get different answers.

    All ranks call this together.
    """
    return cast(Cell, ranks.broadcast(pinned(cell) if ranks.is_first() else None))


def _recorded(cell: Cell) -> Iterator[dict[str, Any]]:
    """Yield the flat settings of the run in the folder, and of this cell and the other ones in sweep.json."""
    if (record := stored_record(cell)) is not None:
        yield record.identity
    path = cell.folder.parent / SweepRecord.FILE
    if path.exists():
        cells = SweepRecord.read(path).cells
        yield cells.get(cell.folder.name, {})
        yield from reversed(cells.values())


def _find(recorded: list[dict[str, Any]], key: str, value: Any, wanted: str) -> str | None:
    """Return the setting `wanted` of the first of these settings that have `value` at `key`."""
    found = (settings.get(wanted) for settings in recorded if settings.get(key) == value)
    return next((commit for commit in found if isinstance(commit, str)), None)
