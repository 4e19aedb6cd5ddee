"""Tests of the mixed model behind claims of kind "mixed": other ways to the same numbers, and error rates."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from statsmodels.regression.mixed_linear_model import MixedLM

from moe.analysis.claims import judge
from moe.analysis.mixed import mixed, range_p
from moe.analysis.simultaneous import block
from moe.analysis.statistics import range_test
from moe.config.claim import ClaimConfig


def values(table: np.ndarray) -> pd.Series:
    frame = pd.DataFrame(table, columns=list("abcdefgh")[: table.shape[1]])
    frame.index.name, frame.columns.name = "seed", "cell"
    return frame.T.stack().dropna()


def drawn(rng: np.random.Generator, *, seeds: int = 3, cells: int = 6) -> np.ndarray:
    return 3 + rng.normal(0, 1, (seeds, 1)) + rng.normal(0, 0.1, (seeds, cells))


def difference(cells: str) -> pd.Series:
    return pd.Series([1.0, -1.0], index=list(cells))


def test_with_all_runs_it_is_the_two_way_analysis_of_variance() -> None:
    table = drawn(np.random.default_rng(0))
    model = mixed(values(table))
    layout = block(pd.DataFrame(table))
    effect, error = model.contrast(difference("ca"))
    assert effect == pytest.approx(table[:, 2].mean() - table[:, 0].mean())
    assert error == pytest.approx(layout.error, rel=1e-4)
    assert model.freedom == layout.freedom == 10


def test_with_missing_runs_it_agrees_with_statsmodels() -> None:
    table = drawn(np.random.default_rng(1), seeds=6, cells=4)
    table[0, 1] = table[3, 3] = table[4, 0] = math.nan
    long = values(table)
    effect, error = mixed(long).contrast(difference("ba"))
    data = long.rename("y").reset_index()
    fit = MixedLM.from_formula("y ~ C(cell)", data, groups="seed").fit(reml=True)
    assert effect == pytest.approx(fit.params["C(cell)[T.b]"], rel=1e-3)
    assert error == pytest.approx(fit.bse["C(cell)[T.b]"], rel=1e-2)
    with pytest.raises(ValueError, match="leave no spread"):
        mixed(values(table[:1]))


def test_p_is_that_of_the_tests_of_a_range() -> None:
    sample = np.random.default_rng(2).normal(0.3, 1, 9)
    error = sample.std(ddof=1) / 3
    for low, high in ((0.0, math.inf), (-math.inf, 0.0), (-0.5, 0.5), (0.5, 2.0)):
        assert range_p(sample.mean(), error, 8, low, high) == pytest.approx(range_test(sample, low, high))


def judged(table: np.ndarray, kind: str) -> pd.Series:
    """Judge that level 1 is higher than level 0, from runs at levels 0, 1, ... of a factor."""
    rows = [
        {"noise": float(cell), "seed": seed, "val/loss": table[seed, cell], "status": "finished", "folder": "made up"}
        for seed in range(len(table))
        for cell in range(table.shape[1])
    ]
    words = {"direction": "higher"} if kind == "mixed" else {}
    claim = ClaimConfig(text="rises", metric="val/loss", factor="noise", levels=[1.0], than=[0.0], kind=kind, **words)
    return judge(pd.DataFrame(rows).assign(experiment="made up"), [claim]).iloc[0]


def test_few_seeds_find_more_than_paired_differences() -> None:
    rng, repeats = np.random.default_rng(0), 10
    found = {"mixed": 0, "higher": 0}
    for _ in range(repeats):
        table = drawn(rng)
        table[:, 1] += 0.4
        for kind in found:
            found[kind] += judged(table, kind)["verdict"] == "supported"
    assert found["mixed"] >= 9
    assert found["mixed"] > found["higher"]


def error_rate(spreads: list[float], repeats: int = 1200) -> float:
    """Return how often the model finds a difference of the first two cells, where there is none."""
    rng, errors = np.random.default_rng(1), 0
    for _ in range(repeats):
        layout = block(pd.DataFrame(rng.normal(0, 1, (3, 1)) + rng.normal(0, spreads, (3, len(spreads)))))
        t = (layout.means[0] - layout.means[1]) / layout.error
        errors += 2 * stats.t.sf(abs(t), layout.freedom) <= 0.05
    return errors / repeats


def test_error_rates() -> None:
    """The rate is 5 % if all settings spread alike; it is not if those that are compared spread more than the others.

    With all runs the model is the two-way analysis of variance, which is faster to simulate.
    """
    assert error_rate([0.1] * 6) == pytest.approx(0.05, abs=0.018)
    assert error_rate([0.4, 0.4, 0.1, 0.1, 0.1, 0.1]) > 0.1, "docs/statistics.md warns of this"


def test_a_model_with_nothing_to_estimate_decides_nothing_and_equal_differences_are_deterministic() -> None:
    alone = judged(drawn(np.random.default_rng(0), seeds=1, cells=3), "mixed")
    assert (alone["verdict"], alone["n"]) == ("not tested", 0)
    assert "leave no spread" in alone["reason"]
    exact = judged(np.arange(3.0)[:, None] + np.array([0.0, 1.0, 2.0]), "mixed")
    assert (exact["verdict"], exact["deterministic"]) == ("supported", True)
