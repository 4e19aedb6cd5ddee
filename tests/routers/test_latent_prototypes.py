"""Tests of latent prototypes: the code, the cosines, and the three losses against other formulas."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from moe.checks import ConfigError
from moe.routers.latent_prototypes import LatentPrototypes
from moe.routing.decision import Context, Knobs, Routing

D, E, T, L = 16, 8, 50, 6


def make(**settings: Any) -> LatentPrototypes:
    torch.manual_seed(0)
    router = LatentPrototypes(D, E, **{"latent": L} | settings)
    router.initialize(0.3)
    return router


def route(router: LatentPrototypes, x: Tensor) -> Routing:
    return router(x, Context(torch.zeros(1, len(x), dtype=torch.long), Knobs.of()))


def code_of(router: LatentPrototypes, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and the standard deviation of the code of one token."""
    hidden = (x - x.mean()) / (x.var(correction=0) + 1e-5).sqrt()
    hidden = hidden * torch.sigmoid(hidden)
    return router.mean @ hidden, ((router.log_variance @ hidden) / 2).exp()


def test_evaluation_takes_the_prototypes_of_largest_cosine_with_the_mean_code() -> None:
    router, x = make(k=3).eval(), torch.randn(T, D)
    routing = route(router, x)
    for t in range(T):
        code, _ = code_of(router, x[t])
        cosines = torch.stack([code @ p / code.norm() / p.norm() for p in router.prototype])
        best = cosines.topk(3)
        assert routing.expert.view(T, 3)[t].tolist() == best.indices.tolist()
        torch.testing.assert_close(routing.weight.view(T, 3)[t], torch.softmax(best.values, -1))


def test_training_draws_codes_with_the_mean_and_the_spread_of_the_encoder() -> None:
    """With prototypes along the axes, the logits of a token are its code divided by its length."""
    router = make(k=1)
    x = torch.randn(1, D).expand(4000, D)
    with torch.no_grad():
        router.prototype.copy_(torch.eye(E, L))
        logits = route(router, x).logits
        mean, spread = code_of(router, x[0])
        codes = mean + spread * torch.randn(4000, L)
    assert logits is not None
    expected = torch.nn.functional.normalize(codes, dim=-1)
    torch.testing.assert_close(logits[:, :L].mean(0), expected.mean(0), atol=0.03, rtol=0)
    torch.testing.assert_close(logits[:, :L].std(0), expected.std(0), atol=0.03, rtol=0)


def test_the_losses_are_a_kl_divergence_a_norm_and_a_mean_square() -> None:
    router, x = make().eval(), torch.randn(T, D)
    aux = route(router, x).aux
    unit = router.prototype / router.prototype.norm(dim=1, keepdim=True)
    divergence, alignment = torch.zeros(()), torch.zeros(())
    for t in range(T):
        mean, spread = code_of(router, x[t])
        divergence = divergence + kl_divergence(Normal(mean, spread), Normal(0.0, 1.0)).sum() / T
        weights = torch.softmax(unit @ mean / mean.norm(), -1)
        alignment = alignment + (weights @ unit - mean).square().mean() / T
    torch.testing.assert_close(aux["latent_kl"], divergence, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(aux["latent_alignment"], alignment, rtol=1e-4, atol=1e-5)
    squares = [((a @ b).item() - (i == j)) ** 2 for i, a in enumerate(unit) for j, b in enumerate(unit)]
    assert aux["latent_diversity"].item() == pytest.approx(sum(squares) ** 0.5, rel=1e-4)
    with torch.no_grad():
        router.prototype.copy_(torch.eye(E, L))
        router.prototype[L:] = torch.eye(L)[: E - L]
    assert route(router, x).aux["latent_diversity"].item() == pytest.approx((2 * (E - L)) ** 0.5)


@pytest.mark.parametrize("settings", [{"latent": 0}, {"kl": -1.0}, {"diversity": -1.0}, {"alignment": -1.0}])
def test_wrong_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"router\.{next(iter(settings))}="):
        LatentPrototypes(D, E, **settings)
