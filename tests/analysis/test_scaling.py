"""Tests of scaling laws on data whose law is known: recovery, coverage of intervals, and warnings."""

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from run_folders import write_metrics, write_record
from scipy import stats
from scipy.optimize import curve_fit

from moe.analysis.figures.charts import charts
from moe.analysis.figures.drawing import Drawing
from moe.analysis.figures.scaling import tokens_along
from moe.analysis.report.blocks import BulletList, Paragraph, TableBlock
from moe.analysis.report.collect import collect_inputs
from moe.analysis.report.sections.cost import NOWHERE, _drawn_speed_up, speed_up_row
from moe.analysis.report.sections.scaling import _flops, _points, laws_in_words, scaling_laws
from moe.analysis.scaling import COMPUTE, EXPERTS, Law, _reasons, budgets, fit, iso_flop_minima, over_seeds
from moe.analysis.speed_up import (
    COSTS_MORE,
    FEW_HERE,
    NO_POINT,
    NOT_APART,
    NOT_CHECKED,
    NOT_REACHED,
    NOT_SHOWN,
    OTHERWISE,
    SAVES,
    STILL_TRAINED,
    TOO_SMALL,
    speed_up,
)
from moe.bench.speed_ups import CASES, coverage, loss, run_at, simulated
from moe.results.table import load_runs

BUDGETS = (1e12, 2e12, 4e12, 8e12, 16e12)
SIZES = Law((("parameters", EXPERTS), ("tokens",)))


