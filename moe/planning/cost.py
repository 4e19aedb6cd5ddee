"""Tokens, FLOPs and time of planned runs: from the speed of a pilot's runs, or from a short measurement."""

import tempfile
import time
from contextlib import redirect_stdout
from dataclasses import asdict, replace
from functools import cache
from io import StringIO
from pathlib import Path
from statistics import median
from typing import NamedTuple

import pandas as pd

from moe.checks import ConfigError, first_line
from moe.config.schema import Config
from moe.launch.flops import forward_flops

MEASURED_STEPS = 9  # at most; the first one does not count
MEASURED_SECONDS = 10.0  # after which no further step is measured
SIZES = ["steps", "batch_size", "grad_accum", "data.seq_len"]


class Speed(NamedTuple):
    """Seconds of each FLOP in training, and where the numbers come from.

    of_evaluation: seconds of an evaluation for each FLOP that the setting needs for a token.
    """

    of_flop: float
    of_evaluation: float
    source: str

    def seconds(self, config: Config) -> float:
        """Return the time of a run after its set-up. The test text at its end counts as one more evaluation."""
        evaluations = 2 + -(-config.steps // config.eval_every)
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
    from moe.data.tokenizer import pretrained_tokenizer  # imports transformers

    try:
        return len(pretrained_tokenizer(tokenizer, revision))
    except ValueError as error:
        raise ConfigError(first_line(error)) from error


def speed_of_runs(runs: pd.DataFrame, name: str) -> Speed | None:
    """Return the median speed of runs, in which evaluations are part of the tokens; None if unknown.

    name: of the runs, in words.
    """
    if not {"seconds", "flops_per_token", *SIZES} <= set(runs):
        return None
    flops = 3 * runs[[*SIZES, "flops_per_token"]].astype(float).prod(axis=1)
    rate = (runs["seconds"].astype(float) / flops.where(flops > 0)).dropna()
    return Speed(float(rate.median()), 0.0, f"the seconds for each FLOP of {name}") if len(rate) else None


def measured_speed(config: Config) -> Speed:
    """Return the speed of a setting, from a few training steps of one micro-batch each.

    After the first step, measuring ends with `MEASURED_SECONDS`, and two steps at least are measured. Evaluations are
    not measured: they are a forward pass over the validation text, so they take a third of what training takes for
    each token.
    """
    from moe.training.precision import choose  # these import torch
    from moe.training.setup import set_up
    from moe.training.step import train_step

    short = replace(config, grad_accum=1, steps=max(config.steps, MEASURED_STEPS))
    times: list[float] = []
    with tempfile.TemporaryDirectory() as name, redirect_stdout(StringIO()):
        training = set_up(choose(short, Path(name) / "run")[0])
        while len(times) < 3 or (len(times) < MEASURED_STEPS and sum(times[1:]) < MEASURED_SECONDS):
            began = time.perf_counter()
            train_step(training, len(times))
            times.append(time.perf_counter() - began)
    of_flop = median(times[1:]) / flops_of(replace(short, steps=1))
    source = f"{len(times) - 1} measured steps of the setting with the most FLOPs, and the FLOPs of each setting"
    return Speed(of_flop, len(training.data.val) * config.data.seq_len * of_flop, source)
