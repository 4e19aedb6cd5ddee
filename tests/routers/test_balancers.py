"""Tests of every balance loss with every router of conf/router: gradients, values at balance, and refusals."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moe.checks import ConfigError
from moe.config.classes import build
from moe.config.options import options, router_spec
from moe.launch.command_line import read_cells
from moe.routers.base import Router
from moe.routing.decision import Routing
from moe.routing.dispatch import dispatch
from moe.routing.loss_table import BALANCE_WEIGHTS, LOSSES
from moe.routing.losses import auxiliary
from moe.testing import inputs
from moe.testing.inputs import B, D, E, S

KEYS = BALANCE_WEIGHTS | {"importance", "mutual_information"}
NAMES = {LOSSES[name].weight: name for name in LOSSES if LOSSES[name].weight in KEYS}
YAMLS = {name: router_spec(name) for name in options("router")}


def make(name: str) -> Router:
    return inputs.random_router(lambda dim: build(YAMLS[name], "router", dim, E))


IGNORED = {name: KEYS & make(name).ignored_keys() for name in YAMLS}


def losses(routing: Routing) -> dict[str, Tensor]:
    """Return the balance losses that this routing has, by key. Each sequence is a document."""
    offered = dispatch(routing, E, capacity=None, seq_len=S).offered
    position = torch.arange(B * S) % S
    values = auxiliary(routing, offered, seq_len=S, document_position=position)
    return {key: values[name] for key, name in NAMES.items() if name in values}


@pytest.mark.parametrize("name", YAMLS)
def test_a_balancer_has_a_gradient_with_every_router_that_does_not_ignore_it(name: str) -> None:
    """Its value is above that of balanced experts, and as finite as its gradient on the router."""
    router = make(name).chain[0]
    found = losses(router(inputs.hidden_states().view(-1, D), inputs.context(inputs.token_ids())))
    assert all(value.isfinite() for value in found.values())
    for key in KEYS - IGNORED[name]:
        gradients = torch.autograd.grad(found[key], [*router.parameters()], retain_graph=True, allow_unused=True)
        sizes = [gradient.norm().item() for gradient in gradients if gradient is not None]
        assert sizes, key
        assert 1e-4 < max(sizes) < math.inf, key
        assert found[key] > {"importance": 0.0, "mutual_information": -math.log(E)}.get(key, 0.5), key


@pytest.mark.parametrize(
    ("probs", "balance", "importance", "mutual_information"),
    [
        (F.one_hot(torch.arange(B * S) % E, E).float(), 1.0, 0.0, -math.log(E)),  # certain, and balanced
        (torch.full((B * S, E), 1 / E), 1.0, 0.0, 0.0),  # balanced, and not certain
        (F.one_hot(torch.zeros(B * S, dtype=torch.long), E).float(), E, E - 1, 0.0),  # one expert has everything
    ],
)
def test_a_balancer_is_smallest_at_balance_and_largest_at_collapse(
    probs: Tensor, balance: float, importance: float, mutual_information: float
) -> None:
    """Only the mutual information tells a certain router from one that hesitates."""
    certain = probs.amax() == 1
    expert = probs.argmax(-1, keepdim=True) if certain else torch.arange(B * S)[:, None] % E
    found = losses(Routing.token_choice(expert, torch.ones(B * S, 1), probs=probs))
    expected = dict.fromkeys(BALANCE_WEIGHTS, balance)
    expected |= {"importance": importance, "mutual_information": mutual_information}
    assert {key: value.item() for key, value in found.items()} == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("name", [name for name, keys in IGNORED.items() if keys and name != "replay"])
def test_a_balancer_that_cannot_act_is_refused_in_one_line(name: str, small: list[str]) -> None:
    key = min(IGNORED[name])
    with pytest.raises(ConfigError, match=rf"^{key}=0\.5: router={name} ignores {key}; leave it out$"):
        read_cells([*small, f"router={name}", f"{key}=0.5"])
