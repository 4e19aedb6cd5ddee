"""The Mixture-of-Experts layer: router, dispatcher and experts. The layer itself has no state."""

import functools
from typing import NamedTuple

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from moe.distributed import ranks
from moe.fused import uncompiled
from moe.model.experts import Experts
from moe.model.router_precision import decide, flips
from moe.routers.base import Router
from moe.routing import losses
from moe.routing.decision import Context, Routing, fill_places
from moe.routing.dispatch import Dispatch, combine, dispatch, gather, sum_by_expert
from moe.routing.measurement import collect_stats, mean_cosine
from moe.routing.stats import RoutingStats


class LayerOutput(NamedTuple):
    """The output of an MoE layer.

    y: (B, S, D), without the residual.
    aux: unweighted auxiliary losses by name.
    stats: sums for metrics, without gradients.
    routing: the decision of each router of the chain.
    load: (C, E) the load of each router of the chain, before drops.
    beside: the output of the MoE layer beside this one, if an adapter has put one there. `y` contains its `y`.
    """

    y: Float[Tensor, "B S D"]
    aux: dict[str, Float[Tensor, ""]]
    stats: RoutingStats
    routing: tuple[Routing, ...]
    load: Int[Tensor, "C E"]
    beside: "LayerOutput | None" = None

    def without_y(self) -> "LayerOutput":
        """Return the same with no sequence in y. A model keeps this, and not the hidden states of all layers."""
        return self._replace(y=self.y.new_empty(0, *self.y.shape[1:]))


class _Pass(NamedTuple):
    """What one router of the chain and its experts return for the T routed tokens. Fields as in `LayerOutput`."""

    y: Float[Tensor, "T D"]
    aux: dict[str, Float[Tensor, ""]]
    stats: RoutingStats
    routing: Routing
    load: Int[Tensor, " E"]


