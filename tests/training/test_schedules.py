"""Tests of schedules: a schedule is a function of the progress of a run alone and ends at the configured value."""

import itertools

import pytest
import yaml

from moe.checks import ConfigError
from moe.config.classes import build
from moe.config.options import CONF
from moe.training.schedules import (
    CosineSchedule,
    ExponentialSchedule,
    LinearSchedule,
    Schedule,
    StepSchedule,
)

PROGRESS = [i / 20 for i in range(21)]
YAMLS = sorted((CONF / "schedule").glob("*.yaml"))


@pytest.fixture(params=YAMLS, ids=lambda path: path.stem)
def schedule(request: pytest.FixtureRequest) -> Schedule:
    return build(yaml.safe_load(request.param.read_text()), "schedule")


def test_every_schedule_never_rises_and_ends_at_the_configured_value(schedule: Schedule) -> None:
    values = [schedule("temperature", 1.0, p) for p in PROGRESS]
    assert values[-1] == pytest.approx(1.0)
    assert values[0] in (5.0, 1.0)
    assert all(a >= b for a, b in itertools.pairwise(values))


def test_a_schedule_of_the_temperature_does_not_change_the_noise(schedule: Schedule) -> None:
    assert [schedule("noise", 0.1, p) for p in PROGRESS] == [0.1] * len(PROGRESS)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (LinearSchedule("temperature", 5.0), [5.0, 4.0, 3.0, 2.0, 1.0]),
        (CosineSchedule("temperature", 5.0), [5.0, 3 + 2 * 0.5**0.5, 3.0, 3 - 2 * 0.5**0.5, 1.0]),
        (ExponentialSchedule("temperature", 5.0), [5.0, 5**0.75, 5**0.5, 5**0.25, 1.0]),
        (StepSchedule("temperature", 5.0, 2.0, 0.2, 0.6), [5.0, 2.0, 2.0, 1.0, 1.0]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_schedules_equal_their_formulas(schedule: Schedule, expected: list[float]) -> None:
    assert [schedule("temperature", 1.0, p / 4) for p in range(5)] == pytest.approx(expected)


def test_the_steps_of_a_step_schedule_are_fractions_of_the_run() -> None:
    """A step schedule changes at fractions of the run, not at fixed step numbers.

    The fractions 0.2 and 0.6 are the steps 100 and 300 of 500.
    """
    schedule = StepSchedule("temperature", 5.0, 2.0, 0.2, 0.6)
    for steps in (5, 500):
        assert [schedule("temperature", 1.0, s / steps) for s in range(steps)].count(5.0) == steps // 5


def test_noise_can_fall_to_zero_except_with_an_exponential_schedule() -> None:
    assert LinearSchedule("noise", 0.5)("noise", 0.0, 1.0) == 0.0
    with pytest.raises(ConfigError, match=r"noise=0\.0: must be > 0"):
        ExponentialSchedule("noise", 0.5)("noise", 0.0, 0.5)


@pytest.mark.parametrize(("knob", "start"), [("temperature", 0.0), ("temperature", float("nan")), ("noise", -0.1)])
def test_impossible_starts_are_refused(knob: str, start: float) -> None:
    with pytest.raises(ConfigError, match=r"schedule\.start="):
        LinearSchedule(knob, start)  # type: ignore[arg-type]


def test_a_step_schedule_with_steps_in_the_wrong_order_is_refused() -> None:
    with pytest.raises(ConfigError, match="first <= second"):
        StepSchedule("temperature", 5.0, 2.0, 0.7, 0.6)
