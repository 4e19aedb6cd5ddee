"""Stochastic top-k: experts are drawn at random in training, so that temperature sets how much is explored."""

import torch
from jaxtyping import Float
from torch import Tensor

from moe.routers.topk import Temperature
from moe.routing.decision import Context, Routing


class Gumbel(Temperature):
    """Router that draws k experts without replacement in training, and takes the k largest logits in evaluation.

    In training, experts are drawn from p = softmax(logits / temperature), as the top-k of logits + temperature * Gumbel
    noise (Kool et al. 1903.06059). Gates are p over the selected experts, summing to 1. Their gradient is that of the
    relaxed draw, softmax(logits / temperature + Gumbel noise) over all experts, passed straight through (Jang et al.
    1611.01144). With k=1 the router therefore learns although its gate is 1. `probs` is p. The knob `noise` moves the
    logits, and with them p, before the draw.

    Expect temperature to change which experts are chosen in training, unlike in `Temperature`. Causal.

    temp: temperature at which experts are drawn; a temperature schedule ends at it.
    """

    expects_load = False  # its noise is not Gaussian alone

    def __init__(self, dim: int, num_experts: int, *, k: int = 2, temp: float = 1.0) -> None:
        super().__init__(dim, num_experts, k=k, temp=temp)

    def forward(self, x: Float[Tensor, "T D"], context: Context) -> Routing:
        temperature = context.knobs.temperature
        logits = self.logits(x)
        noisy = self.add_noise(logits, context.knobs)
        noise = temperature * gumbel_like(noisy) if self.training else torch.zeros_like(noisy)
        drawn = noisy + noise
        expert = (noisy.double() + noise).topk(self.k).indices  # in fp32 large logits would round the noise
        hard = torch.softmax(noisy.gather(-1, expert) / temperature, -1)
        soft = torch.softmax(drawn / temperature, -1).gather(-1, expert)
        probs = torch.softmax(noisy / temperature, -1)
        return Routing.token_choice(expert, hard.detach() + soft - soft.detach(), probs=probs, logits=logits)


def gumbel_like(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return standard Gumbel noise in the shape of x: the negative logarithm of Exponential(1)."""
    return -torch.empty_like(x).exponential_().log()
