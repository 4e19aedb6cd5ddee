"""Balance of the population: a loss that prices experts by a moving average of their probabilities."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from moe.checks import finite, require
from moe.routers.topk import TopK
from moe.routing.decision import Context, Routing
from moe.routing.stats import RoutingStats


class PhiBalancing(TopK):
    """Top-k routing with a loss on a moving average of probabilities (phi-balancing, Chen et al. 2605.15403). Causal.

    The aim is a small phi(E[p]) for a convex potential phi, with the mean over all text, not over a batch. m is the
    moving average of the mean probabilities P of each optimizer step, decay * m + (1 - decay) * P. The loss
    "phi_balance" is sum_e P_e * price_e. The price is the gradient of phi at the moving average with the P of this
    micro-batch in it, and is a constant for the gradient.
        entropy: phi = sum_e m_e ln m_e, and the price is ln(E m_e).
        euclidean: phi = sum_e m_e^2 / 2, and the price is m_e - 1/E.
    Each price has its value at m_e = 1/E subtracted. Since P sums to 1, this changes no gradient, and the loss is 0 if
    the average is balanced. `lb` is 0 by default.

    Two public implementations by others agree on the loss, on the average with the present P in it, and on the entropy
    as the usual potential. Only one of them has the euclidean potential. They differ in where m begins, at 0 or at 1/E
    as here, and one multiplies the loss by E. The usual weight here is our choice.

    k: experts per token.
    gate: as in `TopK`.
    balance: weight of the loss phi_balance.
    decay: share of the old average that is kept in a step.
    potential: entropy or euclidean.
    """

    average: Tensor

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        k: int = 2,
        gate: Literal["renorm", "softmax_all", "uniform"] = "renorm",
        balance: float = 0.01,
        decay: float = 0.99,
        potential: Literal["entropy", "euclidean"] = "entropy",
    ) -> None:
        super().__init__(dim, num_experts, k=k, gate=gate)
        require(finite(balance) and balance >= 0, "router.balance", balance, "a finite number >= 0")
        require(0 <= decay < 1, "router.decay", decay, "at least 0, below 1")
        self.balance, self.decay, self.potential = balance, decay, potential
        if num_experts == 1:
            self.ignores |= {"router.balance"}
        if num_experts == 1 or balance == 0:
            self.ignores |= {"router.decay", "router.potential"}
        self.register_buffer("average", torch.full((num_experts,), 1 / num_experts))

    @property
    def loss_weights(self) -> dict[str, float]:
        return {"phi_balance": self.balance}

    def forward(self, x: Float[Tensor, "T D"], context: Context) -> Routing:
        routing = super().forward(x, context)
        assert routing.probs is not None
        mean = routing.probs.mean(0)
        own = {"phi_balance": (mean * self.price(self.moved(mean.detach()))).sum()}
        return routing._replace(aux=routing.aux | own)

    def moved(self, mean: Float[Tensor, " E"]) -> Float[Tensor, " E"]:
        """Return the moving average after a step whose mean probabilities are `mean`."""
        return torch.lerp(mean, self.average.to(mean), self.decay)

    def price(self, average: Float[Tensor, " E"]) -> Float[Tensor, " E"]:
        """Return the gradient of the potential at `average`, minus that at 1/E."""
        if self.potential == "euclidean":
            return average - 1 / self.num_experts
        return (self.num_experts * average.clamp(min=torch.finfo(average.dtype).tiny)).log()

    @torch.no_grad()
    def after_step(self, stats: RoutingStats) -> None:
        self.average.copy_(self.moved((stats.importance / stats.tokens).to(self.average)))
