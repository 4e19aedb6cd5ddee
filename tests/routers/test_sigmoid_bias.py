"""Tests of sigmoid routing with a bias: selection by score + bias, gates by score, and updates of the bias."""

from typing import Any

import mpmath
import pytest
import torch
from torch import nn

from moe.routers.sigmoid_bias import SigmoidBias
from moe.routing.decision import Context, Knobs
from moe.routing.dispatch import dispatch
from moe.routing.measurement import collect_stats
from moe.routing.stats import RoutingStats
from moe.runs.signals import Signals
from moe.training.loop import train
from moe.training.setup import build_model, prepare_data

D, E, T = 16, 8, 50


def make(**settings: Any) -> SigmoidBias:
    router = SigmoidBias(D, E, **settings)
    nn.init.normal_(router.weight, generator=torch.Generator().manual_seed(0))
    return router


def context(tokens: int = T) -> Context:
    return Context(torch.zeros(1, tokens, dtype=torch.long), Knobs.of())


def stats_with_loads(loads: list[int]) -> RoutingStats:
    """Return sums over T tokens, with the given load of each expert."""
    router = make(k=1)
    routing = router(torch.randn(T, D), context())
    sums = collect_stats(routing, dispatch(routing, E, capacity=None, seq_len=T), T)
    return sums._replace(offered=torch.tensor(loads, dtype=torch.float32))


def test_the_bias_changes_the_selection_but_not_the_gates() -> None:
    x = torch.randn(T, D)
    router = make(k=2, normalize=False)
    router.bias[3] = 10.0
    routing = router(x, context())
    experts, weights = routing.expert.view(T, 2), routing.weight.view(T, 2)
    assert (experts == 3).any(-1).all()
    scores = torch.sigmoid(x @ router.weight.T)
    torch.testing.assert_close(weights, scores.gather(-1, experts))


def test_normalized_gates_sum_to_one_except_with_k_1() -> None:
    torch.testing.assert_close(make(k=3)(torch.randn(T, D), context()).weight.view(T, 3).sum(-1), torch.ones(T))
    assert (make(k=1)(torch.randn(T, D), context()).weight < 1).all()


def test_scores_can_be_roots_of_softplus_as_in_deepseek_v4() -> None:
    """The reference computes ln(1 + exp(z)) with 60 digits, also where exp(z) is 0 in fp32, and above 17."""
    router = make(k=2, scores="sqrt_softplus", scale=1.5)
    router.bias.copy_(torch.linspace(-0.2, 0.2, E))
    for size in (1.0, 30.0, 300.0):
        x = size * torch.randn(T, D, generator=torch.Generator().manual_seed(1))
        routing = router(x, context())
        assert routing.logits is not None
        for t, row in enumerate(routing.logits.tolist()):
            with mpmath.workdps(60):
                scores = [mpmath.sqrt(mpmath.log1p(mpmath.exp(z))) for z in row]
                best = sorted(range(E), key=lambda e: scores[e] + router.bias[e].item(), reverse=True)[:2]
                gates = [float(1.5 * scores[e] / (scores[best[0]] + scores[best[1]])) for e in best]
            own = routing.token == t
            assert routing.expert[own].tolist() == best
            assert routing.weight[own].tolist() == pytest.approx(gates, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(
    ("update", "expected"),
    [("sign", [1, 1, 1, 1, -1, -1, -1, -1]), ("proportional", [1, 0.5, 0.25, 0.25, -0.5, -0.5, -0.5, -0.5])],
)
def test_the_bias_rises_for_loads_below_the_mean_and_falls_for_loads_above_it(
    update: Any, expected: list[float]
) -> None:
    router = make(rate=0.01, update=update)
    router.after_step(stats_with_loads([0, 4, 6, 6, 12, 12, 12, 12]))
    torch.testing.assert_close(router.bias, 0.01 * torch.tensor(expected, dtype=torch.float32))


def test_the_bias_stays_centered() -> None:
    router = make(rate=0.1)
    for load in ([0, 8, 8, 8, 8, 8, 8, 8], [1, 0, 0, 0, 0, 0, 0, 55]):
        router.after_step(stats_with_loads(load))
        torch.testing.assert_close(router.bias.mean(), torch.tensor(0.0), atol=1e-6, rtol=0)


def test_the_bias_balances_a_skewed_router_without_a_gradient() -> None:
    """When all tokens prefer the same experts, updates of the bias reduce MaxVio by more than half."""
    torch.manual_seed(1)
    router = make(k=2, rate=0.02)
    x = torch.randn(400, D) + 0.8 * router.weight[0] / router.weight[0].norm()

    def max_violation() -> float:
        load = torch.bincount(router(x, context(400)).expert, minlength=E).float()
        return (load.max() / load.mean() - 1).item()

    before = max_violation()
    for _ in range(200):
        routing = router(x, context(400))
        router.after_step(collect_stats(routing, dispatch(routing, E, capacity=None, seq_len=400), 400))
    assert max_violation() < before / 2


def test_the_bias_is_updated_once_per_optimizer_step_and_never_in_evaluation(
    cell: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six steps of three micro-batches each, with three evaluations in between, update each layer's bias six times."""
    one = cell("router=sigmoid_bias", "router.rate=1.0", "lb=0", "grad_accum=3")
    one.folder.mkdir(parents=True)
    calls: list[int] = []
    monkeypatch.setattr(SigmoidBias, "after_step", lambda router, sums: calls.append(int(sums.tokens)))
    train(one.config, one.folder, signals=Signals())
    layers, tokens_per_step = 2, 3 * 4 * 32
    assert calls == [tokens_per_step] * 6 * layers


def test_the_biases_of_a_new_model_are_zero(cell: Any) -> None:
    config = cell("router=sigmoid_bias").config
    model = build_model(config, vocab_size=len(prepare_data(config).tokenizer))
    assert all((layer.mlp.router.bias == 0).all() for layer in model.model.layers)
