"""Change the decisions of a router in a finished model: a wrapper edits the `Routing` before the layer uses it.

The code of the model needs no change. When the `with` block ends, the layer has its original router again.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moe.model.layer import MoELayer
from moe.routers.base import Router
from moe.routing.decision import Context, Routing

Intervention = Callable[[Routing, Tensor], Routing]  # (the router's decision, hidden states (T, D)) -> the new decision


class InterveningRouter(Router):
    """Router that decides like the router it wraps and then applies an intervention. In a chain, it wraps every router
    of the chain."""

    def __init__(self, router: Router, intervention: Intervention) -> None:
        super().__init__(router.dim, router.num_experts, fixed_k=None)
        self.router = router
        self.intervention = intervention
        self.replays = router.replays

    @property
    def chain(self) -> list[Router]:
        routers = self.router.chain
        return [self] if routers == [self.router] else [InterveningRouter(each, self.intervention) for each in routers]

    @property
    def expert_rows(self) -> Float[Tensor, "E D"] | None:
        return self.router.expert_rows

    def forward(self, x: Float[Tensor, "T D"], context: Context) -> Routing:
        return self.intervention(self.router(x, context), x)


@contextmanager
def intervene(layer: MoELayer, intervention: Intervention) -> Iterator[None]:
    """Apply an intervention to every decision of a layer's router inside the `with` block."""
    router = layer.router
    layer.router = InterveningRouter(router, intervention)
    try:
        yield
    finally:
        layer.router = router


def remove(routing: Routing, selected: Bool[Tensor, " A"]) -> Routing:
    """Return the routing without the selected assignments. Their experts add nothing; the others keep their weights."""
    return routing.take(~selected)


def reroute(routing: Routing, selected: Bool[Tensor, " A"], *, num_experts: int) -> Routing:
    """Send the selected assignments to the best experts, by logits, that their token has not chosen. Weights stay.

    A router without logits (hash) has no next-best expert, so a random one is taken, the same at every call. If a token
    has already chosen all experts, the assignment is removed.
    """
    scores = routing.logits
    if scores is None:
        tokens = int(routing.token.max()) + 1
        scores = torch.rand(tokens, num_experts, generator=torch.Generator().manual_seed(0)).to(selected.device)
    taken = torch.zeros_like(scores, dtype=torch.bool)
    taken[routing.token, routing.expert] = True
    best_first = scores.masked_fill(taken, -torch.inf).argsort(-1, descending=True)
    token = routing.token[selected]
    rank = _earlier_occurrences(token)
    expert, remaining = routing.expert.clone(), torch.ones_like(selected)
    expert[selected] = best_first[token, rank]
    remaining[selected] = rank < (~taken).sum(-1)[token]
    return routing._replace(expert=expert).take(remaining)


def swap_experts(routing: Routing, token: Int[Tensor, " B"], order: Int[Tensor, "B E"]) -> Routing:
    """Replace the k experts of token[b] by the first k experts of order[b]. The weights of the token stay.

    The expert with the largest logit gets the largest weight, as it would from a router.
    """
    expert = routing.expert.clone()
    for one, preference in zip(token, order, strict=True):
        assignments = (routing.token == one).nonzero()[:, 0]
        assignments = assignments[routing.weight[assignments].argsort(descending=True, stable=True)]
        new = preference[: len(assignments)]
        if routing.logits is not None:
            new = new[routing.logits[one, new].argsort(descending=True, stable=True)]
        expert[assignments] = new
    return routing._replace(expert=expert)


def _earlier_occurrences(token: Int[Tensor, " H"]) -> Int[Tensor, " H"]:
    """Return, for each entry, how many earlier entries are the same token."""
    ordered, original = token.sort(stable=True)
    earlier = torch.empty_like(token)
    earlier[original] = torch.arange(len(token), device=token.device) - torch.searchsorted(ordered, ordered)
    return earlier
