"""Tests of group-limited top-k: a token selects groups first, then experts inside them."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe.checks import ConfigError
from moe.routers.group_limited import GroupLimited
from moe.routers.topk import TopK
from moe.routing.decision import Context, Knobs, Routing

T, D, E = 60, 16, 12


@pytest.fixture
def x() -> Tensor:
    return torch.randn(T, D, generator=torch.Generator().manual_seed(1))


def route(router: TopK, x: Tensor) -> Routing:
    nn.init.normal_(router.weight, std=0.3, generator=torch.Generator().manual_seed(3))
    return router(x, Context(torch.zeros(1, len(x), dtype=torch.long), Knobs.of()))


@pytest.mark.parametrize(("groups", "top_groups", "k"), [(4, 2, 2), (4, 1, 3), (3, 2, 5), (12, 3, 3), (1, 1, 2)])
def test_selection_and_gates_equal_a_loop_over_tokens(x: Tensor, groups: int, top_groups: int, k: int) -> None:
    routing = route(GroupLimited(D, E, k=k, groups=groups, top_groups=top_groups), x)
    assert routing.probs is not None
    size = E // groups
    for t, p in enumerate(routing.probs.tolist()):
        members = [range(g * size, (g + 1) * size) for g in range(groups)]
        members.sort(key=lambda group: -sum(sorted((p[e] for e in group), reverse=True)[:2]))
        allowed = [e for group in members[:top_groups] for e in group]
        best = sorted(allowed, key=lambda e: -p[e])[:k]
        of_token = routing.token == t
        assert routing.expert[of_token].tolist() == best
        total = sum(p[e] for e in best)
        torch.testing.assert_close(routing.weight[of_token], torch.tensor([p[e] / total for e in best]))


@pytest.mark.parametrize("gate", ["renorm", "softmax_all", "uniform"])
def test_it_equals_top_k_if_every_group_is_allowed(x: Tensor, gate: Any) -> None:
    limited = route(GroupLimited(D, E, k=3, groups=4, top_groups=4, gate=gate), x)
    torch.testing.assert_close(limited[:5], route(TopK(D, E, k=3, gate=gate), x)[:5])


def test_a_group_is_scored_by_the_sum_of_its_two_best_experts() -> None:
    """Of the groups {0, 1} and {2, 3}, the first is chosen: its two best experts have more probability together.

    The second group holds the single best expert.
    """
    router = GroupLimited(2, 4, k=1, groups=2, top_groups=1)
    router.weight.data = torch.tensor([[1.0, 0], [1.0, 0], [1.2, 0], [-9.0, 0]])
    routing = router(torch.tensor([[1.0, 0]]), Context(torch.zeros(1, 1, dtype=torch.long), Knobs.of()))
    assert routing.probs is not None
    assert routing.probs.argmax() == 2
    assert routing.expert.item() in (0, 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"groups": 5}, r"router\.groups=5: must be a divisor of model\.num_experts=12"),
        ({"groups": 0}, r"router\.groups=0: must be a divisor"),
        ({"top_groups": 5}, r"router\.top_groups=5: must be between 1 and router\.groups=4"),
        ({"k": 7}, r"router\.k=7: must be at most 6, the experts in router\.top_groups=2 groups"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GroupLimited(D, E, **settings)
