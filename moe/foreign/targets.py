"""The architectures in which a model can be written: those of transformers, and those of a GGUF file."""

from dataclasses import dataclass
from typing import Any, Literal

from moe.foreign.anatomy import Anatomy, Heads
from moe.foreign.rules import Rule
from moe.model.architecture import MoEConfig


def rope_of(config: MoEConfig) -> dict[str, Any]:
    """Return a copy of what the configuration says about positions."""
    return dict(config.rope_parameters or {})


@dataclass(frozen=True, kw_only=True)
class Target:
    """An architecture of transformers, or of a GGUF file.

    name: its `model_type`. prefix: what the names of its classes begin with.
    scores, weights: the rules that its router can follow, see `Rule`. biased, grouped: whether it can have these parts
        of a rule.
    forms: the forms that its experts can have, values of model.expert.
    dense, shared: whether it can have dense first layers, and shared experts. shared_gate: and a gate for them.
    attention: plain, row_norm (always a norm over all heads), head_norm (over each head), latent or sinks.
    query_norms: the norms of queries and keys that a model may have, see `Anatomy`.
    biases: the matrices of its attention that can have a bias, of q, k, v, o. windows: whether it has none, the same
        in all layers, or one in some.
    any_rope: whether it takes all `rope_parameters`. shared_keys: whether several query heads can share a key head.
    experts, width, block, router: how it names the number of experts, their width, the MoE layer and its router.
    """

    name: str
    prefix: str = ""
    scores: tuple[Literal["softmax", "sigmoid"], ...]
    weights: tuple[Literal["normalized", "raw", "equal"], ...]
    biased: bool = False
    grouped: bool = False
    forms: tuple[str, ...] = ("swiglu", "geglu")
    dense: bool = False
    shared: bool = False
    shared_gate: bool = False
    attention: str = "plain"
    query_norms: tuple[Literal["none", "row", "head"], ...] = ("none",)
    biases: str = ""
    windows: Literal["none", "all", "some"] = "none"
    any_rope: bool = True
    shared_keys: bool = True
    experts: str = "num_local_experts"
    width: str = "intermediate_size"
    block: str = "mlp"
    router: str = "gate"

    def lacks(self, anatomy: Anatomy) -> str | None:
        """Return the first key or part of a model, except for its router, that this architecture lacks, and why.

        None if there is none.
        """
        config = anatomy.config
        heads = Heads.of(config)
        rope = rope_of(config).get("rope_type", "default")
        has_experts = config.first_k_dense_replace < config.num_hidden_layers
        window = max((each for each in anatomy.windows if each is not None), default=None)
        extra = "".join(part for part in anatomy.biases if part not in self.biases)
        checks = {
            f"model.expert={config.expert}": (
                config.expert in self.forms,
                f"its experts are of the form model.expert={' or '.join(self.forms)}",
            ),
            f"model.first_k_dense_replace={config.first_k_dense_replace}": (
                config.first_k_dense_replace == 0 or (self.dense and has_experts),
                "all its layers have experts" if not self.dense else "it has at least one layer with experts",
            ),
            f"model.shared_experts={config.shared_experts}": (
                config.shared_experts == 0 or self.shared,
                "it has no shared experts",
            ),
            "model.shared_gate=True": (self.shared_gate or not config.shared_gate, "its shared experts have no gate"),
            f"model.experts_by_layer={config.experts_by_layer}": (
                config.experts_by_layer is None or self.fills_up(anatomy.rule),
                "all its layers have one number of experts"
                + (", and more of them would change the groups or the weights" if self.biased else ""),
            ),
            f"model.routers={config.routers}": (
                config.router_layers is None or anatomy.rule is not None,
                "its layers have routers of one rule",
            ),
            f"model.latent_dim={config.latent_dim}": (
                config.latent_dim is None,
                "its experts work in the width of the hidden states",
            ),
            f"model.router_input={config.router_input}": (
                config.router_input == "feed_forward",
                "its routers read what its experts read",
            ),
            f"model.router_precision={config.router_precision}": (
                config.router_precision == "fp32",
                "its routers do not round in this way",
            ),
            f"biases of the matrices {', '.join(extra)} of the attention": (not extra, "it has none there"),
            f"norms of queries and keys ({anatomy.query_norm})": (
                anatomy.query_norm in self.query_norms,
                "its attention has no such norms",
            ),
            f"sliding_window={window}": (
                window is None or self.windows == "some" or (self.windows == "all" and len(anatomy.windows) == 1),
                "it has the same one in all layers" if self.windows == "all" else "its layers see the whole text",
            ),
            f"head_dim={heads.width}": (
                self.attention != "row_norm" or heads.queries * heads.width == config.hidden_size,
                f"its heads have the width hidden_size / heads = {config.hidden_size / heads.queries:g}",
            ),
            f"num_key_value_heads={heads.keys}": (
                self.shared_keys or heads.keys == heads.queries,
                f"it has as many key heads as query heads, {heads.queries}",
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

    def fills_up(self, rule: Rule | None) -> bool:
        """Return whether a layer may get more experts, which no token takes, without a change of what it computes.

        Their bias keeps them from being chosen. A softmax over all experts would give them probabilities.
        """
        by_itself = rule is not None and (rule.scores == "sigmoid" or rule.weights != "raw")
        return self.biased and by_itself and rule is not None and rule.groups == 1

    def follows(self, rule: Rule) -> bool:
        """Return whether its router can follow `rule`."""
        scores = rule.scores in self.scores or rule.weights == "equal"
        groups = rule.groups == 1 or (self.grouped and rule.weights != "equal")
        parts = (not rule.biased or self.biased) and (rule.factor == 1 or self.grouped)
        return scores and rule.weights in self.weights and parts and groups

    def expresses(self, anatomy: Anatomy) -> bool:
        """Return whether a model of this architecture computes the same as the model with these parts."""
        return anatomy.rule is not None and self.follows(anatomy.rule) and self.lacks(anatomy) is None


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
        Target(name="mixtral", prefix="Mixtral", scores=("softmax",), weights=("normalized",), windows="all"),
        Target(
            name="granitemoe",
            prefix="GraniteMoe",
            scores=("softmax",),
            weights=CHOSEN,
            biases="qkvo",
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
            shared_gate=True,
            biases="qkv",
            windows="some",
            experts="num_experts",
            width="moe_intermediate_size",
        ),
        Target(
            name="glm4_moe",
            prefix="Glm4Moe",
            scores=("sigmoid",),
            biased=True,
            query_norms=("none", "head"),
            biases="qkv",
            **DEEPSEEK,
        ),
        Target(
            name="gpt_oss",
            prefix="GptOss",
            scores=("softmax",),
            weights=CHOSEN,
            forms=("silu",),
            attention="sinks",
            biases="qkvo",
            router="router",
        ),
        Target(
            name="olmoe",
            prefix="Olmoe",
            scores=("softmax",),
            weights=GATES,
            attention="row_norm",
            query_norms=("none", "row"),
            biases="qkvo",
            experts="num_experts",
        ),
        Target(
            name="qwen3_moe",
            prefix="Qwen3Moe",
            scores=("softmax",),
            weights=GATES,
            dense=True,
            attention="head_norm",
            query_norms=("none", "head"),
            biases="qkvo",
            windows="all",
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


# The architectures of llama.cpp that `moe.foreign.gguf` writes, in the order in which it tries them.
GGUF_TARGETS = [
    Target(
        name="llama",
        scores=("softmax",),
        weights=("normalized",),
        forms=("swiglu", "silu"),
        biases="qkvo",
        any_rope=False,
    ),
    Target(
        name="qwen3moe",
        scores=("softmax",),
        weights=("normalized",),
        forms=("swiglu",),
        query_norms=("head",),
        biases="qkv",
        any_rope=False,
    ),
    Target(
        name="olmoe",
        scores=("softmax",),
        weights=("raw",),
        forms=("swiglu",),
        attention="row_norm",
        query_norms=("row",),
        biases="qkv",
        any_rope=False,
        shared_keys=False,
    ),
    Target(
        name="glm4moe",
        scores=("softmax", "sigmoid"),
        weights=("normalized", "raw", "equal"),
        biased=True,
        grouped=True,
        forms=("swiglu",),
        dense=True,
        shared=True,
        query_norms=("none", "head"),
        biases="qkv",
        any_rope=False,
    ),
]
