"""Tests of what a run prints while it trains."""

import re

import pytest

from moe.training.progress import TIMED, Progress


def test_an_evaluation_prints_its_time_and_the_layers_that_route_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    values = {"val/loss": 2.0, "val/perplexity": 7.0, "time/elapsed": 18.2, "routing/load_cv": 0.5}
    values |= {"routing/active_experts/layer00": 2.0, "routing/active_experts/layer01": 0.0}
    with Progress(done=0, steps=9) as progress:
        progress.evaluated(9, values)
    [line] = capsys.readouterr().out.splitlines()
    assert line.endswith("load CV 0.500  no token takes an expert in layer01  after 18 s")


def test_after_the_last_step_the_remaining_time_is_not_printed(capsys: pytest.CaptureFixture[str]) -> None:
    values = {"train/loss": 1.0, "temperature": 1.0, "time/tokens_per_s": 1.0}
    with Progress(done=0, steps=TIMED + 1) as progress:
        for _ in range(TIMED + 1):
            progress.trained(values)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("done", [0, 40])
def test_the_speed_is_printed_once_after_the_first_few_steps(done: int, capsys: pytest.CaptureFixture[str]) -> None:
    """A new run and a resumed run say how long a step takes and how long the rest takes, before any evaluation."""
    values = {"train/loss": 1.0, "temperature": 1.0, "time/tokens_per_s": 1.0}
    with Progress(done=done, steps=300) as progress:
        for _ in range(3 * TIMED):
            progress.trained(values)
    [line] = capsys.readouterr().out.splitlines()
    assert re.fullmatch(rf"step +{done + 1 + TIMED}/300  \S+ s per step, about \S+ min left", line)
