"""Changing what a router decided, from outside: a wrapped router edits the `Routing` that the layer is about to use.

Nothing in the model knows of it, and when the `with` block ends the layer has its own router again.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moe.model.layer import MoELayer
from moe.routers.base import Router
from moe.routing.decision import Context, Routing

Change = Callable[[Routing, Tensor], Routing]  # what was decided, for which (T, D) hidden states -> what is done


class Altered(Router):
    """A router that decides as the one it wraps and then does what `change` makes of it; in every link of a chain."""

    def __init__(self, router: Router, change: Change) -> None:
        super().__init__(router.dim, router.num_experts, fixed_k=None)
        self.router = router
        self.change = change

    @property
    def chain(self) -> list[Router]:
        links = self.router.chain
        return [self] if links == [self.router] else [Altered(link, self.change) for link in links]

    @property
    def expert_rows(self) -> Float[Tensor, "E D"] | None:
        return self.router.expert_rows

    def forward(self, x: Float[Tensor, "T D"], context: Context) -> Routing:
        return self.change(self.router(x, context), x)


@contextmanager
def altered(layer: MoELayer, change: Change) -> Iterator[None]:
    """Inside, the layer's router is `Altered`; outside, it is the very same router as before."""
    router = layer.router
    layer.router = Altered(router, change)
    try:
        yield
    finally:
        layer.router = router


def removed(routing: Routing, hit: Bool[Tensor, "A"]) -> Routing:
    """Without the assignments that are hit: their experts add nothing, the others keep their weights."""
    return routing._replace(token=routing.token[~hit], expert=routing.expert[~hit], weight=routing.weight[~hit])


def rerouted(routing: Routing, hit: Bool[Tensor, "A"], *, num_experts: int) -> Routing:
    """The assignments that are hit go to the best experts, by logits, that their token did not choose; weights stay.

    A router without logits (hash) has no next best: a random one then, the same at every call. A token that has no
    expert left loses the assignment.
    """
    scores = routing.logits
    if scores is None:
        tokens = int(routing.token.max()) + 1
        scores = torch.rand(tokens, num_experts, generator=torch.Generator().manual_seed(0)).to(hit.device)
    taken = torch.zeros_like(scores, dtype=torch.bool)
    taken[routing.token, routing.expert] = True
    best_first = scores.masked_fill(taken, -torch.inf).argsort(-1, descending=True)
    token = routing.token[hit]
    rank = _occurrence(token)
    expert, kept = routing.expert.clone(), torch.ones_like(hit)
    expert[hit] = best_first[token, rank]
    kept[hit] = rank < (~taken).sum(-1)[token]
    return routing._replace(token=routing.token[kept], expert=expert[kept], weight=routing.weight[kept])


def swapped(routing: Routing, token: Int[Tensor, "B"], order: Int[Tensor, "B E"]) -> Routing:
    """Token b takes the first k of the experts in order[b], k the number that it chose; its weights stay.

    The expert with the largest logit gets the largest weight, as a router would have it.
    """
    expert = routing.expert.clone()
    for one, preference in zip(token, order, strict=True):
        mine = (routing.token == one).nonzero()[:, 0]
        mine = mine[routing.weight[mine].argsort(descending=True, stable=True)]
        new = preference[: len(mine)]
        if routing.logits is not None:
            new = new[routing.logits[one, new].argsort(descending=True, stable=True)]
        expert[mine] = new
    return routing._replace(expert=expert)


def _occurrence(token: Int[Tensor, "H"]) -> Int[Tensor, "H"]:
    """How many earlier entries name the same token."""
    ordered, place = token.sort(stable=True)
    rank = torch.empty_like(token)
    rank[place] = torch.arange(len(token), device=token.device) - torch.searchsorted(ordered, ordered)
    return rank
