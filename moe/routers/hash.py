"""Hash routing: the token id alone decides."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moe.routers.base import Router, check_k
from moe.routing import Context, Routing


class Hash(Router):
    """Each token id has k fixed, distinct experts, drawn by an integer hash; gates 1/k (Roller et al. 2106.04426).

    No parameters, no probabilities. Ids are spread evenly over experts, tokens are not: frequent ids make load uneven.
    """

    def __init__(self, dim: int, num_experts: int, *, k: int = 2) -> None:
        super().__init__(dim, num_experts)
        check_k(k, num_experts)
        self.k = k

    def forward(self, x: Float[Tensor, "T D"], context: Context) -> Routing:
        pairs = context.ids.reshape(-1, 1) * self.num_experts + torch.arange(self.num_experts, device=x.device)
        expert = scramble(pairs).topk(self.k).indices
        return Routing.token_choice(expert, torch.full(expert.shape, 1 / self.k, device=x.device))


def scramble(numbers: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """A fixed pseudo-random 32-bit number for each integer (the murmur3 finaliser)."""
    h = numbers & 0xFFFFFFFF
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        h = ((h ^ (h >> shift)) * factor) & 0xFFFFFFFF
    return h ^ (h >> 16)
