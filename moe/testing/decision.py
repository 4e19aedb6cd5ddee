"""Laws about the decision of a router, and about the output that follows from it."""

import itertools

import torch

from moe.routers.base import Router
from moe.routing.decision import Routing
from moe.testing.inputs import (
    B,
    D,
    E,
    S,
    context,
    dense_weights,
    hidden_states,
    random_layer,
    random_router,
    rows_of,
    run_as_second_layer,
    token_ids,
)
from moe.testing.law import Make, hold, law


@law
def assignments_are_valid(make: Make) -> None:
    """Tokens, experts and weights are in range, and no token asks for the same expert twice."""
    routing = random_router(make).eval().chain[0](hidden_states().view(-1, D), context(token_ids()))
    shapes = [tuple(part.shape) for part in (routing.token, routing.expert, routing.weight)]
    hold(len(set(shapes)) == 1, f"token, expert and weight have the shapes {shapes}; give one entry per assignment")
    hold(routing.weight.dtype == torch.float32, f"weights are {routing.weight.dtype}; return them in fp32")
    in_range = routing.token.min() >= 0 and routing.token.max() < rows_of(routing)
    hold(in_range, "a token number is out of range; count the rows of x from 0")
    in_range = routing.expert.min() >= 0 and routing.expert.max() < E
    hold(in_range, "an expert number is out of range; count the experts from 0 to num_experts - 1")
    hold((routing.weight >= 0).all(), "a weight is negative; the output is a sum of experts with weights >= 0")
    hold(routing.state is None or len(routing.state) == B * S, "state needs one row per token")
    pairs = torch.stack([routing.token, routing.expert])
    hold(pairs.unique(dim=1).shape == pairs.shape, "a token asks for the same expert twice; choose distinct experts")


@law
def the_input_is_not_changed(make: Make) -> None:
    """`forward` leaves the hidden states as they are, because the experts get them too."""
    x = hidden_states().view(-1, D)
    for link in random_router(make).chain:
        link(x, context(token_ids()))
        hold(torch.equal(x, hidden_states().view(-1, D)), "forward changes x in place; work on a new tensor")


@law
def evaluation_is_deterministic(make: Make) -> None:
    """Evaluation gives the same output twice, ignores noise, and changes no state."""
    x, ids = hidden_states(), token_ids()
    layer = random_layer(make).eval()
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    first, second = (run_as_second_layer(layer, x, context(ids, noise=noise)).y for noise in (0.0, 9.0))
    hold(torch.equal(first, second), "evaluation draws random numbers; draw them only if `self.training`")
    same = all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    hold(same, "evaluation changes a buffer; learn in training or in `after_step`")


@law
def probabilities_are_a_distribution(make: Make) -> None:
    """`Routing.probs` is a distribution over all experts, in fp32 even under bf16 autocast; or None."""
    layer = random_layer(make)
    routings: list[Routing] = []
    with torch.autocast("cpu", torch.bfloat16):
        layer.router.chain[0].register_forward_hook(lambda module, inputs, output: routings.append(output))
        layer(hidden_states().bfloat16(), context(token_ids()))
    probs = routings[0].probs
    if probs is None:
        return
    hold(probs.shape == (B * S, E), f"probs has the shape {tuple(probs.shape)}; return (T, E), or None without any")
    hold(probs.dtype == torch.float32, f"probs are {probs.dtype}; compute them in the precision of x")
    sums = torch.allclose(probs.sum(-1), torch.ones(B * S), atol=1e-5)
    hold((probs >= 0).all() and sums, "probs of a token must be >= 0 and sum to 1 over all experts")


@law
def the_layer_returns_the_weighted_sum_of_experts(make: Make) -> None:
    """The output of a layer is the sum of every expert's output, run on every token, with the router's weights.

    What the router itself adds (`Routing.added`) is a part of it.
    """
    x, ids = hidden_states(), token_ids()
    layer = random_layer(make).eval()
    flat = x.view(-1, D)
    for router in layer.router.chain:
        routing = router(flat, context(ids))
        rows = flat
        if routing.slots is not None:
            rows = torch.einsum("bms,bsd->bmd", routing.slots.dispatch, x).reshape(-1, D)
        outputs = layer.experts(rows.repeat(E, 1), torch.full((E,), len(rows))).view(E, -1, D)
        out = torch.einsum("te,etd->td", dense_weights(routing), outputs)
        if routing.slots is not None:
            out = torch.einsum("bsm,bmd->bsd", routing.slots.combine, out.view(B, -1, D)).reshape(-1, D)
        flat = flat + out if routing.added is None else flat + out + routing.added
    equal = torch.allclose(layer(x, context(ids)).y.view(-1, D), flat - x.view(-1, D), rtol=1.3e-6, atol=1e-5)
    hold(equal, "the same input gives other assignments the second time, or assignments that the layer cannot use")


@law
def dense_weights_are_declared(make: Make) -> None:
    """A router declares `trains_all_experts` if and only if it gives `Routing.dense_weight` in training."""
    for router in random_router(make).train().chain:
        given = router(hidden_states().view(-1, D), context(token_ids())).dense_weight is not None
        hold(given == router.trains_all_experts, f"`trains_all_experts` must be {given}, as for `Routing.dense_weight`")


@law
def fixed_k_is_right(make: Make) -> None:
    """With `fixed_k`, every token gets that many experts for every input, in training and evaluation."""
    router = random_router(make)
    for link in router.chain:
        hold(link.fixed_k == router.fixed_k, "all routers of a chain need the same fixed_k")
        counts = _numbers_of_experts(link)
        if router.fixed_k is not None:
            advice = (
                f"tokens get {sorted(counts)} experts, and fixed_k={router.fixed_k}; pass fixed_k=None if it varies"
            )
            hold(counts == {router.fixed_k}, advice)


@law
def without_fixed_k_the_number_of_experts_varies(make: Make) -> None:
    """A router with `fixed_k=None` gives tokens different numbers of experts for some inputs."""
    router = random_router(make)
    for link in router.chain:
        slots = link(hidden_states().view(-1, D), context(token_ids())).slots is not None
        if router.fixed_k is None and not slots:
            counts = _numbers_of_experts(link)
            hold(len(counts) > 1, f"every token gets {counts} experts; pass that number as fixed_k")


def _numbers_of_experts(router: Router) -> set[int]:
    """Return the numbers of experts that a token gets, for ordinary and extreme inputs."""
    flat, ids = hidden_states().view(-1, D), token_ids()
    inputs = [flat, 100 * flat, torch.full_like(flat, 0.7), torch.zeros_like(flat), torch.full_like(flat, 1e4)]
    counts: set[int] = set()
    for training, tokens, noise in itertools.product((True, False), inputs, (0.0, 1.0)):
        router.train(training)
        routing = router(tokens, context(ids, noise=noise))
        counts |= set(torch.bincount(routing.token, minlength=rows_of(routing)).tolist())
        single_token = router(tokens[:1], context(ids[:1, :1], noise=noise))
        if routing.slots is None:
            counts |= set(torch.bincount(single_token.token, minlength=1).tolist())
    return counts
