"""The weights of an exported model.

Letters in shapes: E experts, D width of a hidden state, F width of an expert.

Most targets have attention as the model has. The others need one of three rewritings, none of which changes the result
by more than rounding in fp32:

- A norm on queries and keys (olmoe, qwen3_moe). RMSNorm(q) = w q / sqrt(mean(q^2) + eps) is w q / sqrt(eps) where eps
  is far above mean(q^2), which the weights bound for all inputs. All norms share this eps. So the residual stream is
  multiplied by a power of two c, which the other norms divide out again if their eps is c^2 times as large.
- Latent attention (deepseek_v3): one rotated key for all heads, and values from a latent vector with a norm.
  Written with the keys of all heads side by side in that one key, of which a head's query sees its own part; each part
  has its own frequencies. The latent vector is the values, made so small that the eps of its norm outweighs them.
- Attention with sinks (gpt_oss), whose sinks are set so low that they get no attention.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from moe.foreign.anatomy import Anatomy, Heads, Layer, Networks, Routed, Weights
from moe.foreign.rules import Rule, bias_of, matrix_of
from moe.foreign.target_config import ALPHA, NO_SHARED, is_rescaled
from moe.foreign.targets import Target
from moe.model.architecture import MoEConfig
from moe.routers.base import Router

ROUNDING = 2.0**-24  # the largest relative error of a number that is rounded to fp32
LOWEST = -1e30  # logit of a sink without attention, bias of an expert without tokens; finite in bf16 too
LATENT_EPS = 1e-6  # of the norm of the latent vector, which config.json does not set


def residual_scale(anatomy: Anatomy, target: Target) -> float:
    """Return the power of two by which the residual stream is multiplied: 1 unless only the target norms queries
    and keys.

    mean(q^2) of the width N is at most (|W diag(w)|_F sqrt(D) + |b|)^2 / N for every input, where w is the weight of
    the norm before W: what that norm divides by its root mean square has the length sqrt(D).
    """
    if not is_rescaled(anatomy, target):
        return 1.0
    config, largest = anatomy.config, 0.0
    for layer in anatomy.layers:
        for name in ("q_proj", "k_proj"):
            lengths = (layer.attention[f"{name}.weight"] * layer.attention_norm).double().square().sum(1)
            bias = layer.attention.get(f"{name}.bias")
            if bias is not None:
                lengths = (lengths * config.hidden_size).sqrt() + bias.double().abs()
                lengths = lengths.square() / config.hidden_size
            parts = lengths.view(-1, len(lengths) if target.attention == "row_norm" else Heads.of(config).width)
            largest = max(largest, (parts.sum(1) * config.hidden_size / parts.shape[1]).max().item())
    needed = largest / ROUNDING / config.rms_norm_eps
    return 2.0 ** max(0, math.ceil(math.log2(needed) / 2)) if needed > 0 else 1.0


def weights_of(anatomy: Anatomy, target: Target, *, scale: float) -> Weights:
    """Return the state dict of the target. `scale`: of the residual stream, see `residual_scale`."""
    config = anatomy.config
    embedding = anatomy.embedding
    weights = {"model.norm.weight": anatomy.norm, "lm_head.weight": anatomy.head}
    if config.embed_scale and target.name != "granitemoe":
        embedding = embedding * math.sqrt(config.hidden_size)
    weights["model.embed_tokens.weight"] = embedding * scale if scale != 1 else embedding
    for number, layer in enumerate(anatomy.layers):
        own: Weights = {
            "input_layernorm.weight": layer.attention_norm,
            "post_attention_layernorm.weight": layer.feed_forward_norm,
        }
        attention = _latent_attention if target.attention == "latent" else _attention
        own |= {f"self_attn.{name}": weight for name, weight in attention(layer, anatomy, target, scale).items()}
        if isinstance(layer.feed_forward, Routed):
            routed = _routed(layer.feed_forward, layer.feed_forward_norm, anatomy, target, scale)
            own |= {f"{target.block}.{name}": weight for name, weight in routed.items()}
        else:
            own |= _feed_forward("mlp", layer.feed_forward, scale)
        weights |= {f"model.layers.{number}.{name}": weight for name, weight in own.items()}
    return {name: weight.clone() for name, weight in weights.items()}


def _attention(layer: Layer, anatomy: Anatomy, target: Target, scale: float) -> Weights:
    found = dict(layer.attention)
    found |= {name: weight * scale for name, weight in found.items() if name.startswith("o_proj.")}
    if anatomy.biases:
        rows = {f"{part}_proj.bias": len(found[f"{part}_proj.weight"]) for part in target.biases}
        found = {name: anatomy.norm.new_zeros(number) for name, number in rows.items()} | found
    if is_rescaled(anatomy, target):
        eps = math.sqrt(anatomy.config.rms_norm_eps * scale**2)
        for name in ("q", "k"):
            width = len(found[f"{name}_proj.weight"])
            width = width if target.attention == "row_norm" else Heads.of(anatomy.config).width
            found[f"{name}_norm.weight"] = anatomy.norm.new_full((width,), eps)
    if target.attention == "sinks":
        found["sinks"] = anatomy.norm.new_full((anatomy.config.num_attention_heads,), LOWEST)
    return found


def _latent_attention(layer: Layer, anatomy: Anatomy, target: Target, scale: float) -> Weights:
    """Return our attention as latent attention.

    The one key has a first and a second half of each pair of rotated dimensions, and in both halves one part for each
    of our key heads. The latent vector holds our values, made small.
    """
    config, attention, heads = anatomy.config, layer.attention, Heads.of(anatomy.config)
    width = heads.keys * heads.width
    queries = attention["q_proj.weight"].view(heads.queries, 2, heads.width // 2, -1) * math.sqrt(heads.keys)
    sparse = queries.new_zeros(heads.queries, 2, heads.keys, *queries.shape[2:])
    every = torch.arange(heads.queries, device=queries.device)
    own = every // (heads.queries // heads.keys)
    sparse[every, :, own] = queries
    keys = attention["k_proj.weight"].view(heads.keys, 2, heads.width // 2, -1).transpose(0, 1).flatten(0, 2)
    values = attention["v_proj.weight"]
    largest = (values * layer.attention_norm).double().square().sum().item() * config.hidden_size / width
    small = 2.0 ** -max(0, math.ceil(math.log2(max(largest / ROUNDING / LATENT_EPS, 1)) / 2))
    parts = torch.eye(width, dtype=values.dtype, device=values.device).view(heads.keys, heads.width, width)
    return {
        "q_proj.weight": sparse.flatten(0, 3),
        "kv_a_proj_with_mqa.weight": torch.cat((values * small, keys)),
        "kv_a_layernorm.weight": values.new_full((width,), math.sqrt(LATENT_EPS) / small),
        "kv_b_proj.weight": parts[own].flatten(0, 1),
        "o_proj.weight": attention["o_proj.weight"],
    }


def router_matrix(router: Router, norm: Float[Tensor, " D"], rule: Rule) -> Float[Tensor, "E D"]:
    """Return the matrix with which a router without a temperature follows `rule`.

    norm: the weight of the norm before the router, whose output is at most sqrt(D) times as long.

    For equal weights, the matrix is so small that exp(logit) rounds to 1. Its factor is a power of two, so the logits
    keep their order.
    """
    matrix = matrix_of(router)
    assert matrix is not None, "a router with a rule has a matrix"
    matrix = matrix / rule.temperature
    if rule.weights == "equal":
        largest = (matrix * norm).double().norm(dim=1).max().item() * math.sqrt(len(norm))
        matrix = matrix * 2.0 ** -max(0, math.ceil(math.log2(max(2 * largest / ROUNDING, 1))))
    return matrix


class Selected(NamedTuple):
    """The experts of a layer and what selects them: the k largest scores of W x plus a bias."""

    matrix: Float[Tensor, "E D"]
    bias: Float[Tensor, " E"]
    experts: Networks


def selected(routed: Routed, norm: Float[Tensor, " D"], anatomy: Anatomy) -> Selected:
    """Return the experts of a layer, as many as in the layer with the most of them.

    Experts that are added consist of zeros, and their bias is so low that no token takes them. norm: the weight of the
    norm before the layer.
    """
    assert anatomy.rule is not None
    matrix, bias = router_matrix(routed.router, norm, anatomy.rule), bias_of(routed.router)
    bias = matrix.new_zeros(len(matrix)) if bias is None else bias
    gate, up, down = routed.experts
    added = anatomy.config.most_experts - len(matrix)
    experts = Networks(None if gate is None else _longer(gate, added), _longer(up, added), _longer(down, added))
    return Selected(_longer(matrix, added), _longer(bias, added, LOWEST), experts)


def _longer(rows: Float[Tensor, " E *N"], added: int, value: float = 0.0) -> Float[Tensor, " M *N"]:
    return torch.cat((rows, rows.new_full((added, *rows.shape[1:]), value))) if added else rows


def _routed(routed: Routed, norm: Float[Tensor, " D"], anatomy: Anatomy, target: Target, scale: float) -> Weights:
    """Return a Mixture of Experts. `norm`: the weight of the norm before it."""
    matrix, bias, experts = selected(routed, norm, anatomy)
    found = {f"{target.router}.weight": matrix}
    if target.biased:
        found[f"{target.router}.e_score_correction_bias"] = bias
    if target.name == "gpt_oss":
        found[f"{target.router}.bias"] = matrix.new_zeros(len(matrix))
    shared = _shared(routed, anatomy.config, target, scale) if target.shared else {}
    return found | _experts(experts, scale) | shared


def _experts(experts: Networks, scale: float) -> Weights:
    up, down = experts.up, experts.down * scale
    if experts.gate is not None:
        return {"experts.gate_up_proj": torch.cat((experts.gate, up), 1), "experts.down_proj": down}
    # (up' + 1) gate' sigmoid(ALPHA gate') with up' = 0 and gate' = z / ALPHA is silu(z) / ALPHA.
    both = torch.stack((up / ALPHA, torch.zeros_like(up)), 2).flatten(1, 2)
    return {
        "experts.gate_up_proj": both.mT,
        "experts.gate_up_proj_bias": both.new_zeros(both.shape[:2]),
        "experts.down_proj": down.mT * ALPHA,
        "experts.down_proj_bias": down.new_zeros(down.shape[:2]),
    }


def _shared(routed: Routed, config: MoEConfig, target: Target, scale: float) -> Weights:
    """Return the shared experts, which are zeros if the model has none.

    Those of qwen2_moe always have a gate, sigmoid(g x). With g = 0 it halves them, so those without a gate are doubled.
    """
    gated = target.name == "qwen2_moe"
    name = "shared_expert" if gated else "shared_experts"
    like, dim = routed.experts.up, config.hidden_size
    width = NO_SHARED if gated else config.intermediate_size
    wide = like.new_zeros(1, width, dim)
    none = Networks(wide, wide, wide.mT)
    doubled = gated and routed.shared_gate is None
    found = _feed_forward(name, routed.shared or none, 2 * scale if doubled else scale)
    gate = like.new_zeros(1, dim) if routed.shared_gate is None else routed.shared_gate
    return found | ({"shared_expert_gate.weight": gate} if gated else {})


def _feed_forward(name: str, network: Networks, scale: float) -> Weights:
    """Return the matrices of a single network."""
    assert network.gate is not None, "only gpt_oss has experts of two matrices, and no dense network"
    found = {"gate": network.gate[0], "up": network.up[0], "down": network.down[0] * scale}
    return {f"{name}.{part}_proj.weight": weight for part, weight in found.items()}
