"""Every metric against a closed form, at both ends of its range."""

import math

import pytest
import torch

from moe.dispatch import plan
from moe.metrics import METRICS, measure, summarize, utilization
from moe.routing import Routing, RoutingStats

E, K, T = 8, 2, 64
LN_E = math.log(E)


def stats_of(expert: torch.Tensor, probs: torch.Tensor | None, *, capacity: float | None = None) -> RoutingStats:
    """One layer's sums, with a leading layer axis; clean logits are the logs of `probs`."""
    logits = probs.log() if probs is not None else None
    routing = Routing.token_choice(expert, torch.ones(expert.shape), probs=probs, logits=logits)
    todo = plan(routing, E, capacity=capacity, seq_len=len(expert))
    return RoutingStats.stack([measure(routing, todo, len(expert))])


def balanced() -> RoutingStats:
    expert = (torch.arange(T)[:, None] + torch.arange(K)) % E
    return stats_of(expert, torch.full((T, E), 1 / E))


def collapsed() -> RoutingStats:
    probs = torch.full((T, E), 1e-12)
    probs[:, 0] = 1
    return stats_of(torch.zeros(T, 1, dtype=torch.long), probs)


CLOSED_FORMS = {  # metric: (balanced and undecided, everything to one expert with certainty)
    "load_cv": (0, math.sqrt(E - 1)),
    "load_max_violation": (0, E - 1),
    "load_gini": (0, (E - 1) / E),
    "load_entropy": (1, 0),
    "effective_experts": (E, 1),
    "unused_experts": (0, (E - 1) / E),
    "drop_rate": (0, 0),
    "unrouted_rate": (0, 0),
    "entropy": (LN_E, 0),
    "entropy_t1": (LN_E, 0),
    "confidence": (1 / E, 1),
    "confidence_t1": (1 / E, 1),
    "mutual_information": (0, 0),
    "logsumexp_squared": (0, 0),
}


@pytest.mark.parametrize("name", METRICS)
def test_closed_forms(name: str) -> None:
    low, high = CLOSED_FORMS[name]
    assert summarize(balanced())[f"routing/{name}"] == pytest.approx(low, abs=1e-5)
    assert summarize(collapsed())[f"routing/{name}"] == pytest.approx(high, abs=1e-5)


def test_top_2_cannot_be_less_balanced_than_its_attainable_maximum() -> None:
    expert = torch.tensor([[0, 1]]).expand(T, 2)
    values = summarize(stats_of(expert, None))
    assert values["routing/load_cv"] == pytest.approx(math.sqrt(E / K - 1))
    assert values["routing/load_gini"] == pytest.approx(1 - K / E)
    assert values["routing/load_max_violation"] == pytest.approx(E / K - 1)


def test_specialisation_is_mutual_information() -> None:
    """Certain about each token, uniform over all: ln E."""
    probs = torch.eye(E).repeat(T // E, 1).clamp(min=1e-12)
    assert summarize(stats_of(probs.topk(1).indices, probs))["routing/mutual_information"] == pytest.approx(LN_E, 1e-4)


def test_pooling_lets_layers_cancel_and_the_layers_show_it() -> None:
    left, right = (torch.full((T, 1), e) for e in (0, 1))
    layers = [RoutingStats(*(field[0] for field in stats_of(expert, None))) for expert in (left, right)]
    values = summarize(RoutingStats.stack(layers))
    assert values["routing/load_cv/layer00"] == values["routing/load_cv/layer01"] == pytest.approx(math.sqrt(E - 1))
    assert values["routing/load_cv"] == values["routing/load_cv/worst"] == pytest.approx(math.sqrt(E - 1))
    assert values["routing/load_cv/pooled"] == pytest.approx(math.sqrt(E / 2 - 1))


def test_balance_is_judged_on_the_load_asked_for() -> None:
    """On kept assignments a tight capacity would look perfectly balanced."""
    expert = torch.zeros(T, 1, dtype=torch.long)
    values = summarize(stats_of(expert, None, capacity=1.0))
    assert values["routing/load_cv"] == pytest.approx(math.sqrt(E - 1))
    assert values["routing/drop_rate"] == values["routing/unrouted_rate"] == pytest.approx(1 - 1 / E)


def test_a_router_without_probabilities_has_null_metrics_not_zeros() -> None:
    values = summarize(stats_of(torch.zeros(T, 1, dtype=torch.long), None))
    assert values["routing/entropy"] is None
    assert values["routing/mutual_information/layer00"] is None
    assert values["routing/load_cv"] is not None


def test_metrics_of_merged_sums_are_those_of_all_tokens() -> None:
    torch.manual_seed(0)
    probs = torch.softmax(torch.randn(T, E), -1)
    expert = probs.topk(K).indices
    parts = stats_of(expert[:20], probs[:20]).merge(stats_of(expert[20:], probs[20:]))
    whole = summarize(stats_of(expert, probs))
    for name, value in summarize(parts).items():
        assert value == pytest.approx(whole[name], rel=1e-5, abs=1e-6), name


def test_utilization_sums_to_one_per_layer() -> None:
    [shares] = utilization(balanced())
    assert shares == pytest.approx([1 / E] * E)
