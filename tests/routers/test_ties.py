"""Tests that equal logits give the same experts each time: recomputed, in other batches, and compiled."""

import os
import subprocess
import sys

import pytest
import torch
from test_contract import BY_NAME, SPECS
from torch import Tensor
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from moe.routers.base import Router
from moe.routing.decision import Context, Routing
from moe.testing import inputs
from moe.testing.inputs import B, D, E, S


def tied_router(name: str) -> Router:
    """Return a random router whose experts 0 and 1, 2 and 3 ... have equal parameters, so that their logits tie."""
    router = inputs.random_router(BY_NAME[name].make)
    with torch.no_grad():
        for tensor in (*router.parameters(), *router.buffers()):
            if tensor.is_floating_point() and tensor.ndim and len(tensor) == E:
                tensor[1::2] = tensor[0::2]
    return router


def some_states() -> Tensor:
    """Return hidden states of which every third is zero, for which all experts of a linear router tie."""
    x = inputs.hidden_states()
    x[:, ::3] = 0
    return x


def decide(router: Router, x: Tensor, ids: Tensor, context: Context) -> Routing:
    """Return the decision for sequences of hidden states, as in the second MoE layer."""
    first = router.chain[0]
    flat = x.flatten(0, 1)
    context = context._replace(ids=ids)
    return first(flat, context._replace(state=first(flat, context).state))


def experts_of(routing: Routing, tokens: int) -> Tensor:
    """Return which experts each token takes (tokens, E)."""
    chosen = torch.zeros(tokens, E, dtype=torch.bool)
    chosen[routing.token, routing.expert] = True
    return chosen


ALL = pytest.mark.parametrize("name", [spec.name for spec in SPECS])


@ALL
def test_ties_are_broken_alike_when_a_layer_is_computed_again(name: str) -> None:
    """In training, with noise: `gradient_checkpointing` runs the router again in the backward pass."""
    router, x, ids = tied_router(name).train(), some_states().requires_grad_(), inputs.token_ids()
    decisions: list[Routing] = []

    def layer(x: Tensor) -> Tensor:
        decisions.append(decide(router, x, ids, inputs.context(ids, noise=0.1)))
        return x.sin().sum() + decisions[-1].weight.sum()  # the backward pass needs x, so it computes all of this again

    with set_checkpoint_early_stop(False):
        checkpoint(layer, x, use_reentrant=False).backward()
    first, again = decisions
    assert torch.equal(first.token, again.token)
    assert torch.equal(first.expert, again.expert)
    assert torch.equal(first.weight, again.weight)


@ALL
def test_ties_are_broken_alike_in_batches_of_every_size(name: str) -> None:
    """Unless the router compares the tokens of a batch."""
    router, x, ids = tied_router(name).eval(), some_states(), inputs.token_ids()
    context = inputs.context(ids)
    whole = decide(router, x, ids, context)
    if not router.causal_in_evaluation or whole.slots is not None:
        return
    chosen = experts_of(whole, B * S)
    for sequence in range(B):
        one = slice(sequence, sequence + 1)
        told = None if context.told is None else context.told[one]
        alone = decide(router, x[one], ids[one], inputs.context(ids[one])._replace(told=told))
        assert torch.equal(experts_of(alone, S), chosen[sequence * S : (sequence + 1) * S]), sequence
    many = decide(router, x.repeat(20, 1, 1), ids.repeat(20, 1), inputs.context(ids.repeat(20, 1)))
    told_alike = 20 if name not in ("oracle", "shuffled_oracle") else 1  # the labels of `inputs` alternate
    assert torch.equal(experts_of(many, 20 * B * S)[: told_alike * B * S], chosen.repeat(told_alike, 1))


@pytest.mark.parametrize("name", ["topk", "sigmoid_bias", "group_limited", "noisy_topk"])
def test_equal_logits_give_the_same_experts_to_all_tokens(name: str) -> None:
    """Of hidden states that are all zero: no kernel picks other experts in a longer batch."""
    router = tied_router(name).eval()
    expected = None
    for sequences in (1, 2, 7, 64, 500):
        ids = torch.zeros(sequences, S, dtype=torch.long)
        chosen = experts_of(decide(router, torch.zeros(sequences, S, D), ids, inputs.context(ids)), sequences * S)
        expected = chosen[:1] if expected is None else expected
        assert torch.equal(chosen, expected.expand_as(chosen)), sequences


@pytest.mark.compiled
@pytest.mark.long
@ALL
def test_a_compiled_router_breaks_ties_as_it_does_without(name: str) -> None:
    """Compiled routers run without the type checks of the tests, which torch cannot compile."""
    command = [sys.executable, __file__, name]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(["tests/routers", "tests", *sys.path])}
    subprocess.run(command, check=True, timeout=300, env=environment)


def compare_compiled(name: str) -> None:
    """Raise AssertionError if the compiled router takes other experts."""
    router, x, ids = tied_router(name).eval(), some_states(), inputs.token_ids()
    plain = decide(router, x, ids, inputs.context(ids))
    router.chain[0].compile()
    compiled = decide(router, x, ids, inputs.context(ids))
    if plain.slots is not None:  # each slot has one expert, whatever the tokens are
        assert torch.equal(plain.expert, compiled.expert), name
        return
    assert torch.equal(experts_of(plain, B * S), experts_of(compiled, B * S)), name


if __name__ == "__main__":
    compare_compiled(sys.argv[1])
