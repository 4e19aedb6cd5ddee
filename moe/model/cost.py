"""What a model costs: parameters and floating-point operations, each with its formula stated."""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from moe.model.decoder import MoEForCausalLM


class Parameters(NamedTuple):
    """total: all of them, tied ones once. active: those that one token uses, so K/E of each routed expert stack."""

    total: int
    active: int


def count_parameters(model: MoEForCausalLM) -> Parameters:
    """Count parameters, with `Router.experts_per_token` of the experts active.

    Where experts work on mixtures of tokens, a token uses all of them.
    """
    total = sum(p.numel() for p in model.parameters())
    seq_len = model.config.max_position_embeddings
    idle = 0
    for layer in model.moe_layers:
        size = sum(p.numel() for p in layer.experts.parameters())
        experts = layer.router.num_experts
        mixing = any(router.mixing_flops() for router in layer.router.chain)
        used = experts if mixing else layer.router.experts_per_token(seq_len)
        idle += size - round(size * min(1.0, used / experts))
    return Parameters(total, total - idle)


def flops_per_token(model: MoEForCausalLM, seq_len: int, *, active: Sequence[float | None] | None = None) -> int:
    """Forward FLOPs of one token: 2 per matrix weight that works for it (the tied output matrix once, embedding look-up
    free; K/E of the routed experts), plus attention scores and values, 2 * 2 * D * S/2 per layer for a causal context
    of mean length S/2, plus the mixing of tokens into slots where a router does that.

    active: `routing/active_experts` of each MoE layer, to count the experts that tokens asked for; without it, and
    where there is none, K is `Router.experts_per_token`: where the number varies, what it is intended to be.

    Training costs three times as much. Norms, softmax and routing bookkeeping are left out.
    """
    config = model.config
    parts = (*model.model.layers, model.lm_head)  # layers one by one: what they share works in each of them
    weights = float(sum(p.numel() for part in parts for p in part.parameters() if p.ndim > 1))
    mixing = 0
    for layer, asked in zip(model.moe_layers, active or [None] * len(model.moe_layers), strict=True):
        size = sum(p.numel() for p in layer.experts.parameters())
        router = layer.router
        # in the metrics, a token counts once for each router of a chain
        used = router.experts_per_token(seq_len) if asked is None else asked * len(router.chain)
        weights += size * (used / router.num_experts - 1)
        mixing += router.mixing_flops()
    return round(2 * weights) + mixing + config.num_hidden_layers * 2 * config.hidden_size * seq_len


def reset_peak_memory(device: torch.device) -> None:
    """Start measuring peak memory from here, where the system can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):  # Linux: forget the resident-set peak
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory_gb(device: torch.device) -> float | None:
    """Peak since the reset, in 1e9 bytes: allocated on a GPU, resident in the process on a CPU (null if unknown)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e9
