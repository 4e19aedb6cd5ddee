"""A router is known by its declarations alone; the names of its attributes have no meaning."""

from typing import Any

import pytest
import torch
from jaxtyping import Float
from torch import Tensor, nn

from moe.checks import ConfigError
from moe.model.experts import Experts
from moe.model.layer import MoELayer
from moe.routers.base import LinearRouter, Router
from moe.routing.decision import Context, Knobs, Routing
from moe.training.evaluate import router_gram

B, S, D, E = 2, 6, 8, 4
IDS = torch.arange(B * S).view(B, S)


class Alternating(Router):
    """Give tokens at even positions one expert and tokens at odd positions two. `k` is the last number."""

    def __init__(self, dim: int, num_experts: int) -> None:
        super().__init__(dim, num_experts, fixed_k=None)
        self.k = 1
        self.weight = nn.Parameter(torch.randn(num_experts, dim))  # of no logit: it scales the gates

    def forward(self, x: Float[Tensor, "T D"], context: Context) -> Routing:
        chosen = torch.zeros(len(x), self.num_experts, dtype=torch.bool)
        for token in range(len(x)):
            self.k = 1 + token % 2
            chosen[token, : self.k] = True
        return Routing.masked(chosen, torch.ones(len(x), self.num_experts) * self.weight.mean())


class Renamed(Router):
    """Router that takes the top-1 of logits M x, with M under another name than `weight`."""

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
    layer = MoELayer(router, Experts(E, D, hidden=8, kind="silu"))
    for p in layer.experts.parameters():
        nn.init.normal_(p, std=0.1)
    return layer(torch.randn(B, S, D), Context(IDS, Knobs.of())).aux


def test_a_router_that_varies_an_attribute_k_is_not_causal_under_a_capacity() -> None:
    router = Alternating(D, E)
    routing = router(torch.randn(B * S, D), Context(IDS, Knobs.of()))
    assert set(torch.bincount(routing.token).tolist()) == {1, 2}
    assert router.is_causal(capacity=None, drop="position")
    assert not router.is_causal(capacity=1.0, drop="position")


def test_a_router_with_a_fixed_k_under_any_name_is_causal_when_it_drops_by_position() -> None:
    router = Renamed(D, E)
    assert router.is_causal(capacity=1.0, drop="position")
    assert not router.is_causal(capacity=1.0, drop="score")
    assert router.experts_per_token(S) == 1


def test_the_work_of_a_varying_number_of_experts_is_what_the_router_aims_at() -> None:
    router = Alternating(D, E)
    assert router.experts_per_token(S) == E, "nobody can say: the most there can be"
    router.mean_k = 1.5
    assert router.experts_per_token(S) == 1.5


def test_a_parameter_called_weight_is_no_declaration() -> None:
    router = Alternating(D, E)
    assert router.weight.shape == (E, D)
    assert "simbal" not in losses(router)
    assert router_gram(router) is None


def test_declared_rows_get_their_loss_and_metric_under_any_name() -> None:
    router = Renamed(D, E)
    with torch.no_grad():
        router.matrix.copy_(torch.linalg.qr(torch.randn(D, D)).Q[:E])
    assert losses(router)["simbal"].item() == pytest.approx(0, abs=1e-5)
    assert router_gram(router) == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        router.matrix.copy_(torch.ones(E, D) / D**0.5)
    assert losses(router)["simbal"].item() == pytest.approx(E * (E - 1))
    assert router_gram(router) == pytest.approx(1)


def test_whether_the_number_is_fixed_must_be_declared() -> None:
    class Silent(Router):
        def __init__(self, dim: int, num_experts: int) -> None:
            super().__init__(dim, num_experts)  # type: ignore[call-arg]

    with pytest.raises(TypeError, match="fixed_k"):
        Silent(D, E)


@pytest.mark.parametrize("k", [0, 5])
def test_a_fixed_number_is_between_1_and_all(k: int) -> None:
    with pytest.raises(ConfigError, match=rf"router\.k={k}: must be between 1 and model\.num_experts=4"):
        Router(D, E, fixed_k=k)


@pytest.mark.parametrize("base", [Router, LinearRouter])
def test_a_declaration_adds_no_entry_to_the_saved_weights(base: Any) -> None:
    names = ["weight"] if base is LinearRouter else []
    assert list(base(D, E, fixed_k=2).state_dict()) == names
