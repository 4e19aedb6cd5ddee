"""Tests of null experts: selection, gates, and the balance loss over real and null experts."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe.checks import ConfigError
from moe.routers.null_experts import NullExperts
from moe.routing.decision import Context, Knobs, Routing
from moe.training.objective import total_loss
from moe.training.setup import build_model, prepare_data

D, E, Z, T = 16, 8, 8, 400


def make(**settings: Any) -> NullExperts:
    router = NullExperts(D, E, **settings)
    nn.init.normal_(router.weight, std=0.5, generator=torch.Generator().manual_seed(0))
    return router


def route(router: NullExperts, x: Tensor) -> Routing:
    return router(x, Context(torch.zeros(1, len(x), dtype=torch.long), Knobs.of()))


@pytest.mark.parametrize(("k", "nulls"), [(2, 1), (4, 8), (16, 8)])
def test_selection_and_gates_equal_a_loop_over_tokens(k: int, nulls: int) -> None:
    router, x = make(k=k, nulls=nulls), torch.randn(T, D)
    routing = route(router, x)
    logits = x @ router.weight.T
    for t in range(T):
        of_token = routing.token == t
        best = sorted(range(E + nulls), key=lambda slot: -logits[t, slot].item())[:k]
        real = sorted(slot for slot in best if slot < E)
        assert routing.expert[of_token].tolist() == real
        torch.testing.assert_close(routing.weight[of_token], torch.softmax(logits[t, real], -1))


def test_a_token_gets_0_to_k_experts_and_none_if_it_selects_only_null_experts() -> None:
    router, x = make(), torch.randn(T, D)
    counts = torch.bincount(route(router, x).token, minlength=T)
    assert set(counts.tolist()) == {0, 1, 2, 3, 4}
    with torch.no_grad():
        router.weight[E:] = 10 * x[0]
    assert (route(router, x).token != 0).all()


def test_probabilities_and_logits_cover_only_the_real_experts() -> None:
    router, x = make(), torch.randn(T, D)
    routing, real_probs = route(router, x), torch.softmax(x @ router.weight.T, -1)[:, :E]
    torch.testing.assert_close(routing.probs, real_probs / real_probs.sum(-1, keepdim=True))
    torch.testing.assert_close(routing.logits, x @ router.weight[:E].T)


def test_the_balance_loss_equals_a_loop_over_experts() -> None:
    """The balance loss covers all E + Z real and null experts. Each null expert counts with the mean share of all null
    experts.
    """
    router, x = make(k=3, nulls=5), torch.randn(T, D)
    logits = x @ router.weight.T
    probs, picks = torch.softmax(logits, -1), logits.topk(3).indices.flatten().tolist()
    share = [picks.count(slot) / (3 * T) for slot in range(E + 5)]
    share[E:] = [sum(share[E:]) / 5] * 5
    expected = (E + 5) * sum(f * p.item() for f, p in zip(share, probs.mean(0), strict=True))
    assert route(router, x).aux["null_balance"].item() == pytest.approx(expected, rel=1e-5)


def test_the_balance_loss_is_1_when_balanced_and_is_the_same_whichever_null_is_selected() -> None:
    router = make()
    uniform = torch.full((E + Z, E + Z), 1 / (E + Z))
    # each of the E + Z tokens selects 4 experts, and each of the E + Z experts is selected 4 times
    selected = (torch.arange(E + Z) - torch.arange(E + Z)[:, None]) % (E + Z) < 4
    assert router._balance(selected, uniform).item() == pytest.approx(1)
    probs = torch.softmax(torch.randn(T, E + Z), -1)
    several_nulls = torch.zeros(T, E + Z, dtype=torch.bool)
    several_nulls[:, :2] = True
    same_nulls = several_nulls.clone()
    same_nulls[:, E : E + 2] = True
    several_nulls[: T // 2, E : E + 2], several_nulls[T // 2 :, E + 4 : E + 6] = True, True
    torch.testing.assert_close(router._balance(same_nulls, probs), router._balance(several_nulls, probs))


def test_training_on_the_balance_loss_alone_leads_to_its_mean_number_of_experts() -> None:
    """Tokens take fewer than one real expert on average at first, and about k E / (E + Z) = 2 in the end."""
    router, x = make(), torch.randn(T, D, generator=torch.Generator().manual_seed(1)) + 0.5
    with torch.no_grad():
        router.weight[E:] += 0.3
    before = len(route(router, x).token) / T
    optimizer = torch.optim.SGD(router.parameters(), lr=0.5)
    for _ in range(100):
        optimizer.zero_grad()
        route(router, x).aux["null_balance"].backward()
        optimizer.step()
    assert before < 1
    assert len(route(router, x).token) / T == pytest.approx(2, rel=0.1)


def test_the_gradient_is_finite_with_tokens_without_an_expert() -> None:
    router, x = make(), torch.randn(T, D)
    (route(router, x).weight * torch.randn(len(route(router, x).weight))).sum().backward()
    assert router.weight.grad is not None
    assert router.weight.grad.isfinite().all()
    assert router.weight.grad.norm() > 0


def test_the_total_loss_contains_its_balance_loss_times_the_setting_balance(cell: Any) -> None:
    config = cell("router=null_experts", "router.balance=0.25", "lb=0").config
    model = build_model(config, vocab_size=len(prepare_data(config).tokenizer))
    loss_weights = [layer.router.loss_weights for layer in model.moe_layers]
    ids = torch.randint(0, 300, (2, 16))
    output = model(ids, ids)
    expected = output.loss + 0.25 * output.aux["null_balance"].sum()
    torch.testing.assert_close(total_loss(config, loss_weights, output), expected)


@pytest.mark.parametrize("settings", [{"k": 1}, {"k": E + Z + 1}, {"nulls": 0}, {"balance": -0.1}])
def test_wrong_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"router\.{next(iter(settings))}="):
        NullExperts(D, E, **settings)
