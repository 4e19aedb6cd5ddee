"""What every router is: a module from hidden states to a `Routing`."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moe.checks import require
from moe.routing import Context, Knobs, Routing


class Router(nn.Module):
    """Maps (T, D) hidden states to assignments; subclasses implement `forward`.

    causal: whether a token's routing is independent of later tokens and of other sequences; audited by the contract
        test and printed beside the router's name everywhere.
    schedulable: whether the knob `temperature` acts on it.
    """

    causal: bool = True
    schedulable: bool = False

    def __init__(self, dim: int, num_experts: int) -> None:
        super().__init__()
        self.dim = dim
        self.num_experts = num_experts

    def forward(self, x: Float[Tensor, "T D"], context: Context) -> Routing:
        raise NotImplementedError

    def perturb(self, logits: Float[Tensor, "T E"], knobs: Knobs) -> Float[Tensor, "T E"]:
        """logits + N(0, noise^2) in training, the logits themselves in evaluation.

        Noise enters before temperature, softmax and selection, so it moves selection, gates and balance loss alike.
        """
        return logits + knobs.noise * torch.randn_like(logits) if self.training else logits


def check_k(k: int, num_experts: int) -> None:
    """Refuse a number of experts per token outside 1 ... E."""
    require(1 <= k <= num_experts, "router.k", k, f"between 1 and model.num_experts={num_experts}")
