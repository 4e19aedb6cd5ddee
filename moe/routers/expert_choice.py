"""Experts choose tokens: perfect balance, bought with causality."""

import torch
from jaxtyping import Float
from torch import Tensor

from moe.checks import require
from moe.routers.base import LinearRouter
from moe.routing.decision import Context, Routing
from moe.routing.dispatch import capacity_slots


class ExpertChoice(LinearRouter):
    """Each expert takes its ceil(capacity_factor * T / E) tokens of largest p = softmax(W x) (Zhou et al. 2202.09368).

    The gate is p itself, not renormalized; a token gets 0 ... E experts, `capacity_factor` on average, and one that no
    expert takes gets none. Every load is the same, so the balance loss is the constant 1. Not causal: whether an expert
    takes a token depends on all others of the batch, so results change with its size (a token alone gets every expert).
    """

    causal = False

    def __init__(self, dim: int, num_experts: int, *, capacity_factor: float = 2.0) -> None:
        super().__init__(dim, num_experts, fixed_k=None)
        allowed = f"above 0, at most model.num_experts={num_experts}"
        require(0 < capacity_factor <= num_experts, "router.capacity_factor", capacity_factor, allowed)
        self.capacity_factor = self.mean_k = capacity_factor

    def forward(self, x: Float[Tensor, "T D"], context: Context) -> Routing:
        logits = self.logits(x)
        probs = torch.softmax(self.perturb(logits, context.knobs), -1)
        weight, token = probs.topk(capacity_slots(len(x), self.num_experts, self.capacity_factor), dim=0)
        expert = torch.arange(self.num_experts, device=x.device).expand_as(token)
        return Routing(token.flatten(), expert.flatten(), weight.flatten(), probs=probs, logits=logits)
