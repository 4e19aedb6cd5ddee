"""The Mixture-of-Experts layer: router, dispatcher and experts. The layer itself has no state."""

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
from moe.routing.measurement import collect_stats, mean_cosine
from moe.routing.stats import RoutingStats


class LayerOutput(NamedTuple):
    """The output of an MoE layer.

    y: (B, S, D), without the residual.
    aux: unweighted auxiliary losses by name.
    stats: sums for metrics, without gradients.
    routing: the decision of each router of the chain.
    """

    y: Float[Tensor, "B S D"]
    aux: dict[str, Float[Tensor, ""]]
    stats: RoutingStats
    routing: tuple[Routing, ...]


class MoELayer(nn.Module):
    """MoE layer: y = sum over kept assignments of weight * expert(x), plus the output of the shared experts.

    Every token passes through the shared experts. Routers run in fp32, whatever the precision of the other modules.
    """

    def __init__(self, router: Router, experts: Experts, shared: nn.Module | None = None) -> None:
        super().__init__()
        self.router = router
        self.experts = experts
        self.shared = shared

    def forward(self, x: Float[Tensor, "B S D"], context: Context) -> LayerOutput:
        first, *others = self.router.chain
        outputs = [self._route(first, x, context)]
        for router in others:
            x_so_far = x + sum(output.y for output in outputs)
            outputs.append(self._route(router, x_so_far, context))
        y = sum((output.y for output in outputs[1:]), outputs[0].y)
        if self.shared is not None:
            y = y + self.shared(x)
        aux = {name: torch.stack([output.aux[name] for output in outputs]).mean() for name in outputs[0].aux}
        stats = functools.reduce(RoutingStats.merge, [output.stats for output in outputs])
        return LayerOutput(y, aux, stats, tuple(routing for output in outputs for routing in output.routing))

    def _route(self, router: Router, x: Float[Tensor, "B S D"], context: Context) -> LayerOutput:
        """Run one router of the chain and the experts that it chooses."""
        flat = x.reshape(-1, x.shape[-1])
        seq_len = x.shape[1]
        with torch.autocast(x.device.type, enabled=False):
            routing = router(flat.float(), context)
        source = flat if routing.slots is None else routing.slots.gather(flat)
        dispatched: Dispatch = dispatch(
            routing, router.num_experts, capacity=context.capacity, seq_len=seq_len, drop=context.drop
        )
        rows = self.experts(gather(source, dispatched), dispatched.kept)
        y = combine(rows, dispatched, len(source))
        if routing.slots is not None:
            y = routing.slots.scatter(y)

        load = context.load
        if self.training and ranks.world_size() > 1:  # ranks process consecutive micro-batches at the same time
            load = _load_of_earlier_ranks(dispatched.offered) + (0 if load is None else load)
        aux = losses.auxiliary(routing, dispatched.offered, seq_len=seq_len, load=load)
        if router.expert_rows is not None:
            aux["simbal"] = losses.similarity_preserving(router.expert_rows)
        if context.orthogonality:
            aux["output_orthogonality"] = losses.output_orthogonality(rows, dispatched.token)
        similarity = self._compare(flat[:: context.probe_stride]) if context.probe_stride else None
        stats = collect_stats(
            routing,
            dispatched,
            len(flat),
            seq_len=seq_len,
            document_position=None if context.document_position is None else context.document_position.flatten(),
            capacity=context.capacity,
            similarity=similarity,
        )
        return LayerOutput(y.view_as(x), aux, stats, (routing,))

    @torch.no_grad()
    def _compare(self, x: Float[Tensor, "N D"]) -> Float[Tensor, "N"]:
        """Return the mean similarity of the outputs of all experts for each of N tokens."""
        experts = self.router.num_experts
        outputs = self.experts(x.repeat(experts, 1), torch.full((experts,), len(x), device=x.device))
        return mean_cosine(outputs.view(experts, *x.shape))


@torch.compiler.disable
def _load_of_earlier_ranks(offered: Int[Tensor, "E"]) -> Int[Tensor, "E"]:
    return ranks.sum_of_lower_ranks(offered)
