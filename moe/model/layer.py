"""The Mixture-of-Experts layer: router, dispatcher, experts, in that order, and no state of its own."""

import functools
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from moe.distributed import ranks
from moe.model.experts import Experts
from moe.routers.base import Router
from moe.routing import losses
from moe.routing.decision import Context, Routing
from moe.routing.dispatch import Dispatch, combine, dispatch, gather
from moe.routing.measurement import mean_cosine, measure
from moe.routing.stats import RoutingStats


class LayerOutput(NamedTuple):
    """y (B, S, D); aux: unweighted losses by name; stats: detached sums; routing: one entry per router of the chain."""

    y: Float[Tensor, "B S D"]
    aux: dict[str, Float[Tensor, ""]]
    stats: RoutingStats
    routing: tuple[Routing, ...]


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
        first, *others = self.router.chain
        outputs = [self._ask(first, x, context)]
        for router in others:
            x_so_far = x + sum(output.y for output in outputs)
            outputs.append(self._ask(router, x_so_far, context))
        y = sum((output.y for output in outputs[1:]), outputs[0].y)
        if self.shared is not None:
            y = y + self.shared(x)
        aux = {name: torch.stack([output.aux[name] for output in outputs]).mean() for name in outputs[0].aux}
        stats = functools.reduce(RoutingStats.merge, [output.stats for output in outputs])
        return LayerOutput(y, aux, stats, tuple(routing for output in outputs for routing in output.routing))

    def _ask(self, router: Router, x: Float[Tensor, "B S D"], context: Context) -> LayerOutput:
        """What the experts add that one router chooses."""
        flat = x.reshape(-1, x.shape[-1])
        seq_len = x.shape[1]
        with torch.autocast(x.device.type, enabled=False):
            routing = router(flat.float(), context)
        source = flat if routing.slots is None else routing.slots.gather(flat)
        todo: Dispatch = dispatch(
            routing, router.num_experts, capacity=context.capacity, seq_len=seq_len, drop=context.drop
        )
        rows = self.experts(gather(source, todo), todo.kept)
        y = combine(rows, todo, len(source))
        if routing.slots is not None:
            y = routing.slots.scatter(y)

        load = context.load
        if self.training and ranks.world_size() > 1:  # ranks work on consecutive micro-batches at once
            load = _before(todo.offered) + (0 if load is None else load)
        aux = losses.auxiliary(routing, todo.offered, seq_len=seq_len, load=load)
        if router.expert_rows is not None:
            aux["simbal"] = losses.similarity_preserving(router.expert_rows)
        if context.orthogonality:
            aux["output_orthogonality"] = losses.output_orthogonality(rows, todo.token)
        similarity = self._compare(flat[:: context.probe_stride]) if context.probe_stride else None
        stats = measure(
            routing,
            todo,
            len(flat),
            seq_len=seq_len,
            place=None if context.place is None else context.place.flatten(),
            capacity=context.capacity,
            similarity=similarity,
        )
        return LayerOutput(y.view_as(x), aux, stats, (routing,))

    @torch.no_grad()
    def _compare(self, x: Float[Tensor, "N D"]) -> Float[Tensor, "N"]:
        """How alike the experts' outputs are, all of them run on the same tokens."""
        experts = self.router.num_experts
        outputs = self.experts(x.repeat(experts, 1), torch.full((experts,), len(x), device=x.device))
        return mean_cosine(outputs.view(experts, *x.shape))


@torch.compiler.disable
def _before(offered: Int[Tensor, "E"]) -> Int[Tensor, "E"]:
    return ranks.sum_of_lower_ranks(offered)
