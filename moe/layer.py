"""The Mixture-of-Experts layer: router, dispatcher, experts, in that order, and no state of its own."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moe import losses
from moe.dispatch import Plan, combine, plan
from moe.experts import Experts
from moe.metrics import measure
from moe.routers.base import Router
from moe.routing import Context, RoutingStats


class LayerOutput(NamedTuple):
    """y (B, S, D); aux: unweighted losses by name; stats: detached sums."""

    y: Float[Tensor, "B S D"]
    aux: dict[str, Float[Tensor, ""]]
    stats: RoutingStats


class MoELayer(nn.Module):
    """y = sum over kept assignments of weight * expert(x), plus the shared experts, which every token passes.

    Routing runs in fp32 whatever the precision of the rest.
    """

    def __init__(self, router: Router, experts: Experts, shared: nn.Module | None = None) -> None:
        super().__init__()
        self.router = router
        self.experts = experts
        self.shared = shared

    def forward(self, x: Float[Tensor, "B S D"], context: Context) -> LayerOutput:
        flat = x.reshape(-1, x.shape[-1])
        with torch.autocast(x.device.type, enabled=False):
            routing = self.router(flat.float(), context)
        todo: Plan = plan(
            routing, self.router.num_experts, capacity=context.capacity, seq_len=x.shape[1], drop=context.drop
        )
        rows = self.experts(flat.index_select(0, todo.token), todo.kept)
        y = combine(rows, todo, len(flat)).view_as(x)
        if self.shared is not None:
            y = y + self.shared(x)
        aux = losses.auxiliary(routing, todo.offered, seq_len=x.shape[1], load=context.load)
        if self.router.rows is not None:
            aux["simbal"] = losses.similarity_preserving(self.router.rows)
        return LayerOutput(y, aux, measure(routing, todo, len(flat), seq_len=x.shape[1], capacity=context.capacity))
