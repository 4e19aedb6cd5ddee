"""Tests of searches for good settings: what is refused before any training, and what Optuna makes of the results."""

import importlib.util
import json
import math
import re
import shlex
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from run_folders import FACTS, write_metrics
from train_processes import TRAIN, run_script

import moe
from moe.checks import ConfigError, parse
from moe.config.cell import Cell
from moe.launch import search, sweep
from moe.launch.command_line import read_command
from moe.launch.compose import composing
from moe.launch.run import write_run_record
from moe.results.table import load_runs
from moe.runs.record import RunFacts, SweepRecord

OPTUNA = "hydra/sweeper=optuna"


def read(words: str) -> search.Search:
    found = read_command(shlex.split(words)).search
    assert found is not None
    return found


@pytest.fixture
def _installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the check for the package Optuna pass, where it is not installed."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())


@pytest.mark.usefixtures("_installed")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (f"{OPTUNA} lb=interval(0,1)", "hydra/sweeper=optuna: must be used with -m"),
        (f"-m {OPTUNA} lb=0.1", "needs a key to search, such as lb=interval"),
        (f"-m {OPTUNA} seed=1,2", "needs a key to search"),
        (
            f"-m {OPTUNA} lb=interval(0,1) seed=interval(1,9)",
            "list the seeds; a trial trains all, and its objective",
        ),
        (f"-m {OPTUNA} lbb=interval(0,1)", "unknown key 'lbb'; nearest: lb"),
        (f"-m {OPTUNA} lb=interval(-1,1)", "lb=-1.0: must be a finite number >= 0"),
        (f"-m {OPTUNA} lb=interval(1,0)", r"lb=interval\(1,0\): must be two finite numbers, the smaller one first"),
        (f"-m {OPTUNA} lb=tag(log,interval(0,1))", "the smaller one first, both > 0 with log"),
        (f"-m {OPTUNA} lb=tag(big,interval(0,1))", r"only an interval can have a tag, as tag\(log,interval"),
        (f"-m {OPTUNA} lb=shuffle(0.1,0.2)", "leave shuffle out, because Optuna chooses the order"),
        (f"-m {OPTUNA} steps=interval(1.5,9)", "steps=1.5: must be a whole number"),
        (f"-m {OPTUNA} router.k=interval(1,9)", "router.k=9: must be between 1 and model.num_experts=8"),
        (f"-m {OPTUNA} model.heads=interval(1,4)", "model.heads=3: "),
        (f"-m {OPTUNA} model.heads=range(1,5)", "model.heads=3: "),
        (f"-m {OPTUNA} lb=interval(0,0.1) seed=1,1", "^seed=1,1: two of these values are the same; leave one out$"),
        (f"-m {OPTUNA} lb=interval(0,0.1) seed=1,-1", "seed=-1: must be"),
        (f"-m {OPTUNA} router=topk,temperature router.tempp=interval(1,2)", "unknown key of router=topk 'router.te"),
        ("-m hydra/sweeper=Optuna lb=interval(0,1)", "hydra/sweeper=Optuna: must be one of .*; nearest: optuna"),
        (f"-m {OPTUNA} capacity=interval(0.5,1.5),null", "null: an interval or a range stands alone, or list single"),
        ("-m capacity=1,range(2,4)", "an interval or a range stands alone, or list single values as a,b,c"),
        (
            f"-m {OPTUNA} lb=0,1 hydra.sweeper.n_trial=2",
            "unknown setting of a search 'hydra.sweeper.n_trial'; nearest: hydra.sweeper.n_trials",
        ),
        (f"-m {OPTUNA} router=topk,topq", "unknown option of router 'topq'"),
        (f"-m {OPTUNA} router=hash noise=interval(0,1)", "router=hash ignores noise, because a table"),
        (f"-m {OPTUNA} lb=0.1,0.2 hydra.sweeper.n_trials=0", "n_trials=0: must be a whole number from 1 to 10,000"),
        (f"-m {OPTUNA} lb=0.1,0.2 seed=1,2 hydra.sweeper.n_trials=5001", "must be a whole number from 1 to 5,000"),
        (f"-m {OPTUNA} lb=0.1,0.2 hydra.sweeper.direction=up", "direction=up: must be one of minimize, maximize"),
        (
            f"-m {OPTUNA} lb=0.1,0.2 hydra.sweeper.metric=val/los",
            "unknown metric of hydra.sweeper 'val/los'; nearest",
        ),
        (
            f"-m {OPTUNA} lb=0.1,0.2 hydra.sweeper.metric=val_capacity/loss",
            "without capacity=... there is no val_",
        ),
        (f"-m {OPTUNA} lb=0.1,0.2 hydra.sweeper.sampler.seed=null", "sampler.seed=null: must be between 0 and 2"),
        (f"-m {OPTUNA} lb=0.1,0.2 hydra/sweeper/sampler=tpee", "must be one of tpe, random; nearest: tpe"),
        (f"-m {OPTUNA} experiment=noise_lb_seed", r"claims judge a planned grid, .*; add claims=\[\]"),
        ("-m hydra/sweeper=nevergrad lb=0.1,0.2", "hydra/sweeper=nevergrad: must be one of basic, optuna"),
        ("-m lb=0.1,0.2 hydra.sweeper.n_trials=3", "hydra.sweeper.n_trials=3: .*add hydra/sweeper=optuna"),
        ("-m lb=interval(0,1)", "an interval has no list of values; .*, or add hydra/sweeper=optuna to search in it"),
    ],
)
def test_a_search_that_cannot_be_carried_out_is_refused_in_one_line(words: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        read_command(shlex.split(words))
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(importlib.util.find_spec("optuna") is not None, reason="Optuna is installed")
def test_without_the_package_a_search_says_how_to_install_it() -> None:
    with pytest.raises(ConfigError, match=r"hydra/sweeper=optuna: needs `pip install -e '\.\[optuna\]'`"):
        read_command(["-m", OPTUNA, "lb=0.1,0.2"])


@pytest.mark.usefixtures("_installed")
def test_each_form_of_a_sweep_becomes_a_dimension_of_its_own_kind() -> None:
    """Lists and options are categories, a range is a scale, and an interval has whole numbers if its key has."""
    found = read(
        f"-m {OPTUNA} router=topk,temperature capacity=tag(log,interval(1,2)) "
        "noise=range(0,0.3,0.1) steps=interval(2,9) seed=1,2 batch_size=4"
    )
    dimensions = {each.key: each for each in found.dimensions}
    assert dimensions["router"] == search.Dimension("router", ["topk", "temperature"])
    assert dimensions["capacity"] == search.Dimension("capacity", [], low=1, high=2, log=True)
    assert dimensions["noise"].ordered
    assert [float(value) for value in dimensions["noise"].values] == pytest.approx([0, 0.1, 0.2])
    assert dimensions["steps"].whole
    assert {"seed=1,2", "batch_size=4"} <= {each.input_line for each in found.fixed}
    assert found.grid.search == "minimize val/loss"
    assert found.grid.factors == ["capacity", "noise", "router", "steps"]


@pytest.mark.usefixtures("_installed")
def test_a_search_over_the_grid_of_an_experiment_averages_over_its_seeds() -> None:
    found = read(f"-m {OPTUNA} experiment=noise_lb_seed claims=[] lb=interval(0,0.1) hydra.sweeper.n_trials=7")
    assert {each.key for each in found.dimensions} == {"noise", "lb"}
    assert "seed=42,43,44" in [each.input_line for each in found.fixed]
    assert found.settings.n_trials == 7


def bowl(cell: Cell) -> float:
    """Return a loss with its minimum at lb=0.01; the seed adds noise whose mean over seeds 1 and 2 is 0."""
    return (math.log10(cell.config.lb) + 2) ** 2 + (0.1 if cell.config.seed == 1 else -0.1)


def launcher(loss: Callable[[Cell], float], trained: list[Cell]) -> Callable[[list[Cell], list[str]], None]:
    """Return a stand-in for training: it leaves a finished run with this loss in the folder of each new cell."""

    def launch(cells: list[Cell], arguments: list[str]) -> None:
        for cell in cells:
            if not (cell.folder / "run.json").exists():
                trained.append(cell)
                cell.folder.mkdir(parents=True, exist_ok=True)
                value = loss(cell)
                write_metrics(cell.folder, {"val/loss": value, "val/perplexity": value, "val/accuracy": 0.0})
                write_run_record(cell, "finished", parse(RunFacts, FACTS))

    return launch


@pytest.mark.usefixtures("_installed")
def test_from_python_a_search_returns_the_runs_of_its_trials(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs of another search in the same folder are not among them. A stand-in for Optuna proposes two trials."""
    command = ["-m", *small, f"out={tmp_path}", OPTUNA, "lb=interval(0,1)", "seed=1,2", "save_model=none"]

    def trials(words: list[str]) -> SimpleNamespace:
        found = read(shlex.join(words))
        for lb in ("0.1", "0.2"):
            with composing():
                cells, arguments = search._trial_cells(found, search._trial_words(found, {"lb": lb}))
            sweep.carry_out(cells, partial(launcher(bowl, []), cells, arguments), tables=False)
        return SimpleNamespace(returncode=0)

    trials([*command, "z=0.1"])
    monkeypatch.setattr("moe.api.subprocess", SimpleNamespace(run=lambda words: trials(words[words.index("-m", 2) :])))
    runs = moe.train(*command)
    settings = [(run.config.lb, run.config.seed, run.config.z) for run in runs]
    assert settings == [(0.1, 1, 0.0), (0.1, 2, 0.0), (0.2, 1, 0.0), (0.2, 2, 0.0)]
    assert {run.status for run in runs} == {"finished"}


@pytest.mark.optuna
def test_finished_trials_are_not_trained_again_and_more_trials_continue_the_search(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The objective of a trial is the mean over its seeds. All trials are one grid, which is marked as a search."""
    command = ["-m", *small, f"out={tmp_path}", OPTUNA, "lb=tag(log,interval(1e-6,1))", "seed=1,2", "save_model=none"]
    trained: list[Cell] = []
    for trials in (3, 4):
        found = read(shlex.join([*command, f"hydra.sweeper.n_trials={trials}"]))
        assert search.carry_out(found, launcher(bowl, trained)) == 0
        assert len(trained) == 2 * trials
        best = min((cell.config.lb for cell in trained), key=lambda lb: abs(math.log10(lb) + 2))
        value = f"{(math.log10(best) + 2) ** 2:.6g}"
        assert f"best of {trials} trials: lb={best!r}, val/loss {value}. It was chosen by" in capsys.readouterr().out
    [grid] = SweepRecord.read(tmp_path / "default" / SweepRecord.FILE).grids
    assert (grid.factors, grid.search, len(grid.cells)) == (["lb"], "minimize val/loss", 8)
    assert (load_runs([tmp_path])["search"] == "minimize val/loss").all()


@pytest.mark.optuna
def test_a_trial_without_a_finite_objective_does_not_end_the_search(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["-m", *small, f"out={tmp_path}", OPTUNA, "lb=0.1,0.2,0.4", "hydra.sweeper.n_trials=5", "save_model=none"]
    found = read(shlex.join([*words, "hydra/sweeper/sampler=random", "hydra.sweeper.direction=maximize"]))
    search.carry_out(found, launcher(lambda cell: math.inf if cell.config.lb == 0.4 else cell.config.lb, []))
    told = capsys.readouterr().out
    assert "no val/loss; the search goes on without it" in told
    assert "best of 5 trials: lb=0.2, val/loss 0.2. It was chosen by this result" in told


@pytest.mark.usefixtures("_installed")
@pytest.mark.parametrize("mark", ["", "++"])
def test_a_trial_goes_without_the_keys_that_its_options_lack(mark: str) -> None:
    """This holds in every trial, although a trial sees only its own options."""
    found = read(f"-m {OPTUNA} router=topk,temperature {mark}router.temp=interval(0.5,2) seed=1,2")
    identities = {}
    for router in ("topk", "temperature"):
        with composing():
            words = search._trial_words(found, {"router": router, f"{mark}router.temp": "0.7"})
            cells, _ = search._trial_cells(found, words)
        assert len(cells) == 2
        identities[router] = cells[0].identity()
    assert "router.temp" not in identities["topk"]
    assert identities["temperature"]["router.temp"] == 0.7


@pytest.mark.optuna
def test_a_search_over_options_of_which_some_lack_a_key_reports_only_what_a_trial_has(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither a key that the options of a trial lack nor one that its router ignores belongs to its settings."""
    space = ["router=hash,temperature", "router.temp=interval(0.5,2)", "lb=interval(0,0.1)"]
    words = ["-m", *small, f"out={tmp_path}", OPTUNA, *space]
    found = read(shlex.join([*words, "hydra/sweeper/sampler=random", "hydra.sweeper.n_trials=4", "save_model=none"]))
    trained: list[Cell] = []
    assert search.carry_out(found, launcher(lambda cell: cell.config.temperature, trained)) == 0
    told = capsys.readouterr().out
    assert {cell.choices["router"] for cell in trained} == {"hash", "temperature"}
    assert " of 4: router=hash\n" in told
    assert re.search(r" of 4: router=temperature router\.temp=\S+ lb=\S+\n", told)


def test_a_search_that_is_stopped_says_that_the_same_command_continues_it(capsys: pytest.CaptureFixture[str]) -> None:
    """Ctrl-C either stops a run, which then exits, or comes between two runs."""
    heard: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: heard.append(number))
    try:
        with search._stop_told():
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(SystemExit), search._stop_told():
            raise SystemExit(130)
    finally:
        signal.signal(signal.SIGINT, before)
    assert heard == [signal.SIGINT]
    assert capsys.readouterr().out == 2 * "the search was stopped; the same command continues it\n"


@pytest.mark.optuna
def test_a_trial_whose_settings_are_refused_fails_and_the_search_goes_on(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there are too many settings to check all of them first, only the ends are known to be allowed."""
    monkeypatch.setattr(search, "MOST_CHECKED", 2)
    words = ["-m", *small, f"out={tmp_path}", OPTUNA, "model.heads=range(1,5)", "save_model=none"]
    found = read(shlex.join([*words, "hydra/sweeper/sampler=random", "hydra.sweeper.n_trials=8"]))
    trained: list[Cell] = []
    assert search.carry_out(found, launcher(lambda cell: float(cell.config.model.heads), trained)) == 1
    told = capsys.readouterr().out
    assert ": model.heads=3: " in told
    best = min(cell.config.model.heads for cell in trained)
    assert f"best of 8 trials: model.heads={best}, val/loss {best}" in told


@pytest.mark.optuna
def test_train_py_carries_out_a_search_with_several_trials_at_a_time(small: list[str], tmp_path: Path) -> None:
    """A trial that ignores a key, such as the noise of a hash router, is trained without it."""
    sweeper = [OPTUNA, "hydra.sweeper.n_trials=4", "hydra.sweeper.n_jobs=2"]
    space = ["router=topk,hash", "noise=interval(0,0.5)", "seed=1,2", "save_model=none", f"out={tmp_path}"]
    first = run_script(TRAIN, "-m", *small, *sweeper, *space)
    assert first.returncode == 0, first.stderr
    again = run_script(TRAIN, "-m", *small, *sweeper, *space)
    assert again.returncode == 0
    assert ": training" in first.stdout
    assert ": training" not in again.stdout
    results = [line for line in first.stdout.splitlines() if line.startswith(("trial", "best"))]
    assert [line for line in again.stdout.splitlines() if line.startswith(("trial", "best"))] == results
    noises = {json.loads(path.read_text())["identity"].get("noise") for path in tmp_path.glob("default/*/run.json")}
    assert None in noises
    assert len(noises) > 1  # trials of the hash router are one run, whatever their noise
