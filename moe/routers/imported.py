"""The router of an imported model as its authors wrote it."""

from jaxtyping import Float
from torch import Tensor

from moe.checks import require
from moe.routers.base import Router
from moe.routing.decision import Context, Routing


class Imported(Router):
    """Router that decides as the imported model decides by itself (`moe.model.imported`).

    The model has the weights of its router elsewhere, and gives the decision to the layer. Noise, temperature and the
    loss `simbal` change nothing. Balance losses use the probabilities that `moe.model.imported.probabilities` finds.
    Only for models with `model.checkpoint`. Causal.

    k: experts per token, as in the configuration of the imported model.
    """

    ignores = frozenset(("noise",))
    why = "the router of the imported model adds none"
    weights_elsewhere = True

    def __init__(self, dim: int, num_experts: int, *, k: int) -> None:
        super().__init__(dim, num_experts, fixed_k=k)

    def forward(self, x: Float[Tensor, "T D"], context: Context) -> Routing:
        allowed = "the router of an imported model (model.checkpoint)"
        require(context.given is not None, "router._target_", "moe.routers.imported.Imported", allowed)
        assert context.given is not None
        return context.given
