"""The parts of a language model, whatever code it runs with: the form from which every target is written.

Our decoder has these parts, and so have models of transformers that are built like a Llama (`READ`): dense ones that
were upcycled, and some Mixtures of Experts that were imported.

Letters in shapes: E networks, D width of a hidden state, F width of a network.
"""

import copy
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

from jaxtyping import Float
from torch import Tensor
from transformers import PretrainedConfig

from moe.checks import ConfigError
from moe.config.checkpoints import dense, transformers_config
from moe.foreign.rules import Rule, rule_of
from moe.model.architecture import IDS, MoEConfig
from moe.model.causal_lm import MoEForCausalLM
from moe.model.decoder import DenseFFN
from moe.model.imported import ImportedModel, RoutedExperts
from moe.model.layer import MoELayer
from moe.routers.base import Router
from moe.routers.imported import Imported

# The architectures of transformers that have no other parts than these.
READ = ("mistral", "qwen2", "qwen3", "gemma", "mixtral", "qwen3_moe", "olmoe")

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


class Networks(NamedTuple):
    """The matrices of E feed-forward networks without biases. `gate` is None if they have two matrices."""

    gate: Float[Tensor, "E F D"] | None
    up: Float[Tensor, "E F D"]
    down: Float[Tensor, "E D F"]


class Routed(NamedTuple):
    """A Mixture of Experts: its router, its experts, its shared experts as one network, and their gate, if any."""

    router: Router
    experts: Networks
    shared: Networks | None
    shared_gate: Float[Tensor, "1 D"] | None


class Layer(NamedTuple):
    """x + attention(norm x), then x + feed-forward(norm x).

    attention_norm, feed_forward_norm: by which the normed hidden states are multiplied. attention: its weights, under
    the names that transformers' Llama has for them. window: how many tokens a token sees, itself included; None: all.
    """

    attention_norm: Float[Tensor, " D"]
    attention: Weights
    feed_forward_norm: Float[Tensor, " D"]
    feed_forward: Networks | Routed
    window: int | None = None


@dataclass(frozen=True, kw_only=True)
class Anatomy:
    """The parts of a model.

    config: its sizes, under the names of our decoder's configuration.
    rule: of the routers of all layers, or None if they follow no common one. Without routers, one that all targets
        follow.
    embedding, norm, head: the weights around the layers. The embedding lacks the factor of `config.embed_scale`.
    """

    config: MoEConfig
    rule: Rule | None
    embedding: Tensor
    norm: Float[Tensor, " D"]
    head: Tensor
    layers: tuple[Layer, ...]

    @property
    def biases(self) -> str:
        """Return the letters of the matrices q, k, v, o of the attention that have a bias."""
        return "".join(part for part in "qkvo" if f"{part}_proj.bias" in self.layers[0].attention)

    @property
    def query_norm(self) -> Literal["none", "row", "head"]:
        """Return which norm queries and keys have before they are rotated: one over all heads, or over each head."""
        weight = self.layers[0].attention.get("q_norm.weight")
        if weight is None:
            return "none"
        return "row" if len(weight) == len(self.layers[0].attention["q_proj.weight"]) else "head"

    @property
    def windows(self) -> set[int | None]:
        """Return the windows that occur."""
        return {layer.window for layer in self.layers}


def anatomy_of(model: MoEForCausalLM) -> Anatomy:
    """Return the parts of a model, as views of its weights where possible.

    Raises ConfigError, with the reason, for an imported model that has other parts.
    """
    config = cast(MoEConfig, model.config)
    if config.imported is None:
        return _parts(model, config, model.decoder, model.lm_head, [None] * config.num_hidden_layers)
    source = transformers_config.parse(config.imported, "config.json.imported")
    if reason := _other_parts(source, model):
        raise ConfigError(reason)
    causal_lm: Any = cast(ImportedModel, model.model).causal_lm
    offset = 1.0 if source.model_type == "gemma" else 0.0  # its norms multiply by 1 + weight
    found = _parts(model, _as_ours(config, source), causal_lm.model, causal_lm.lm_head, _windows(source), offset)
    kinds = [isinstance(layer.feed_forward, Routed) for layer in found.layers]
    if kinds != sorted(kinds):
        raise ConfigError("a dense layer comes after one with experts, as in no target")
    found.config.first_k_dense_replace = kinds.count(False)
    for layer in found.layers:
        if isinstance(layer.feed_forward, Routed):
            found.config.intermediate_size = layer.feed_forward.experts.up.shape[1]
        else:
            found.config.dense_ffn = layer.feed_forward.up.shape[1]
    return found


