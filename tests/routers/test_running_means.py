"""Tests of running means: the cosines, the moving average against a loop, and clusters that it finds."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moe.checks import ConfigError
from moe.model.experts import Experts
from moe.model.layer import MoELayer
from moe.routers.running_means import RunningMeans
from moe.routing.decision import Context, Knobs
from moe.routing.stats import RoutingStats

D, E, T = 16, 8, 60


def make(experts: int = E, **settings: float) -> MoELayer:
    torch.manual_seed(0)
    router = RunningMeans(D, experts, **settings)
    router.initialize(0.02)
    layer = MoELayer(router, Experts(experts, D, hidden=4, kind="silu"))
    for p in layer.experts.parameters():
        torch.nn.init.zeros_(p)
    return layer


def stats_of(layer: MoELayer, x: Tensor) -> RoutingStats:
    return layer(x[None], Context(torch.zeros(1, len(x), dtype=torch.long), Knobs.of())).stats


def test_tokens_take_the_experts_of_largest_cosine() -> None:
    router, x = make(k=3).router, torch.randn(T, D)
    routing = router(x, Context(torch.zeros(1, T, dtype=torch.long), Knobs.of()))
    for t in range(T):
        cosines = F.cosine_similarity(x[t], router.mean, dim=-1)
        best = cosines.topk(3)
        assert routing.expert.view(T, 3)[t].tolist() == best.indices.tolist()
        torch.testing.assert_close(routing.weight.view(T, 3)[t], torch.softmax(best.values, -1))
    scaled = router(5 * x, Context(torch.zeros(1, T, dtype=torch.long), Knobs.of()))
    assert torch.equal(scaled.expert, routing.expert)


def test_means_are_moving_averages_over_the_tokens_of_a_step() -> None:
    """A step has two micro-batches. An expert without a token keeps its mean."""
    layer = make(k=1, decay=0.75)
    with torch.no_grad():
        layer.router.mean[3] = torch.tensor([-1.0] + [0.0] * (D - 1))  # no token is near it while x_0 > 0
    expected = layer.router.mean.clone()
    for _ in range(3):
        parts = [torch.randn(T, D), torch.randn(T // 2, D)]
        for x in parts:
            x[:, 0] = 5 + x[:, 0].abs()
        x = torch.cat(parts)
        nearest = torch.stack([F.cosine_similarity(each, expected, dim=-1).argmax() for each in x])
        stats = stats_of(layer, parts[0]).merge(stats_of(layer, parts[1]))
        for e in range(E):
            if (nearest == e).any():
                expected[e] = 0.75 * expected[e] + 0.25 * x[nearest == e].mean(0)
        layer.router.after_step(stats)
        torch.testing.assert_close(layer.router.mean, expected, rtol=1e-4, atol=1e-5)
    assert layer.router.mean[3, 0] == -1.0


def test_the_means_find_clusters() -> None:
    """Tokens around four orthogonal directions end up at four experts, one for each direction."""
    layer, centers = make(4, k=1, decay=0.8), 4 * torch.eye(4, D)
    with torch.no_grad():
        layer.router.mean.copy_(centers + torch.randn(4, D))
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        x = centers.repeat(25, 1) + 0.3 * torch.randn(100, D, generator=generator)
        layer.router.after_step(stats_of(layer, x))
    torch.testing.assert_close(layer.router.mean, centers, atol=0.2, rtol=0)


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"router\.decay="):
        RunningMeans(D, E, decay=1.0)
