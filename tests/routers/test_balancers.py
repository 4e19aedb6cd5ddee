"""Tests of every auxiliary loss with every router of conf/router: gradients, values at balance, and refusals."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moe.checks import ConfigError
from moe.config.classes import build
from moe.config.options import CONF, options, router_spec
from moe.launch.command_line import read_cells
from moe.routing.decision import Routing
from moe.routing.dispatch import dispatch
from moe.routing.loss_table import BALANCE_WEIGHTS, COSTLY, LOSSES
from moe.routing.losses import auxiliary
from moe.testing import inputs
from moe.testing.inputs import B, E, S
from moe.testing.law import Make

KEYS = {loss.weight: name for name, loss in LOSSES.items()}
BALANCERS = BALANCE_WEIGHTS | {"lb_first", "importance", "mutual_information"}
LEAST = dict.fromkeys(BALANCE_WEIGHTS, 0.5) | {"mutual_information": -math.log(E), "gate_variance": -math.inf}
YAMLS = {name: router_spec(name) for name in options("router")}


def maker(name: str) -> Make:
    return lambda dim: build(YAMLS[name], "router", dim, E)


IGNORED = {name: frozenset(KEYS) & inputs.random_router(maker(name)).ignored_keys() for name in YAMLS}


@pytest.mark.parametrize("name", YAMLS)
def test_a_loss_has_a_gradient_with_every_router_that_does_not_ignore_it(name: str) -> None:
    """Its value is above its minimum, and as finite as its gradient on the router or the experts."""
    layer, context = inputs.random_layer(maker(name)), inputs.context(inputs.token_ids(), noise=1.0)
    context = context._replace(costly=COSTLY, document_position=(torch.arange(S) % 5).expand(B, S))
    output = layer(inputs.hidden_states(), context)
    found, tokens = output.aux, output.routing[0].token
    assert all(value.isfinite() for value in found.values())
    pairs = len(tokens.unique()) < len(tokens)  # dtop_p may give each token one expert
    alone = frozenset(() if pairs else ("output_orthogonality",))
    for key in KEYS.keys() - IGNORED[name] - alone:
        loss = found[KEYS[key]]
        gradients = torch.autograd.grad(loss, [*layer.parameters()], retain_graph=True, allow_unused=True)
        sizes = [gradient.norm().item() for gradient in gradients if gradient is not None]
        assert sizes, key
        assert 1e-5 < max(sizes) < math.inf, key
        assert loss > LEAST.get(key, 0.0), key


def test_the_page_about_routing_names_the_routers_that_refuse_the_expected_load_and_no_others() -> None:
    table = (CONF.parent / "docs/routing.md").read_text().split("These routers refuse it:")[1].split("\n## ")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert named == {name for name, keys in IGNORED.items() if "load" in keys}


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
    routing = Routing.token_choice(expert, torch.ones(B * S, 1), probs=probs)
    offered = dispatch(routing, E, capacity=None, seq_len=S).offered
    found = auxiliary(routing, offered, seq_len=S, document_position=torch.arange(B * S) % S)
    expected = dict.fromkeys(BALANCE_WEIGHTS | {"lb_first"}, balance)
    expected |= {"importance": importance, "mutual_information": mutual_information}
    assert {key: found[KEYS[key]].item() for key in BALANCERS} == pytest.approx(expected, abs=1e-5)


def test_first_choices_may_be_off_balance_where_all_choices_are_even() -> None:
    """One expert is always first, and the others take turns as second."""
    probs = torch.tensor([[0.6, 0.3, 0.1], [0.6, 0.1, 0.3]])
    routing = Routing.token_choice(torch.tensor([[0, 1], [0, 2]]), torch.ones(2, 2), probs=probs)
    found = auxiliary(routing, torch.tensor([2, 1, 1]), seq_len=2)
    assert found["load_balance_first"].item() == pytest.approx(3 * 0.6)
    assert found["load_balance"].item() == pytest.approx(3 * (0.5 * 0.6 + 2 * 0.25 * 0.2))


@pytest.mark.parametrize("name", {keys: name for name, keys in IGNORED.items() if keys and name != "replay"}.values())
def test_a_loss_that_cannot_act_is_refused_in_one_line(name: str, small: list[str]) -> None:
    """Of routers that ignore the same keys, one is tried."""
    key = min(IGNORED[name] - {"load"}, default="load")
    noise = [] if key != "load" else ["noise=0.1"]
    why = f"router={name} ignores {key}, because .*|this router has a loss of its own for it, router.{key}"
    with pytest.raises(ConfigError, match=rf"^{key}=0\.5: ({why}); leave it out$"):
        read_cells([*small, f"router={name}", *noise, f"{key}=0.5"])
