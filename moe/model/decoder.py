"""The language model: a Llama-type decoder with Mixture-of-Experts feed-forward layers.

Attention, norms and position embeddings compute what those of transformers do. Parameter names follow transformers'
Llama, so that dense checkpoints can be loaded by name.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from transformers import Cache
from transformers.masking_utils import create_causal_mask
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from moe.model.architecture import MoEConfig
from moe.model.attention import Attention, RMSNorm
from moe.model.experts import Experts
from moe.model.layer import Latent, LayerOutput, MoELayer
from moe.model.replay import decisions, experts_per_token
from moe.model.routed import Attended, RoutedModel, Seen, Wanted, build_router
from moe.routing.decision import Context


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

    `forward` also returns the attention weights, or None unless attention is eager, and the output of the MoE layer,
    or None if the feed-forward network is dense.
    """

    def __init__(self, config: MoEConfig, index: int, *, trusted: bool) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config, layer_idx=index)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = _feed_forward(config, index, trusted=trusted)
        self.dropout = nn.Dropout(config.dropout)
        self.routes_before_attention = config.router_input == "attention"

    def forward(
        self, x: Float[Tensor, "B S D"], context: Context, *attention: Any
    ) -> tuple[Tensor, Tensor | None, LayerOutput | None]:
        before = self.input_layernorm(x)
        attended, weights = self.self_attn(before, *attention)
        x = x + self.dropout(attended)
        normed = self.post_attention_layernorm(x)
        if isinstance(self.mlp, MoELayer):
            output = self.mlp(normed, context, before if self.routes_before_attention else None)
            return x + self.dropout(output.y), weights, output
        return x + self.dropout(self.mlp(normed)), weights, None


def _feed_forward(config: MoEConfig, index: int, *, trusted: bool) -> nn.Module:
    if index < config.first_k_dense_replace:
        return DenseFFN(config, config.dense_ffn)
    return make_layer(config, index, trusted=trusted)


def make_layer(config: MoEConfig, index: int, *, trusted: bool) -> MoELayer:
    """Return the MoE layer of decoder layer `index`, with router, routed experts and shared experts."""
    dim, width = config.hidden_size, config.latent_dim or config.hidden_size
    kind, dropout = config.expert, config.dropout
    experts = Experts(config.experts_of(index), width, hidden=config.intermediate_size, kind=kind, dropout=dropout)
    router = build_router(config, index, trusted=trusted)
    if router.replays is not None:
        router.mean_k = experts_per_token(router.replays[0], index, seq_len=config.max_position_embeddings)
    return MoELayer(
        router,
        experts,
        DenseFFN(config, config.shared_experts * config.intermediate_size) if config.shared_experts else None,
        shared_gate=nn.Linear(dim, 1, bias=False) if config.shared_gate else None,
        latent=None if config.latent_dim is None else Latent(dim, width),
        router_precision=config.router_precision,
    )


class MoEModel(RoutedModel):
    """Our decoder: embedding, decoder layers and final norm."""

    def __init__(self, config: MoEConfig, *, trusted: bool = False) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        layers = range(config.num_hidden_layers)
        self.layers = nn.ModuleList(DecoderLayer(config, index, trusted=trusted) for index in layers)
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config)
        self.dropout = nn.Dropout(config.dropout)
        self._tie_routers()
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Return the decoder of a saved model, which `MoEForCausalLM.from_pretrained` checks and loads.

        Raises ConfigError, also for an imported model.
        """
        from moe.model.causal_lm import MoEForCausalLM  # it imports this file

        loaded = MoEForCausalLM.from_pretrained(*args, **kwargs)
        return (loaded[0].decoder, *loaded[1:]) if isinstance(loaded, tuple) else loaded.decoder

    @property
    def moe_layers(self) -> list[MoELayer]:
        return [block.mlp for block in self.layers if isinstance(block.mlp, MoELayer)]

    def _run(
        self,
        inputs: Int[Tensor, "B S"] | Float[Tensor, "B S D"],
        context: Context,
        load: Shaped[Tensor, "L C E"] | None,
        attended: Attended,
        wanted: Wanted,
    ) -> Seen:
        x = self._embed(inputs)
        attention = self._attention_inputs(x, attended)
        states: list[Tensor] = []
        attentions: list[Any] = []
        outputs: list[LayerOutput] = []
        alike = self.first_alike()
        given = decisions(self.moe_layers, context, attended.mask)
        recompute = self.gradient_checkpointing and self.training and attended.cache is None
        for layer in self.layers:
            number = min(len(outputs), len(alike) - 1)  # of the MoE layer that comes next
            if given is not None:
                context = context._replace(given=given[number])
            if load is not None:
                present = self.moe_layers[number].router.num_experts
                context = context._replace(load=load[number, :, :present])  # dense layers ignore it
            if outputs and alike[number] != alike[len(outputs) - 1]:
                context = context._replace(state=None)  # another router cannot read it
            run: Callable[..., Any] = layer
            if recompute:
                run = functools.partial(self._gradient_checkpointing_func, layer)
            if wanted.states:
                states.append(x)
            x, weights, output = run(x, context, *attention)
            if wanted.attentions:
                attentions.append(weights)
            if output is not None:
                outputs.append(output.without_y())
                context = context._replace(state=output.routing[-1].state)
        return Seen(self.dropout(self.norm(x)), states, attentions, outputs, cache=attended.cache)

    def _embed(self, inputs: Int[Tensor, "B S"] | Float[Tensor, "B S D"]) -> Float[Tensor, "B S D"]:
        x = inputs if inputs.is_floating_point() else self._look_up(inputs)
        if self.config.embed_scale:
            x = x * math.sqrt(self.config.hidden_size)
        return self.dropout(x)

    def _attention_inputs(self, x: Float[Tensor, "B S D"], attended: Attended) -> tuple[Any, Any, Cache | None]:
        """Return what attention gets beside hidden states: rotary embeddings of the positions, mask and cache."""
        mask, position_ids, cache, _ = attended
        # Positional arguments here and for the attention, because transformers 5.24 renamed the argument for the cache.
        # With positions, transformers makes the host wait for the device to find out whether there are documents.
        causal = create_causal_mask(self.config, x, mask, cache, position_ids)
        if position_ids is None:
            seen = cache.get_seq_length() if cache is not None else 0
            position_ids = torch.arange(seen, seen + x.shape[1], device=x.device)[None]
        return self.rotary_emb(x, position_ids=position_ids), causal, cache
