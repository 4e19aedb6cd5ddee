"""Tests that the command of a report trains the runs of the report."""

import shlex
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hydra.core.override_parser.types import Quote, QuotedString

from moe.analysis.report.collect import collect_inputs
from moe.analysis.report.sections.commands import (
    MOST_LISTED,
    command_for_more,
    fixed_settings,
    grid_of,
    training_command,
)
from moe.analysis.report.sections.setup import _replaced
from moe.config.cell import Cell
from moe.config.keys import flatten
from moe.config.words import quote
from moe.launch.command_line import read_cells
from moe.launch.plans import record_plan
from moe.launch.run import write_run_record
from moe.launch.sweep import _record_command, _record_grid
from moe.results.table import load_runs
from moe.runs.folder import grid_name
from moe.runs.record import CommandsRecord

OWN = "# A router of this test\n_target_: moe.routers.topk.TopK\nk: {k}\n"


@pytest.fixture
def labs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Return two folders of options, each with a router, below the working folder, which has a train.py."""
    monkeypatch.chdir(tmp_path)
    Path("train.py").touch()  # so that the commands name it
    monkeypatch.setenv("MOE_SEARCH_PATH", "")
    folders = [Path("my lab"), Path("other")]
    for number, folder in enumerate(folders):
        (folder / "router").mkdir(parents=True)
        (folder / "router" / f"own{number}.yaml").write_text(OWN.format(k=number + 1))
    return folders


def trained(*words: str) -> tuple[list[Cell], pd.DataFrame]:
    """Return the cells of a sweep, and the table of its runs, after writing what the sweep writes into its folder."""
    cells = read_cells(["-m", *words])
    assert cells is not None
    cells[0].folder.parent.mkdir(parents=True, exist_ok=True)
    _record_grid(cells)
    _record_command(cells)
    return cells, pd.DataFrame({"folder": [str(cell.folder) for cell in cells]})


def described(cell: Cell) -> dict[str, Any]:
    """Return everything that a command decides about a run."""
    return flatten(cell.config) | cell.choices | {"folder": cell.folder}


@pytest.mark.parametrize(
    "command",
    [
        "--config-dir 'my lab' router=topk,own0 seed=1,2 steps=9 save_model=none threads=1 logger=csv planned_seeds=8",
        """'hydra.searchpath=["my lab",other]' router=own0,own1 noise=0.1 seed=1,2 out=here""",
        'capacity=1.0,null seed=3 \'logger.project="my \\"lab\\""\'',
        "experiment=experiment_a capacity=null router=softk,switch seed=1 claims=[] logger.mode=disabled",
        "experiment=noise_lb_seed seed=1,2 trainable=router noise=0.0 'question=\"Why, and how?\"'",
    ],
)
@pytest.mark.usefixtures("labs")
def test_the_command_of_a_report_trains_its_runs(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cells, runs = trained(*shlex.split(command))
    monkeypatch.setenv("MOE_SEARCH_PATH", "")
    program, script, *words = shlex.split(training_command(runs))
    assert (program, script) == ("python", "train.py")
    again = read_cells(words)
    assert again is not None
    assert sorted(map(described, again), key=str) == sorted(map(described, cells), key=str)
    more = read_cells(shlex.split(training_command(runs, [7, 8]))[2:])
    assert more is not None
    assert {cell.config.seed for cell in more} == {7, 8}


@pytest.mark.usefixtures("labs")
def test_a_setting_that_each_cell_computes_is_printed_as_it_was_typed() -> None:
    """At equal FLOPs, experts of the oracle are wider than those of top-2 routing."""
    command = "router=topk,oracle 'model.ffn=${equal_flops:64}' seed=1"
    cells, runs = trained(*shlex.split(command))
    assert [cell.config.model.ffn for cell in cells] == [64, 128]
    assert training_command(runs) == "python train.py -m 'model.ffn=${equal_flops:64}' router=topk,oracle seed=1"
    grid = grid_of(runs)
    assert grid is not None
    assert fixed_settings(grid) == ["model.ffn=${equal_flops:64}"]
    again = read_cells(shlex.split(training_command(runs))[2:])
    assert again is not None
    assert [*map(described, again)] == [*map(described, cells)]


@pytest.mark.usefixtures("labs")
def test_levels_that_each_cell_computes_are_printed_as_they_were_typed() -> None:
    """Seeds are added, at first with the same words, and then with numbers, which are other levels."""
    typed = "'model.ffn=${equal_flops:64},${equal_flops:32}'"
    cells, runs = trained(*shlex.split(f"router=topk,oracle {typed} seed=1"))
    assert [cell.config.model.ffn for cell in cells] == [64, 32, 128, 64]
    assert training_command(runs) == f"python train.py -m {typed} router=topk,oracle seed=1"
    again = read_cells(shlex.split(training_command(runs))[2:]) or []
    assert sorted(map(described, again), key=str) == sorted(map(described, cells), key=str)
    more, _ = trained(*shlex.split(f"router=topk,oracle {typed} seed=2"))
    both = pd.DataFrame({"folder": [str(cell.folder) for cell in (*cells, *more)]})
    assert training_command(both) == f"python train.py -m {typed} router=topk,oracle seed=1,2"
    trained(*shlex.split("router=topk,oracle model.ffn=16,8 seed=1"))
    assert "model.ffn=64,32,128" in training_command(runs)


@pytest.mark.usefixtures("labs")
def test_what_a_command_replaced_in_its_experiment_is_a_fact_of_the_report() -> None:
    _, runs = trained("experiment=quick_demo", "seed=1", "noise=0.5", "router.temp=1.0,2.0")
    assert _replaced(runs.assign(experiment="quick_demo: noise=0.5")) == ["noise=0.5 instead of 0.1"]
    _, runs = trained("experiment=quick_demo", "seed=1", "router.temp=1.0,2.0")
    assert _replaced(runs.assign(experiment="quick_demo")) == []


@pytest.mark.usefixtures("labs")
def test_many_more_seeds_are_a_range() -> None:
    _, runs = trained("steps=1", "seed=1", "-m")
    command = training_command(runs, range(2, 2 + MOST_LISTED + 1))
    again = read_cells(shlex.split(command)[2:])
    assert command == "python train.py -m steps=1 'seed=range(2,23)'"
    assert again is not None
    assert [cell.config.seed for cell in again] == [*range(2, 23)]
    assert training_command(runs, range(2, 4)) == "python train.py -m steps=1 seed=2,3"


@pytest.mark.usefixtures("labs")
def test_a_claim_that_was_changed_keeps_its_own_command() -> None:
    """Seed 2 was added with another claim, so an advice about the old claim must name it."""
    old = "[{text: 'a \"b\", 1 %', metric: val/loss, factor: noise, levels: [0.1], than: [0.0], kind: higher}]"
    new = "[{text: c, metric: val/loss, factor: noise, levels: [0.1], than: [0.0], kind: lower}]"
    folders: list[str] = []
    for seed, claims in ((1, old), (2, new)):
        cells, _ = trained("noise=0.0,0.1", f"seed={seed}", f"claims={claims}")
        record_plan(cells, grid_name(cells))
        for cell in cells:
            cell.folder.mkdir(parents=True)
            write_run_record(cell, "interrupted")
            folders.append(str(cell.folder))
    [inputs] = collect_inputs(load_runs([Path(folders[0]).parent]))
    assert inputs.claims["claim"].tolist() == ['a "b", 1 %', "c"]
    assert command_for_more(inputs, 900).endswith("'seed=range(3,903)'")
    for row, claim in enumerate((old, new)):
        words = shlex.split(command_for_more(inputs, 2, row))[2:]
        again, wanted = read_cells(words), read_cells(["-m", "noise=0.0,0.1", "seed=3,4", f"claims={claim}"])
        assert again is not None
        assert wanted is not None
        assert sorted(map(described, again), key=str) == sorted(map(described, wanted), key=str)


@pytest.mark.usefixtures("labs")
def test_a_command_says_what_the_newest_command_said_and_nothing_of_a_damaged_file() -> None:
    cells, runs = trained("noise=0.0,0.1", "seed=1", "save_model=none")
    trained("noise=0.0,0.1", "seed=2", "save_model=all", "planned_seeds=2")
    assert "save_model=all planned_seeds=2" in training_command(runs)
    (cells[0].folder.parent / CommandsRecord.FILE).write_text("[]")
    assert training_command(runs) == "python train.py -m noise=0.0,0.1 seed=1"


@pytest.mark.parametrize("text", ["plain", 'a "b"', "a\\", 'a\\"', '\\\\"x', "", "{a: 'b'}"])
def test_a_quoted_text_is_that_of_hydra(text: str) -> None:
    assert quote(text) == QuotedString(text, Quote.double).with_quotes()
