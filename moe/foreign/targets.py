"""The architectures of transformers in which a model of this project can be written, and how its weights go there.

Letters in shapes: E experts, D width of a hidden state, F width of an expert.

Most targets have attention as ours. The others need one of three rewritings, none of which changes the result by more
than rounding in fp32:

- A norm on queries and keys (olmoe, qwen3_moe). RMSNorm(q) = w q / sqrt(mean(q^2) + eps) is w q / sqrt(eps) where eps
  is far above mean(q^2), which the weights bound for all inputs. All norms share this eps. So the residual stream is
  multiplied by a power of two c, which the other norms divide out again if their eps is c^2 times as large.
- Latent attention (deepseek_v3): one rotated key for all heads, and values from a latent vector with a norm.
  Written with the keys of all heads side by side in that one key, of which a head's query sees its own part; each part
  has its own frequencies. The latent vector is the values, made so small that the eps of its norm outweighs them.
- Attention with sinks (gpt_oss), whose sinks are set so low that they get no attention.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor

from moe.foreign.rules import Rule, bias_of, matrix_of
from moe.model.architecture import MoEConfig
from moe.model.causal_lm import MoEForCausalLM
from moe.model.experts import Experts
from moe.model.layer import MoELayer
from moe.routers.base import Router

ROUNDING = 2.0**-24  # the largest relative error of a number that is rounded to fp32
NO_SHARED = 8  # width of the shared expert of zeros, in targets that always have one
LOWEST = -1e30  # logit of a sink that gets no attention, finite in bf16 too
ALPHA = 1.702  # gpt_oss gates with x sigmoid(ALPHA x)
LATENT_EPS = 1e-6  # of the norm of the latent vector, which config.json does not set

Weights = dict[str, Tensor]


class Heads(NamedTuple):
    """The attention of a model: the number of its query heads, of its key heads, and the width of one."""

    queries: int
    keys: int
    width: int

    @staticmethod
    def of(config: MoEConfig) -> "Heads":
        """Return the heads that transformers gives to a model of this configuration."""
        width = config.head_dim or config.hidden_size // config.num_attention_heads
        return Heads(config.num_attention_heads, config.num_key_value_heads or config.num_attention_heads, width)


def rope_of(config: MoEConfig) -> dict[str, Any]:
    """Return a copy of what the configuration says about positions."""
    return dict(config.rope_parameters or {})


def config_of(model: MoEForCausalLM) -> MoEConfig:
    """Return the model's configuration, whose class transformers does not know."""
    return cast(MoEConfig, model.config)


@dataclass(frozen=True, kw_only=True)
class Target:
    """An architecture of transformers, or of a GGUF file.

    name: its `model_type`. prefix: what the names of its classes begin with.
    scores, weights: the rules that its router can follow, see `Rule`. biased, grouped: whether it can have these parts
        of a rule.
    forms: the forms that its experts can have, values of model.expert.
    dense, shared: whether it can have dense first layers, and shared experts without a gate.
    attention: plain, row_norm (a norm over all heads), head_norm (over each head), latent or sinks.
    biases: whether its attention can have biases. any_rope: whether it takes all `rope_parameters`.
    experts, width, block, router: how it names the number of experts, their width, the MoE layer and its router.
    """

    name: str
    prefix: str = ""
    scores: tuple[Literal["softmax", "sigmoid"], ...]
    weights: tuple[Literal["normalized", "raw", "equal"], ...]
    biased: bool = False
    grouped: bool = False
    forms: tuple[str, ...] = ("swiglu",)
    dense: bool = False
    shared: bool = False
    attention: str = "plain"
    biases: bool = False
    any_rope: bool = True
    experts: str = "num_local_experts"
    width: str = "intermediate_size"
    block: str = "mlp"
    router: str = "gate"

    def lacks(self, config: MoEConfig) -> str | None:
        """Return the first key of a model, except for its router, that this architecture cannot express, and why.

        None if there is none.
        """
        heads = Heads.of(config)
        rope = rope_of(config).get("rope_type", "default")
        has_experts = config.first_k_dense_replace < config.num_hidden_layers
        matrices = "three" if "swiglu" in self.forms else "two"
        form = f"the experts of the target have {matrices} matrices (model.expert={self.forms[0]})"
        checks = {
            f"model.expert={config.expert}": (config.expert in self.forms, form),
            f"model.first_k_dense_replace={config.first_k_dense_replace}": (
                config.first_k_dense_replace == 0 or (self.dense and has_experts),
                "all its layers have experts" if not self.dense else "it has at least one layer with experts",
            ),
            f"model.shared_experts={config.shared_experts}": (
                config.shared_experts == 0 or self.shared,
                "it has no shared experts",
            ),
            "attention_bias=True": (not config.attention_bias or self.biases, "its attention has no biases"),
            f"head_dim={heads.width}": (
                self.attention != "row_norm" or heads.queries * heads.width == config.hidden_size,
                f"its heads have the width hidden_size / heads = {config.hidden_size / heads.queries:g}",
            ),
            f"rope_parameters.rope_type={rope}": (
                self.any_rope or rope == "default",
                "it takes the type default alone",
            ),
            f"model.num_experts={config.num_experts}": (
                not self.grouped or config.num_experts > 1,
                "its router adds the two largest scores",
            ),
        }
        return next((f"{key}: {why}" for key, (ok, why) in checks.items() if not ok), None)

    def follows(self, rule: Rule) -> bool:
        """Return whether its router can follow `rule`."""
        scores = rule.scores in self.scores or rule.weights == "equal"
        groups = rule.groups == 1 or (self.grouped and rule.weights != "equal")
        parts = (not rule.biased or self.biased) and (rule.factor == 1 or self.grouped)
        return scores and rule.weights in self.weights and parts and groups


