"""Tests of what a run prints while it trains."""

import re

import pytest

from moe.training.progress import TIMED, Progress


@pytest.mark.parametrize("done", [0, 40])
def test_the_speed_is_printed_once_after_the_first_few_steps(done: int, capsys: pytest.CaptureFixture[str]) -> None:
    """A new run and a resumed run say how long a step takes and how long the rest takes, before any evaluation."""
    values = {"train/loss": 1.0, "temperature": 1.0, "time/tokens_per_s": 1.0}
    with Progress(done=done, steps=300) as progress:
        for _ in range(3 * TIMED):
            progress.trained(values)
    [line] = capsys.readouterr().out.splitlines()
    assert re.fullmatch(rf"step +{done + 1 + TIMED}/300  \S+ s per step, about \S+ min left", line)
