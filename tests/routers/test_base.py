"""Tests that the code uses only what a router declares, whatever the names of its other attributes."""

import inspect
from typing import Any

import pytest
import torch
from jaxtyping import Float
from torch import Tensor, nn

from moe.checks import ConfigError
from moe.model.experts import Experts
from moe.model.layer import MoELayer
from moe.routers.base import LinearRouter, Router, check_k
from moe.routing.decision import Context, Knobs, Routing
from moe.training.evaluate import router_gram

B, S, D, E = 2, 6, 8, 4
IDS = torch.arange(B * S).view(B, S)


class Alternating(Router):
    """Router that gives tokens at even positions one expert and tokens at odd positions two.

    Its attribute `k` holds the number of the last token. It is not a declaration.
    """

    def __init__(self, dim: int, num_experts: int) -> None:
        super().__init__(dim, num_experts, fixed_k=None)
        self.k = 1
        self.weight = nn.Parameter(torch.randn(num_experts, dim))  # scales the gates and produces no logits

    def forward(self, x: Float[Tensor, "T D"], context: Context) -> Routing:
        chosen = torch.zeros(len(x), self.num_experts, dtype=torch.bool)
        for token in range(len(x)):
            self.k = 1 + token % 2
            chosen[token, : self.k] = True
        return Routing.masked(chosen, torch.ones(len(x), self.num_experts) * self.weight.mean())


class Renamed(Router):
    """Router that takes the largest of the logits M x and stores M under another name than `weight`."""

    def __init__(self, dim: int, num_experts: int) -> None:
        super().__init__(dim, num_experts, fixed_k=1)
        self.matrix = nn.Parameter(torch.randn(num_experts, dim))

    @property
    def expert_rows(self) -> Float[Tensor, "E D"]:
        return self.matrix

    def forward(self, x: Float[Tensor, "T D"], context: Context) -> Routing:
        logits = x @ self.matrix.T
        probs = logits.softmax(-1)
        weight, expert = probs.topk(1)
        return Routing.token_choice(expert, weight, probs=probs, logits=logits)


def losses(router: Router) -> dict[str, Tensor]:
    """Return the auxiliary losses of a layer with this router and random inputs."""
    layer = MoELayer(router, Experts(E, D, hidden=8, kind="silu"))
    for p in layer.experts.parameters():
        nn.init.normal_(p, std=0.1)
    return layer(torch.randn(B, S, D), Context(IDS, Knobs.of())).aux


def test_a_router_without_fixed_k_is_not_causal_under_a_capacity_even_if_it_has_an_attribute_k() -> None:
    router = Alternating(D, E)
    routing = router(torch.randn(B * S, D), Context(IDS, Knobs.of()))
    assert set(torch.bincount(routing.token).tolist()) == {1, 2}
    assert router.is_causal(capacity=None, drop="position")
    assert not router.is_causal(capacity=1.0, drop="position")


def test_a_router_with_fixed_k_is_causal_under_a_capacity_when_it_drops_by_position() -> None:
    router = Renamed(D, E)
    assert router.is_causal(capacity=1.0, drop="position")
    assert not router.is_causal(capacity=1.0, drop="score")
    assert router.experts_per_token(S) == 1


def test_experts_per_token_is_mean_k_if_the_number_varies_and_all_experts_without_mean_k() -> None:
    router = Alternating(D, E)
    assert router.experts_per_token(S) == E, "without mean_k, the largest possible number"
    router.mean_k = 1.5
    assert router.experts_per_token(S) == 1.5


def test_a_parameter_named_weight_does_not_declare_expert_rows() -> None:
    router = Alternating(D, E)
    assert router.weight.shape == (E, D)
    assert "simbal" not in losses(router)
    assert router_gram(router) is None


