"""Tokens, FLOPs and time of planned runs: from the speed of a pilot's runs, or from a short measurement."""

import tempfile
import time
from contextlib import redirect_stdout
from dataclasses import asdict, replace
from functools import cache
from io import StringIO
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import pandas as pd

from moe.checks import ConfigError, first_line
from moe.config.schema import Config
from moe.data.tokenizer import pretrained_tokenizer
from moe.launch.flops import forward_flops
from moe.runs.events import RunListener
from moe.runs.signals import Signals

MEASURED_STEPS = 8  # of which the first half does not count
SIZES = ["steps", "batch_size", "grad_accum", "data.seq_len"]


class Speed(NamedTuple):
    """Seconds of each FLOP in training, and where the numbers come from.

    of_evaluation: seconds of an evaluation for each FLOP that the setting needs for a token.
    """

    of_flop: float
    of_evaluation: float
    source: str

    def seconds(self, config: Config) -> float:
        """Return the time of a run after its set-up."""
        evaluations = 1 + -(-config.steps // config.eval_every)
        return flops_of(config) * self.of_flop + evaluations * flops_of_token(config) * self.of_evaluation


def tokens_of(config: Config) -> int:
    """Return the number of tokens that a run reads in training."""
    return config.steps * config.batch_size * config.grad_accum * config.data.seq_len


def flops_of(config: Config) -> int:
    """Return the FLOPs of training: three times the forward FLOPs of each token."""
    return 3 * tokens_of(config) * flops_of_token(config)


def flops_of_token(config: Config) -> int:
    """Return the forward FLOPs of a token, see `moe.model.cost.flops_per_token`."""
    data = config.data
    vocab_size = data.vocab_size or _vocab_size(data.tokenizer, data.tokenizer_revision)
    return forward_flops(asdict(config.model), config.router, vocab_size=vocab_size, seq_len=data.seq_len)


@cache
def _vocab_size(tokenizer: str, revision: str | None) -> int:
    try:
        return len(pretrained_tokenizer(tokenizer, revision))
    except ValueError as error:
        raise ConfigError(first_line(error)) from error


def speed_of_pilot(pilot: pd.DataFrame) -> Speed | None:
    """Return the median speed of the pilot's runs, in which evaluations are part of the tokens; None if unknown."""
    if not {"seconds", "flops_per_token", *SIZES} <= set(pilot):
        return None
    flops = 3 * pilot[[*SIZES, "flops_per_token"]].astype(float).prod(axis=1)
    rate = (pilot["seconds"].astype(float) / flops.where(flops > 0)).dropna()
    return Speed(float(rate.median()), 0.0, "the seconds for each FLOP of the pilot's runs") if len(rate) else None


def measured_speed(config: Config) -> Speed:
    """Return the speed of a setting: a few steps and its evaluations are timed in a temporary folder."""
    from moe.training.loop import train  # imports torch

    steps = min(config.steps, MEASURED_STEPS)
    short = replace(config, steps=steps, eval_every=max(1, steps), save_every=max(1, steps), save_model="none")
    times = _Times()
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(StringIO()):
        train(short, Path(folder), signals=Signals(), listeners=[times])
    of_step = median(times.steps[steps // 2 :]) if times.steps else 0.0
    return Speed(
        of_step / flops_of(replace(config, steps=1)),
        median(times.evaluations) / flops_of_token(config),
        f"{steps} measured steps of the setting with the most FLOPs, and the FLOPs of each setting",
    )


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
