"""Tests of frozen routing: the projection never learns, and the scale changes gates alone."""

import math

import pytest
import torch
from torch import nn

from moe.routers.frozen import Frozen
from moe.routers.random import Random
from moe.routing.decision import Context, Knobs

T, D, E = 12, 6, 5
CONTEXT = Context(torch.zeros(1, T, dtype=torch.long), Knobs.of())


def make(k: int, scale: float) -> Frozen:
    router = Frozen(D, E, k=k)
    router.weight.copy_(torch.randn(E, D, generator=torch.Generator().manual_seed(0)))
    nn.init.constant_(router.log_scale, math.log(scale))
    return router


@pytest.mark.parametrize("k", [1, 2, E])
@pytest.mark.parametrize("scale", [0.1, 1.0, 7.0])
def test_gates_are_those_of_the_scaled_logits(k: int, scale: float) -> None:
    router, x = make(k, scale), torch.randn(T, D)
    routing = router(x, CONTEXT)
    for t in range(T):
        logits = [scale * sum(w * v for w, v in zip(row, x[t].tolist(), strict=True)) for row in router.weight.tolist()]
        best = sorted(range(E), key=lambda e: -logits[e])[:k]
        total = sum(math.exp(logits[e]) for e in (best if k > 1 else range(E)))
        own = routing.token == t
        assert routing.expert[own].tolist() == best
        assert routing.weight[own].tolist() == pytest.approx([math.exp(logits[e]) / total for e in best], rel=1e-3)


def test_it_chooses_what_random_chooses_and_only_the_scale_trains() -> None:
    router, x = make(2, 3.0), torch.randn(T, D)
    control = Random(D, E, k=2)
    control.weight.copy_(router.weight)
    assert torch.equal(router(x, CONTEXT).expert, control(x, CONTEXT).expert)
    assert [name for name, _ in router.named_parameters()] == ["log_scale"]
    assert router.role("log_scale", router.log_scale) == "scale"  # no weight decay
    assert {*router.state_dict()} == {"log_scale", "weight"}
