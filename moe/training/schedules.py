"""Schedules of temperature or noise over a run.

A schedule changes one of the two and ends at the value in the configuration (`router.temp` or `noise`). The other one
has its configured value at every step. A saved model has the values of the step after which it was saved. Schedules are
pure functions of the progress of a run, so a resumed run needs no schedule state.
"""

import math
from dataclasses import dataclass
from typing import Literal

from moe.checks import ConfigError, finite, require
from moe.config.classes import build
from moe.config.schema import Config

Knob = Literal["temperature", "noise"]


class Schedule:
    """Base class of all schedules."""

    def __call__(self, knob: str, setting: float, progress: float) -> float:
        """Return the value of `knob` at `progress` in [0, 1], given its configured value `setting`."""
        raise NotImplementedError


@dataclass(frozen=True)
class ConstantSchedule(Schedule):
    """Schedule that changes nothing: temperature and noise have their configured values at every step."""

    def __call__(self, knob: str, setting: float, progress: float) -> float:
        return setting


@dataclass(frozen=True)
class CurveSchedule(Schedule):
    """Schedule that changes `knob` from `start` to its configured value; subclasses define the curve, `between`.

    knob: what changes over the run: temperature or noise.
    start: its value at the beginning; the end is router.temp or noise.
    """

    knob: Knob
    start: float

    def __post_init__(self) -> None:
        self._check("schedule.start", self.start)

    def __call__(self, knob: str, setting: float, progress: float) -> float:
        return self.between(setting, progress) if knob == self.knob else setting

    def between(self, setting: float, progress: float) -> float:
        """Return the value at `progress` in [0, 1]: `start` at 0 and `setting` at 1."""
        raise NotImplementedError

    def _check(self, key: str, value: float) -> None:
        low = "> 0" if self.knob == "temperature" else ">= 0"
        ok = finite(value) and (value > 0 or (value == 0 and self.knob == "noise"))
        require(ok, key, value, f"a finite number {low}")


@dataclass(frozen=True)
class LinearSchedule(CurveSchedule):
    """Straight line: start + (setting - start) p at progress p."""

    def between(self, setting: float, progress: float) -> float:
        return self.start + (setting - self.start) * progress


@dataclass(frozen=True)
class CosineSchedule(CurveSchedule):
    """Half a cosine: changes slowly at both ends and fast in the middle."""

    def between(self, setting: float, progress: float) -> float:
        return setting + (self.start - setting) * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class ExponentialSchedule(CurveSchedule):
    """Exponential curve: start (setting / start)^p at progress p. It multiplies by the same factor in equal times.

    Raises ConfigError if `start` or the configured value is not above 0.
    """

    def between(self, setting: float, progress: float) -> float:
        if self.start <= 0 or setting <= 0:
            raise ConfigError(f"{self.knob}={setting}: must be > 0, like schedule.start, for an exponential schedule")
        return self.start * (setting / self.start) ** progress


@dataclass(frozen=True)
class StepSchedule(CurveSchedule):
    """Three constant values: `start`, then `middle` from progress `first`, the configured value from `second`.

    middle: the second of the three values.
    first: where the middle value begins, as a fraction of the run.
    second: where the configured value begins, as a fraction of the run.
    """

    middle: float
    first: float
    second: float

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("schedule.middle", self.middle)
        require(0 <= self.first <= self.second <= 1, "schedule.first", self.first, "0 <= first <= second <= 1")

    def between(self, setting: float, progress: float) -> float:
        if progress < self.first:
            return self.start
        return self.middle if progress < self.second else setting


def same_values(one: Config, other: Config) -> bool:
    """Return whether two runs, of the same number of steps, have the same temperature and noise at every step."""
    if one.schedule == other.schedule and (one.temperature, one.noise) == (other.temperature, other.noise):
        return True
    first, second = (build(config.schedule, "schedule", trusted=True) for config in (one, other))
    return all(knob_settings(one, first, step) == knob_settings(other, second, step) for step in range(one.steps + 1))


def knob_settings(config: Config, schedule: Schedule, step: int) -> dict[str, float]:
    """Return temperature and noise at optimizer step `step` (0-based).

    At `step` = `steps`, which only the last evaluation uses, they are the configuration's own values.
    """
    progress = step / config.steps if config.steps else 1.0
    return {
        "temperature": schedule("temperature", config.temperature, progress),
        "noise": schedule("noise", config.noise, progress),
    }