GATES: tuple[Literal["normalized", "raw"], ...] = ("normalized", "raw")
# A softmax over the chosen logits gives equal weights if they are made small.
CHOSEN: tuple[Literal["normalized", "equal"], ...] = ("normalized", "equal")
DEEPSEEK: dict[str, Any] = {
    "weights": GATES,
    "grouped": True,
    "dense": True,
    "shared": True,
    "experts": "n_routed_experts",
    "width": "moe_intermediate_size",
}

# In the order in which `auto` tries them.
TARGETS = {
    target.name: target
    for target in (
        Target(name="mixtral", prefix="Mixtral", scores=("softmax",), weights=("normalized",)),
        Target(
            name="granitemoe",
            prefix="GraniteMoe",
            scores=("softmax",),
            weights=CHOSEN,
            biases=True,
            block="block_sparse_moe",
            router="router",
        ),
        Target(
            name="qwen2_moe",
            prefix="Qwen2Moe",
            scores=("softmax",),
            weights=GATES,
            dense=True,
            shared=True,
            experts="num_experts",
            width="moe_intermediate_size",
        ),
        Target(name="glm4_moe", prefix="Glm4Moe", scores=("sigmoid",), biased=True, **DEEPSEEK),
        Target(
            name="gpt_oss",
            prefix="GptOss",
            scores=("softmax",),
            weights=CHOSEN,
            forms=("silu",),
            attention="sinks",
            biases=True,
            router="router",
        ),
        Target(
            name="olmoe",
            prefix="Olmoe",
            scores=("softmax",),
            weights=GATES,
            attention="row_norm",
            biases=True,
            experts="num_experts",
        ),
        Target(
            name="qwen3_moe",
            prefix="Qwen3Moe",
            scores=("softmax",),
            weights=GATES,
            dense=True,
            attention="head_norm",
            biases=True,
            experts="num_experts",
            width="moe_intermediate_size",
        ),
        Target(
            name="deepseek_v3",
            prefix="DeepseekV3",
            scores=("sigmoid",),
            biased=True,
            attention="latent",
            any_rope=False,
            **DEEPSEEK,
        ),
    )
}


# The architectures of llama.cpp that `moe.foreign.gguf` writes.
GGUF_TARGETS = [
    Target(
        name="llama",
        scores=("softmax",),
        weights=("normalized",),
        forms=("swiglu", "silu"),
        biases=True,
        any_rope=False,
    ),
    Target(
        name="glm4moe",
        scores=("softmax", "sigmoid"),
        weights=("normalized", "raw", "equal"),
        biased=True,
        grouped=True,
        dense=True,
        shared=True,
        any_rope=False,
    ),
]


