"""Bias updates that are soft-clamped and have a momentum."""

import torch
from torch import Tensor

from moe.checks import finite, require
from moe.routers.sigmoid_bias import BiasedSigmoid
from moe.routing.stats import RoutingStats


class Smebu(BiasedSigmoid):
    """Router whose biases follow a clamped, smoothed error of the load (SMEBU, Arcee Trinity Large 2602.17004).

    v_e = (mean load - load_e) / mean load, with the loads of the whole optimizer step. d_e = rate * tanh(kappa * v_e),
    minus its mean over experts. m = momentum * m + (1 - momentum) * d, and b += m. `SigmoidBias` moves by the sign of v
    instead, so its biases never come to rest. Selection and gates are those of `BiasedSigmoid`. Expect load_cv to fall
    without a balance loss; `lb` is 0 by default. Causal.

    The equations were read in two write-ups of the report by others and in public code for another model. The constants
    rate = 5e-4, kappa = 2 and momentum = 0.5 are in one of the write-ups; that code has rate = 2e-3.

    k: experts per token.
    rate: the most that the bias of an expert moves in a step, before centering.
    kappa: how fast tanh saturates. The step is about rate * kappa * v if that is small.
    momentum: share of the old m that is kept.
    normalize: whether the gates of a token sum to 1, before `scale`.
    scale: a factor on the gates.
    groups: groups of neighboring experts, all equally large. 1: no groups.
    top_groups: groups per token whose experts can be chosen.
    """

    of_updates = frozenset(("router.kappa", "router.momentum"))
    rate: float
    velocity: Tensor

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        k: int = 2,
        rate: float = 5e-4,
        kappa: float = 2.0,
        momentum: float = 0.5,
        normalize: bool = True,
        scale: float = 1.0,
        groups: int = 1,
        top_groups: int = 1,
    ) -> None:
        grouping = {"groups": groups, "top_groups": top_groups}
        super().__init__(dim, num_experts, k=k, rate=rate, normalize=normalize, scale=scale, **grouping)
        require(finite(kappa) and kappa > 0, "router.kappa", kappa, "a finite number > 0")
        require(0 <= momentum < 1, "router.momentum", momentum, "at least 0, below 1")
        self.kappa, self.momentum = kappa, momentum
        self.register_buffer("velocity", torch.zeros(num_experts))

    @torch.no_grad()
    def after_step(self, stats: RoutingStats) -> None:
        mean = stats.offered.mean()
        step = self.rate * torch.tanh(self.kappa * (mean - stats.offered) / mean)
        self.velocity.lerp_((step - step.mean()).to(self.velocity), 1 - self.momentum)
        self.bias += self.velocity
