"""Tests of scaling laws on data whose law is known: recovery, coverage of intervals, and warnings."""

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from run_folders import write_metrics, write_record
from scipy.optimize import curve_fit

from moe.analysis.report.blocks import BulletList, TableBlock
from moe.analysis.report.inputs import collect_inputs
from moe.analysis.report.sections.scaling import scaling_laws
from moe.analysis.scaling import COMPUTE, EXPERTS, Law, budgets, fit, over_seeds, speed_up
from moe.results.table import load_runs

BUDGETS = (1e12, 2e12, 4e12, 8e12, 16e12)
SIZES = Law((("parameters", EXPERTS), ("tokens",)))


def loss_of(compute: float) -> float:
    return 3 + 1.2 * (compute / 4e12) ** -0.3


def made_up(
    seeds: int, rng: np.random.Generator, *, noise: float = 0.003, speed: float = 1.5, budget: float = 4e12
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return runs of a baseline at five budgets, and of an arm that is `speed` times as fast. Seeds share an offset."""
    offset = rng.normal(0, 0.02, seeds)

    def runs(points: tuple[float, ...], faster: float) -> pd.DataFrame:
        rows = [
            {"seed": seed, "FLOPs": each, "loss": loss_of(each * faster) + offset[seed] + rng.normal(0, noise)}
            for seed in range(seeds)
            for each in points
        ]
        return pd.DataFrame(rows)

    return runs(BUDGETS, 1.0), runs((budget,), speed)


def test_a_law_without_noise_is_recovered_as_by_scipy() -> None:
    baseline, _ = made_up(1, np.random.default_rng(0), noise=0.0)
    found = fit(baseline, COMPUTE)
    offset = baseline["loss"].iloc[0] - loss_of(BUDGETS[0])
    assert found.floor[0] == pytest.approx(3 + offset, rel=1e-4)
    assert found.exponent("FLOPs")[0] == pytest.approx(0.3, rel=1e-3)
    assert found.doubts == []
    noisy, _ = made_up(3, np.random.default_rng(1))
    fitted, _ = curve_fit(
        lambda c, floor, a, alpha: floor + a * (c / 4e12) ** -alpha, noisy["FLOPs"], noisy["loss"], (3, 1, 0.3)
    )
    theta = fit(noisy, COMPUTE, resamples=2)
    assert (theta.floor[0], theta.exponent("FLOPs")[0]) == pytest.approx((fitted[0], fitted[2]), rel=1e-3)


def sizes_of(seed: int, rng: np.random.Generator, noise: float) -> list[dict]:
    return [
        {"seed": seed, "parameters": n, "tokens": d, "experts": e, "loss": size_law(n, d, e) + rng.normal(0, noise)}
        for n in (1e5, 2e5, 4e5)
        for d in (1e6, 2e6, 4e6)
        for e in (4, 8, 16)
    ]


def size_law(parameters: float, tokens: float, experts: float) -> float:
    return 2.5 + (parameters / 1e5) ** -0.4 * (experts / 4) ** -0.15 + 0.8 * (tokens / 1e6) ** -0.3


def test_a_law_of_size_tokens_and_experts_is_recovered_and_extrapolated() -> None:
    rng, hits = np.random.default_rng(0), 0
    for _ in range(8):
        runs = pd.DataFrame([row for seed in range(4) for row in sizes_of(seed, rng, 0.004)])
        found = fit(runs, SIZES, resamples=40)
        further = over_seeds(found.predict(parameters=8e5, tokens=8e6, experts=16.0), 4)
        hits += further.low <= size_law(8e5, 8e6, 16) <= further.high
    assert found.exponent("parameters")[0] == pytest.approx(0.4, abs=0.1)
    assert found.exponent(EXPERTS)[0] == pytest.approx(0.15, abs=0.05)
    assert hits >= 6, "8 intervals of 95 %"
    assert found.outside(parameters=8e5, tokens=8e6, experts=16.0) == [
        *("parameters 2 times beyond the runs", "tokens 2 times beyond the runs")
    ]


@pytest.mark.parametrize("seeds", [3, 8])
def test_intervals_of_the_speed_up_cover_the_true_one(seeds: int) -> None:
    rng, covered, repeats = np.random.default_rng(seeds), 0, 30
    for _ in range(repeats):
        [found] = speed_up(*made_up(seeds, rng), resamples=50)
        covered += found.times.low <= 1.5 <= found.times.high
    assert found.times.value == pytest.approx(1.5, abs=0.2)
    assert covered / repeats >= 0.87, "95 % in the long run"
    assert found.doubts == []
    assert 1 < found.misfit < 1.03, "the form is true, and noise is small"


def test_a_speed_up_says_what_the_data_do_not_carry() -> None:
    rng = np.random.default_rng(0)
    baseline, far = made_up(3, rng, budget=16e12)
    [found] = speed_up(baseline, far)
    assert found.doubts == ["FLOPs 1.49 times beyond the runs"]
    [beyond] = speed_up(baseline, far.assign(loss=2.0))
    assert beyond.needed == math.inf
    assert "below L_inf" in beyond.doubts[-1]
    three = baseline[baseline["FLOPs"] < 5e12]
    [few] = speed_up(three, far)
    assert any("nothing checks the form" in doubt for doubt in few.doubts)
    with pytest.raises(ValueError, match="2 different points of FLOPs; the law needs at least 3"):
        speed_up(baseline[baseline["FLOPs"] < 3e12], far)
    flat = baseline.assign(loss=4.0 + 1e-9 * np.arange(len(baseline)))
    assert any("at a bound" in doubt for doubt in fit(flat, COMPUTE).doubts)


def test_the_error_of_a_mean_is_that_of_its_t_interval() -> None:
    """For a mean, the spread of resamples is that of the usual formula."""
    values = np.random.default_rng(0).normal(0, 1, 6)
    draws = np.random.default_rng(1).multinomial(6, np.full(6, 1 / 6), size=20_000)
    found = over_seeds(np.concatenate([[values.mean()], draws @ values / 6]), 6)
    reach = 2.5706 * values.std(ddof=1) / math.sqrt(6)  # t of 5 degrees of freedom
    assert found.high - found.value == pytest.approx(reach, rel=0.02)
    assert math.isnan(over_seeds(np.array([1.0]), 1).low)
    assert over_seeds(np.array([1.0, 2.0, math.inf]), 3).high == math.inf


def test_budgets_within_two_percent_are_one() -> None:
    assert budgets([1e9, 1.01e9, 2e9]) == 2


def test_the_report_fits_the_law_extrapolates_it_and_checks_it(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for number, point in enumerate([row for seed in range(3) for row in sizes_of(seed, rng, 0.002)]):
        folder = tmp_path / "made_up" / str(number)
        folder.mkdir(parents=True)
        config = {"seed": point["seed"], "steps": int(point["tokens"]) // 1000, "batch_size": 10, "grad_accum": 10}
        config |= {"data": {"seq_len": 10}, "model": {"dim": point["parameters"], "num_experts": point["experts"]}}
        size = {"total": 10**7, "active": int(point["parameters"]), "trainable": 10**7}
        write_record(folder, config=config, parameters=size)
        write_metrics(folder, {"val/loss": point["loss"]})
        (folder / "events.jsonl").touch()
    [inputs] = collect_inputs(load_runs([tmp_path]))
    blocks = list(scaling_laws(inputs))
    [table] = [block.frame for block in blocks if isinstance(block, TableBlock)]
    numbers = table.set_index("number")["estimate"].str.split(" ").str[0].astype(float)
    assert numbers["exponent of experts"] == pytest.approx(0.15, abs=0.05)
    assert numbers["best size grows as FLOPs to the power of"] == pytest.approx(0.3 / 0.7, abs=0.1)
    [lines] = [block.items for block in blocks if isinstance(block, BulletList)]
    assert "2 times beyond the runs" in lines[0]
    predicted = float(lines[0].split("a loss of ")[1].split(" ")[0])
    assert predicted == pytest.approx(size_law(8e5, 8e6, 16), abs=0.03)
    assert "the law predicts their losses" in lines[1]
    few = inputs._replace(runs=inputs.runs[inputs.runs["parameters.active"] == 10**5])
    assert list(scaling_laws(few)) == []