def settings_of(model: MoEForCausalLM, target: Target, rule: Rule, *, scale: float) -> dict[str, Any]:
    """Return the keyword arguments of the target's configuration. `scale`: that of the residual stream."""
    config = config_of(model)
    names = """vocab_size hidden_size num_hidden_layers max_position_embeddings initializer_range bos_token_id
        eos_token_id pad_token_id attention_bias""".split()
    settings = {name: getattr(config, name) for name in names}
    heads = Heads.of(config)
    settings |= {
        "num_attention_heads": heads.queries,
        "num_key_value_heads": heads.keys,
        "head_dim": heads.width,
        "rope_parameters": rope_of(config),
        "rms_norm_eps": config.rms_norm_eps * scale**2,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "tie_word_embeddings": is_tied(config, target),
        "num_experts_per_tok": rule.k,
        target.experts: config.num_experts,
        target.width: config.intermediate_size,
    }
    if target.width != "intermediate_size":
        settings["intermediate_size"] = config.dense_ffn
    if "raw" in target.weights:
        settings["norm_topk_prob"] = rule.weights == "normalized"
    if target.grouped:
        settings |= {
            "n_group": rule.groups,
            "topk_group": rule.top_groups,
            "routed_scaling_factor": rule.factor,
            "n_shared_experts": max(1, config.shared_experts),
            "first_k_dense_replace": config.first_k_dense_replace,
            "num_nextn_predict_layers": 0,
        }
    elif target.dense:
        settings["mlp_only_layers"] = list(range(config.first_k_dense_replace))
    return settings | OWN_SETTINGS.get(target.name, lambda config: {})(config)


def positions_of(model: MoEForCausalLM, target: Target) -> dict[str, float]:
    """Return what config.json says about positions in its older form too, which other programs may read.

    transformers 5 has moved these keys to `rope_parameters`.
    """
    rope = rope_of(config_of(model))
    if rope.get("rope_type", "default") != "default" or target.attention == "latent":
        return {}
    found = {"rope_theta": float(rope["rope_theta"])} if "rope_theta" in rope else {}
    return found | ({"partial_rotary_factor": 1.0} if target.name == "glm4_moe" else {})


def is_tied(config: MoEConfig, target: Target) -> bool:
    """Return whether the target has one matrix for embedding and output. With embed_scale, only one has that factor."""
    return bool(config.tie_word_embeddings) and (
        target.name == "granitemoe" or not (config.embed_scale or has_norms(target))
    )


def has_norms(target: Target) -> bool:
    return target.attention in ("row_norm", "head_norm")


def _granite(config: MoEConfig) -> dict[str, Any]:
    return {
        "embedding_multiplier": math.sqrt(config.hidden_size) if config.embed_scale else 1.0,
        "attention_multiplier": Heads.of(config).width ** -0.5,
        "residual_multiplier": 1.0,
        "logits_scaling": 1.0,
    }


def _qwen2(config: MoEConfig) -> dict[str, Any]:
    width = config.shared_experts * config.intermediate_size or NO_SHARED
    return {"shared_expert_intermediate_size": width, "qkv_bias": False, "use_sliding_window": False}


def _glm4(config: MoEConfig) -> dict[str, Any]:
    return {"use_qk_norm": False, "partial_rotary_factor": 1.0}


def _gpt_oss(config: MoEConfig) -> dict[str, Any]:
    layers = ["full_attention"] * config.num_hidden_layers
    unused = config.max_position_embeddings  # no layer has a window, but transformers makes a mask for one
    return {"layer_types": layers, "sliding_window": unused, "swiglu_alpha": ALPHA, "swiglu_limit": 1e30}


def _latent(config: MoEConfig) -> dict[str, Any]:
    """Return the sizes of latent attention that holds ours, and the frequencies of its one key."""
    heads = Heads.of(config)
    width = heads.keys * heads.width
    rope = rope_of(config)
    if heads.keys > 1:
        factors = rope_factors(rope["rope_theta"], heads.width, heads.keys)
        length = config.max_position_embeddings
        rope |= {"rope_type": "longrope", "short_factor": factors, "long_factor": factors, "factor": 1.0}
        rope |= {"attention_factor": 1.0, "original_max_position_embeddings": length}
    return {
        "rope_parameters": rope,
        "num_key_value_heads": heads.queries,
        "head_dim": width,
        "kv_lora_rank": width,
        "q_lora_rank": None,
        "qk_nope_head_dim": 0,
        "qk_rope_head_dim": width,
        "v_head_dim": heads.width,
        "rope_interleave": False,
    }


