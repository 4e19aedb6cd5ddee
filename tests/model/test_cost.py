"""Tests of the FLOPs of imported models."""

import pytest
import torch
from architectures import V, around, router_of, tiny
from torch.utils.flop_counter import FlopCounterMode

from moe.model.cost import attention_flops, flops_per_token


@pytest.mark.parametrize(
    ("kind", "changes"),
    [("olmoe", {}), ("qwen3_moe", {"head_dim": 16}), ("deepseek_v3", {}), ("deepseek_v2", {}), ("lfm2_moe", {})],
)
def test_attention_costs_half_of_what_eager_attention_computes(kind: str, changes: dict[str, int]) -> None:
    """Eager attention multiplies all pairs of tokens, a causal one half of them. Positions need a few products too."""
    source = tiny(kind, attn_implementation="eager", **changes)
    length = 64
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        source(torch.randint(3, V, (1, length)))
    products = counter.get_flop_counts()["Global"][torch.ops.aten.bmm]
    assert attention_flops(source.config, length) * length * 2 == pytest.approx(products, rel=0.02)


def test_a_window_limits_the_context() -> None:
    config = tiny("mixtral", sliding_window=4).config
    mean = sum(min(t + 1, 4) for t in range(64)) / 64
    per_layer = 2 * 4 * (8 + 8)
    assert attention_flops(config, 64) / (3 * per_layer) == pytest.approx(mean, abs=0.05)
    config.sliding_window = None
    assert attention_flops(config, 64) == 3 * per_layer * 32


def test_the_flops_of_an_imported_model_equal_a_hand_computed_value() -> None:
    """Each layer has queries of 4 heads, keys and values of 2, a router of 5 rows and 3 experts of width 24."""
    source = tiny("qwen3_moe", head_dim=16, tie_word_embeddings=False)
    matrices = 3 * (2 * 32 * 4 * 16 + 2 * 32 * 2 * 16 + 5 * 32 + 3 * 3 * 32 * 24) + 32 * V
    assert flops_per_token(around(source, router_of(source)), 64) == 2 * matrices + 3 * 2 * 4 * (16 + 16) * 32


def test_biases_of_experts_are_no_matrices() -> None:
    source = tiny("gpt_oss")
    matrices = 3 * (2 * 32 * 4 * 8 + 2 * 32 * 2 * 8 + 5 * 32 + 3 * 3 * 32 * 40) + 32 * V
    found = flops_per_token(around(source), 64) - attention_flops(source.config, 64)
    assert found == 2 * matrices
