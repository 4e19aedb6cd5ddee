"""Tests of `tune`: the two stages of a command, what is chosen, and what is refused before any training."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from run_folders import FACTS, change_record, write_metrics

from moe.analysis.tuned import arms_of, tuned_equally
from moe.checks import ConfigError, parse
from moe.config.cell import Cell
from moe.config.options import SEARCH_PATH
from moe.launch import sweep
from moe.launch.command_line import read_cells
from moe.launch.run import write_run_record
from moe.results.table import load_runs
from moe.runs.record import RunFacts, SweepRecord

RATE = "optimizer.muon_lr"
EXPERIMENT = f"""\
# @package _global_
# Tunes the learning rate of each router
tune:
  {RATE}: [0.04, 0.01, 0.02]
tune_seeds: [1, 2]
hydra:
  mode: MULTIRUN
  sweeper:
    params:
      router: topk,mlp
      seed: 42,43
"""


@pytest.fixture
def command(small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a command that trains an experiment which tunes."""
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    (tmp_path / "conf" / "experiment" / "tuned.yaml").write_text(EXPERIMENT)
    monkeypatch.setenv(SEARCH_PATH, str(tmp_path / "conf"))
    options = [word for word in small if not word.startswith(("router=", "save_model="))]
    return [f"out={tmp_path / 'out'}", "experiment=tuned", "save_model=none", *options]


def train(cells: list[Cell], loss: Callable[[Cell], float]) -> None:
    """Stand in for training: leave a finished run with this loss in the folder of each cell that has none."""

    def launch() -> None:
        for cell in cells:
            if not (cell.folder / "run.json").exists():
                cell.folder.mkdir(parents=True, exist_ok=True)
                write_metrics(cell.folder, {"val/loss": loss(cell)})
                write_run_record(cell, "finished", parse(RunFacts, FACTS))

    assert sweep.carry_out(cells, launch, tables=False) == 0


def best_at(rates: dict[str, float], cell: Cell) -> float:
    """Return a loss that is lowest at a learning rate for each router. The noise of seeds 1 and 2 cancels out."""
    rate = cell.config.optimizer.muon_lr
    assert rate is not None
    return abs(rate - rates[str(cell.choices["router"])]) + {1: 0.5, 2: -0.5}.get(cell.config.seed, 0.0)


def settings(cells: list[Cell] | None) -> list[tuple[str | None, float | None, int]]:
    return [(cell.choices["router"], cell.config.optimizer.muon_lr, cell.config.seed) for cell in cells or []]


