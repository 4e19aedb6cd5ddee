"""Stochastic top-k: here temperature explores, because experts are drawn and not ranked."""

import torch
from jaxtyping import Float
from torch import Tensor

from moe.routers.topk import Temperature
from moe.routing.decision import Context, Routing


class Gumbel(Temperature):
    """In training, draw k experts without replacement from p = softmax(logits / temperature); in evaluation, take the
    k largest.

    The draw is the top-k of logits + temperature * Gumbel noise (Kool et al. 1903.06059). Gates are p over the
    selected, summing to 1; their gradient is that of the relaxed draw, softmax(logits / temperature + Gumbel noise)
    over all experts, passed straight through (Jang et al. 1611.01144), so k=1 learns although its gate is 1.
    `probs` is p. The knob `noise` moves the logits, and so p, before the draw.
    """

    def __init__(self, dim: int, num_experts: int, *, k: int = 2, temp: float = 1.0) -> None:
        super().__init__(dim, num_experts, k=k, temp=temp)

    def forward(self, x: Float[Tensor, "T D"], context: Context) -> Routing:
        temperature = context.knobs.temperature
        logits = self.logits(x)
        noisy = self.perturb(logits, context.knobs)
        drawn = noisy + temperature * gumbel_like(noisy) if self.training else noisy
        expert = drawn.topk(self.k).indices
        hard = torch.softmax(noisy.gather(-1, expert) / temperature, -1)
        soft = torch.softmax(drawn / temperature, -1).gather(-1, expert)
        probs = torch.softmax(noisy / temperature, -1)
        return Routing.token_choice(expert, hard.detach() + soft - soft.detach(), probs=probs, logits=logits)


def gumbel_like(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Standard Gumbel noise: the negative logarithm of Exponential(1)."""
    return -torch.empty_like(x).exponential_().log()
