"""Tests of MoE++: a layer against a loop over tokens, residual scores, and the balance loss."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe.checks import ConfigError
from moe.model.experts import Experts
from moe.model.layer import MoELayer
from moe.routers.moe_plus_plus import MoEPlusPlus
from moe.routing.decision import Context, Knobs

D, E, T = 16, 8, 60


def make(**settings: Any) -> MoEPlusPlus:
    torch.manual_seed(0)
    router = MoEPlusPlus(D, E, **settings)
    router.initialize(0.5)
    return router


def context_of(tokens: int, state: Tensor | None = None) -> Context:
    return Context(torch.zeros(1, tokens, dtype=torch.long), Knobs.of(), state=state)


@pytest.mark.parametrize(("zero", "copy", "constant"), [(1, 1, 2), (0, 0, 3), (2, 0, 0), (0, 2, 0)])
def test_the_output_of_a_layer_equals_a_loop_over_tokens_and_choices(zero: int, copy: int, constant: int) -> None:
    router = make(k=3, zero=zero, copy=copy, constant=constant)
    experts = Experts(E, D, hidden=12, kind="silu")
    nn.init.normal_(experts.up, std=0.3)
    nn.init.normal_(experts.down, std=0.3)
    x, before = torch.randn(1, T, D), torch.randn(T, E + zero + copy + constant)
    layer = MoELayer(router, experts)
    y = layer(x, context_of(T, before)).y[0]
    computed = experts(x[0].repeat(E, 1), torch.full((E,), T)).view(E, T, D)
    assert router.residual is not None
    kinds = [*("expert",) * E, *("copy",) * copy, *("constant",) * constant, *("zero",) * zero]
    for t in range(T):
        z = router.weight @ x[0, t] + router.residual @ before[t]
        chosen = [s for s in z.topk(3).indices.tolist() if kinds[s] != "zero"]
        expected = torch.zeros(D)
        for s, gate in zip(chosen, torch.softmax(z[chosen], -1), strict=True):
            if kinds[s] == "expert":
                output = computed[s, t]
            elif kinds[s] == "copy":
                output = x[0, t]
            else:
                assert router.proportion is not None
                assert router.constant is not None
                number = s - E - copy
                a, b = torch.softmax(router.proportion[number] @ x[0, t], -1)
                output = a * x[0, t] + b * router.constant[number]
            expected = expected + gate * output
        torch.testing.assert_close(y[t], expected, atol=1e-5, rtol=1e-5)


def test_the_logits_of_the_first_layer_are_w_x_and_those_of_the_next_one_add_to_them() -> None:
    router, x = make(), torch.randn(T, D)
    first = router(x, context_of(T))
    torch.testing.assert_close(first.state, x @ router.weight.T)
    second = router(x, context_of(T, first.state))
    assert router.residual is not None
    torch.testing.assert_close(second.state, x @ router.weight.T + first.state @ router.residual.T)
    assert make(residual=False)(x, context_of(T, first.state)).state is None


def test_a_token_that_chooses_only_zero_experts_gets_nothing() -> None:
    router, x = make(k=2, zero=2, copy=0, constant=0), torch.randn(T, D)
    with torch.no_grad():
        router.weight[E:] = 10 * x[0]
    routing = router(x, context_of(T))
    assert (routing.token != 0).all()
    assert routing.added is not None
    assert (routing.added == 0).all()
    (routing.weight.sum() + routing.added.sum()).backward()
    assert router.weight.grad is not None
    assert router.weight.grad.isfinite().all()


def test_the_balance_loss_equals_a_loop_and_is_1_if_balanced() -> None:
    """Balanced means that a choice that computes nothing is chosen 1 / tau as often as an expert."""
    router, x = make(k=3, tau=0.25), torch.randn(T, D)
    logits = x @ router.weight.T
    probs, picks = torch.softmax(logits, -1).mean(0), logits.topk(3).indices.flatten().tolist()
    eta = [1.0] * E + [0.25] * 4
    expected = sum(e * picks.count(s) / (3 * T) * probs[s].item() for s, e in enumerate(eta)) * (E + 4 / 0.25)
    assert router(x, context_of(T)).aux["heterogeneous_balance"].item() == pytest.approx(expected, rel=1e-5)
    balanced = torch.tensor([1 / e for e in eta]) / (E + 4 / 0.25)  # 8 shares of 1/24, and 4 of 4/24
    singles = torch.eye(E + 4, dtype=torch.bool).repeat_interleave((24 * balanced).round().long(), 0)
    one = make(k=2, tau=0.25)
    one.k = 1
    assert one._balance(singles, balanced.expand(24, -1)).item() == pytest.approx(1)


def test_training_on_the_balance_loss_alone_leads_to_the_share_of_the_paper() -> None:
    """Experts get tau E / (tau E + Z) of the choices (table 1 of the paper)."""
    router, x = make(tau=0.25, balance=1.0), torch.randn(400, D, generator=torch.Generator().manual_seed(1)) + 0.5
    optimizer = torch.optim.SGD([router.weight], lr=0.5)
    for _ in range(200):
        optimizer.zero_grad()
        router(x, context_of(400)).aux["heterogeneous_balance"].backward()
        optimizer.step()
    assert router.mean_k == pytest.approx(2 * 2 / (2 + 4))
    assert len(router(x, context_of(400)).token) / 400 == pytest.approx(router.mean_k, rel=0.15)


@pytest.mark.parametrize(
    "settings", [{"k": 1}, {"k": E + 5}, {"zero": -1}, {"copy": -1}, {"constant": -1}, {"tau": 0.0}, {"balance": -0.1}]
)
def test_wrong_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"router\.{next(iter(settings))}="):
        MoEPlusPlus(D, E, **settings)
    with pytest.raises(ConfigError, match=r"router\.zero=0"):
        MoEPlusPlus(D, E, zero=0, copy=0, constant=0)