def test_the_same_command_tunes_first_and_then_trains_each_setting_at_its_best_value(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """All settings have equal budgets. Between two equal values the smaller one counts, and the end of a list warns."""
    trials = read_cells([*command, "seed=42,43"]) or []
    budget = [(rate, seed) for rate in (0.01, 0.02, 0.04) for seed in (1, 2)]
    for router in ("topk", "mlp"):
        assert sorted((rate, seed) for name, rate, seed in settings(trials) if name == router) == budget
    capsys.readouterr()
    train(trials, partial(best_at, {"topk": 0.015, "mlp": 0.05}))  # topk: as far from 0.01 as from 0.02
    judged = read_cells(command)
    assert settings(judged) == [("topk", 0.01, 42), ("topk", 0.01, 43), ("mlp", 0.04, 42), ("mlp", 0.04, 43)]
    told = capsys.readouterr().out
    assert f"router=topk: {RATE}=0.01, mean val/loss 0.005\nrouter=mlp: {RATE}=0.04, mean val/loss 0.01\n" in told
    assert [line.partition(":")[0] for line in caplog.messages] == ["router=topk", "router=mlp"]
    assert f"the best {RATE} is at the end of its list" in caplog.messages[1]
    train(judged or [], lambda cell: 1.0)
    grids = SweepRecord.read(tmp_path / "out" / "tuned" / SweepRecord.FILE).grids
    assert [(grid.factors, grid.search, len(grid.cells)) for grid in grids] == [
        ([RATE, "router"], "minimize val/loss", 12),
        (["router"], None, 4),
    ]
    runs = load_runs([tmp_path / "out"])
    assert runs["tuned"].nunique() == 1
    assert set(runs.loc[runs["search"].isna(), "seed"]) == {42, 43}


def test_values_at_which_a_run_diverged_are_not_chosen(command: list[str]) -> None:
    """A run that diverged is not trained again. A run that failed otherwise keeps the command in its first stage."""
    command += ["router=mlp", "tune_seeds=[1]", "seed=42"]
    trials = read_cells(command) or []
    train(trials, partial(best_at, {"mlp": 0.02}))
    [best] = [cell for cell in trials if cell.config.optimizer.muon_lr == 0.02]
    change_record(best.folder, status="failed", error="OutOfMemoryError: no memory", facts=None)
    assert settings(read_cells(command)) == settings(trials)
    change_record(best.folder, status="failed", error="Diverged: the loss is not finite", facts=None)
    assert settings(read_cells(command)) == [("mlp", 0.01, 42)]
    for cell in trials:
        change_record(cell.folder, status="failed", error="Diverged: the loss is not finite", facts=None)
    with pytest.raises(ConfigError, match=f"^tune: all runs diverged at each value of {RATE}; give other values$"):
        read_cells(command)


def test_a_run_that_two_settings_have_in_common_counts_for_both(command: list[str], tmp_path: Path) -> None:
    """With one expert per token no two outputs are compared, so that this weight does not apply there."""
    weight = "output_orthogonality"
    small = [word for word in command if not word.startswith("experiment=")]
    command = ["-m", *small, f"{weight}=0.0,0.01", "tune={router.k:[1,2]}", "tune_seeds=[1]", "seed=42"]
    command += [f"claims=[{{text: a, metric: val/loss, factor: {weight}, levels: [0.01], than: [0.0], kind: lower}}]"]
    trials = read_cells(command) or []
    assert len(trials) == 3
    train(trials, lambda cell: cell.config.router["k"])  # k=1, which both have, is the best
    runs = load_runs([tmp_path / "out"])
    assert tuned_equally(runs).startswith(f"tuned equally: yes, each setting of {weight} has the same 2 values")
    arms = arms_of(runs)
    assert {arm.name: arm.best for arm in arms} == {f"{weight}={each}": {"router.k": 1} for each in (0.0, 0.01)}
    assert [(cell.config.router["k"], cell.config.seed) for cell in read_cells(command) or []] == [(1, 42)]


def test_settings_that_compute_the_same_are_each_tuned(command: list[str], caplog: pytest.LogCaptureFixture) -> None:
    """Otherwise the runs of one of them would be missing, or a claim about it could not be judged."""
    trials = read_cells([*command, "router=topk,softk", "tune_seeds=[1]", "seed=42"]) or []
    assert [cell.choices["router"] for cell in trials] == ["topk"] * 3 + ["softk"] * 3
    assert caplog.messages[0].startswith("router=softk is the same run as router=topk here, and both are trained")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tune_seeds=[1,43]"], r"tune_seeds=\[1, 43\]: must be one or more different seeds >= 0 .* which are 42, 43$"),
        (["tune_seeds=[]"], r"tune_seeds=\[\]: must be one or more different seeds"),
        (["tune_seeds=[1,1]"], r"tune_seeds=\[1, 1\]: must be one or more different seeds"),
        (["seed=002,43"], r"tune_seeds=\[1, 2\]: .* not those of the sweep, which are 002, 43$"),
        (["tune={data_seed:[3,4]}"], r"tune: data_seed=\[3, 4\]: must be a key of a run, not a seed"),
        (["seed=2"], r"tune_seeds=\[1, 2\]: .* not those of the sweep, which are 2$"),
        ([f"{RATE}=0.1"], f"{RATE}=0.1: this key is tuned; leave it out, or add tune=null"),
        (["init_seed=7"], "^init_seed=7: must be null with tune, because both stages would share it$"),
        (["data_seed=7,8"], "^data_seed=7,8: must be null with tune"),
        (["tune=3"], "tune=3: must be keys with lists of two or more different numbers"),
        (
            [f"tune={{{RATE}:[0.1]}}"],
            "tune: optimizer.muon_lr=.*must be a list of two or more different finite numbers",
        ),
        ([f"tune={{{RATE}:[0.1,a]}}"], "tune: optimizer.muon_lr=.*: must be a list of two or more"),
        (["tune={threads:[1,2]}"], r"tune: threads=\[1, 2\]: must be a key of a run, not a seed"),
        (["tune={optimizer.muon_rate:[1,2]}"], "'optimizer.muon_rate'; nearest: optimizer.muon_lr"),
        ([f"tune={{{RATE}:[-1,1]}}"], f"{RATE}=-1.0: must be a finite number > 0"),
    ],
)
def test_what_cannot_be_tuned_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_cells(["-m", f"tune={{{RATE}:[0.01,0.02]}}", "tune_seeds=[1,2]", "seed=42,43", *words])


def test_without_tuning_the_seeds_of_tuning_are_refused_and_null_switches_it_off(command: list[str]) -> None:
    assert settings(read_cells([*command, "tune=null", "router=topk", "seed=42"])) == [("topk", 0.02, 42)]
    with pytest.raises(ConfigError, match=r"^tune_seeds=\[1\]: must be left out without tune$"):
        read_cells(["tune_seeds=[1]"])