OWN_SETTINGS: dict[str, Callable[[MoEConfig], dict[str, Any]]] = {
    "granitemoe": _granite,
    "qwen2_moe": _qwen2,
    "glm4_moe": _glm4,
    "gpt_oss": _gpt_oss,
    "qwen3_moe": lambda config: {"use_sliding_window": False},
    "deepseek_v3": _latent,
}


def rope_factors(theta: float, head_dim: int, key_heads: int) -> list[float]:
    """Return the numbers by which longrope divides the frequencies of a key that holds the keys of all heads.

    Part g of that key gets the frequencies theta^(-2i/head_dim) of a key of its own. Each factor is the one, among the
    neighbors of its rounded value, that gives the nearest frequency in fp32.
    """
    wanted = (1.0 / (theta ** (torch.arange(0, head_dim, 2, dtype=torch.float) / head_dim))).repeat(key_heads)
    width = key_heads * head_dim
    powers = theta ** (torch.arange(0, width, 2, dtype=torch.int64).float() / width)
    first = (1.0 / (wanted.double() * powers.double())).float()
    tried = torch.stack([first * (1 + step * 2.0**-24) for step in range(-4, 5)])
    error = (1.0 / (tried * powers) - wanted).abs()
    return tried.gather(0, error.argmin(0)[None])[0].tolist()


def residual_scale(model: MoEForCausalLM, target: Target) -> float:
    """Return the power of two by which the residual stream is multiplied: 1 unless the target norms queries and keys.

    mean(q^2) of the width N is at most (|W diag(w)|_F sqrt(D) + |b|)^2 / N for every input, where w is the weight of
    the norm before W: what that norm divides by its root mean square has the length sqrt(D).
    """
    if not has_norms(target):
        return 1.0
    config, largest = config_of(model), 0.0
    for layer in model.decoder.layers:
        for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            lengths = (linear.weight * layer.input_layernorm.weight).double().square().sum(1)
            if linear.bias is not None:
                lengths = (lengths * config.hidden_size).sqrt() + linear.bias.double().abs()
                lengths = lengths.square() / config.hidden_size
            parts = lengths.view(-1, len(lengths) if target.attention == "row_norm" else Heads.of(config).width)
            largest = max(largest, (parts.sum(1) * config.hidden_size / parts.shape[1]).max().item())
    needed = largest / ROUNDING / config.rms_norm_eps
    return 2.0 ** max(0, math.ceil(math.log2(needed) / 2)) if needed > 0 else 1.0


def weights_of(model: MoEForCausalLM, target: Target, rule: Rule, *, scale: float) -> Weights:
    """Return the state dict of the target. `scale`: of the residual stream, see `residual_scale`."""
    config = config_of(model)
    embedding = model.decoder.embed_tokens.weight.detach()
    weights = {"model.norm.weight": model.decoder.norm.weight, "lm_head.weight": model.lm_head.weight}
    if config.embed_scale and target.name != "granitemoe":
        embedding = embedding * math.sqrt(config.hidden_size)
    weights["model.embed_tokens.weight"] = embedding * scale if scale != 1 else embedding
    for number, layer in enumerate(model.decoder.layers):
        own: Weights = {
            "input_layernorm.weight": layer.input_layernorm.weight,
            "post_attention_layernorm.weight": layer.post_attention_layernorm.weight,
        }
        attention = _latent_attention if target.attention == "latent" else _attention
        own |= {f"self_attn.{name}": weight for name, weight in attention(layer, config, target, scale).items()}
        if isinstance(layer.mlp, MoELayer):
            norm = layer.post_attention_layernorm.weight
            routed = _router(layer.mlp, norm, target, rule) | _experts(layer.mlp.experts, target, scale)
            routed |= _shared(layer.mlp, config, target)
            own |= {f"{target.block}.{name}": weight for name, weight in routed.items()}
        else:
            own |= _feed_forward("mlp", layer.mlp.experts, scale)
        weights |= {f"model.layers.{number}.{name}": weight for name, weight in own.items()}
    return {name: weight.detach().clone() for name, weight in weights.items()}


