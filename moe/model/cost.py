"""The cost of a model: number of parameters, FLOPs and peak memory."""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from moe.config.checkpoints import transformers_config
from moe.model.causal_lm import MoEForCausalLM
from moe.model.layer import MoELayer


class Parameters(NamedTuple):
    """Numbers of parameters.

    total: all parameters; tied ones count once.
    active: the parameters that process one token, with K/E of the routed experts.
    trainable: the parameters that training changes, see the key `trainable`.
    """

    total: int
    active: int
    trainable: int


def count_parameters(model: MoEForCausalLM) -> Parameters:
    """Count parameters, with `Router.experts_per_token` active experts.

    If experts process mixtures of tokens, all experts are active for each token.
    """
    total = sum(p.numel() for p in model.parameters())
    seq_len = model.config.max_position_embeddings
    idle = 0
    for layer in (*model.moe_layers, *model.beside_layers):
        size = _routed_size(layer)
        experts = layer.router.num_experts
        mixing = any(router.mixing_flops() for router in layer.router.chain)
        used = experts if mixing else layer.router.experts_per_token(seq_len)
        idle += size - round(size * min(1.0, used / experts))
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Parameters(total, total - idle, trainable)


def _routed_size(layer: MoELayer, *, matrices: bool = False) -> int:
    """Return the number of parameters of the routed experts of a layer, and of what an adapter has beside each.

    matrices: leave out biases.
    """
    modules = [layer.experts] + ([] if layer.beside_experts is None else [layer.beside_experts])
    named = [each for module in modules for each in module.named_parameters()]
    return sum(p.numel() for name, p in named if not (matrices and _is_bias(name)))


def _is_bias(name: str) -> bool:
    return name.endswith("bias")


def flops_per_token(model: MoEForCausalLM, seq_len: int, *, active: Sequence[float | None] | None = None) -> int:
    """Return the forward FLOPs of one token.

    They are the sum of
    - 2 for each weight of the matrices that process the token. The tied output matrix counts once, because looking up
      an embedding is free. Routed experts count K/E.
    - attention scores and values, see `attention_flops`.
    - the mixing of tokens into slots, if the router does that.
    - the same for adapters. LoRA counts as if B A x were computed from the right; peft adds B A to a stack of experts
      first, which costs more.
    Norms, softmax and the dispatch of tokens are left out. Training costs three times as much if all parameters train:
    the backward pass computes a gradient of the inputs and one of the weights of each matrix. For a frozen matrix the
    latter is saved, and below the first layer that trains the former too, so that three times is then an upper bound.

    active: the metric `routing/active_experts` of each MoE layer, to use as K. Where it is missing or None, K is
        `Router.experts_per_token`, which is the intended mean if the number varies.
    """
    config = model.config
    named = model.named_parameters(remove_duplicate=False)  # modules that layers share work in each of them
    looked_up = sum(p.numel() for p in model.get_input_embeddings().parameters())
    weights = float(sum(p.numel() for name, p in named if p.ndim > 1 and not _is_bias(name)) - looked_up)
    mixing = 0
    layers = [*model.moe_layers, *model.beside_layers]
    measured = [*(active or [])]
    for layer, asked in zip(layers, measured + [None] * (len(layers) - len(measured)), strict=True):
        size = _routed_size(layer, matrices=True)
        router = layer.router
        # in the metrics, a token counts once per router of a chain
        used = router.experts_per_token(seq_len) if asked is None else asked * len(router.chain)
        weights += size * (used / router.num_experts - 1)
        mixing += router.mixing_flops()
    source = config if config.imported is None else transformers_config.parse(config.imported, "config.json.imported")
    return round(2 * weights) + mixing + attention_flops(source, seq_len)


class TrainingFlops:
    """Counts the FLOPs that training has spent, from the experts that its steps ran.

    A token costs three times the forward FLOPs of all but the routed experts, see `flops_per_token`. An assignment that
    is carried out costs three times the forward FLOPs of an expert. A run of an expert without a backward pass
    (`RoutingStats.forward_only`) costs the forward FLOPs, and those of the layer's matrix after the experts if there is
    one. So dropped assignments cost nothing, and a number of experts that varies counts as it was.

    total: the FLOPs so far.
    """

    def __init__(self, model: MoEForCausalLM, seq_len: int) -> None:
        layers = [*model.moe_layers, *model.beside_layers]
        self.total = 0.0
        self._token = 3 * flops_per_token(model, seq_len, active=[0.0] * len(layers))
        self._expert = [2 * _routed_size(layer, matrices=True) / layer.router.num_experts for layer in layers]
        self._after = [0 if layer.latent is None else 2 * layer.latent.up.weight.numel() for layer in layers]

    def add(self, tokens: int, kept: Sequence[float], forward_only: Sequence[float]) -> None:
        """Add a step of so many tokens.

        kept, forward_only: of each layer, as in `RoutingStats`: the MoE layers, then those that an adapter has put
            beside them.
        """
        runs = zip(self._expert, self._after, kept, forward_only, strict=True)
        experts = sum(3 * expert * trained + (expert + after) * alone for expert, after, trained, alone in runs)
        self.total += float(tokens * self._token + experts)


def training_flops_per_token(model: MoEForCausalLM, seq_len: int) -> int:
    """Return the FLOPs that one token is going to cost in training, with the number of experts that a router aims at.

    They are three times those of `flops_per_token`, and those of the experts that run for a router alone.
    """
    counted = TrainingFlops(model, seq_len)
    routers = [layer.router for layer in (*model.moe_layers, *model.beside_layers)]
    alone = [float(router.num_experts if router.trains_all_experts else 0) for router in routers]
    counted.add(1, [router.experts_per_token(seq_len) for router in routers], alone)
    return round(counted.total)


def attention_flops(config: Any, seq_len: int) -> int:
    """Return the FLOPs of attention scores and values of one token, in the mean over a sequence.

    They are 2 * heads * (width of keys + width of values) * context in each layer with attention. The mean context is
    S/2, or with a window of w < S tokens, w - w^2 / (2 S). What layers of other kinds, such as linear attention, do
    beside their matrices is left out.
    """
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    keys = values = width
    if getattr(config, "kv_lora_rank", None):  # multi-head latent attention (DeepSeek-V2, 2405.04434)
        keys, values = config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim
    window = getattr(config, "sliding_window", None) or seq_len
    everywhere = "full_attention" if getattr(config, "use_sliding_window", None) is False else "sliding_attention"
    kinds = getattr(config, "layer_types", None) or [everywhere] * config.num_hidden_layers
    contexts = {"sliding_attention": min(window, seq_len), "conv": 0, "linear_attention": 0, "moe": 0, "mlp": 0}
    seen = [contexts.get(kind, seq_len) for kind in kinds]
    return round(sum(2 * heads * (keys + values) * (w - w * w / (2 * seq_len)) for w in seen))


def reset_peak_memory(device: torch.device) -> None:
    """Reset the peak memory to the present memory, if the system can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):  # Linux: resets the peak of the resident set
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory_gb(device: torch.device) -> float | None:
    """Return the peak memory since the reset in 1e9 bytes, or None if unknown.

    On a GPU this is allocated memory, on a CPU the resident set of the process.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e9
