"""ReLU routing: fully differentiable; a token takes all experts with a positive gate."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from moe.checks import finite, require
from moe.routers.base import LinearRouter
from moe.routing.decision import Context, Routing
from moe.routing.loss_table import PROBABILITY_WEIGHTS
from moe.routing.stats import RoutingStats


class ReLU(LinearRouter):
    """Router with gates relu(W x): a token takes every expert with a positive gate, possibly none (ReMoE 2412.14711).

    The auxiliary loss `sparsity` (Wang et al., ReMoE) is the mean over tokens of sum_e f_e gate_e. f_e is the share of
    tokens that take expert e, relative to target / E. This is an L1 norm that presses harder on popular experts, so it
    also balances. Its weight starts at `coefficient`. After each optimizer step the weight is multiplied by `rate` if
    tokens took more than `target` experts on average, and divided by `rate` if they took fewer. Each layer steers its
    own weight; the paper steers the mean over layers by one weight.

    There is no softmax: `probs` and `logits` are None, so losses on probabilities and the z-loss do not apply. Expect
    active_experts to approach `target`. Causal when dropless. Not causal under a capacity limit, which is a share of
    the number of assignments in the micro-batch, and that number varies.

    target: mean number of experts per token that is aimed at.
    coefficient: weight of the auxiliary loss before training.
    rate: factor by which the weight changes in a step.
    """

    ignores = PROBABILITY_WEIGHTS | {"z"}
    why = "it has no probabilities: its gates need not sum to 1"
    log_coefficient: Tensor  # the logarithm, because a weight that underflowed to 0 could not grow again

    def __init__(
        self, dim: int, num_experts: int, *, target: float = 2.0, coefficient: float = 1e-8, rate: float = 1.2
    ) -> None:
        super().__init__(dim, num_experts, fixed_k=None)
        allowed = f"more than 0 and at most model.num_experts={num_experts}"
        require(0 < target <= num_experts, "router.target", target, allowed)
        require(finite(coefficient) and coefficient > 0, "router.coefficient", coefficient, "a finite number > 0")
        require(finite(rate) and rate >= 1, "router.rate", rate, "a finite number >= 1")
        self.target = self.mean_k = target
        self.rate = rate
        self.register_buffer("log_coefficient", torch.tensor(math.log(coefficient)))

    @property
    def loss_weights(self) -> dict[str, float]:
        """The current weight of `sparsity`, which changes with every step."""
        return {"sparsity": self.log_coefficient.exp().item()}

    def forward(self, x: Float[Tensor, "T D"], context: Context) -> Routing:
        gates = torch.relu(self.add_noise(self.logits(x), context.knobs))
        chosen = gates > 0
        popularity = chosen.float().mean(0) * self.num_experts / self.target
        return Routing.masked(chosen, gates, aux={"sparsity": (popularity * gates).sum(-1).mean()})

    @torch.no_grad()
    def after_step(self, stats: RoutingStats) -> None:
        active = stats.assignments / stats.tokens
        self.log_coefficient += math.log(self.rate) * torch.sign(active - self.target)
