"""Tests of top-k and temperature routing against slow and simple reference code."""

import pytest
import torch
from torch import Tensor, nn

from moe.checks import ConfigError
from moe.routers.topk import Temperature, TopK
from moe.routing.decision import Context, Knobs, Routing

T, D, E = 40, 16, 8


@pytest.fixture
def x() -> Tensor:
    return torch.randn(T, D, generator=torch.Generator().manual_seed(1))


def route(router: TopK, x: Tensor, *, temperature: float = 1.0, noise: float = 0.0) -> Routing:
    nn.init.normal_(router.weight, generator=torch.Generator().manual_seed(3))
    return router(x, Context(torch.zeros(1, len(x), dtype=torch.long), Knobs.of(temperature=temperature, noise=noise)))


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("gate", ["renorm", "softmax_all", "uniform"])
def test_selection_and_gates_equal_a_loop_over_tokens(x: Tensor, k: int, gate: str) -> None:
    routing = route(TopK(D, E, k=k, gate=gate), x)
    assert routing.logits is not None
    for t in range(T):
        of_token = routing.token == t
        probs = torch.softmax(routing.logits[t], -1)
        best = sorted(range(E), key=lambda e: -probs[e].item())[:k]
        assert set(routing.expert[of_token].tolist()) == set(best)
        for expert, weight in zip(routing.expert[of_token].tolist(), routing.weight[of_token], strict=True):
            expected = {
                "softmax_all": probs[expert],
                "renorm": probs[expert] / probs[best].sum() if k > 1 else probs[expert],
                "uniform": torch.tensor(1 / k),
            }[gate]
            torch.testing.assert_close(weight, expected)


def test_renormalized_gates_sum_to_one_and_top1_gates_do_not(x: Tensor) -> None:
    torch.testing.assert_close(route(TopK(D, E, k=3), x).weight.view(T, 3).sum(-1), torch.ones(T))
    assert (route(TopK(D, E, k=1), x).weight < 1).all()


def test_uniform_gates_have_the_gradient_of_the_probabilities(x: Tensor) -> None:
    uniform, soft = TopK(D, E, k=2, gate="uniform"), TopK(D, E, k=2, gate="softmax_all")
    coefficients = torch.randn(2 * T, generator=torch.Generator().manual_seed(5))
    (route(uniform, x).weight * coefficients).sum().backward()
    (route(soft, x).weight * coefficients).sum().backward()
    torch.testing.assert_close(uniform.weight.grad, soft.weight.grad)


@pytest.mark.parametrize("temperature", [0.01, 0.5, 2.0, 10.0])
def test_temperature_never_changes_which_experts_are_chosen(x: Tensor, temperature: float) -> None:
    """Temperature never changes the selected experts, even where the softmax saturates into ties.

    The reason is that the logits select, not the probabilities.
    """
    plain, scaled = route(Temperature(D, E), x), route(Temperature(D, E), x, temperature=temperature)
    assert torch.equal(plain.expert, scaled.expert)
    assert not torch.equal(plain.weight, scaled.weight)


def test_temperature_divides_the_logits(x: Tensor) -> None:
    routing = route(Temperature(D, E), x, temperature=2.0)
    assert routing.logits is not None
    torch.testing.assert_close(routing.probs, torch.softmax(routing.logits / 2.0, -1))


def test_entropy_rises_with_temperature(x: Tensor) -> None:
    def entropy(temperature: float) -> float:
        probs = route(Temperature(D, E), x, temperature=temperature).probs
        assert probs is not None
        return torch.special.entr(probs).sum(-1).mean().item()

    assert entropy(0.5) < entropy(1.0) < entropy(2.0) < entropy(10.0)


def test_without_noise_no_random_numbers_are_drawn(x: Tensor) -> None:
    before = torch.get_rng_state()
    routing = route(TopK(D, E), x)
    assert torch.equal(torch.get_rng_state(), before)
    torch.testing.assert_close(routing.probs, torch.softmax(routing.logits, -1))
    route(TopK(D, E), x, noise=0.1)
    assert not torch.equal(torch.get_rng_state(), before)


def test_noise_is_added_before_temperature_softmax_and_selection() -> None:
    """With equal logits, noise alone decides: at temperature T the log-probabilities have the standard deviation
    noise / T, and every expert is selected equally often.
    """
    x = torch.zeros(20_000, D)
    routing = route(Temperature(D, E, temp=2.0), x, temperature=2.0, noise=0.5)
    assert routing.probs is not None
    centered = routing.probs.log() - routing.probs.log().mean(-1, keepdim=True)
    torch.testing.assert_close(centered.std().item() * 2.0, 0.5 * (1 - 1 / E) ** 0.5, rtol=0.02, atol=0)
    counts = torch.bincount(routing.expert, minlength=E).float()
    torch.testing.assert_close(counts / counts.sum(), torch.full((E,), 1 / E), rtol=0.05, atol=0)
    assert routing.logits is not None
    assert routing.logits.abs().max() == 0, "the returned logits, which the z-loss uses, are without noise"


@pytest.mark.parametrize("temp", [0.0, -1.0, float("nan"), float("inf")])
def test_a_temperature_must_be_positive_and_finite(temp: float) -> None:
    with pytest.raises(ConfigError, match=r"router\.temp=.*finite number > 0"):
        Temperature(D, E, temp=temp)


@pytest.mark.parametrize("k", [0, -1, E + 1])
def test_k_must_be_between_1_and_the_number_of_experts(k: int) -> None:
    with pytest.raises(ConfigError, match=rf"router\.k={k}: must be between 1 and model\.num_experts=8"):
        TopK(D, E, k=k)


def test_jitter_multiplies_what_the_router_reads_in_training_alone() -> None:
    """With W = 1 on the diagonal and x = 1, the logits are the random factors: uniform on 1 +- 0.1."""
    router = TopK(4, 4, k=1, jitter=0.1)
    router.weight.data.copy_(torch.eye(4))
    x = torch.ones(5000, 4)
    context = Context(torch.zeros(1, 5000, dtype=torch.long), Knobs.of())
    factors = router(x, context).logits
    assert factors is not None
    assert 0.9 <= factors.min() < 0.901
    assert 1.099 < factors.max() <= 1.1
    assert abs(factors.mean() - 1) < 5 * 0.1 / 3**0.5 / 20000**0.5
    assert (x == 1).all()
    assert torch.equal(router.eval()(x, context).logits, x)


def test_a_jitter_that_could_turn_numbers_around_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^router.jitter=1.0: must be at least 0, below 1$"):
        TopK(4, 4, jitter=1.0)
