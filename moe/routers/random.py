"""Random routing: a control that cannot learn, to show what learning to route is worth."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from moe.routers.base import Router
from moe.routing.decision import Context, Routing
from moe.routing.loss_table import PROBABILITY_WEIGHTS


class Random(Router):
    """Router that takes the top-k of a fixed random projection of the hidden state, with gates 1/k.

    It routes by content, as a trained router does, but stays as it was initialized. Expect imbalance, because hidden
    states are not isotropic. Causal.
    """

    ignores = PROBABILITY_WEIGHTS | {"z"}
    why = "its weights are not trained"
    weight: Tensor

    def __init__(self, dim: int, num_experts: int, *, k: int = 2) -> None:
        super().__init__(dim, num_experts, fixed_k=k)
        self.k = k
        if k == num_experts:
            self.ignores |= {"noise"}
        self.register_buffer("weight", torch.empty(num_experts, dim))

    def draw(self, name: str, tensor: Tensor, std: float) -> None:
        nn.init.normal_(tensor, std=std)

    def forward(self, x: Float[Tensor, "T D"], context: Context) -> Routing:
        logits = F.linear(x, self.weight.to(x.dtype))
        expert = self.add_noise(logits, context.knobs).topk(self.k).indices
        return Routing.token_choice(expert, torch.full(expert.shape, 1 / self.k, device=x.device))
