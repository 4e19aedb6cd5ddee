"""A router with a hidden layer: the border between two experts may be curved."""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from moe.checks import require
from moe.routers.base import Router
from moe.routers.topk import TopK
from moe.routing.decision import Context, Routing

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
}


class MLPRouter(Router):
    """Router whose logits are W2 phi(W1 x), a network of two layers (the MLP router of Harvey et al. 2506.16419).

    The second layer is the router `TopK` of the hidden units phi(W1 x). So a comparison with `TopK` shows what a router
    gains that is not linear. There are no biases. The rows of W2 do not have the width of x, so there is no SimBal
    loss. Causal.

    hidden: the width of the hidden layer, the number of rows of W1.
    activation: phi.
    gate: the weight of a selected expert, as in `TopK`.
    """

    expects_load = True

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        k: int = 2,
        hidden: int = 64,
        activation: Literal["gelu", "relu", "silu", "tanh"] = "gelu",
        gate: Literal["renorm", "softmax_all", "uniform"] = "renorm",
    ) -> None:
        super().__init__(dim, num_experts, fixed_k=k)
        require(hidden >= 1, "router.hidden", hidden, "at least 1")
        self.activation = ACTIVATIONS[activation]
        self.first = nn.Parameter(torch.empty(hidden, dim))
        self.second = TopK(hidden, num_experts, k=k, gate=gate)
        self.ignores = self.second.ignores

    @property
    def expert_directions(self) -> Float[Tensor, "E N"]:
        return self.second.weight

    def forward(self, x: Float[Tensor, "T D"], context: Context) -> Routing:
        return self.second(self.activation(F.linear(x, self.first.to(x.dtype))), context)
