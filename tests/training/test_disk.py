"""Tests of `save_model`, and of what a run says before it starts about its use of the disk."""

import re
from pathlib import Path
from typing import Any

import pytest
from run_folders import FACTS, write_metrics

from moe.analysis.figures.specialization import specialization_drawings
from moe.checks import ConfigError, parse
from moe.config.options import CONF
from moe.launch.command_line import read_cells
from moe.launch.run import run, write_run_record
from moe.launch.sweep import carry_out
from moe.results.table import load_runs
from moe.runs import checkpoint
from moe.runs.record import RunFacts
from moe.specialization.__main__ import main as specialization
from moe.training.disk import needed, statement

LARGE = ("model.dim=128", "model.ffn=256", "steps=8", "eval_every=4", "save_every=2")  # weights outweigh other files


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_a_run_occupies_what_was_computed_from_its_shapes(cell: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models and checkpoints have the computed size within 3 %; all other files have at most the computed size."""
    one, checkpoints = cell(*LARGE, "save_model=all", "logger.to=[csv]"), list[int]()
    save = checkpoint.save

    def save_and_measure(root: Path, step: int, state: dict[str, Any]) -> None:
        save(root, step, state)
        checkpoints.append(size(root / f"step-{step:08d}"))

    monkeypatch.setattr(checkpoint, "save", save_and_measure)
    run(one)
    expected = needed(one.config)
    models = size(one.folder / "model") + size(one.folder / "milestones")
    assert len(checkpoints) == 3
    assert max(checkpoints) * 3 <= expected.checkpoints <= 1.03 * min(checkpoints) * 3
    assert models <= expected.models <= 1.03 * models
    assert size(one.folder) - models <= expected.logs
    assert not (one.folder / "checkpoints").exists()


def test_readme_and_benchmarks_have_the_sizes_that_their_commands_state() -> None:
    for words in ([], ["experiment=noise_lb_seed"]):
        size = re.search(r"at most ([\d.]+ MB)", statement([each.config for each in read_cells(words) or []]))
        assert size is not None
        for page in ("README.md", "docs/benchmarks.md"):
            text = " ".join((CONF.parent / page).read_text(encoding="utf-8").split())
            assert f" {size[1]} " in text, page


def test_a_run_without_a_saved_model_says_so_before_it_starts_and_when_it_is_to_be_studied(
    cell: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    one = cell("save_model=none", "steps=2")
    assert carry_out([one], lambda: run(one)) == 0
    assert "disk: this run keeps at most " in (said := capsys.readouterr().out)
    assert "(no saved model, logs " in said
    assert not (one.folder / "model").exists()
    assert specialization([str(one.folder)]) == 0
    printed = capsys.readouterr()
    assert printed.err == (f"{one.folder}: has no saved model (save_model=none), so its experts cannot be studied\n")
    assert printed.out == "1 of 1 runs are finished\n"
    [drawn] = specialization_drawings(load_runs([one.folder]))
    assert drawn.reason == (
        "no run has a specialization.json: it comes from saved models, and no run has one (save_model=none)"
    )


@pytest.mark.parametrize(("asked", "lacks"), [("none", ""), ("last", "model"), ("all", "model, milestones/step-0000")])
def test_a_finished_run_that_lacks_a_saved_model_says_so_when_it_is_skipped(
    asked: str, lacks: str, cell: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """A finished run is skipped, even by a command that asks for more saved models; the line names those it lacks."""
    one = cell("save_model=none", "steps=2")
    one.folder.mkdir(parents=True)
    write_run_record(one, "finished", parse(RunFacts, FACTS))
    write_metrics(one.folder, {})
    one.config.save_model = asked
    assert carry_out([one], lambda: pytest.fail("it was trained")) == 0
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("skipped")]
    named = f"skipped     {one.folder.name}"
    assert line.startswith(f"{named}, without {lacks}" if lacks else named)
    assert lacks or line == named
    assert not lacks or line.endswith("delete the folder to train the run again")


def test_another_value_of_save_model_is_refused(cell: Any) -> None:
    with pytest.raises(ConfigError, match=r"^save_model=False: must be one of none, last, all"):
        cell("save_model=false").config.check()
