"""Tests of expert thresholds: which tokens exceed them, how they are learned, and balance without a loss."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from moe.checks import ConfigError
from moe.routers.expert_threshold import ExpertThreshold
from moe.routers.topk import TopK
from moe.routing.decision import Context, Knobs
from moe.routing.dispatch import dispatch
from moe.routing.measurement import collect_stats
from moe.routing.stats import RoutingStats

D, E, T = 16, 8, 512


def make(**settings: Any) -> ExpertThreshold:
    router = ExpertThreshold(D, E, **settings)
    nn.init.normal_(router.weight, std=0.5, generator=torch.Generator().manual_seed(0))
    return router


def context(tokens: int = T) -> Context:
    return Context(torch.zeros(1, tokens, dtype=torch.long), Knobs.of())


def stats_of(router: ExpertThreshold, x: Tensor) -> RoutingStats:
    routing = router(x, context(len(x)))
    return collect_stats(routing, dispatch(routing, E, capacity=None, seq_len=len(x)), len(x))


def quantiles(router: ExpertThreshold, x: Tensor) -> Tensor:
    """Return the (1 - 2 / E) quantile of each expert's logits."""
    logits = (x @ router.weight.T).detach().numpy()
    return torch.from_numpy(np.quantile(logits, 1 - 2 / E, axis=0))


def test_a_token_takes_every_expert_whose_threshold_its_logit_exceeds() -> None:
    router, x = make(), torch.randn(T, D)
    router.threshold.copy_(torch.linspace(-2, 2, E))
    logits = x @ router.weight.T
    scores = torch.sigmoid(logits)
    routing = router(x, context())
    expected = [(t, e) for t in range(T) for e in range(E) if logits[t, e] > router.threshold[e]]
    assert list(zip(routing.token.tolist(), routing.expert.tolist(), strict=True)) == expected
    torch.testing.assert_close(routing.weight, torch.stack([scores[pair] for pair in expected]))


def test_a_token_below_every_threshold_gets_no_expert() -> None:
    router = make()
    router.threshold.fill_(0.001)
    assert len(router(torch.zeros(T, D), context()).token) == 0


@pytest.mark.parametrize("training", [True, False])
def test_before_the_first_update_it_selects_like_top_k(training: bool) -> None:
    router, x = make(k=3).train(training), torch.randn(T, D)
    routing = router(x, context())
    top = TopK(D, E, k=3)
    top.weight = router.weight
    assert torch.equal(routing.expert.view(T, 3), top(x, context()).expert.view(T, 3).sort(-1).values)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_on_the_batch_that_set_the_thresholds_all_loads_are_equal(k: int) -> None:
    """After an update, every expert takes T k / E tokens of the same batch.

    A token then has k experts on average, but not every token has k.
    """
    router, x = make(k=k), torch.randn(T, D) + 0.5
    router.after_step(stats_of(router, x))
    routing = router(x, context())
    assert torch.bincount(routing.expert, minlength=E).tolist() == [T * k // E] * E
    assert len(torch.bincount(routing.token, minlength=T).unique()) > 1


def test_the_first_update_sets_the_thresholds_and_later_ones_average_them() -> None:
    router, first, second = make(decay=0.75), torch.randn(T, D), torch.randn(T, D)
    a, b = quantiles(router, first), quantiles(router, second)
    router.after_step(stats_of(router, first))
    torch.testing.assert_close(router.threshold, a)
    router.after_step(stats_of(router, second))
    torch.testing.assert_close(router.threshold, 0.75 * a + 0.25 * b)


def test_an_update_uses_the_mean_over_the_tokens_of_all_micro_batches() -> None:
    router, first, second = make(), torch.randn(T, D), torch.randn(3 * T, D)
    a, b = quantiles(router, first), quantiles(router, second)
    router.after_step(stats_of(router, first).merge(stats_of(router, second)))
    torch.testing.assert_close(router.threshold, (a + 3 * b) / 4)


def test_thresholds_balance_a_skewed_router_on_new_batches() -> None:
    router, generator = make(), torch.Generator().manual_seed(1)

    def batch() -> Tensor:
        return torch.randn(T, D, generator=generator) + 2 * router.weight[0].detach()

    def load_cv() -> float:
        load = stats_of(router, batch()).offered
        return (load.std(correction=0) / load.mean()).item()

    before = load_cv()
    for _ in range(30):
        router.after_step(stats_of(router, batch()))
    assert before > 0.5
    assert load_cv() < 0.15
    assert stats_of(router, batch()).assignments.item() / T == pytest.approx(2, rel=0.1)


def test_thresholds_are_saved() -> None:
    assert list(make().state_dict()) == ["weight", "threshold"]


@pytest.mark.parametrize("settings", [{"k": 0}, {"k": E + 1}, {"decay": 1.0}, {"decay": -0.1}, {"decay": float("nan")}])
def test_wrong_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"router\.{next(iter(settings))}="):
        ExpertThreshold(D, E, **settings)
