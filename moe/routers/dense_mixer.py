"""DenseMixer: top-k whose router learns from all experts, those that a token did not choose included."""

from typing import Literal

from jaxtyping import Float
from torch import Tensor

from moe.routers.topk import TopK
from moe.routing.decision import Context, Routing


class DenseMixer(TopK):
    """Top-k routing with the gradient of a dense mixture on the router (DenseMixer, Yao et al. 2025).

    The output of the layer is that of `TopK`. In training all experts run on all tokens, and the gradient of a gate is
    the product of the expert's output and the gradient of the layer's output, for experts that were not chosen too
    (straight through). Their gates are p, divided for gate=renorm by the sum of the chosen p, as a constant. The
    experts themselves get the gradient of `TopK`.

    A training step is slower, because each layer runs E experts per token in addition to k, without a backward pass.
    The metric `train/flops` counts them; the FLOPs per token are those of evaluation. Causal.

    gate: the weight of a selected expert, see `TopK`.
        renorm: p divided by its sum over the selected experts; p itself with k=1.
        softmax_all: p itself.
    """

    trains_all_experts = True

    def __init__(
        self, dim: int, num_experts: int, *, k: int = 2, gate: Literal["renorm", "softmax_all"] = "renorm"
    ) -> None:
        super().__init__(dim, num_experts, k=k, gate=gate)

    def forward(self, x: Float[Tensor, "T D"], context: Context) -> Routing:
        routing = super().forward(x, context)
        dense = routing.probs
        assert dense is not None
        if self.gate == "renorm" and self.k > 1:
            chosen = dense.gather(-1, routing.expert.view(-1, self.k))
            dense = dense / chosen.sum(-1, keepdim=True).detach()
        return routing._replace(dense_weight=dense)
