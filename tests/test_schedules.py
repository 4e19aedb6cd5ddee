"""Schedules are pure functions of progress that end at the run's own setting."""

import pytest

from moe.checks import ConfigError
from moe.schedules import Constant, Linear


def test_constant_is_the_setting() -> None:
    assert [Constant()("temperature", 1.5, p) for p in (0.0, 0.5, 1.0)] == [1.5] * 3


def test_linear_goes_from_start_to_the_setting_and_leaves_the_other_knob_alone() -> None:
    schedule = Linear("temperature", 5.0)
    assert [schedule("temperature", 1.0, p) for p in (0.0, 0.25, 1.0)] == [5.0, 4.0, 1.0]
    assert schedule("noise", 0.1, 0.3) == 0.1


@pytest.mark.parametrize(("knob", "start"), [("temperature", 0.0), ("temperature", float("nan")), ("noise", -0.1)])
def test_impossible_starts_are_refused(knob: str, start: float) -> None:
    with pytest.raises(ConfigError, match=r"schedule\.start="):
        Linear(knob, start)  # type: ignore[arg-type]
