"""Tests that runs are analyzed with the grid for which they were asked, and with no other runs of the same folder."""

from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from run_folders import FACTS, write_metrics

from moe.checks import ConfigError, parse
from moe.config.cell import Cell, Grid
from moe.dashboard import workspace
from moe.launch.command_line import read_cells
from moe.launch.resolvers import best_level
from moe.launch.run import write_run_record
from moe.launch.sweep import _record_grid, carry_out
from moe.results.conditions import levels, spread_table, summary, varied_factors
from moe.results.sweep_tables import write_sweep_tables
from moe.results.table import load_runs
from moe.runs.folder import grid_name
from moe.runs.record import RunFacts, SweepRecord

Sweep = Callable[..., list[Cell]]


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sweep:
    """Return a function that carries out a command in the folder of the test; runs are only recorded as finished."""
    monkeypatch.setattr("moe.launch.sweep._state_disk", lambda cells: None)  # it counts the tokens of the text
    trained: list[Path] = []

    def carry(*words: str) -> list[Cell]:
        cells = read_cells(["-m", f"out={tmp_path}", "logger.mode=disabled", *words]) or []

        def launch() -> None:
            for cell in cells:
                if not (cell.folder / "run.json").exists():
                    assert cell.folder not in trained
                    trained.append(cell.folder)
                    (cell.folder / "model").mkdir(parents=True)
                    write_metrics(cell.folder, {})
                    write_run_record(cell, "finished", parse(RunFacts, FACTS))

        assert carry_out(cells, launch) == 0
        return cells

    return carry


def grids(folder: Path) -> dict[str, int]:
    """Return how many runs each grid has; none of them may vary another setting than the grid's factors."""
    runs = load_runs([folder])
    for name, members in runs.groupby("experiment"):
        known = [*str(name).partition(": ")[2].partition(",")[0].split(" x "), "noise", "lb", "seed"]
        assert set(varied_factors(members)) <= set(known), name
    return {str(name): len(members) for name, members in runs.groupby("experiment")}