def _attention(layer: Any, config: MoEConfig, target: Target, scale: float) -> Weights:
    found: Weights = {}
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        linear = getattr(layer.self_attn, name)
        factor = scale if name == "o_proj" else 1
        found[f"{name}.weight"] = linear.weight * factor
        if linear.bias is not None:
            found[f"{name}.bias"] = linear.bias * factor
    if has_norms(target):
        eps = math.sqrt(config.rms_norm_eps * scale**2)
        for name in ("q", "k"):
            width = len(found[f"{name}_proj.weight"]) if target.attention == "row_norm" else Heads.of(config).width
            found[f"{name}_norm.weight"] = found["q_proj.weight"].new_full((width,), eps)
    if target.attention == "sinks":
        found["sinks"] = found["q_proj.weight"].new_full((config.num_attention_heads,), LOWEST)
    return found


def _latent_attention(layer: Any, config: MoEConfig, target: Target, scale: float) -> Weights:
    """Return our attention as latent attention.

    The one key has a first and a second half of each pair of rotated dimensions, and in both halves one part for each
    of our key heads. The latent vector holds our values, made small.
    """
    attention, heads = layer.self_attn, Heads.of(config)
    width = heads.keys * heads.width
    queries = attention.q_proj.weight.view(heads.queries, 2, heads.width // 2, -1) * math.sqrt(heads.keys)
    sparse = queries.new_zeros(heads.queries, 2, heads.keys, *queries.shape[2:])
    every = torch.arange(heads.queries, device=queries.device)
    own = every // (heads.queries // heads.keys)
    sparse[every, :, own] = queries
    keys = attention.k_proj.weight.view(heads.keys, 2, heads.width // 2, -1).transpose(0, 1).flatten(0, 2)
    values = attention.v_proj.weight
    largest = (values * layer.input_layernorm.weight).double().square().sum().item() * config.hidden_size / width
    small = 2.0 ** -max(0, math.ceil(math.log2(max(largest / ROUNDING / LATENT_EPS, 1)) / 2))
    parts = torch.eye(width, dtype=values.dtype, device=values.device).view(heads.keys, heads.width, width)
    return {
        "q_proj.weight": sparse.flatten(0, 3),
        "kv_a_proj_with_mqa.weight": torch.cat((values * small, keys)),
        "kv_a_layernorm.weight": values.new_full((width,), math.sqrt(LATENT_EPS) / small),
        "kv_b_proj.weight": parts[own].flatten(0, 1),
        "o_proj.weight": attention.o_proj.weight,
    }


def router_matrix(router: Router, norm: Float[Tensor, "D"], rule: Rule) -> Float[Tensor, "E D"]:
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


def _router(layer: MoELayer, norm: Float[Tensor, "D"], target: Target, rule: Rule) -> Weights:
    matrix, bias = router_matrix(layer.router, norm, rule), bias_of(layer.router)
    found = {f"{target.router}.weight": matrix}
    if target.biased:
        found[f"{target.router}.e_score_correction_bias"] = matrix.new_zeros(len(matrix)) if bias is None else bias
    if target.name == "gpt_oss":
        found[f"{target.router}.bias"] = matrix.new_zeros(len(matrix))
    return found


def _experts(experts: Experts, target: Target, scale: float) -> Weights:
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


def _shared(layer: MoELayer, config: MoEConfig, target: Target) -> Weights:
    """Return the shared experts, which are zeros if we have none and the target always has them.

    Those of qwen2_moe have a gate, sigmoid(g x). With g = 0 it halves them, so they are doubled.
    """
    if not target.shared:
        return {}
    gated = target.name == "qwen2_moe"
    name = "shared_expert" if gated else "shared_experts"
    if layer.shared is not None:
        found = _feed_forward(name, cast(Experts, layer.shared.experts), 2.0 if gated else 1.0)
    else:
        width, like = NO_SHARED if gated else config.intermediate_size, layer.experts.up
        wide, high = like.new_zeros(width, config.hidden_size), like.new_zeros(config.hidden_size, width)
        found = {f"{name}.gate_proj.weight": wide, f"{name}.up_proj.weight": wide, f"{name}.down_proj.weight": high}
    if gated:
        found["shared_expert_gate.weight"] = layer.experts.up.new_zeros(1, config.hidden_size)
    return found


def _feed_forward(name: str, experts: Experts, scale: float) -> Weights:
    """Return the matrices of a single expert as those of a dense network."""
    assert experts.gate is not None, "only gpt_oss has experts of two matrices, and no dense network"
    found = {"gate": experts.gate[0], "up": experts.up[0], "down": experts.down[0] * scale}
    return {f"{name}.{part}_proj.weight": weight for part, weight in found.items()}
