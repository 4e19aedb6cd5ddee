"""Tests of routers in bf16: what is rounded, that gradients stay, and how many tokens change their experts."""

from typing import Any

import pytest
import torch
from small_runs import run, untimed

from moe.config.classes import build
from moe.config.options import complete, router_spec
from moe.model.experts import Experts
from moe.model.layer import MoELayer
from moe.model.router_precision import PRECISIONS, decide, flips
from moe.routers.topk import TopK
from moe.routing.decision import Context, Knobs, Routing
from moe.testing import inputs
from moe.testing.inputs import D, E

TOKENS = 512
IDS = torch.zeros(1, TOKENS, dtype=torch.long)
CONTEXT = Context(IDS, Knobs.of())
ROUTERS = complete("router")


def router_and_states() -> tuple[TopK, torch.Tensor]:
    torch.manual_seed(0)
    router = TopK(D, E, k=2)
    router.initialize(0.5)
    return router, torch.randn(TOKENS, D)


def rounded(x: torch.Tensor) -> torch.Tensor:
    return x.bfloat16().float()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_weights_alone_or_products_too_are_rounded(precision: str) -> None:
    """Compared with rounding by hand. Logits of `bf16` have bf16's eight bits, all numbers are stored in fp32."""
    router, x = router_and_states()
    routing = decide(router, x, CONTEXT, precision)
    weight = router.weight.detach()
    expected = {
        "fp32": x @ weight.T,
        "bf16_weights": x @ rounded(weight).T,
        "bf16": rounded(rounded(x) @ rounded(weight).T),
    }[precision]
    assert routing.logits is not None
    assert routing.probs is not None
    tolerance = 2**-7 if precision == "bf16" else 1e-6  # a sum that is rounded may fall on either side
    torch.testing.assert_close(routing.logits, expected, rtol=tolerance, atol=1e-5)
    assert torch.equal(routing.logits, rounded(routing.logits)) == (precision == "bf16")
    assert {routing.logits.dtype, routing.probs.dtype, routing.weight.dtype} == {torch.float32}
    torch.testing.assert_close(routing.probs, routing.logits.softmax(-1))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_fp32_weights_get_the_gradient_of_the_rounded_ones(precision: str) -> None:
    router, x = router_and_states()
    gradients = []
    for each in ("fp32", precision):
        router.zero_grad()
        decide(router, x, CONTEXT, each).weight.square().sum().backward()
        assert router.weight.grad is not None
        gradients.append(router.weight.grad)
    assert gradients[1].dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(gradients[0].flatten(), gradients[1].flatten(), dim=0) > 0.97


def test_flips_count_other_experts_and_another_order_by_hand() -> None:
    def routing(expert: list[list[int]], weight: list[list[float]]) -> Routing:
        return Routing.token_choice(torch.tensor(expert), torch.tensor(weight))

    exact = routing([[0, 1], [0, 1], [2, 3], [4, 5]], [[0.6, 0.4]] * 4)
    other = routing([[0, 1], [1, 0], [2, 4], [4, 5]], [[0.7, 0.3], [0.6, 0.4], [0.6, 0.4], [0.6, 0.4]])
    assert flips(other, exact, 4, E).tolist() == [1, 2]
    assert flips(exact, exact, 4, E).tolist() == [0, 0]


def test_tokens_between_two_experts_flip_and_clear_ones_do_not() -> None:
    """In bf16, logits that differ by less than 2^-9 are often equal; those that differ by a tenth never are."""
    router = TopK(2, 2, k=1)
    with torch.no_grad():
        router.weight.copy_(torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
    for gap, flipped in ((-(2**-12), 1.0), (-0.1, 0.0)):
        x = torch.tensor([[1.0, gap]]).expand(TOKENS, 2)
        exact, low = (decide(router, x, CONTEXT, precision) for precision in ("fp32", "bf16"))
        assert exact.expert.tolist() == [0] * TOKENS
        share = flips(low, exact, TOKENS, 2)[0].item() / TOKENS
        assert share == (flipped if low.expert[0] != 0 else 0.0)
        assert gap == -0.1 or low.logits[0, 0] == low.logits[0, 1]  # type: ignore[index]


@pytest.mark.parametrize("precision", ["bf16_weights", "bf16"])
@pytest.mark.parametrize("name", ROUTERS)
def test_every_router_runs_in_every_precision(name: str, precision: str) -> None:
    settings = router_spec(name)
    router = inputs.random_router(lambda dim: build(settings, "router", dim, E))
    experts = Experts(router.num_experts, D, hidden=8, kind="silu")
    experts.initialize(0.3, {p: str(number) for number, p in enumerate(experts.parameters())})
    layer = MoELayer(router, experts, router_precision=precision)
    context = inputs.context(inputs.token_ids())._replace(compared=torch.tensor([0]))
    output = layer(inputs.hidden_states(), context)
    (output.y.square().sum() + sum(loss.sum() for loss in output.aux.values())).backward()
    for routing in output.routing:
        numbers = [routing.weight, routing.probs, routing.logits, *routing.aux.values()]
        assert {number.dtype for number in numbers if number is not None} == {torch.float32}
    assert output.y.isfinite().all()
    grads = [p.grad for p in router.parameters() if p.grad is not None]
    assert all(grad.isfinite().all() and grad.dtype == torch.float32 for grad in grads)
    assert 0 <= output.stats.flipped <= output.stats.reordered <= output.stats.rechecked


def test_the_outputs_of_all_experts_for_no_token_are_empty() -> None:
    """A micro-batch of the validation set can be too small to have a token on which experts are compared."""
    router, x = router_and_states()
    layer = MoELayer(router, Experts(E, D, hidden=8, kind="silu"))
    assert layer.outputs_of_all(x[:0]).shape == (E, 0, D)


def test_a_run_with_a_router_in_bf16_has_its_flip_rates_and_one_in_fp32_has_none(cell: Any) -> None:
    small = ("steps=1", "model.layers=1", "eval_every=1", "save_model=none", "data.max_val_blocks=64")
    rates = {}
    for precision in ("fp32", "bf16"):
        one = cell(*small, f"model.router_precision={precision}")
        run(one)
        [*_, last] = [event for event in untimed(one.folder) if event["kind"] == "eval"]
        rates[precision] = last["routing/flip_rate"], last["routing/flip_rate_order"]
    assert rates["fp32"] == (None, None)
    assert 0 <= rates["bf16"][0] <= rates["bf16"][1] < 0.5
    assert rates["bf16"][1] > 0