class Latent(nn.Module):
    """Two matrices around all routed experts of a layer, which work in a smaller width N (LatentMoE, 2601.18089)."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.down = nn.Linear(dim, width, bias=False)
        self.up = nn.Linear(width, dim, bias=False)


class MoELayer(nn.Module):
    """MoE layer: y = sum over kept assignments of weight * expert(x), plus the output of the shared experts.

    With a latent, y = up(sum of weight * expert(down(x))), and routers still read all of x. Every token passes through
    the shared experts. With a gate g, their output is multiplied by sigmoid(g x). An adapter may put a layer `beside`
    this one, whose output is added too: another MoE layer, or one through which every token passes. And it may put an
    adapter beside each routed expert (`beside_experts`), whose output is added to that of its expert. Routers run in
    `router_precision`, see `decide`. Raises ConfigError if the router's chain is empty or holds something else than
    routers.
    """

    def __init__(
        self,
        router: Router,
        experts: Experts,
        shared: nn.Module | None = None,
        *,
        shared_gate: nn.Linear | None = None,
        latent: Latent | None = None,
        router_precision: str = "fp32",
    ) -> None:
        super().__init__()
        router.check_chain()
        self.router = router
        self.experts = experts
        self.shared = shared
        self.shared_gate = shared_gate
        self.latent = latent
        self.router_precision = router_precision
        self.beside: nn.Module | None = None
        self.beside_experts: Experts | None = None

    def forward(
        self, x: Float[Tensor, "B S D"], context: Context, read: Float[Tensor, "B S D"] | None = None
    ) -> LayerOutput:
        """Return the output for the hidden states x. read: what routers read instead of x, if it is something else."""
        tokens = context.routed(x.reshape(-1, x.shape[-1]))
        routed_by = tokens if read is None else context.routed(read.reshape(-1, read.shape[-1]))
        passes: list[_Pass] = []
        for number, router in enumerate(self.router.chain):
            load = None if context.load is None else context.load[number]
            passes.append(self._route(router, tokens, routed_by, context, load))
            if number + 1 < len(self.router.chain):
                tokens, routed_by = tokens + passes[-1].y, routed_by + passes[-1].y
        y = sum((p.y for p in passes[1:]), passes[0].y)
        y = fill_places(y, context.place, context.ids.numel()).view_as(x)
        if self.shared is not None:
            always = self.shared(x)
            y = y + (always if self.shared_gate is None else torch.sigmoid(self.shared_gate(x)) * always)
        beside = None
        if isinstance(self.beside, MoELayer):
            beside = self.beside(x, context.beside())
            y = y + beside.y
        elif self.beside is not None:
            y = y + self.beside(x)
        aux = passes[0].aux
        if len(passes) > 1:
            aux = {name: torch.stack([p.aux[name] for p in passes]).mean() for name in aux}
        stats = functools.reduce(RoutingStats.merge, [p.stats for p in passes])
        return LayerOutput(
            y, aux, stats, tuple(p.routing for p in passes), torch.stack([p.load for p in passes]), beside
        )

    def _route(
        self,
        router: Router,
        x: Float[Tensor, "T D"],
        read: Float[Tensor, "T D"],
        context: Context,
        load: Shaped[Tensor, " E"] | None,
    ) -> _Pass:
        """Run one router of the chain on `read`, and the experts that it chooses on x.

        load: its row of `Context.load`.
        """
        seq_len = context.ids.shape[1]
        position = None if context.document_position is None else context.routed(context.document_position.flatten())
        routing = decide(router, read, context, self.router_precision)
        x = x if self.latent is None else self.latent.down(x)
        source = x if routing.slots is None else routing.slots.gather(x)
        slots = None if routing.slots is None else routing.slots.dispatch.shape[1]
        dispatched: Dispatch = dispatch(
            routing,
            router.num_experts,
            capacity=context.capacity,
            seq_len=slots or seq_len,
            drop=context.drop,
            position=None if slots else position,
            document=None if slots else context.document,
        )
        rows = self._run_experts(gather(source, dispatched), dispatched.kept)
        y = combine(rows, dispatched, len(source))
        if routing.slots is not None:
            y = routing.slots.scatter(y)
        y = self.full_width(y)
        if routing.added is not None:
            y = y + routing.added.to(y.dtype)
        forward_only = 0
        if routing.dense_weight is not None and self.training:
            y = y + self._gradient_of_others(routing, routing.dense_weight, x)
            forward_only = len(x) * router.num_experts
        if router.learns_from_outputs:
            sums = self.full_width(sum_by_expert(rows, dispatched.kept))
            routing = routing._replace(feedback=sums.flatten())

        if (
            self.training and ranks.world_size() > 1 and not context.alone
        ):  # ranks process consecutive micro-batches at the same time
            load = _load_of_earlier_ranks(dispatched.offered) + (0 if load is None else load)
        sequence = context.sequence
        aux = losses.auxiliary(
            routing,
            dispatched.offered,
            seq_len=seq_len,
            load=load,
            sequence=sequence,
            document_position=None if slots else position,
        )
        if router.expert_rows is not None:
            aux["simbal"] = losses.similarity_preserving(router.expert_rows)
            if "erc" in context.costly and self.experts.first is not None and self.latent is None:
                aux["expert_router_coupling"] = self._coupling(router.expert_rows, self.experts.first)
        if "output_orthogonality" in context.costly:
            aux["output_orthogonality"] = losses.output_orthogonality(self.full_width(rows), dispatched.token)
        similarity = None if context.compared is None else mean_cosine(self._run_all(x[context.compared]))
        flipped = None
        if context.compared is not None and self.router_precision != "fp32" and not slots:
            exact = decide(router, read, context, "fp32")
            flipped = flips(routing, exact, len(x), router.num_experts)
        stats = collect_stats(
            routing,
            dispatched,
            len(x),
            seq_len=seq_len,
            document_position=position,
            sequence=sequence,
            similarity=similarity,
            flipped=flipped,
            forward_only=forward_only,
        )
        return _Pass(y, aux, stats, routing, dispatched.offered)

    def _coupling(self, rows: Float[Tensor, "E D"], first: Float[Tensor, "E H D"]) -> Float[Tensor, ""]:
        with torch.autocast(rows.device.type, enabled=False):
            return losses.expert_router_coupling(rows, first.to(rows.dtype), noisy=self.training)

    def _run_experts(self, rows: Float[Tensor, "R D"], counts: Int[Tensor, " E"]) -> Float[Tensor, "R D"]:
        """Return the outputs of the experts, and of what is beside each. See `Experts.forward`."""
        return self.with_beside(self.experts(rows, counts), rows, counts)

    def with_beside(
        self, outputs: Float[Tensor, "R D"], rows: Float[Tensor, "R D"], counts: Int[Tensor, " E"]
    ) -> Float[Tensor, "R D"]:
        """Return outputs of the experts plus those of what is beside each. See `Experts.forward`."""
        return outputs if self.beside_experts is None else outputs + self.beside_experts(rows, counts)

    def full_width(self, outputs: Float[Tensor, "*N W"]) -> Float[Tensor, "*N D"]:
        """Return outputs of experts in the width of the hidden states."""
        full: Tensor = outputs if self.latent is None else self.latent.up(outputs)
        return full

    def outputs_of_all(self, x: Float[Tensor, "N D"]) -> Float[Tensor, "E N D"]:
        """Return the outputs of all experts for each of N tokens, without gradients."""
        return self._run_all(x if self.latent is None else self.latent.down(x))

    @torch.no_grad()
    def _run_all(self, x: Float[Tensor, "N W"]) -> Float[Tensor, "E N D"]:
        """Return the outputs of all experts for each of N tokens in the width of the experts, without gradients."""
        experts = self.router.num_experts
        outputs = self._run_experts(x.repeat(experts, 1), torch.full((experts,), len(x), device=x.device))
        return self.full_width(outputs).unflatten(0, (experts, len(x)))

    def _gradient_of_others(
        self, routing: Routing, weight: Float[Tensor, "T E"], x: Float[Tensor, "T W"]
    ) -> Float[Tensor, "T D"]:
        """Return zeros whose gradient reaches the weights of the experts that a token did not choose.

        Straight through: the gradient of such a weight is the product of the expert's output and the gradient of y.
        """
        others = weight.index_put((routing.token, routing.expert), weight.new_zeros(()))
        outputs = self._run_all(x)
        return torch.einsum("te,etd->td", (others - others.detach()).to(outputs.dtype), outputs)


@uncompiled
def _load_of_earlier_ranks(offered: Int[Tensor, " E"]) -> Int[Tensor, " E"]:
    return ranks.sum_of_lower_ranks(offered)
