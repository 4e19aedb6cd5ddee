"""Tokens and time of planned runs: from the speed of a pilot's runs, or from a short measurement."""

import tempfile
import time
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import pandas as pd

from moe.config.schema import Config
from moe.runs.events import RunListener
from moe.runs.signals import Signals

MEASURED_STEPS = 8  # of which the first half does not count
SIZES = ["steps", "batch_size", "grad_accum", "data.seq_len"]


class Speed(NamedTuple):
    """Seconds of each token in training and of each evaluation, and where the numbers come from."""

    of_token: float
    of_evaluation: float
    source: str

    def seconds(self, config: Config) -> float:
        """Return the time of a run after its set-up."""
        evaluations = 1 + -(-config.steps // config.eval_every)
        return tokens_of(config) * self.of_token + evaluations * self.of_evaluation


def tokens_of(config: Config) -> int:
    """Return the number of tokens that a run reads in training."""
    return config.steps * config.batch_size * config.grad_accum * config.data.seq_len


def speed_of_pilot(pilot: pd.DataFrame) -> Speed | None:
    """Return the median speed of the pilot's runs, in which evaluations are part of the tokens; None if unknown."""
    if not {"seconds", *SIZES} <= set(pilot):
        return None
    read = pilot[SIZES].astype(float).prod(axis=1)
    rate = (pilot["seconds"].astype(float) / read.where(read > 0)).dropna()
    return Speed(float(rate.median()), 0.0, "the speed of the pilot's runs") if len(rate) else None


def measured_speed(config: Config) -> Speed:
    """Return the speed of a setting: a few steps and its evaluations are timed in a temporary folder."""
    from moe.training.loop import train  # imports torch

    steps = min(config.steps, MEASURED_STEPS)
    short = replace(config, steps=steps, eval_every=max(1, steps), save_every=max(1, steps), save_model="none")
    times = _Times()
    with tempfile.TemporaryDirectory() as folder, Signals() as signals, redirect_stdout(StringIO()):
        train(short, Path(folder), signals=signals, listeners=[times])
    of_step = median(times.steps[steps // 2 :]) if times.steps else 0.0
    tokens = tokens_of(replace(config, steps=1))
    return Speed(of_step / tokens, median(times.evaluations), f"{steps} measured steps of the longest setting")


class _Times(RunListener):
    """Listener that times the steps and the evaluations of a run."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.evaluations: list[float] = []
        self.last = 0.0

    def begin(self, step: int) -> None:
        self.last = time.perf_counter()

    def log(self, step: int, values: dict[str, Any]) -> None:
        now = time.perf_counter()
        (self.steps if "train/loss" in values else self.evaluations).append(now - self.last)
        self.last = now