def _other_parts(source: PretrainedConfig, model: MoEForCausalLM) -> str | None:
    """Return in which way an imported model has other parts than those of `Anatomy`, or None."""
    kind = source.model_type
    if kind not in READ:
        return f"a {kind} has parts that no other target has"
    if getattr(source, "clip_qkv", None) is not None:
        return "clip_qkv limits queries, keys and values, in no target but olmoe"
    if any(isinstance(layer.router, Imported) for layer in model.moe_layers):
        return f"its router is the code of {kind}; import it with one of ours, such as router=topk"
    activation = source.hidden_act
    return None if activation in dense.FORMS else f"hidden_act={activation}: no form of model.expert"


def _as_ours(config: MoEConfig, source: PretrainedConfig) -> MoEConfig:
    """Return the configuration that our decoder would have for an imported model."""
    found = copy.deepcopy(config)
    found.imported = None
    for name in dense.INHERITED:
        value = getattr(source, name, None)
        if value is not None and name not in IDS:  # which a run sets to those of its tokenizer
            setattr(found, name, value)
    found.attention_bias = bool(getattr(source, "attention_bias", source.model_type == "qwen2"))
    found.expert = dense.FORMS[source.hidden_act]
    found.embed_scale = source.model_type == "gemma"
    return found


def _windows(source: PretrainedConfig) -> list[int | None]:
    """Return the window of each layer. One as long as `max_position_embeddings` acts too: longer texts can be read."""
    window = getattr(source, "sliding_window", None) or None
    types = getattr(source, "layer_types", None) or ["sliding_attention"] * source.num_hidden_layers
    return [window if each == "sliding_attention" else None for each in types]


def _parts(
    model: MoEForCausalLM, config: MoEConfig, body: Any, head: Any, windows: list[int | None], offset: float = 0.0
) -> Anatomy:
    """Return the parts of a model whose layers are in `body`. `offset`: what is added to the weights of its norms."""
    rules = {rule_of(layer.router, temperature=config.router_temperature) for layer in model.moe_layers}
    return Anatomy(
        config=config,
        rule=rules.pop() if len(rules) == 1 else None if rules else Rule(1),
        embedding=body.embed_tokens.weight.detach(),
        norm=body.norm.weight.detach() + offset,
        head=head.weight.detach(),
        layers=tuple(
            Layer(
                layer.input_layernorm.weight.detach() + offset,
                {name: weight.detach() for name, weight in layer.self_attn.state_dict().items()},
                layer.post_attention_layernorm.weight.detach() + offset,
                _feed_forward(layer.mlp),
                window,
            )
            for layer, window in zip(body.layers, windows, strict=True)
        ),
    )


def _feed_forward(mlp: Any) -> Networks | Routed:
    """Return the parts of an MLP, or of what has taken its place."""
    place = getattr(mlp, "experts", None) if not isinstance(mlp, RoutedExperts) else mlp
    layer = place.layer if isinstance(place, RoutedExperts) else mlp
    if isinstance(layer, MoELayer):
        shared = None if layer.shared is None else _networks(cast(DenseFFN, layer.shared).experts)
        gate = None if layer.shared_gate is None else layer.shared_gate.weight.detach()
        return Routed(layer.router, _networks(layer.experts), shared, gate)
    if isinstance(layer, DenseFFN):
        return _networks(layer.experts)
    return Networks(*(getattr(layer, f"{part}_proj").weight.detach()[None] for part in Networks._fields))


def _networks(experts: Any) -> Networks:
    """Return the matrices of our experts, or of those of transformers, which stack gate and up."""
    module = getattr(experts, "module", None)
    if module is None:
        gate = None if experts.gate is None else experts.gate.detach()
        return Networks(gate, experts.up.detach(), experts.down.detach())
    gate, up = module.gate_up_proj.detach().chunk(2, dim=1)
    return Networks(gate, up, module.down_proj.detach())
