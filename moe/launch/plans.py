"""Write down what a command plans, before the first step of its runs, and which of the runs have ended."""

import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from moe.checks import first_line
from moe.config import run_routers
from moe.config.cell import Cell
from moe.files import shown
from moe.runs.folder import stored_record
from moe.runs.planned import (
    ENDED_FILE,
    Ended,
    PlannedStudy,
    PlansRecord,
    add_ended,
    begin_ended,
    digest_of,
    digest_of_run,
    ended_in,
    looks_in,
    plans_in,
    result_of,
)
from moe.runs.record import MetricsRecord, RunRecord

log = logging.getLogger(__name__)

LATER_TOKENS = """\
{some} of {all} runs, such as {name}, may use later tokens of the text, perhaps in training alone: their losses are \
not comparable with those of the others. A claim or table that compares them does not say which model predicts better"""
KEPT = "{runs} claims of an earlier command, which differ: each claim is judged by the runs that recorded it"


def record_plan(cells: list[Cell], experiment: str) -> None:
    """Add the plan of a command to plans.json of its sweep folder, unless all its runs have begun.

    A command that plans what the newest plan of the experiment says adds nothing, unless it trains runs again.
    Raises RecordError for a damaged file that a report reads, before a run trains for a report that would be refused.
    """
    folder = cells[0].folder.parent
    earlier = plans_in(folder)
    looks_in(folder)
    known = ended_in(folder) or []
    ended = {each.run for each in known}
    records = [stored_record(cell) for cell in cells]
    _record_missed_ends(cells, records, earlier, known)
    new = [cell for cell, record in zip(cells, records, strict=True) if record is None]
    if not new:
        return
    plan = PlannedStudy(
        time=datetime.now(UTC).isoformat(timespec="seconds"),
        experiment=experiment,
        claims=[asdict(claim) for claim in new[0].config.claims],
        seeds=list(dict.fromkeys(cell.config.seed for cell in cells)),
        planned_seeds=new[0].config.planned_seeds,
        runs=[digest_of_run(cell.identity()) for cell in new],
    )
    begin_ended(folder)
    of_experiment = [each.digest for each in earlier if each.experiment == experiment]
    if plan.digest not in of_experiment[-1:] or not ended.isdisjoint(plan.runs):
        PlansRecord(plans=[*earlier, plan]).write(folder / PlansRecord.FILE)


def _record_missed_ends(
    cells: Sequence[Cell], records: Sequence[RunRecord | None], plans: Sequence[PlannedStudy], ended: Sequence[Ended]
) -> None:
    """Add planned runs that ended, but whose command was killed before it wrote that into the sweep folder."""
    planned, known = {run for plan in plans for run in plan.runs}, {(each.run, each.result) for each in ended}
    for cell, record in zip(cells, records, strict=True):
        if record is not None and record.ended and (run := digest_of_run(cell.identity())) in planned:
            with suppress(OSError, ValueError):  # a run whose files cannot be read has no result
                if (run, result_of(_final_metrics(cell, record))) not in known:
                    written = (cell.folder / RunRecord.FILE).stat().st_mtime
                    record_end(cell, record, datetime.fromtimestamp(written, UTC))


def _final_metrics(cell: Cell, record: RunRecord) -> dict[str, Any]:
    return {} if record.diverged else MetricsRecord.read(cell.folder / MetricsRecord.FILE).scalars()


def record_end(cell: Cell, record: RunRecord, time: datetime | None = None) -> None:
    """Add a run that is finished or diverged to the file of its sweep folder. If that fails, log it instead.

    time: when it ended; by default now.
    """
    try:
        add_ended(cell.identity(), cell.config.seed, cell.folder, _final_metrics(cell, record), time)
    except (OSError, ValueError) as error:
        path = shown(cell.folder.parent / ENDED_FILE)
        log.error("%s: a report will not know that %s has ended: %s", path, cell.folder.name, first_line(error))


def kept_claims(cells: list[Cell]) -> str:
    """Return a line about runs that have begun with other claims than their command has; "" if there are none.

    A run keeps the claims that it recorded before its first step, because new ones could be chosen by its result.
    """
    begun = [(cell.config.claims, record.claims()) for cell in cells if (record := stored_record(cell))]
    kept = sum(digest_of([*map(asdict, now)]) != digest_of([*map(asdict, recorded)]) for now, recorded in begun)
    return KEPT.format(runs="1 run keeps the" if kept == 1 else f"{kept} runs keep the") if kept else ""


def not_comparable(cells: Sequence[Cell]) -> str:
    """Return a line about runs whose losses are not comparable, because their routers are not causal; "" if all agree.

    This imports torch, unless there is one cell.
    """
    later = [cell for cell in cells if len(cells) > 1 and not run_routers.is_causal(cell.config)]
    if not 0 < len(later) < len(cells):
        return ""
    return LATER_TOKENS.format(some=len(later), all=len(cells), name=later[0].folder.name)
