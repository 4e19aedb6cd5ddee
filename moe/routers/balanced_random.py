"""Balanced random routing: what perfect balance is worth without any preference."""

import torch
from jaxtyping import Float
from torch import Tensor

from moe.routers.hash import Hash
from moe.routing.decision import Context, Routing


class BalancedRandom(Hash):
    """Router that deals the tokens of each micro-batch to the experts at random and evenly, with gates 1/k. A control.

    In training, tokens and experts are shuffled, and the tokens take the experts in turn, k different ones each. So the
    loads of a micro-batch differ by 1 at most. The random numbers follow from the seed, the step and the micro-batch
    alone: what a token says, and what the others say, changes nothing. In evaluation the router is `Hash`, whose
    experts depend on the token id and are balanced over the training text, so that a token has the same experts each
    time. Causal.
    """

    def __init__(self, dim: int, num_experts: int, *, k: int = 2) -> None:
        super().__init__(dim, num_experts, k=k)

    def forward(self, x: Float[Tensor, "T D"], context: Context) -> Routing:
        if not self.training:
            return super().forward(x, context)
        turn = torch.randperm(len(x), device=x.device)[:, None] * self.k + torch.arange(self.k, device=x.device)
        expert = torch.randperm(self.num_experts, device=x.device)[turn % self.num_experts]
        return Routing.token_choice(expert, torch.full(expert.shape, 1 / self.k, device=x.device))
