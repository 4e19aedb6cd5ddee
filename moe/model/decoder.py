"""The language model: a Llama-type decoder with Mixture-of-Experts feed-forward layers.

Attention, norms and position embeddings are those of transformers. Parameter names follow transformers' Llama, so that
dense checkpoints can be loaded by name.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRMSNorm, LlamaRotaryEmbedding

from moe.checks import build, require
from moe.data.labels import IGNORED, next_token
from moe.model.architecture import MoEConfig
from moe.model.experts import Experts
from moe.model.layer import LayerOutput, MoELayer
from moe.routers.base import Router
from moe.routing.decision import Context, Knobs, Routing, document_positions
from moe.routing.stats import RoutingStats


@dataclass
class MoEOutput(CausalLMOutputWithPast):
    """transformers' output plus the results of routing.

    loss: mean cross-entropy in nats, without auxiliary losses.
    aux: {name: (L)} unweighted auxiliary losses of each MoE layer. None without MoE layers.
    stats: sums for metrics, with a first dimension L. None without MoE layers.
    routing: for each MoE layer the decision of each router of its chain. None without MoE layers.
    """

    __no_type_check__ = True  # accelerate builds it from a dict that transformers unpacks

    aux: dict[str, Tensor] | None = None
    stats: RoutingStats | None = None
    routing: list[tuple[Routing, ...]] | None = None


class DenseFFN(nn.Module):
    """A dense feed-forward network: `Experts` with E = 1 and no router."""

    def __init__(self, config: MoEConfig, width: int) -> None:
        super().__init__()
        self.experts = Experts(1, config.hidden_size, hidden=width, kind=config.expert, dropout=config.dropout)

    def forward(self, x: Float[Tensor, "B S D"]) -> Float[Tensor, "B S D"]:
        rows = x.reshape(-1, x.shape[-1])
        return self.experts(rows, torch.tensor([len(rows)], device="cpu")).view_as(x)


class DecoderLayer(nn.Module):
    """x + attention(norm x), then x + feed-forward(norm x).

    `forward` also returns the output of the MoE layer, or None if the feed-forward network is dense.
    """

    def __init__(self, config: MoEConfig, index: int) -> None:
        super().__init__()
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = LlamaAttention(config, layer_idx=index)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = _feed_forward(config, index)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Float[Tensor, "B S D"], context: Context, *attention: Any
    ) -> tuple[Tensor, LayerOutput | None]:
        attended, _ = self.self_attn(self.input_layernorm(x), *attention)
        x = x + self.dropout(attended)
        normed = self.post_attention_layernorm(x)
        if isinstance(self.mlp, MoELayer):
            output = self.mlp(normed, context)
            return x + self.dropout(output.y), output
        return x + self.dropout(self.mlp(normed)), None


def _feed_forward(config: MoEConfig, index: int) -> nn.Module:
    if index < config.first_k_dense_replace:
        return DenseFFN(config, config.dense_ffn)
    router = build(config.router or {}, "router", config.hidden_size, config.num_experts)
    if not isinstance(router, Router):
        raise ValueError(f"router._target_={config.router}: must be a moe.routers.base.Router")
    kind, dropout = config.expert, config.dropout
    experts = Experts(
        config.num_experts, config.hidden_size, hidden=config.intermediate_size, kind=kind, dropout=dropout
    )
    shared = DenseFFN(config, config.shared_experts * config.intermediate_size) if config.shared_experts else None
    return MoELayer(router, experts, shared)


class MoEPreTrainedModel(PreTrainedModel):
    config_class = MoEConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = False
    _no_split_modules = ["DecoderLayer"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Draw every matrix from N(0, initializer_range) and set norms to 1. Routers initialize themselves."""
        super()._init_weights(module)
        if isinstance(module, Router):
            module.initialize(self.config.initializer_range)
        elif isinstance(module, Experts):
            for p in module.parameters():
                nn.init.normal_(p, std=self.config.initializer_range)


