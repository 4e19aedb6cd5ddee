"""Simulated studies of a level that is the reference: how often the effective speed-up has a verdict all the same."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest
from test_equal_cost import made_up, write_runs

from moe.analysis.equal_cost import FLOPS
from moe.analysis.report.collect import collect_inputs
from moe.analysis.report.inputs import ReportInputs
from moe.analysis.report.sections.cost import found_speed_ups
from moe.analysis.speed_up import COSTS_MORE, FEW_HERE, NO_POINT, NOT_APART, NOT_SHOWN, OTHERWISE, SAVES, SpeedUp

STUDIES = 40
OF_STEP = 1e9  # FLOPs
EVERY = 50  # steps between evaluations


class Design(NamedTuple):
    """The seeds of the reference and of the level, by the length of their runs. spread: of the FLOPs of a run.

    of_seed: whether all runs of a seed share that. wave: of the losses around the law, in nats.
    """

    reference: Mapping[int, Sequence[int]]
    level: Mapping[int, Sequence[int]]
    spread: float = 0.0
    of_seed: bool = False
    wave: float = 0.0

    @property
    def is_of_reference(self) -> bool:
        """Whether the reference has a run beside each of the level."""
        return all({*seeds} <= {*self.reference.get(length, ())} for length, seeds in self.level.items())


FIVE, TWO = range(5), range(2)
OF_LENGTHS = dict.fromkeys((100, 200, 400), FIVE)
DESIGNS = {
    "two seeds are short": Design({400: FIVE, 100: TWO}, {100: TWO}),
    "two seeds are short, the level has all": Design({400: FIVE, 100: TWO}, {100: FIVE}),
    "three seeds are short, the level has all": Design({400: FIVE, 100: range(3)}, {100: FIVE}),
    "two short lengths": Design({400: FIVE, 100: TWO, 101: (2, 3)}, {100: FIVE}),
    "FLOPs vary by 2 %": Design(OF_LENGTHS, {400: FIVE}, 0.02),
    "FLOPs vary by 8 %": Design(OF_LENGTHS, {400: FIVE}, 0.08),
    "FLOPs vary by 8 % with the seed": Design(OF_LENGTHS, {200: FIVE}, 0.08, of_seed=True),
    "FLOPs vary by 8 %, evaluations": Design({400: FIVE}, {400: FIVE}, 0.08),
    "FLOPs vary by 8 %, two seeds": Design({400: FIVE, 100: TWO}, {100: TWO}, 0.08),
}


def loss_of(step: int, length: int) -> float:
    """Return the loss without chance: a law of the steps, and lower at the end of a run, with its learning rate."""
    return 3 + 4 * step**-0.4 - 0.15 * max(0.0, 5 * step / length - 4)


def simulated(design: Design, rng: np.random.Generator, *, same: bool) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the runs of a study and their training curves. same: whether the level has the reference's own curves."""
    alike = made_up(flops={"a": 100})[0].iloc[0]
    offset, of_seed = rng.normal(0, 0.02, 5), rng.uniform(-design.spread, design.spread, 5)
    runs, curves, drawn = [], [], {}
    for router, length, seed in (
        (router, length, seed)
        for router, side in (("a", design.reference), ("b", design.level))
        for length, seeds in side.items()
        for seed in seeds
    ):
        folder, steps = f"{router} {length} {seed}", [*range(EVERY, length, EVERY), length]
        if not (same and (length, seed) in drawn):
            spread = of_seed[seed] if design.of_seed else rng.uniform(-design.spread, design.spread)
            noise = offset[seed] + rng.normal(0, 0.003) + rng.normal(0, 0.0005, len(steps))
            waves = [design.wave * math.sin(2.5 * math.log(step / 200) + 1) for step in steps]
            noise += np.array(waves)
            losses = [loss_of(step, length) + each for step, each in zip(steps, noise, strict=True)]
            drawn[length, seed] = pd.DataFrame(
                {"step": steps, FLOPS: OF_STEP * (1 + spread) * np.array(steps), "loss": losses}
            )
        curves.append(drawn[length, seed].assign(folder=folder))
        run = {"folder": folder, "run": folder, "router": router, "seed": seed, "steps": length, "place": len(runs)}
        runs.append({**alike, **run, "val/loss": drawn[length, seed]["loss"].iloc[-1]})
    return pd.DataFrame(runs), pd.concat(curves)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> ReportInputs:
    [found] = collect_inputs(write_runs(tmp_path_factory.mktemp("runs"), *made_up(flops={"a": 100, "b": 100})))
    return found


