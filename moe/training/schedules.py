"""Schedules of a knob (temperature or noise): pure functions of progress, so a resumed run needs no schedule state.

A schedule ends at the run's own setting (`router.temp`, `noise`), which is also what the saved model keeps; the knob
that it does not turn stays there from first to last step.
"""

import math
from dataclasses import dataclass
from typing import Literal

from moe.checks import ConfigError, finite, require

Knob = Literal["temperature", "noise"]


@dataclass(frozen=True)
class Constant:
    """Both knobs at the run's own settings."""

    def __call__(self, knob: str, setting: float, progress: float) -> float:
        return setting


@dataclass(frozen=True)
class Schedule:
    """Turns `knob` from `start` to the run's setting; subclasses give the curve, `between`, for progress in [0, 1]."""

    knob: Knob
    start: float

    def __post_init__(self) -> None:
        self._check("schedule.start", self.start)

    def __call__(self, knob: str, setting: float, progress: float) -> float:
        """The value of `knob` at `progress`, given the run's own `setting` of it."""
        return self.between(setting, progress) if knob == self.knob else setting

    def between(self, setting: float, progress: float) -> float:
        raise NotImplementedError

    def _check(self, key: str, value: float) -> None:
        low = "> 0" if self.knob == "temperature" else ">= 0"
        ok = finite(value) and (value > 0 or (value == 0 and self.knob == "noise"))
        require(ok, key, value, f"a finite number {low}")


@dataclass(frozen=True)
class Linear(Schedule):
    """start + (setting - start) p."""

    def between(self, setting: float, progress: float) -> float:
        return self.start + (setting - self.start) * progress


@dataclass(frozen=True)
class Cosine(Schedule):
    """Half a cosine: slow, fast, slow."""

    def between(self, setting: float, progress: float) -> float:
        return setting + (self.start - setting) * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class Exponential(Schedule):
    """start (setting / start)^p: equal factors in equal times, so neither end may be 0."""

    def between(self, setting: float, progress: float) -> float:
        if self.start <= 0 or setting <= 0:
            raise ConfigError(f"{self.knob}={setting}: must be > 0, as schedule.start, for an exponential schedule")
        return self.start * (setting / self.start) ** progress


@dataclass(frozen=True)
class Step(Schedule):
    """start, then `middle` from progress `first`, then the run's setting from progress `second`."""

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