def made_up(
    seeds: int, rng: np.random.Generator, *, noise: float = 0.003, speed: float = 1.5, budget: float = 4e12
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return runs of a baseline at five budgets, and of an arm that is `speed` times as fast. Seeds share an offset."""
    offset = rng.normal(0, 0.02, seeds)

    def runs(points: tuple[float, ...], faster: float) -> pd.DataFrame:
        rows = [
            run_at(seed, each, loss(each * faster) + offset[seed] + rng.normal(0, noise))
            for seed in range(seeds)
            for each in points
        ]
        return pd.DataFrame(rows)

    return runs(BUDGETS, 1.0), runs((budget,), speed)


def test_a_law_without_noise_is_recovered_as_by_scipy() -> None:
    baseline, _ = made_up(1, np.random.default_rng(0), noise=0.0)
    found = fit(baseline, COMPUTE)
    offset = baseline["loss"].iloc[0] - loss(BUDGETS[0])
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
        further = found.estimate(found.predict(parameters=8e5, tokens=8e6, experts=16.0))
        hits += further.low <= size_law(8e5, 8e6, 16) <= further.high
    assert found.exponent("parameters")[0] == pytest.approx(0.4, abs=0.1)
    assert found.exponent(EXPERTS)[0] == pytest.approx(0.15, abs=0.05)
    assert hits >= 6, "8 intervals of 95 %"
    assert found.outside(parameters=8e5, tokens=8e6, experts=16.0) == [
        *("parameters 2 times beyond the runs", "tokens 2 times beyond the runs")
    ]


@pytest.mark.parametrize("seeds", [3, 8])
def test_intervals_of_the_speed_up_cover_the_true_one(seeds: int) -> None:
    case = CASES["the law is true"]
    assert coverage(case, seeds, studies=30, resamples=50) >= 0.87, "95 % in the long run"
    [found] = speed_up(*simulated(case, seeds, np.random.default_rng(0)), resamples=50)
    assert found.times.value == pytest.approx(1.5, abs=0.2)
    assert found.doubts == []


def test_intervals_of_the_speed_up_are_too_narrow_far_from_the_budgets() -> None:
    """A law that is wrong between two budgets gives a wrong speed-up there, and no seed tells how wrong."""
    far = CASES["waves, halfway between budgets 4 times apart"]
    assert coverage(far, 8, studies=20, resamples=50) < 0.5
    assert coverage(far._replace(wave=0.0), 8, studies=20, resamples=50) >= 0.8, "not because of the distance alone"


@pytest.mark.parametrize("of_curve", [False, True])
def test_a_curve_of_a_wrong_form_tells_no_equal_settings_apart(of_curve: bool) -> None:
    """The loss waves around the fitted law, which is off by 4 % of the compute at the largest budget."""
    rng, covered, repeats = np.random.default_rng(0), 0, 30
    budgets = [1e12 * 1.5**k for k in range(9)] if of_curve else [*BUDGETS]
    wave = {each: 0.012 * math.sin(2.5 * math.log(each / 4e12) + 1) for each in budgets}
    for _ in range(repeats):
        offset = rng.normal(0, 0.02, 5)
        rows = [
            run_at(seed, each, loss(each) + wave[each] + offset[seed] + rng.normal(0, 0.003))
            for seed in range(5)
            for each in budgets
        ]
        baseline = pd.DataFrame(rows)
        arm = baseline[baseline["FLOPs"] == budgets[-1]]
        arm = arm.assign(loss=arm["loss"] + rng.normal(0, 0.004, 5))
        [found] = speed_up(baseline, arm, resamples=50)
        covered += found.times.low <= 1 <= found.times.high
        assert (found.verdict == NOT_APART) == (found.times.low <= 1 <= found.times.high)
    assert covered / repeats >= 0.87, "95 % in the long run"
    [same] = speed_up(baseline, baseline[baseline["FLOPs"] == budgets[-1]], resamples=5)
    assert same.times == pytest.approx((1, 1, 1))


def test_arms_of_one_reference_share_the_curve_through_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A curve through the runs of the same seeds is fitted once, and the speed-ups are those without sharing."""
    baseline, arm = made_up(3, np.random.default_rng(1))
    arms = [arm, arm.assign(loss=arm["loss"] + 0.01), arm[arm["seed"] > 0]]
    alone = [speed_up(baseline, each, resamples=5) for each in arms]
    fits, known = [], {}
    monkeypatch.setattr("moe.analysis.speed_up.fit", lambda *given, **options: fits.append(0) or fit(*given, **options))
    together = [speed_up(baseline, each, resamples=5, known=known) for each in arms]
    assert [found.times for [found] in together] == [found.times for [found] in alone]
    assert len(fits) == len(known) == 2
    other = baseline.assign(loss=baseline["loss"] + 0.1)
    [found] = speed_up(other, arm, resamples=5, known=known)
    assert found.times != alone[0][0].times


def test_a_speed_up_says_what_the_data_do_not_carry() -> None:
    rng = np.random.default_rng(0)
    baseline, far = made_up(3, rng, budget=16e12)
    [found] = speed_up(baseline, far)
    assert found.doubts == ["FLOPs 1.48 times beyond the runs"]
    assert found.verdict == SAVES
    ended = baseline[baseline["FLOPs"] == 16e12]
    [training] = speed_up(ended, far, evaluations=baseline)
    assert training == found._replace(of_training=True), "its runs end there"
    for budget, doubt in ((14e12, STILL_TRAINED.format(what="saved")), (17e12, NOT_CHECKED)):
        [early] = speed_up(ended, far.assign(FLOPs=budget), evaluations=baseline)
        assert early.times.low > 1
        assert (early.verdict, early.doubts[-1]) == (NOT_SHOWN, doubt), "a loss in training is another one"
    [early] = speed_up(ended, far.assign(FLOPs=14e12, loss=far["loss"] + 0.2), evaluations=baseline)
    assert early.times.high < 1
    assert (early.verdict, early.doubts[-1]) == (NOT_SHOWN, STILL_TRAINED.format(what="wasted"))
    both = baseline[baseline["FLOPs"].isin((8e12, 16e12))]
    [later] = speed_up(both, far.assign(FLOPs=14e12, loss=far["loss"] + 0.6), evaluations=baseline)
    assert later.verdict == COSTS_MORE, "runs with a lower loss had ended at 8e12"
    [beyond] = speed_up(baseline, far.assign(FLOPs=17e12))
    assert beyond.times.low > 1
    assert (beyond.verdict, beyond.doubts[-1]) == (NOT_SHOWN, NOT_CHECKED)
    [between] = speed_up(baseline, far.assign(FLOPs=14e12))
    assert between.verdict == SAVES
    [worse] = speed_up(baseline, far.assign(loss=far["loss"] + 0.2))
    assert worse.verdict == COSTS_MORE
    slower = far.assign(FLOPs=far["FLOPs"] * 4)
    [extrapolated] = speed_up(baseline, slower)
    assert extrapolated.times.high < 1
    assert (extrapolated.verdict, extrapolated.doubts[-1]) == (NOT_SHOWN, NOT_REACHED), "no run has this loss"
    [beyond] = speed_up(baseline, far.assign(loss=2.0))
    assert beyond.needed == beyond.times.value == math.inf
    assert speed_up_row(beyond)["times the compute"] == NOWHERE
    assert "below L_inf" in beyond.doubts[-1]
    three = baseline[baseline["FLOPs"] < 5e12]
    [few] = speed_up(three, far)
    assert any("nothing checks the form" in doubt for doubt in few.doubts)
    assert "intervals from so few points within a factor of 4 are known to be too narrow" in few.doubts
    wide = fit(baseline[baseline["FLOPs"].isin((1e12, 4e12, 16e12))], COMPUTE)
    assert wide.sure
    assert not any("too narrow" in doubt for doubt in wide.doubts)
    assert speed_up(baseline[baseline["FLOPs"] < 3e12], far) == [], "two budgets"
    flat = baseline.assign(loss=4.0 + 1e-9 * np.arange(len(baseline)))
    [flat_one] = speed_up(flat, far)
    assert any("no interval, because" in doubt and "at a bound" in doubt for doubt in flat_one.doubts)
    assert np.isnan(flat_one.times[1:]).all()
    assert flat_one.verdict == NOT_SHOWN
    assert speed_up_row(flat_one)["times the compute"] == NOWHERE, "no number of 300 digits"


@pytest.mark.parametrize(
    ("budget", "higher", "doubt"), [(5e11, -0.3, NOT_CHECKED), (5e11, 0.3, TOO_SMALL), (4e13, -0.3, NOT_CHECKED)]
)
def test_no_verdict_rests_on_a_curve_beyond_the_budgets_of_the_reference(
    budget: float, higher: float, doubt: str
) -> None:
    """A run of the reference there does not help if the curve does not use its seed, and the doubt then says so."""
    rng = np.random.default_rng(0)
    baseline, _ = made_up(3, rng)
    arm = pd.DataFrame([run_at(k, budget, loss(budget) + higher + k * 0.01) for k in range(3)])
    few = FEW_HERE.format(what="saved" if higher < 0 else "wasted")
    for reference, last in ((baseline, doubt), (pd.concat([baseline, arm.tail(1).assign(seed=9)]), few)):
        [found] = speed_up(reference, arm)
        assert not found.times.low <= 1 <= found.times.high
        assert (found.verdict, found.doubts[-1]) == (NOT_SHOWN, last)
        assert not _drawn_speed_up("a name", found, 1).decided, "the figure says what the table says"


@pytest.mark.parametrize(("budget", "higher", "low", "high"), [(8e12, 0.02, 1.1, 2), (16e12, -0.02, 0.5, 0.97)])
def test_no_verdict_contradicts_the_runs_that_ended_at_the_same_compute(
    budget: float, higher: float, low: float, high: float
) -> None:
    """The longer runs have the higher loss, so between them the curve says what the ends of the runs do not."""
    reference, _ = made_up(3, np.random.default_rng(0))
    other = {8e12: 16e12, 16e12: 8e12}
    reference = reference.sort_values(["FLOPs", "seed"], ignore_index=True)
    of_other = reference["FLOPs"].map(other).fillna(reference["FLOPs"])
    reference = reference.assign(loss=reference["loss"].to_numpy()[np.lexsort([reference["seed"], of_other])])
    ended = reference[reference["FLOPs"].isin(other)]
    arm = ended[ended["FLOPs"] == budget].assign(loss=lambda arm: arm["loss"] + higher + [1e-4, -1e-4, 0])
    [found] = speed_up(ended, arm, evaluations=reference)
    assert low < found.times.low <= found.times.high < high
    assert (found.verdict, found.doubts[-1]) == (NOT_SHOWN, OTHERWISE)


@pytest.mark.parametrize("shift", [-2e-4, 2e-4])
def test_a_setting_with_the_loss_of_each_step_costs_more_if_a_step_costs_more(shift: float) -> None:
    """The runs of the reference ended before this compute with a loss that is the same up to 2 % of the compute."""
    reference, _ = made_up(3, np.random.default_rng(0))
    ended = reference[reference["FLOPs"] == 16e12]
    arm = ended.assign(FLOPs=1.5 * ended["FLOPs"], loss=ended["loss"] + shift + [1e-5, -1e-5, 0])
    [found] = speed_up(ended, arm, evaluations=reference)
    assert found.times.value == pytest.approx(1 / 1.5, abs=0.01)
    assert (found.verdict, found.doubts) == (COSTS_MORE, [])


@pytest.mark.parametrize("few", [[0], [0, 1]])
def test_a_budget_of_the_reference_that_few_seeds_have_changes_no_number(few: list[int]) -> None:
    """These seeds do better than the others. Another length has runs of all seeds."""
    reference, _ = made_up(5, np.random.default_rng(0))
    arm = reference[reference["FLOPs"] == 4e12].assign(loss=lambda arm: arm["loss"] + 0.1)
    of_all = reference[reference["FLOPs"] != 4e12]
    more = pd.concat([of_all, reference[(reference["FLOPs"] == 4e12) & reference["seed"].isin(few)]])
    [with_few], [without] = (speed_up(each, arm, resamples=5) for each in (more, of_all))
    assert with_few.times == pytest.approx(without.times)
    assert (without.verdict, without.doubts) == (COSTS_MORE, [])
    assert with_few.verdict == NOT_SHOWN
    assert with_few.doubts == [NO_POINT.format(budgets="4e+12"), FEW_HERE.format(what="wasted")]
    ended = reference[reference["FLOPs"] == 16e12]
    lucky = pd.concat([ended, arm[arm["seed"].isin(few)].assign(loss=1.0)])
    [found] = speed_up(lucky, arm, evaluations=reference)
    assert found.times == pytest.approx(speed_up(ended, arm, evaluations=reference)[0].times)
    assert found.verdict == NOT_SHOWN


def test_a_seed_that_would_carry_a_part_of_the_curve_alone_is_left_out() -> None:
    """Seed 0 alone has three budgets or more, so evaluations take the place of the runs."""
    baseline, arm = made_up(4, np.random.default_rng(0))
    two_budgets = baseline["FLOPs"].isin((2e12, 4e12))
    few = baseline[(baseline["seed"] == 0) | two_budgets]
    assert speed_up(few, arm, resamples=5) == []
    [found] = speed_up(few, arm, evaluations=baseline, resamples=5)
    assert found.of_training
    two = baseline[(baseline["seed"] < 2) | two_budgets]
    [found] = speed_up(two, arm, evaluations=baseline, resamples=5)
    assert not found.of_training
    assert found.doubts[0] == "left out, as the reference has fewer than three budgets of them: seeds 2 and 3"
    [alone] = speed_up(baseline[baseline["seed"] == 0], arm[arm["seed"] == 0], resamples=5)
    assert math.isnan(alone.times.low), "one seed has no interval"


def test_a_doubt_says_when_resamples_reach_a_bound() -> None:
    noisy, _ = made_up(3, np.random.default_rng(0), noise=0.1)
    found = fit(noisy, COMPUTE, resamples=100)
    assert found.sure
    assert any("of the resamples reach a bound" in doubt for doubt in found.doubts)


def test_a_seed_that_is_missing_at_one_budget_is_left_out_there_alone() -> None:
    baseline, _ = made_up(4, np.random.default_rng(0))
    arm = baseline.assign(loss=baseline["loss"] - 0.02)
    gap = (arm["seed"] == 0) & (arm["FLOPs"] == 4e12)
    whole, lacking = speed_up(baseline, arm), speed_up(baseline, arm[~gap])
    of_three = speed_up(baseline[baseline["seed"] > 0], arm[arm["seed"] > 0])
    assert lacking[2]._replace(doubts=[]) == of_three[2], "and its degrees of freedom are those of three seeds"
    assert math.isfinite(lacking[2].times.high)
    assert lacking[0] == whole[0]


def test_a_seed_that_the_reference_lacks_at_one_budget_is_left_out_there_alone() -> None:
    arm, _ = made_up(4, np.random.default_rng(0))
    baseline = arm[(arm["seed"] != 0) | (arm["FLOPs"] != 4e12)]
    found = speed_up(baseline, arm)
    assert found[2].times == pytest.approx((1, 1, 1)), "without the seed, the runs are the same"
    assert [each.doubts[:1] for each in found] == [
        [],
        [],
        ["left out, as not both sides have them here: seeds 0"],
        [],
        [],
    ]


def lengths_of_seeds(lengths: dict[int, tuple[float, ...]]) -> pd.DataFrame:
    """Return runs of a reference at the budgets of each seed. Their FLOPs differ by less than 2 %, as with `top_p`."""
    rng = np.random.default_rng(0)
    rows = [
        run_at(seed, each, loss(each) + 0.01 * seed + rng.normal(0, 2e-3)) | {"FLOPs": each * rng.uniform(0.995, 1.005)}
        for seed, budgets in lengths.items()
        for each in budgets
    ]
    return pd.DataFrame(rows)


def test_a_curve_needs_three_budgets_of_a_seed_that_it_uses() -> None:
    """Seed 0 alone has three. Where it is left out, the evaluations of the others take the place of their runs."""
    runs = lengths_of_seeds({0: (1e12, 2e12, 4e12), 1: (1e12, 2e12), 2: (1e12, 2e12), 3: (1e12, 2e12)})
    early = [
        runs.assign(step=runs["step"] / part, FLOPs=runs["FLOPs"] / part, loss=(runs["FLOPs"] / part).map(loss) + 0.01)
        for part in (2, 4)
    ]
    evaluations = pd.concat([runs, *early], ignore_index=True)
    arm = runs[(runs["seed"] > 0) == (runs["FLOPs"] < 3e12)].assign(loss=lambda arm: arm["loss"] + 0.1)
    [whole] = speed_up(runs, arm, resamples=5)
    assert (whole.needed < 4e12, whole.of_training) == (True, False), "the budgets without a curve have no speed-up"
    assert {"left out, as not both sides have them here: seeds 1, 2 and 3"} < {*whole.doubts}
    found = speed_up(runs, arm, evaluations=evaluations, resamples=5)
    assert [each.of_training for each in found] == [True, True, False]
    assert (found[-1].budget, found[-1].times.value) == (whole.budget, whole.times.value)


def test_three_budgets_that_differ_a_little_among_seeds_are_three_points() -> None:
    [*found] = speed_up(*[lengths_of_seeds(dict.fromkeys(range(3), (1e12, 2e12, 4e12)))] * 2, resamples=5)
    assert ["nothing checks the form" in str(each.doubts) for each in found] == [True] * 3
    two = lengths_of_seeds(dict.fromkeys(range(3), (1e12, 2e12)))
    with pytest.raises(ValueError, match="2 different points of FLOPs; the law needs at least 3"):
        fit(two, COMPUTE)


def of_sizes(points: list[tuple[float, float]]) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    rows = [
        {"seed": seed, "parameters": n, "tokens": d, "loss": size_law(n, d, 4) + rng.normal(0, 0.003)}
        for seed in range(3)
        for n, d in points
    ]
    return pd.DataFrame(rows)


def test_a_law_that_the_runs_do_not_determine_has_no_interval() -> None:
    law = Law((("parameters",), ("tokens",)))
    grid = [(1e5 * 2**a, 1e6 * 2**b) for a in range(3) for b in range(3)]
    good = fit(of_sizes(grid), law, resamples=20)
    assert good.sure
    assert math.isfinite(good.estimate(good.exponent("tokens")).low)
    ray = [(1e5 * 2**k, 2e6 * 2**k) for k in range(6)]
    five = [grid[place] for place in (0, 1, 3, 4, 8)]
    for points, reason in ((ray, "do not tell the terms apart"), (five, "5 different points determine 5 numbers")):
        found = fit(of_sizes(points), law, resamples=20)
        assert not found.sure
        assert any(doubt.startswith("no interval, because") and reason in doubt for doubt in found.doubts)
        assert math.isnan(found.estimate(found.exponent("tokens")).low)
    with pytest.raises(ValueError, match="4 different points of parameters, tokens; the law needs at least 5"):
        fit(of_sizes([grid[0], grid[1], grid[3], grid[8]]), law)


def test_sizes_and_tokens_on_one_ray_are_named() -> None:
    """The true law is away from its bounds, so that nothing else gives a reason."""
    law = Law((("parameters",), ("tokens",)))
    theta = np.array([math.log(2.5), 0.0, math.log(0.8), 0.4, 0.3])
    loss = np.array([size_law(1e5 * 2**k, 1e6 * 2**k, 4) for k in range(6)])
    logs = np.log(2.0) * np.tile(np.arange(6.0) - 2.5, (2, 1))
    [reason] = _reasons(law, theta, logs, loss, 6)
    assert "do not tell the terms apart" in reason
    apart = np.stack([logs[0], logs[0, [0, 3, 1, 5, 2, 4]]])
    assert _reasons(law, theta, apart, loss, 6) == []


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


def test_tokens_at_a_budget_are_those_of_the_runs_and_go_on_smoothly_beyond_them() -> None:
    runs = pd.DataFrame({"active parameters": [1e5, 2e5, 4e5], "tokens": [8e6, 4e6, 2e6]})
    size = np.array([5e4, 1e5, 2e5, 4e5, 8e5])
    assert tokens_along(runs, size) == pytest.approx(8e11 / size)


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
    table, minima = [block.frame for block in blocks if isinstance(block, TableBlock)]
    assert len(minima) == len(iso_flop_minima(_points(inputs.runs)))
    spread = np.random.default_rng(0).uniform(0.92, 1.08, len(inputs.runs))
    flops = inputs.runs["parameters.active"] * inputs.runs["steps"]
    points, varied = (_points(inputs.runs.assign(**{"train/flops": flops * each})) for each in (1.0, spread))
    assert [len(each.groupby(["FLOPs", EXPERTS])) for each in (points, varied)] == [15, 27], "means of a size"
    assert varied["FLOPs"].to_numpy() == pytest.approx(points["FLOPs"], rel=0.08)
    told = laws_in_words(inputs)
    numbers = table.set_index("number")["estimate"].str.split(" ").str[0].astype(float)
    assert numbers["exponent of experts"] == pytest.approx(0.15, abs=0.05)
    assert numbers["best size grows as FLOPs to the power of"] == pytest.approx(0.3 / 0.7, abs=0.1)
    assert f" {table.set_index('number')['estimate']['exponent of tokens']} of tokens, and L_inf " in told
    assert "The scaling law has the exponents" in told
    assert _flops(2e12) == "2 x 10^12 FLOPs"
    [lines] = [block.items for block in blocks if isinstance(block, BulletList)]
    assert told.endswith(lines[1])
    assert "2 times beyond the runs" in lines[0]
    predicted = float(lines[0].split("a loss of ")[1].split(" ")[0])
    assert predicted == pytest.approx(size_law(8e5, 8e6, 16), abs=0.03)
    assert "the law predicts their losses" in lines[1]
    [figure] = [block.figure for block in blocks if isinstance(block, Drawing)]
    assert figure is not None
    assert [axes.get_title() for axes in figure.axes] == ["4 experts", "8 experts", "16 experts"]
    for axes, experts in zip(figure.axes, (4, 8, 16), strict=True):
        solid = [line for line in axes.lines if line.get_linestyle() == "-" and not line.get_label().startswith("_")]
        for line, tokens in zip(solid, (1e6, 2e6, 4e6), strict=True):  # a token costs the same at all sizes here
            assert line.get_xdata().min() >= 1e5
            expected = [size_law(size, tokens, experts) for size in line.get_xdata()]
            assert line.get_ydata() == pytest.approx(expected, abs=0.02)
        [last] = [line for line in axes.lines if line.get_label() == "4 times the largest budget"]
        assert last.get_linestyle() == "--"
        assert last.get_xdata()[[0, -1]] == pytest.approx([1e5 / 1.6, 4e5 * 1.6])
        assert last.get_ydata()[16] == pytest.approx(size_law(2e5, 16e6, experts), abs=0.04)
    assert charts(figure) is not None, "the page shows values"
    few = inputs._replace(runs=inputs.runs[inputs.runs["parameters.active"] == 10**5])
    assert list(scaling_laws(few)) == []
    two = inputs._replace(runs=inputs.runs[inputs.runs["parameters.active"] < 4 * 10**5])
    [_, said] = scaling_laws(two)
    assert isinstance(said, Paragraph)
    assert " ".join(said.text.split()) == (
        "No law: the runs have 2 sizes and 3 numbers of tokens, in 18 combinations. A law needs at least 3 of each, "
        "and 6 combinations."
    )
    assert laws_in_words(two) == ""


@pytest.mark.parametrize("size", [50, 100, 200, 400])
def test_a_missing_run_does_not_move_the_best_size_of_a_budget(size: int) -> None:
    """Seeds differ by 0.5 and sizes by less, and 100 is best in each seed. Seed 2 lacks a size."""
    rows = [
        {
            "seed": seed,
            EXPERTS: 4,
            "FLOPs": 1e9,
            "active parameters": each,
            "loss": 3 + 0.5 * seed + math.log(each / 100) ** 2,
        }
        for seed in range(3)
        for each in (50, 100, 200, 400)
        if (seed, each) != (2, size)
    ]
    [found] = iso_flop_minima(pd.DataFrame(rows)).to_dict("records")
    assert (found["best"], found["loss"]) == (100, 3.25)
    assert found["size"] == pytest.approx(100)


@pytest.mark.parametrize(
    "further",
    [[(0, 400)], [(9, 400)], [(seed, 25) for seed in (9, 10, 11, 12, 13)], [(seed, 100) for seed in range(9, 19)]],
    ids=["a seed with all sizes", "a new seed", "a size of new seeds", "seeds of one size"],
)
def test_further_runs_take_no_seed_from_the_best_size(further: list[tuple[int, int]]) -> None:
    rows = [
        {"seed": each, EXPERTS: 4, "FLOPs": 1e9, "active parameters": size}
        | {"loss": 3 + 0.5 * each + (math.log(size / 100) - 0.1 * each) ** 2}
        for each in range(5)
        for size in (50, 100, 200)
    ]
    added = [{"seed": seed, EXPERTS: 4, "FLOPs": 1e9, "active parameters": size, "loss": 3.0} for seed, size in further]
    [alone], [more] = (iso_flop_minima(pd.DataFrame(each)).to_dict("records") for each in (rows, [*rows, *added]))
    assert more == alone | {"left out": int(further[0][1] != 100)}
    assert alone["sizes"] == 3


def test_the_minimum_of_a_budget_is_that_of_its_parabola_if_it_lies_between_the_sizes() -> None:
    """Losses are parabolas in the log of the size: with the minimum at 200, at a size of the seed's own, and at 500."""

    def runs(experts: int, budget: float, best: dict[int, float]) -> list[dict[str, float]]:
        return [
            {
                "seed": seed,
                EXPERTS: experts,
                "FLOPs": budget,
                "active parameters": size,
                "loss": 3 + seed + math.log(size / at) ** 2,
            }
            for seed, at in best.items()
            for size in (100, 200, 400)
        ]

    own = {1: 150.0, 2: 200.0, 3: 250.0}
    rows = runs(4, 1e9, dict.fromkeys(own, 200.0)) + runs(4, 2e9, own) + runs(8, 1e9, {1: 500.0, 2: 200.0})
    found = iso_flop_minima(pd.DataFrame(rows + runs(8, 2e9, own)[:2]))
    assert found[[EXPERTS, "FLOPs"]].to_numpy().tolist() == [[4, 1e9], [4, 2e9], [8, 1e9]], "two sizes are too few"
    assert found["size"].tolist() == pytest.approx([200, (150 * 200 * 250) ** (1 / 3), math.sqrt(500 * 200)])
    assert found["inside"].tolist() == [True, True, True]
    assert found["best"].tolist() == [200, 200, 400]
    assert math.isnan(found["low"][0]), "seeds with the same minimum have no spread"
    low, high = stats.t.interval(0.95, 2, np.log([*own.values()]).mean(), stats.sem(np.log([*own.values()])))
    assert (found["low"][1], found["high"][1]) == pytest.approx((math.exp(low), math.exp(high)))
    assert math.isnan(found["low"][2]), "the minimum of one seed is beyond its sizes"
    beyond = iso_flop_minima(pd.DataFrame(runs(4, 1e9, {1: 500.0, 2: 500.0})))
    assert beyond["inside"].tolist() == [False]