def studied(design: Design, inputs: ReportInputs, rng: np.random.Generator, *, same: bool = False) -> list[SpeedUp]:
    """Return the speed-ups that a report shows of a simulated study."""
    runs, curves = simulated(design, rng, same=same)
    return [found for each in found_speed_ups(inputs._replace(runs=runs), curves) for found in each.found]


FALSE_BEFORE = ("two seeds are short", "two short lengths", "FLOPs vary by 8 %", "FLOPs vary by 8 %, evaluations")


@pytest.mark.parametrize("name", FALSE_BEFORE)
def test_a_level_that_learns_as_the_reference_is_seldom_told_apart(name: str, inputs: ReportInputs) -> None:
    rng = np.random.default_rng(0)
    found = [studied(DESIGNS[name], inputs, rng) for _ in range(STUDIES)]
    assert all(found), "each study has a speed-up"
    false = sum(any(each.verdict in (SAVES, COSTS_MORE) for each in of_study) for of_study in found)
    assert false <= 4, "2 of 40 in the long run"


@pytest.mark.parametrize("name", [name for name, design in DESIGNS.items() if design.is_of_reference])
def test_a_level_with_the_runs_of_the_reference_has_exactly_1(name: str, inputs: ReportInputs) -> None:
    [found] = studied(DESIGNS[name], inputs, np.random.default_rng(0), same=True)
    assert found.times == pytest.approx((1, 1, 1), abs=1e-9)
    assert found.verdict == NOT_APART


@pytest.mark.parametrize("few", [(), (0,), (4,)])
@pytest.mark.parametrize("better", [-0.05, 0.0, 0.05])
def test_a_budget_that_too_few_seeds_have_gives_no_verdict(
    few: tuple[int, ...], better: float, inputs: ReportInputs
) -> None:
    """The losses of the reference wave around the law, so between its budgets the curve is wrong by 0.012 nats."""
    four = range(4)
    design = Design({**dict.fromkeys((100, 400, 800, 1600), four), 200: few}, {200: four}, wave=0.012)
    rng = np.random.default_rng(0)
    for _ in range(3):
        runs, curves = simulated(design, rng, same=False)
        curves.loc[curves["folder"].str.startswith("b"), "loss"] -= better
        [found] = [each for of in found_speed_ups(inputs._replace(runs=runs), curves) for each in of.found]
        named = NO_POINT.format(budgets="2e+11") in found.doubts
        assert named == bool(few)
        if few:
            assert found.verdict in (NOT_APART, NOT_SHOWN)
            reasons = {FEW_HERE.format(what=what) for what in ("saved", "wasted")}
            assert (found.verdict == NOT_SHOWN) == bool(reasons & {*found.doubts})
        elif better:
            assert found.verdict == (SAVES if better > 0 else COSTS_MORE), "no run there says otherwise"


def test_no_verdict_contradicts_runs_of_seeds_that_the_curve_leaves_out(inputs: ReportInputs) -> None:
    """Seeds 3 and 4 have one budget, so the curve goes through the others; all five together say otherwise."""
    design = Design({length: range(3) for length in (100, 400, 800, 1600)} | {200: FIVE}, {200: FIVE})
    rng = np.random.default_rng(0)
    runs, curves = simulated(design, rng, same=False)
    curves.loc[curves["folder"].str.startswith("b"), "loss"] -= 0.05
    curves.loc[curves["folder"].isin(["a 200 3", "a 200 4"]), "loss"] -= 0.5
    [found] = [each for of in found_speed_ups(inputs._replace(runs=runs), curves) for each in of.found]
    assert (found.verdict, found.doubts[-1]) == (NOT_SHOWN, OTHERWISE)