class MoEModel(MoEPreTrainedModel):
    """Embedding, decoder layers and final norm. Maps token ids to hidden states and the outputs of MoE layers.

    recompute: in training, store only the input of each decoder layer and compute the layer again in the backward
        pass, with the same random numbers.
    """

    recompute: bool = False

    def __init__(self, config: MoEConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config)
        self.dropout = nn.Dropout(config.dropout)
        for router in self._routers[1:]:
            router.tie_to(self._routers[0])
        self._tied_weights_keys = _second_names(self)
        self.post_init()

    @property
    def _routers(self) -> list[Router]:
        return [block.mlp.router for block in self.layers if isinstance(block.mlp, MoELayer)]

    def forward(
        self,
        input_ids: Int[Tensor, "B S"],
        context: Context,
        *,
        load: Float[Tensor, "L E"] | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Int[Tensor, "#B S"] | None = None,
        cache: Cache | None = None,
    ) -> tuple[Float[Tensor, "B S D"], list[LayerOutput]]:
        x = self.embed_tokens(input_ids)
        if self.training and self.config.neftune_noise_alpha:
            x = x + neftune_noise(x, self.config.neftune_noise_alpha)
        if self.config.embed_scale:
            x = x * math.sqrt(self.config.hidden_size)
        x = self.dropout(x)
        seen = cache.get_seq_length() if cache is not None else 0
        if position_ids is None:
            position_ids = torch.arange(seen, seen + x.shape[1], device=x.device)[None]
        elif self.config._attn_implementation == "flash_attention_2":  # it would need the lengths of packed documents
            packed = attention_mask is None and cache is None and bool((position_ids.diff() != 1).any())
            allowed = "sdpa or eager for blocks of several documents"
            require(not packed, "model.attention", "flash_attention_2", allowed)
        # positional arguments here and for the attention, because transformers 5.24 renamed the argument for the cache
        mask = create_causal_mask(self.config, x, attention_mask, cache, position_ids)
        rotary = self.rotary_emb(x, position_ids=position_ids)
        outputs: list[LayerOutput] = []
        recompute = self.recompute and self.training
        for layer in self.layers:
            if load is not None:
                context = context._replace(load=load[min(len(outputs), len(load) - 1)])  # dense layers ignore it
            run: Callable[..., Any] = functools.partial(checkpoint, layer, use_reentrant=False) if recompute else layer
            x, output = run(x, context, rotary, mask, cache)
            if output is not None:
                outputs.append(output)
                context = context._replace(state=output.routing[-1].state)
        return self.dropout(self.norm(x)), outputs


def neftune_noise(x: Float[Tensor, "B S D"], alpha: float) -> Float[Tensor, "B S D"]:
    """Return noise in the shape of x, uniform on +-alpha / sqrt(S D) (NEFTune 2310.05914).

    The noise of a sequence has length alpha / sqrt(3).
    """
    return torch.empty_like(x).uniform_(-1, 1) * (alpha / math.sqrt(x.shape[1] * x.shape[2]))


def _second_names(module: nn.Module) -> dict[str, str]:
    """Return {further name: first name} for parameters with several names, which `save_pretrained` must write once."""
    first = {p: name for name, p in module.named_parameters()}
    return {name: first[p] for name, p in module.named_parameters(remove_duplicate=False) if name != first[p]}


class MoEForCausalLM(MoEPreTrainedModel, GenerationMixin):
    """`MoEModel` plus output matrix. `save_pretrained`, `from_pretrained` and `generate` are those of transformers."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: MoEConfig) -> None:
        super().__init__(config)
        self.model = MoEModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @property
    def moe_layers(self) -> list[MoELayer]:
        """The MoE layers, in the order in which `aux` and `stats` stack them."""
        return [block.mlp for block in self.model.layers if isinstance(block.mlp, MoELayer)]

    def experts_kernel(self, dtype: torch.dtype) -> str | None:
        """Return the kernel of the routed experts in `dtype`, see `moe.model.experts.choose_kernel`.

        None without MoE layers.
        """
        return self.moe_layers[0].experts.kernel(dtype) if self.moe_layers else None

    def forward(
        self,
        input_ids: Int[Tensor, "B S"],
        labels: Int[Tensor, "B S"] | None = None,
        *,
        knobs: Knobs | None = None,
        capacity: float | None = None,
        drop: str = "position",
        load: Float[Tensor, "L E"] | None = None,
        orthogonality: bool = False,
        probe_stride: int | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Int[Tensor, "#B S"] | None = None,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool = False,
        logits_to_keep: int = 0,
        **_: Any,
    ) -> MoEOutput:
        """Return logits, loss, auxiliary losses, sums for metrics and routing decisions.

        labels: token ids, not shifted, with IGNORED where nothing is predicted. None: no loss.
        knobs: default to the temperature of the model's configuration and no noise.
        capacity, drop, orthogonality, probe_stride: see `moe.routing.decision.Context`.
        load: as in `Context`, for each MoE layer.
        position_ids: where they do not increase by 1, a new document begins. A document does not attend to the
            documents before it. (Only without cache and attention_mask. transformers makes the mask.)
        past_key_values: the name of `cache` in transformers before 5.24.
        """
        cache = cache if cache is not None else past_key_values
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if knobs is None:
            knobs = Knobs.of(temperature=self.config.router_temperature, device=input_ids.device)
        hidden, layers = self.model(
            input_ids,
            Context(
                input_ids,
                knobs,
                capacity,
                drop,
                orthogonality=orthogonality,
                probe_stride=probe_stride,
                document_position=None
                if position_ids is None
                else document_positions(position_ids.expand_as(input_ids)),
            ),
            load=load,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
        )
        logits = self.lm_head(hidden[:, -logits_to_keep:])
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits.float().flatten(0, 1), next_token(labels).flatten(), ignore_index=IGNORED)
        routed: dict[str, Any] = {}
        if layers:
            names = layers[0].aux
            routed["aux"] = {name: torch.stack([layer.aux[name] for layer in layers]) for name in names}
            routed["stats"] = RoutingStats.stack([layer.stats for layer in layers])
            routed["routing"] = [layer.routing for layer in layers]
        return MoEOutput(loss, logits, cache, **routed)  # positional, because transformers renamed the cache's field


AutoConfig.register("moe_routing", MoEConfig)
AutoModelForCausalLM.register(MoEConfig, MoEForCausalLM)
