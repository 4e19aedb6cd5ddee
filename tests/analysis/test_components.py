"""Tests of variance components: against simulated runs whose components are known, and a table by hand."""

from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from run_folders import write_metrics, write_record
from scipy import stats

from moe.analysis.components import is_crossed, mean_squares, of_difference, variance_components
from moe.analysis.report.blocks import BulletList, Cards, Paragraph
from moe.analysis.report.collect import collect_inputs
from moe.analysis.report.inputs import ReportOptions
from moe.analysis.report.sections.answer import answer
from moe.analysis.report.sections.setup import setup
from moe.analysis.report.sections.verdicts import contrast_verdicts
from moe.analysis.statistics import spread_interval
from moe.results.table import load_runs

METRIC = "val/loss"


def runs_of(
    draws: np.random.Generator, init: float, data: float, both: float, *, size: tuple[int, int]
) -> pd.DataFrame:
    """Return runs of two settings with these standard deviations. The settings differ by 100."""
    rows = []
    for noise in (0.0, 0.5):
        a, b = (std * draws.normal(size=number) for std, number in zip((init, data), size, strict=True))
        rows += [
            {"noise": noise, "init_seed": i, "data_seed": j, METRIC: 100 * noise + a[i] + b[j] + both * draws.normal()}
            for i, j in product(*map(range, size))
        ]
    return pd.DataFrame(rows).assign(seed=42, status="finished", folder="made up", experiment="made up")


def test_the_estimates_are_unbiased() -> None:
    draws = np.random.default_rng(3)
    found = [variance_components(runs_of(draws, 2.0, 0.0, 1.0, size=(3, 4)), METRIC)["variance"] for _ in range(150)]
    error = np.std(found, axis=0) / np.sqrt(len(found))
    assert (np.abs(np.mean(found, axis=0) - [4.0, 0.0, 1.0]) < 4 * error).all()
    assert error.max() < 0.4
    assert min(each[1] for each in found) < 0  # so that the mean is not too large


def test_a_table_by_hand() -> None:
    """Rows 0, 2 and columns 0, 4 add up, apart from 1 in one cell."""
    table = np.array([[0.0, 4.0], [2.0, 7.0]])
    assert mean_squares(table) == pytest.approx((6.25, 20.25, 0.25))


@pytest.mark.parametrize("std", [(1.0, 1.0, 1.0), (2.0, 0.0, 1.0), (0.3, 1.0, 0.2)])
def test_the_intervals_cover_the_components(std: tuple[float, float, float]) -> None:
    """In 20,000 draws each covers 94.7 % or more. With 200, a coverage of 95 % has a standard error of 1.5 %."""
    draws = np.random.default_rng(5)
    found = []
    for _ in range(200):
        runs = runs_of(draws, *std, size=(3, 3))
        found.append(variance_components(runs[runs["noise"] == 0.0], METRIC)[["std_low", "std_high"]].to_numpy())
    low, high = np.moveaxis(np.array(found), 2, 0)
    assert (((low <= std) & (std <= high)).mean(axis=0) > 0.9).all()
    assert (np.median(high, axis=0) < 20 * max(std)).all(), "wide, because three seeds tell little, but no more"


def test_the_interval_of_a_difference_is_exact_at_its_ends() -> None:
    """Without a second mean square it is that of chi-square; where the F test is just significant, it begins at 0."""
    assert of_difference(2.0, 0.0, 2, 4) == pytest.approx(spread_interval(2**0.5, 2))
    just = float(stats.f.isf(0.025, 2, 4))
    assert of_difference(just, 1.0, 2, 4)[0] == pytest.approx(0, abs=1e-6)
    assert of_difference(1.1 * just, 1.0, 2, 4)[0] > 0.1


def test_shares_add_up_and_a_negative_estimate_is_no_spread() -> None:
    found = variance_components(runs_of(np.random.default_rng(0), 0.0, 5.0, 1.0, size=(3, 3)), METRIC)
    assert found["share"].sum() == pytest.approx(1)
    assert (found["std"] >= 0).all()
    assert found["levels"].tolist() == [3, 3, 9]


def test_an_incomplete_table_loses_the_data_seeds_that_lack_a_run() -> None:
    runs = runs_of(np.random.default_rng(0), 1.0, 1.0, 1.0, size=(3, 3))
    lost = runs.drop(runs.index[[0, 9]])  # init_seed 0 and data_seed 0 of both settings
    expected = variance_components(runs[runs["data_seed"] != 0], METRIC)
    pd.testing.assert_frame_equal(variance_components(lost, METRIC), expected)
    assert is_crossed(lost)
    with pytest.raises(ValueError, match="has no setting with all combinations of two values of init_seed"):
        variance_components(runs[runs["init_seed"] == runs["data_seed"]], METRIC)


def write_crossed(place: Path, *, noise: float) -> None:
    """Write runs with two seeds of each kind. Their perplexities are those of the table by hand, plus 10."""
    for init, data, value in ((1, 1, 10.0), (1, 2, 14.0), (2, 1, 12.0), (2, 2, 17.0)):
        folder = place / f"{noise}{init}{data}"
        folder.mkdir(parents=True)
        write_record(folder, config={"seed": 42, "noise": noise, "init_seed": init, "data_seed": data})
        write_metrics(folder, {"val/perplexity": value, METRIC: value})
        (folder / "events.jsonl").touch()


def test_a_report_about_crossed_seeds_answers_where_the_spread_comes_from(tmp_path: Path) -> None:
    """The answer has the shares of the table by hand, 3, 10 and 0.25 of 13.25. No seed is compared with another."""
    write_crossed(tmp_path / "crossed", noise=0.0)
    [inputs] = collect_inputs(load_runs([tmp_path]), ReportOptions(metrics=(METRIC,)))
    blocks = list(answer(inputs))
    assert dict(setup(inputs))["Runs"] == "4 of 4 finished; seeds 42; init_seed 1, 2; data_seed 1, 2"
    _, *texts = [block.text for block in blocks if isinstance(block, Paragraph)]
    shares = "23 % is due to the initial weights, 75 % to the order of the data, noise and dropout, and 2 % to both"
    assert texts[0].startswith(f"**Answer:** Of the variance of the validation perplexity between runs, {shares}")
    assert "in the same order and with 95 % intervals, are 1.7 [0, 56], 3.2 [0, 100] and 0.5 [0.22, 16]." in texts[0]
    assert "2 x 2 seeds" in texts[0]
    assert shares in texts[1], "the metric that was asked for"
    assert not any(isinstance(block, Cards | BulletList) for block in blocks), "no comparison, no advice"
    assert "no seed is better" in str(list(contrast_verdicts(inputs)))


def test_where_another_factor_varies_too_only_its_levels_are_compared(tmp_path: Path) -> None:
    for noise in (0.0, 0.5):
        write_crossed(tmp_path / "crossed", noise=noise)
    [inputs] = collect_inputs(load_runs([tmp_path]))
    assert set(inputs.contrasts["factor"]) == {"noise"}
    assert [block for block in answer(inputs) if isinstance(block, Cards)]
