"""Tests of Matryoshka routing: which numbers of experts are drawn, how often, and what evaluation uses."""

from typing import Any

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor, nn

from moe.checks import ConfigError
from moe.routers.matryoshka import Matryoshka, draw
from moe.routing.decision import Context, Knobs, Routing

T, D, E = 30, 16, 8


def route(x: Tensor, *, training: bool, **settings: Any) -> Routing:
    router = Matryoshka(D, E, **settings).train(training)
    nn.init.normal_(router.weight, generator=torch.Generator().manual_seed(3))
    return router(x, Context(torch.zeros(1, len(x), dtype=torch.long), Knobs.of()))


@pytest.fixture
def x() -> Tensor:
    return torch.randn(T, D, generator=torch.Generator().manual_seed(1))


def test_all_numbers_are_equally_likely() -> None:
    torch.manual_seed(0)
    drawn = torch.tensor([draw(2, 5) for _ in range(2000)])
    counts = drawn.bincount(minlength=6)
    assert counts[:2].tolist() == [0, 0]
    assert chisquare(counts[2:].numpy()).pvalue > 0.001


def test_training_gives_all_tokens_the_same_drawn_number_and_evaluation_gives_k(x: Tensor) -> None:
    numbers = set()
    for seed in range(30):
        torch.manual_seed(seed)
        counts = route(x, training=True, k=2, k_min=2, k_max=4).token.bincount(minlength=T)
        assert len(counts.unique()) == 1
        numbers.add(int(counts[0]))
    assert numbers == {2, 3, 4}
    assert set(route(x, training=False, k=5).token.bincount(minlength=T).tolist()) == {5}


def test_experts_are_nested_and_gates_are_the_softmax_over_the_chosen_ones(x: Tensor) -> None:
    """The experts for k are those for k - 1 and one more."""
    smaller: set[tuple[int, int]] = set()
    for k in range(1, E + 1):
        routing = route(x, training=False, k=k)
        assert routing.probs is not None
        chosen = routing.probs.gather(1, routing.expert.view(T, k))
        torch.testing.assert_close(routing.weight.view(T, k), chosen / chosen.sum(-1, keepdim=True))
        pairs = set(zip(routing.token.tolist(), routing.expert.tolist(), strict=True))
        assert smaller < pairs
        smaller = pairs


@pytest.mark.parametrize(
    "settings", [{"k": 0}, {"k": E + 1}, {"k_min": 0}, {"k_max": E + 1}, {"k_min": 5}, {"k_max": 1}]
)
def test_wrong_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"router\.{next(iter(settings))}="):
        Matryoshka(D, E, **settings)


def test_one_number_alone_is_a_fixed_number() -> None:
    assert Matryoshka(D, E, k=3, k_min=3, k_max=3).fixed_k == 3
    assert Matryoshka(D, E, k=2, k_min=3, k_max=3).fixed_k is None
