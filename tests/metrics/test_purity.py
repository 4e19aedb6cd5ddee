"""Agreement of experts with domains: counted by loops, computed by scikit-learn, and in closed form."""

from collections import Counter

import numpy as np
import pytest
from sklearn.metrics import homogeneity_score

from moe.metrics.purity import domain_agreement, domain_information, purity, purity_chance


def counts_of(domain: np.ndarray, expert: np.ndarray, domains: int, experts: int) -> np.ndarray:
    """Return the counts (1, N, E) of one layer in which each token takes one expert."""
    counts = np.zeros((1, domains, experts))
    np.add.at(counts[0], (domain, expert), 1)
    return counts


@pytest.mark.parametrize("agreement", [0.0, 0.3, 1.0])
def test_purity_is_what_loops_count_and_information_is_the_homogeneity_of_scikit_learn(agreement: float) -> None:
    """One expert of 8 has no token, and domains have unequal sizes."""
    rng = np.random.default_rng(0)
    domain = rng.choice(3, size=2000, p=[0.6, 0.3, 0.1])
    expert = np.where(rng.random(2000) < agreement, domain, rng.integers(7, size=2000))
    counts = counts_of(domain, expert, 3, 8)
    leading = sum(max(Counter(domain[expert == e].tolist()).values(), default=0) for e in range(8))
    assert purity(counts) == pytest.approx(leading / 2000)
    assert purity_chance(counts) == pytest.approx(max(Counter(domain.tolist()).values()) / 2000)
    assert domain_information(counts) == pytest.approx(homogeneity_score(domain, expert), abs=1e-12)


def test_both_are_1_where_each_expert_has_one_domain_and_at_chance_where_experts_are_all_alike() -> None:
    sizes = np.array([60.0, 30.0, 10.0])
    pure = np.kron(np.diag(sizes), [[0.5, 0.5]])[None]  # two experts for each domain, as an oracle with E = 2 N
    alike = np.broadcast_to(sizes[:, None] / 6, (1, 3, 6))
    assert [*purity(pure), *domain_information(pure)] == pytest.approx([1, 1])
    assert [*purity(alike), *purity_chance(alike), *purity_chance(pure)] == pytest.approx([0.6] * 3)
    assert domain_information(alike) == pytest.approx(0, abs=1e-12)


def test_only_the_information_sees_a_difference_below_a_domain_that_leads_everywhere() -> None:
    counts = np.array([[[50.0, 50.0], [30.0, 0.0], [0.0, 30.0]]])
    assert purity(counts) == purity_chance(counts)
    assert domain_information(counts) > 0.25


def test_layers_have_values_of_their_own_and_none_where_there_is_no_agreement() -> None:
    pure, one_domain = np.diag([3.0, 5.0]), np.array([[2.0, 6.0], [0.0, 0.0]])
    found = domain_agreement(np.stack([pure, np.full((2, 2), 2.0)]))
    assert (found["routing/purity/layer00"], found["routing/purity/layer01"], found["routing/purity"]) == (1, 0.5, 0.75)
    assert found["routing/domain_information"] == pytest.approx(0.5)
    for absent in (one_domain, np.zeros((2, 2)), np.full((2, 2), np.nan)):
        assert set(domain_agreement(absent[None]).values()) == {None}