def test_declared_expert_rows_get_simbal_and_router_gram_under_any_attribute_name() -> None:
    router = Renamed(D, E)
    with torch.no_grad():
        router.matrix.copy_(torch.linalg.qr(torch.randn(D, D)).Q[:E])
    assert losses(router)["simbal"].item() == pytest.approx(0, abs=1e-5)
    assert router_gram(router) == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        router.matrix.copy_(torch.ones(E, D) / D**0.5)
    assert losses(router)["simbal"].item() == pytest.approx(E * (E - 1))
    assert router_gram(router) == pytest.approx(1)


def test_a_router_must_pass_fixed_k() -> None:
    class Undeclared(Router):
        def __init__(self, dim: int, num_experts: int) -> None:
            super().__init__(dim, num_experts)  # type: ignore[call-arg]

    with pytest.raises(TypeError, match="fixed_k"):
        Undeclared(D, E)


class WithK(Router):
    """Router with a setting `k`."""

    def __init__(self, dim: int, num_experts: int, *, k: Any) -> None:
        super().__init__(dim, num_experts, fixed_k=k)


@pytest.mark.parametrize(
    ("k", "allowed"),
    [
        (0, "between 1 and model.num_experts=4"),
        (5, "between 1 and model.num_experts=4"),
        (True, "a whole number"),
    ],
)
def test_fixed_k_must_be_a_whole_number_from_1_to_the_number_of_experts(k: Any, allowed: str) -> None:
    """The message names `router.k` only for a router that has this setting."""
    with pytest.raises(ConfigError, match=f"^fixed_k of Router={k}: must be {allowed}$"):
        Router(D, E, fixed_k=k)
    with pytest.raises(ConfigError, match=f"^router.k={k}: must be {allowed}$"):
        WithK(D, E, k=k)


@pytest.mark.parametrize("k", ["2", 2.0])
def test_fixed_k_of_another_type_is_refused_in_one_line(k: Any) -> None:
    with pytest.raises(ConfigError, match=f"^router.k={k}: must be a whole number$"):
        inspect.unwrap(check_k)(k, E)  # without the type checks of the tests


def test_a_parameter_that_hides_a_property_of_a_router_is_refused_in_one_line() -> None:
    class Hiding(Router):
        def __init__(self, dim: int, num_experts: int) -> None:
            super().__init__(dim, num_experts, fixed_k=1)
            self.expert_rows = nn.Parameter(torch.empty(num_experts, dim))

    with pytest.raises(TypeError, match=r"^Hiding\.expert_rows is a property: store the value by another name"):
        Hiding(D, E)


@pytest.mark.parametrize(
    ("chain", "message"),
    [
        ([], r"^chain of Chained=\[\]: must be a list of one or more routers$"),
        ([nn.Identity()], "must be a list of one or more routers$"),
        ([Renamed(D, E), Router(D, E, fixed_k=2)], "^fixed_k in the chain of Chained=2: must be 1$"),
    ],
)
def test_a_chain_must_be_routers_with_the_same_fixed_k(chain: Any, message: str) -> None:
    class Chained(Renamed):
        @property
        def chain(self) -> Any:
            return chain

    with pytest.raises(ConfigError, match=message):
        MoELayer(Chained(D, E), Experts(E, D, hidden=8, kind="silu"))


def test_a_router_ignores_what_follows_from_its_other_declarations() -> None:
    assert Renamed(D, E).ignored_keys() == {"output_orthogonality", "load"}
    assert LinearRouter(D, E, fixed_k=2).ignored_keys() == {"load"}
    assert LinearRouter(D, E, fixed_k=E).ignored_keys() == {"lb", "lb_sequence", "lb_global", "lb_document", "load"}
    assert Router(D, E, fixed_k=2).ignored_keys() == {"simbal", "erc", "load"}
    assert all({**Router(D, 1, fixed_k=1).why_ignored(), **LinearRouter(D, E, fixed_k=E).why_ignored()}.values())


@pytest.mark.parametrize("base", [Router, LinearRouter])
def test_declarations_add_no_entry_to_the_saved_weights(base: Any) -> None:
    names = ["weight"] if base is LinearRouter else []
    assert list(base(D, E, fixed_k=2).state_dict()) == names
