"""Count how often the interval of the effective speed-up covers the true one, in simulated studies."""

import argparse
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pandas as pd

from moe.analysis.speed_up import speed_up
from moe.bench.timing import TimingTable

# The loss of the reference is 3 + 1.2 (C / 4e12)^-0.3 nats at C FLOPs. Seeds share an offset, and each run deviates.
FLOOR, FACTOR, ALPHA, MIDDLE = 3.0, 1.2, 0.3, 4e12
OF_SEED, OF_RUN = 0.02, 0.003  # standard deviations, nats
WAVE = 0.012  # height of the waves around the law, nats: 4 % of the compute at the middle


class Case(NamedTuple):
    """A way in which the reference's losses lie, and the setting's.

    budgets: how many the reference has, a factor of `apart` from each other, with the middle one at `MIDDLE`. wave: the
    height of the waves around the law. saves: the true speed-up of the setting, which trains for the middle budget.
    of_training: whether the reference's losses are evaluations during its training.
    """

    budgets: int
    apart: float
    wave: float
    saves: float
    of_training: bool = False


CASES = {
    "the law is true": Case(5, 2.0, 0.0, 1.5),
    "waves, the setting is as the reference": Case(5, 2.0, WAVE, 1.0),
    "waves, halfway between budgets 2 times apart": Case(5, 2.0, WAVE, math.sqrt(2)),
    "waves, halfway between budgets 4 times apart": Case(5, 4.0, WAVE, 2.0),
    "waves, nine budgets 1.5 times apart, of which only the last one is a run": Case(
        9, 1.5, WAVE, math.sqrt(1.5), of_training=True
    ),
}


def answer(arguments: argparse.Namespace) -> Iterator[TimingTable]:
    """Simulate studies whose speed-up is known, and count the intervals that contain it."""
    rows = [
        {"losses": name}
        | {f"{seeds} seeds": coverage(case, seeds, arguments.studies, arguments.resamples) for seeds in arguments.seeds}
        for name, case in CASES.items()
    ]
    yield TimingTable(f"share of 95 % intervals that contain the true speed-up, {arguments.studies} studies each", rows)


def coverage(case: Case, seeds: int, studies: int, resamples: int) -> float:
    """Return the share of simulated studies whose interval contains the true speed-up."""
    rng, covered = np.random.default_rng(seeds), 0
    for _ in range(studies):
        reference, setting = simulated(case, seeds, rng)
        ended = reference[reference["FLOPs"] == reference["FLOPs"].max()] if case.of_training else reference
        [found] = speed_up(ended, setting, evaluations=reference, resamples=resamples)
        covered += found.times.low <= case.saves <= found.times.high
    return covered / studies


def simulated(case: Case, seeds: int, rng: np.random.Generator) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the runs of the reference and of the setting, a row for each (`run_at`)."""
    offset = rng.normal(0, OF_SEED, seeds)

    def runs(budgets: list[float], faster: float) -> pd.DataFrame:
        rows = [
            run_at(seed, each, loss(each * faster, case.wave) + offset[seed] + rng.normal(0, OF_RUN))
            for seed in range(seeds)
            for each in budgets
        ]
        return pd.DataFrame(rows)

    middle = case.budgets // 2
    return runs([MIDDLE * case.apart ** (k - middle) for k in range(case.budgets)], 1.0), runs([MIDDLE], case.saves)


def run_at(seed: int, budget: float, loss: float) -> dict[str, int | float]:
    """Return a run for `speed_up`, whose steps are its FLOPs."""
    return {"seed": seed, "end": budget, "step": budget, "FLOPs": budget, "loss": loss}


def loss(compute: float, wave: float = 0.0) -> float:
    """Return the reference's loss at so many FLOPs, without chance."""
    return FLOOR + FACTOR * (compute / MIDDLE) ** -ALPHA + wave * math.sin(2.5 * math.log(compute / MIDDLE) + 1)
