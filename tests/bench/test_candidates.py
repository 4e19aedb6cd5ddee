"""Tests of the simulated studies by which ways to test are compared: their spreads are those of real studies."""

import numpy as np
import pytest
from scipy import special, stats

from moe.bench.candidates import (
    EVALUATIONS,
    SPREADS,
    SPREADS_FROM,
    TEXT_BIAS,
    TEXT_SHARE,
    TIMES,
    inverse_trigamma,
    moderated,
    paired,
    simulated,
)
from moe.bench.kinds import KINDS
from moe.config.options import CONF
from moe.results.conditions import by_seed, conditions, varied_factors
from moe.results.shipped import read_shipped

DOCS = CONF.parent / "docs"


def test_moderated_variances_err_where_spreads_differ() -> None:
    values = simulated(3, "one level x4", 1500)
    assert (paired(values.last)[:, -1] <= 0.05).mean() < 0.07
    assert (moderated(values.last)[:, -1] <= 0.05).mean() > 0.15
    assert special.polygamma(1, inverse_trigamma(np.array([0.01, 1.0, 40.0]))) == pytest.approx([0.01, 1.0, 40.0])


@pytest.mark.parametrize("spread", SPREADS)
def test_no_kind_of_test_errs_more_often_than_its_level_says(spread: str) -> None:
    values, highest = simulated(3, spread, 2000).last, stats.binom.ppf(0.9999, 2000, 0.05) / 2000
    rates = {name: float(errs(values).mean()) for name, errs in KINDS.items() if name != "ANOVA"}
    assert max(rates.values()) <= highest, rates
    assert rates["higher"] == pytest.approx(0.05, abs=0.02)


def test_more_text_and_the_last_evaluations_spread_less_by_what_their_spreads_say() -> None:
    values = simulated(3, "equal", 4000)
    spreads = [(each[:, :, 2] - each[:, :, 1]).var() / 2 for each in values]
    expected = [1.0, 1 - TEXT_SHARE * (1 - 1 / TIMES), EVALUATIONS.mean()]
    assert spreads == pytest.approx(expected, rel=0.04)


def test_the_simulated_spreads_are_those_of_the_studies() -> None:
    """Runs deviate from the means of their setting and their seed on validation text, and otherwise on test text."""
    shares, biases, covariances = list[float](), list[float](), list[np.ndarray]()
    for name in SPREADS_FROM:
        runs, past = read_shipped(DOCS / "studies" / name)
        runs = runs[(runs["status"] == "finished") & runs["search"].isna()]
        cells = [part for _, part in conditions(runs, [each for each in varied_factors(runs) if each != "seed"])]
        losses = past.evals.pivot_table(index="folder", columns="step", values="val/loss")
        at = [np.array([losses.loc[list(part["folder"]), step] for part in cells]) for step in losses.columns[:-4:-1]]
        test = np.array([by_seed(part, "test/loss") for part in cells])
        freedom = (len(test) - 1) * (test.shape[1] - 1)
        rest = np.array(
            [each - each.mean(1, keepdims=True) - each.mean(0) + each.mean() for each in (*at, at[0] - test)]
        )
        products = np.einsum("ams,bms->ab", rest, rest) / freedom
        covariances.append(products[:3, :3] / products[0, 0])
        shares.append(products[3, 3] / 2 / products[0, 0])
        means = (at[0] - test).mean(1)
        biases.append((means.var(ddof=1) / 2 - products[3, 3] / 2 / test.shape[1]) / products[0, 0])
    assert pytest.approx(np.median(shares), abs=0.01) == TEXT_SHARE
    assert pytest.approx(np.mean(biases), abs=0.01) == TEXT_BIAS**2
    assert pytest.approx(np.median(covariances, axis=0), abs=0.02) == EVALUATIONS
