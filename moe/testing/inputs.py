"""What the laws are tried on: random routers and layers, hidden states, and what a router is told beside them."""

import torch
from torch import Tensor, nn

from moe.model.experts import Experts
from moe.model.layer import LayerOutput, MoELayer
from moe.routers.base import Router
from moe.routers.seeding import seed_all
from moe.routing.decision import Context, Knobs, Routing, TrainingText
from moe.testing.law import Make

# Sequences, tokens of each, width, experts, and hidden width of an expert.
B, S, D, E, F = 3, 8, 16, 8, 12

# The training text of which routers learn: the frequencies of 1000 token ids, and two domains.
TEXT = TrainingText(torch.arange(1000), ("first", "second"))


def random_router(make: Make) -> Router:
    """Return a router whose parameters and buffers are all drawn at random, so that each of them has an effect."""
    seed_all(0)
    router = make(D)
    for tensor in (*router.parameters(), *router.buffers()):
        if tensor.is_floating_point():
            nn.init.normal_(tensor, std=0.5)
    router.before_training(TEXT)
    return router


def random_layer(make: Make) -> MoELayer:
    """Return a Mixture-of-Experts layer with a random router and random experts."""
    router = random_router(make)
    experts = Experts(router.num_experts, D, hidden=F, kind="silu")
    for p in experts.parameters():
        nn.init.normal_(p, std=0.3)
    return MoELayer(router, experts)


def hidden_states() -> Tensor:
    """Return hidden states (B, S, D), the same at each call."""
    return torch.randn(B, S, D, generator=torch.Generator().manual_seed(1))


def token_ids() -> Tensor:
    """Return token ids (B, S), the same at each call."""
    return torch.randint(0, 1000, (B, S), generator=torch.Generator().manual_seed(2))


def context(ids: Tensor, *, noise: float = 0.0, capacity: float | None = None) -> Context:
    """Return what a router is told beside hidden states."""
    return Context(ids, Knobs.of(noise=noise), capacity, told=labels(len(ids)), given=decided(ids))


def decided(ids: Tensor) -> Routing:
    """Return `Context.given`: one or two experts for each token, which depend on its id and on earlier ones."""
    total = ids.cumsum(1).flatten()
    chosen = torch.zeros(len(total), E, dtype=torch.bool)
    chosen[torch.arange(len(total)).repeat(2), torch.cat([total % E, total // E % E])] = True
    token, expert = chosen.nonzero(as_tuple=True)
    return Routing(token, expert, 0.2 + 0.1 * expert, probs=None, logits=None)


def labels(sequences: int) -> Tensor:
    """Return `Context.told`: the sequences have the domains 0, 1, 0 ... of `TEXT`, and 1, 0, 1 ... when shuffled."""
    domain = torch.arange(sequences) % 2
    return torch.stack([domain, 1 - domain], 1)


def run_as_second_layer(layer: MoELayer, x: Tensor, context: Context) -> LayerOutput:
    """Run the layer twice. The second time, its router gets the state that it returned the first time."""
    return layer(x, context._replace(state=layer(x, context).routing[-1].state))


def rows_of(routing: Routing) -> int:
    """Return how many vectors the experts choose from: tokens, or slots if experts process slots."""
    return B * S if routing.slots is None else routing.slots.dispatch.shape[:2].numel()


def dense_weights(routing: Routing) -> Tensor:
    """Return the weight of each expert for each token (T, E), or for each slot (B * M, E) if experts process slots."""
    weights = torch.zeros(rows_of(routing), E)
    return weights.index_put((routing.token, routing.expert), routing.weight, accumulate=True)
