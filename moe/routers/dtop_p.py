"""Top-p routing with a mean number of experts that a controller holds."""

import torch
from jaxtyping import Float
from torch import Tensor

from moe.checks import finite, require
from moe.routers.top_p import TopP
from moe.routing.stats import RoutingStats


class DTopP(TopP):
    """`TopP` whose p is steered so that tokens take `target` experts on average (DTop-p, Jin et al. 2512.13996).

    After each optimizer step a proportional-integral controller sets p = p_0 + K_p e + K_i sum of all e so far, with
    e = (target - mean number of experts per token in this step) / E. p stays between 0 and 1, and the integral within
    what p can use. Each layer steers its own p. The paper steers one p for all layers and normalizes the logits of each
    layer instead. Causal when dropless, as `TopP`.

    target: mean number of experts per token that is aimed at.
    p: probability p_0 before training.
    k_max: most experts of a token.
    k_p: factor of the latest error.
    k_i: factor of the sum of errors.
    entropy: weight of the auxiliary loss of `TopP`, which the controller makes unnecessary.
    """

    error: Tensor
    integral: Tensor

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        target: float = 2.0,
        p: float = 0.4,
        k_max: int = 4,
        k_p: float = 0.2,
        k_i: float = 0.3,
        entropy: float = 0.0,
    ) -> None:
        require(k_max >= 2, "router.k_max", k_max, "at least 2: the number of experts varies")
        require(0 < p < 1, "router.p", p, "more than 0 and below 1")
        super().__init__(dim, num_experts, p=p, k_max=k_max, entropy=entropy)
        require(1 <= target < k_max, "router.target", target, f"at least 1 and below router.k_max={k_max}")
        for name, factor in (("k_p", k_p), ("k_i", k_i)):
            require(finite(factor) and factor >= 0, f"router.{name}", factor, "a finite number >= 0")
        require(k_p + k_i > 0, "router.k_i", k_i, "above 0, or router.k_p above 0")
        self.target = self.mean_k = target
        self.k_p, self.k_i = k_p, k_i
        self.register_buffer("error", torch.zeros(()))
        self.register_buffer("integral", torch.zeros(()))

    def experts_per_token(self, seq_len: int) -> float:
        return self.target

    @property
    def threshold(self) -> Float[Tensor, ""]:
        """The present p. Slightly above 1, a token takes all `k_max` experts; slightly above 0, it takes one."""
        return (self.p + self.k_p * self.error + self.k_i * self.integral).clamp(1e-6, 1 + 1e-6)

    @torch.no_grad()
    def after_step(self, stats: RoutingStats) -> None:
        self.error.copy_((self.target - stats.assignments / stats.tokens) / self.num_experts)
        if self.k_i:
            self.integral.add_(self.error).clamp_(-self.p / self.k_i, (1 - self.p) / self.k_i)
