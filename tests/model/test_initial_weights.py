"""Tests that the initial value of a tensor depends on the seed, its name and its shape alone."""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from moe.config.model import ModelConfig
from moe.config.options import options, router_spec
from moe.model.architecture import MoEConfig
from moe.model.causal_lm import MoEForCausalLM

SIZES = {"dim": 16, "heads": 2, "layers": 2, "ffn": 16, "num_experts": 4, "dense_ffn": 16}
ROUTERS = list(options("router"))


@functools.cache
def initial(router: str = "topk", *, seed: int = 42, **sizes: Any) -> dict[str, Tensor]:
    settings = router_spec(router)
    torch.manual_seed(seed)
    torch.rand(seed)  # the state of the generator must not matter
    config = MoEConfig.of(ModelConfig(**SIZES | sizes), settings, vocab_size=32, seq_len=8)
    return MoEForCausalLM(config, trusted=True).state_dict()


@pytest.mark.parametrize("router", ROUTERS)
def test_runs_of_a_seed_start_with_the_same_weights_whatever_their_router(router: str) -> None:
    """All tensors outside the routers are equal, and tensors of routers with the same name and shape too."""
    one, other = initial("topk"), initial(router)
    outside = {name for name in one if ".router." not in name}
    assert outside <= other.keys()
    for name in outside | (one.keys() & other.keys()):
        if one[name].shape == other[name].shape:
            assert torch.equal(one[name], other[name]), name
    drawn = {t.data_ptr(): t for t in other.values() if t.is_floating_point() and t.numel() >= 8 and t.std() > 0}
    beginnings = {tuple(tensor.flatten()[:8].tolist()) for tensor in drawn.values()}
    assert len(beginnings) == len(drawn), "each tensor has random numbers of its own"


@pytest.mark.parametrize(
    "sizes", [{"layers": 3}, {"shared_experts": 1}, {"num_experts": 8}, {"first_k_dense_replace": 1, "dense_ffn": 8}]
)
def test_a_changed_size_changes_only_the_tensors_that_have_another_shape(sizes: dict[str, int]) -> None:
    one, other = initial(), initial(**sizes)
    common = [name for name in one.keys() & other.keys() if one[name].shape == other[name].shape]
    assert len(common) > 5
    assert all(torch.equal(one[name], other[name]) for name in common)


def test_another_seed_changes_all_matrices() -> None:
    one, other = initial(), initial(seed=43)
    assert not any(torch.equal(one[name], other[name]) for name in one if one[name].ndim >= 2)
