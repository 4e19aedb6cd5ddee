"""Tests of `precision=auto`: what it chooses, that a sweep and a resume keep the choice, and that it is recorded."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from small_runs import run, untimed

from moe.checks import ConfigError
from moe.runs.signals import Interrupted
from moe.training import precision
from moe.training.precision import Choice, choose
from moe.training.setup import set_up


@pytest.mark.parametrize(("fp32", "bf16", "chosen"), [(3.0, 2.0, "bf16"), (2.1, 2.0, "fp32"), (2.0, 3.0, "fp32")])
def test_the_clearly_faster_precision_is_chosen(
    fp32: float, bf16: float, chosen: str, cell: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The passes really run; only the clock is replaced."""

    def clock() -> Iterator[float]:
        now = 0.0
        while True:
            for duration in (fp32, bf16):
                yield now
                now += duration
                yield now

    ticks = clock()
    monkeypatch.setattr(precision, "_now", lambda device: next(ticks))
    monkeypatch.setattr(precision, "BUDGET", 0.0)
    one = cell("precision=auto")
    one.folder.mkdir(parents=True)
    config, facts = choose(one.config, one.folder)
    assert config.precision == facts["precision"] == chosen
    stored = json.loads((one.folder.parent / "precision.json").read_text())
    assert stored == {"precision": chosen, "ratio": pytest.approx(fp32 / bf16)}
    assert f"{fp32 / bf16:.2f} times" in facts["precision_reason"]


def test_all_runs_of_a_sweep_and_every_resume_take_the_first_choice(
    cell: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run with `auto` equals one with the chosen precision bit for bit, although it was interrupted.

    It says what was chosen whenever it begins.
    """
    plain = cell("precision=bf16", "seed=3")
    run(plain)
    assert "precision" not in capsys.readouterr().out
    chosen = [Choice("bf16", 1.5)]
    monkeypatch.setattr(precision, "_measure", lambda config: chosen.pop())  # a second measurement fails
    auto = cell("precision=auto", "seed=3")
    with pytest.raises(Interrupted):
        run(auto, stop_after=3)
    facts = run(auto)
    why = (
        "a pass of the first run in this folder took 1.50 times as long in fp32 as in bf16; bf16 is chosen from 1.1 on"
    )
    assert capsys.readouterr().out.splitlines().count(f"precision=auto: bf16, because {why}") == 2
    assert facts["process"]["precision"] == "bf16"
    assert untimed(auto.folder) == untimed(plain.folder)
    other = cell("precision=auto", "seed=4")
    other.folder.mkdir(parents=True)
    assert choose(other.config, other.folder)[0].precision == "bf16"
    assert auto.identity()["precision"] == "auto"


def test_a_resume_in_another_precision_is_refused(cell: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    choices = [Choice("fp32", 0.5), Choice("bf16", 2.0)]
    monkeypatch.setattr(precision, "_measure", lambda config: choices.pop())
    one = cell("precision=auto")
    with pytest.raises(Interrupted):
        run(one, stop_after=3)
    (one.folder.parent / "precision.json").unlink()
    with pytest.raises(ConfigError, match="trained with precision=bf16 until step 3, not fp32; restore"):
        run(one)


@pytest.mark.parametrize("content", ["", "{}", '{"precision": "fp8", "ratio": 1.0}', '{"precision": "fp32"}', "[1]"])
def test_a_choice_that_cannot_be_used_is_refused_and_kept(content: str, cell: Any) -> None:
    one = cell("precision=auto")
    one.folder.mkdir(parents=True)
    path = one.folder.parent / "precision.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"precision.json cannot be used .*choose precision=fp32 or bf16"):
        choose(one.config, one.folder)
    assert path.read_text() == content


def test_the_measurement_leaves_no_trace_in_the_run(cell: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are drawn after the measurement as without it."""
    monkeypatch.setattr(precision, "BUDGET", 0.0)
    one = cell("precision=fp32")
    before = set_up(one.config).model.state_dict()
    choice = precision._measure(one.config)
    assert choice.ratio > 0
    after = set_up(one.config).model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    with pytest.raises(ConfigError, match="precision=auto: must be fp32 or bf16 here"):
        set_up(cell("precision=auto").config)
