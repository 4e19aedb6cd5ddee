"""Schedules of a knob (temperature or noise): pure functions of progress, so a resumed run needs no schedule state.

A schedule ends at the run's own setting (`router.temp`, `noise`), which is also what the saved model keeps.
"""

from dataclasses import dataclass
from typing import Literal

from moe.checks import finite, require


@dataclass(frozen=True)
class Constant:
    """The run's own setting from first to last step."""

    def __call__(self, knob: str, setting: float, progress: float) -> float:
        return setting


@dataclass(frozen=True)
class Linear:
    """A straight line from `start` to the run's own setting."""

    knob: Literal["temperature", "noise"]
    start: float

    def __post_init__(self) -> None:
        low = "> 0" if self.knob == "temperature" else ">= 0"
        ok = finite(self.start) and (self.start > 0 or (self.start == 0 and self.knob == "noise"))
        require(ok, "schedule.start", self.start, f"a finite number {low}")

    def __call__(self, knob: str, setting: float, progress: float) -> float:
        """The value of `knob` at `progress` in [0, 1]."""
        return self.start + (setting - self.start) * progress if knob == self.knob else setting


Schedule = Constant | Linear
