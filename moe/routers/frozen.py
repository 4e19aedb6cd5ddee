"""Frozen routing with a learned scale: the gates learn how sharp they are, and nothing else does."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from moe.routers.base import Router
from moe.routing.decision import Context, Routing


class Frozen(Router):
    """Router whose logits are exp(s) R x, with R fixed at its random initial values and a learned number s. A control.

    Each token takes the k experts of largest logit. The scale does not change which ones. It only learns how unequal
    the gates are, p = softmax over the selected experts. With k=1, p is the softmax over all experts, because the gate
    would otherwise be the constant 1. `Random` has the same choices and gates 1/k, `TopK` the same gates with an R that
    learns. Causal.
    """

    weight: Tensor

    expects_load = True

    def __init__(self, dim: int, num_experts: int, *, k: int = 2) -> None:
        super().__init__(dim, num_experts, fixed_k=k)
        self.k = k
        if num_experts == 1:
            self.ignores = frozenset(("noise",))
        self.log_scale = nn.Parameter(torch.zeros(1))
        self.register_buffer("weight", torch.empty(num_experts, dim))

    @property
    def expert_directions(self) -> Float[Tensor, "E N"]:
        return self.weight

    def draw(self, name: str, tensor: Tensor, std: float) -> None:
        if name == "weight":
            nn.init.normal_(tensor, std=std)

    def forward(self, x: Float[Tensor, "T D"], context: Context) -> Routing:
        logits = self.log_scale.to(x.dtype).exp() * F.linear(x, self.weight.to(x.dtype))
        noisy = self.add_noise(logits, context.knobs)
        probs = torch.softmax(noisy, -1)
        expert = noisy.topk(self.k).indices
        weight = noisy.gather(-1, expert).softmax(-1) if self.k > 1 else probs.gather(-1, expert)
        aux = self.expected_load(logits, noisy, self.k, context)
        return Routing.token_choice(expert, weight, probs=probs, logits=logits, aux=aux)