def test_a_trial_and_the_real_sweep_are_two_grids(sweep: Sweep, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The table of the noise study, whose columns tell no steps apart, has the runs of one of the two.

    The first command again trains nothing.
    """
    sweep("experiment=noise_lb_seed", "noise=0.0,0.5", "seed=42", "steps=20")
    capsys.readouterr()
    sweep("experiment=noise_lb_seed", "noise=0.0,0.5", "seed=42,43")
    said = capsys.readouterr().out
    assert grids(tmp_path) == {"noise_lb_seed": 8, "noise_lb_seed: steps=20": 4}
    assert "steps" not in said.partition("per condition")[2]
    assert "8 of 8 runs finished" in said
    sweep("experiment=noise_lb_seed", "noise=0.50,0", "seed=42", "steps=20")
    assert grids(tmp_path) == {"noise_lb_seed": 8, "noise_lb_seed: steps=20": 4}
    name = "moe_routing_noise_experiment_results"
    rows = {path.name: len(pd.read_csv(path)) for path in (tmp_path / "noise_lb_seed").glob(f"{name}*")}
    assert rows == {f"{name}.csv": 8, f"{name}_steps=20.csv": 4}


def test_two_plain_sweeps_are_two_grids_and_a_run_in_both_is_in_each(sweep: Sweep, tmp_path: Path) -> None:
    """The run with the default values is trained once."""
    sweep("noise=0.0,0.5", "lb=0.0,0.01", "seed=42,43")
    sweep("router.k=1,2", "seed=42,43")
    assert grids(tmp_path) == {"default: lb x noise": 8, "default: router.k": 4}
    assert len(load_runs([tmp_path])["folder"].unique()) == 10
    assert len(write_sweep_tables(tmp_path / "default")) == 12
    noise = pd.read_csv(tmp_path / "default" / "moe_routing_noise_experiment_results.csv")
    assert not noise.duplicated(["noise_std", "load_balancing_weight", "seed"]).any()
    assert len(noise) == 8


def test_single_runs_beside_a_sweep_are_a_grid_of_their_own(sweep: Sweep, tmp_path: Path) -> None:
    """No mean is taken over a sweep of seeds and a run that somebody started alone, with other settings or the same."""
    sweep("seed=42,43")
    for words in (["seed=44"], ["seed=44", "steps=20"]):
        [single] = read_cells([f"out={tmp_path}", *words]) or []
        single.folder.mkdir()
        write_metrics(single.folder, {})
        write_run_record(single, "finished", parse(RunFacts, FACTS))
        assert grid_name([single]) == "default: single runs"
    runs = load_runs([tmp_path])
    assert runs["experiment"].value_counts().to_dict() == {"default": 2, "default: single runs": 2}
    assert varied_factors(runs[runs["experiment"] == "default"]) == ["seed"]
    sweep("seed=44,45")
    assert grids(tmp_path)["default"] == 4, "a run that a later sweep asks for belongs to its grid"


def test_levels_have_the_order_in_which_the_user_listed_them(sweep: Sweep, tmp_path: Path) -> None:
    """Texts are not sorted by the alphabet; numbers are sorted as numbers."""
    sweep("router=temperature", "schedule=linear,constant,cosine", "noise=10.0,2.0")
    runs = load_runs([tmp_path])
    assert levels(runs["schedule"]) == ["linear", "constant", "cosine"]
    assert levels(runs["noise"]) == [2.0, 10.0]
    table = spread_table(summary(runs, ["schedule", "noise"], ["val/loss"]))
    assert table["schedule"].drop_duplicates().tolist() == ["linear", "constant", "cosine"]
    assert table["noise"].tolist() == ["2.0", "10.0"] * 3


def test_a_shortened_name_keeps_as_many_settings_as_fit(tmp_path: Path) -> None:
    """Keys lose their groups, so that two sweeps that differ in the number of layers have names that say so."""
    sizes = ["steps=4", "data.max_val_blocks=8", "data.seq_len=32", "data.vocab_size=300"]
    sizes += ["model.dim=32", "model.ffn=32", "model.heads=2"]
    names = []
    for layers in (1, 2):
        cells = read_cells(["-m", "router.k=1,2", *sizes, f"model.layers={layers}", f"out={tmp_path}"]) or []
        assert cells[0].grid is not None
        names.append(cells[0].grid.name)
        assert names[-1].startswith("default: router.k, steps=4, max_val_blocks=8, ")
        assert f"layers={layers}" in names[-1]
        assert len(names[-1]) <= 120
    assert names[0] != names[1]


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> list[Cell]:
    """Return the cells of a sweep over noise and balance weight."""
    out = tmp_path_factory.mktemp("out")
    return read_cells(["-m", "noise=0.0,0.5", "lb=0.0,0.01", "seed=42,43", f"out={out}"]) or []


@pytest.mark.parametrize(
    ("words", "runs"),
    [
        (["noise=0.0,0.5", "lb=0.0,0.01", "seed=42,43", "threads=2"], 8),
        (["noise=0.0,0.5", "lb=0.0,0.01", "seed=44"], 12),
        (["noise=0.0,0.5,1.0", "lb=0.0,0.01", "seed=42,43"], 12),
        (["noise=1.0", "lb=0.0,0.01", "seed=42,43"], 12),
        (["noise=0.0", "lb=0.02", "seed=42,43"], 10),
        (["noise=1.0", "lb=0.02", "seed=42"], 9),
    ],
    ids=["again", "seed", "levels", "one level", "a level and a default", "one run"],
)
def test_the_same_factors_and_fixed_settings_are_one_grid(first: list[Cell], words: list[str], runs: int) -> None:
    """A command that asks for more seeds or more levels adds its cells to the grid."""
    out = first[0].folder.parents[1]
    (out / "default" / "sweep.json").unlink(missing_ok=True)
    second = read_cells(["-m", f"out={out}", *words]) or []
    [grid] = recorded(first, second)
    assert (grid.name, len(grid.cells)) == ("default: lb x noise", runs)
    assert {grid_name([cell]) for cell in second} == {grid.name}


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["lb=0.0,0.01", "seed=42,43"], "default: lb"),
        (["seed=42,43"], "default"),
        (["noise=0.0,0.5", "lb=0.0,0.01", "steps=20"], "default: lb x noise, steps=20"),
        (["noise=0.0,0.5", "lb=0.0,0.01", "router=temperature"], "default: lb x noise, router=temperature"),
        (["router=topk,temperature", "lb=0.01", "steps=300"], "default: router, lb=0.01, steps=300"),
        (["experiment=temperature_ablation", "router.temp=0.5"], "temperature_ablation"),
    ],
)
def test_another_factor_or_setting_is_another_grid(first: list[Cell], words: list[str], name: str) -> None:
    """W&B groups runs by the same name, and the dashboard of the command shows that group.

    A given default is no other setting, except where the default depends on the level of a factor.
    """
    out = first[0].folder.parents[1]
    second = read_cells(["-m", f"out={out}", "model=tiny", *words]) or []
    assert name in [grid.name for grid in recorded(first, second)]
    assert {grid_name([cell]) for cell in first} == {"default: lb x noise"}
    assert {grid_name([cell]) for cell in second} == {name}
    assert name in str(workspace(second, entity="me", project="p").runset_settings.filters)


def test_a_setting_that_each_cell_computes_is_named_as_it_is_written(tmp_path: Path) -> None:
    """The same setting with other routers is the same grid."""
    asked = [
        read_cells(["-m", f"router={routers}", "model.ffn=${equal_flops:64}", f"out={tmp_path}"]) or []
        for routers in ("topk,oracle", "oracle,soft_moe")
    ]
    assert {cell.config.model.ffn for cells in asked for cell in cells} > {64}
    [grid] = recorded(*asked)
    assert grid.name == "default: router, model.ffn=${equal_flops:64}"
    assert grid.fixed == {"model.ffn": "${equal_flops:64}"}


def test_a_long_name_is_cut_and_still_names_one_grid(tmp_path: Path) -> None:
    """W&B allows 128 characters in the name of a group."""
    words = ["-m", "noise=0.0,0.5", f"out={tmp_path}"]
    words += [f"optimizer.{key}=0.5" for key in ("beta1", "beta2", "momentum", "floor", "warmup")]
    names = set()
    for rate in (2.0, 3.0):
        [cell, _] = read_cells([*words, "steps=20", f"optimizer.weight_decay={rate}"]) or []
        assert cell.grid is not None
        names.add(cell.grid.name)
    assert len(names) == 2
    assert all(len(name) <= 120 and name.startswith("default: noise, steps=20, beta1=0.5, ") for name in names)


def recorded(*commands: list[Cell]) -> list[Grid]:
    """Record the grids of commands one after another, and return all that sweep.json then has."""
    for cells in commands:
        cells[0].folder.parent.mkdir(exist_ok=True)
        _record_grid(cells)
    return SweepRecord.read(commands[-1][0].folder.parent / SweepRecord.FILE).grids


def test_the_best_level_of_several_grids_is_refused(finished_ablation: Path) -> None:
    """A mean over a trial and the real sweep is the best level of neither."""
    results = finished_ablation / "temperature_ablation" / "results.csv"
    assert best_level(str(results), "router.temp") == 1.5
    results.write_text(results.read_text().replace("x,a", "x: steps=20,a"))
    with pytest.raises(ConfigError, match=r"has several grids: x: steps=20; x; keep the runs of one of them there"):
        best_level(str(results), "router.temp")
