"""The language model: a Llama-type decoder with Mixture-of-Experts feed-forward layers.

Attention, norms and position embeddings are those of transformers. Parameter names follow transformers' Llama, so that
dense checkpoints can be loaded by name.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import local_torch_dtype
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRMSNorm, LlamaRotaryEmbedding

from moe.checks import ConfigError, require
from moe.config.classes import build
from moe.model.architecture import MoEConfig
from moe.model.experts import Experts
from moe.model.layer import LayerOutput, MoELayer
from moe.routers.base import Router
from moe.routers.seeding import Initializable, seeded
from moe.routing.decision import Context, Knobs, document_positions, fill_places

CACHE = fields(BaseModelOutputWithPast)[1].name  # "past_key_values" before transformers 5.24


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
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = LlamaAttention(config, layer_idx=index)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = _feed_forward(config, index, trusted=trusted)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Float[Tensor, "B S D"], context: Context, *attention: Any
    ) -> tuple[Tensor, Tensor | None, LayerOutput | None]:
        attended, weights = self.self_attn(self.input_layernorm(x), *attention)
        x = x + self.dropout(attended)
        normed = self.post_attention_layernorm(x)
        if isinstance(self.mlp, MoELayer):
            output = self.mlp(normed, context)
            return x + self.dropout(output.y), weights, output
        return x + self.dropout(self.mlp(normed)), weights, None


def _feed_forward(config: MoEConfig, index: int, *, trusted: bool) -> nn.Module:
    if index < config.first_k_dense_replace:
        return DenseFFN(config, config.dense_ffn)
    with local_torch_dtype(torch.promote_types(torch.get_default_dtype(), torch.float32), "a router"):
        router = build(config.router, "router", config.hidden_size, config.num_experts, trusted=trusted)
    kind, dropout = config.expert, config.dropout
    experts = Experts(
        config.num_experts, config.hidden_size, hidden=config.intermediate_size, kind=kind, dropout=dropout
    )
    shared = DenseFFN(config, config.shared_experts * config.intermediate_size) if config.shared_experts else None
    return MoELayer(router, experts, shared)


class MoEPreTrainedModel(PreTrainedModel):
    config_class = MoEConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DecoderLayer"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(self, config: MoEConfig) -> None:
        """Raises ConfigError for a configuration that no file may have either: see `MoEConfig.check`."""
        config.check()
        super().__init__(config)

    def _set_gradient_checkpointing(
        self,
        enable: bool = True,
        gradient_checkpointing_func: Callable[..., Any] = checkpoint,
        every_n_layers: int = 1,
    ) -> None:
        """Turn `MoEModel.gradient_checkpointing` on or off, as transformers does. Raises ConfigError.

        The reentrant kind gives no gradient to what a layer returns beside its hidden states: the auxiliary losses.
        """
        reentrant = getattr(gradient_checkpointing_func, "keywords", {}).get("use_reentrant", False)
        require(not reentrant, "use_reentrant", reentrant, "False, or the losses of routers have no gradient")
        require(every_n_layers == 1, "every_n_layers", every_n_layers, "1")
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Draw every matrix from N(0, initializer_range) and set norms to 1. Routers and experts do it themselves.

        The random numbers of a tensor depend on the seed, its name and its shape alone. So runs of the same seed start
        with the same weights wherever their models have the same tensors, whatever router they have.
        """
        std, modules = self.config.initializer_range, {part: name for name, part in self.named_modules()}
        with seeded(modules[module], *(p.shape for p in module.parameters(recurse=False))):
            super()._init_weights(module)
        if isinstance(module, Initializable):
            tensors = [*self.named_parameters(), *self.named_buffers()]
            loaded = {tensor for _, tensor in tensors if getattr(tensor, "_is_hf_initialized", False)}
            module.initialize(std, {tensor: name for name, tensor in tensors if tensor not in loaded})


@dataclass
class MoEModelOutput(BaseModelOutputWithPast):
    """transformers' output of a model without output matrix, plus the results of routing.

    last_hidden_state: (B, S, D), after the final norm.
    hidden_states: what each decoder layer gets, and then `last_hidden_state`. None unless asked for.
    attentions: (B, heads, S, S) for each decoder layer. None unless asked for.
    router_logits: (B * S, E) for each router of each MoE layer, without noise and temperature, 0 for padding. None
        unless asked for.
    layers: the output of each MoE layer.
    """

    __no_type_check__ = True  # as in `moe.model.causal_lm.MoEOutput`

    router_logits: tuple[Tensor, ...] | None = None
    layers: list[LayerOutput] | None = None


class _Seen(NamedTuple):
    """Of each decoder layer, if asked for, its input and attention weights; and the output of each MoE layer."""

    states: list[Tensor]
    attentions: list[Any]
    outputs: list[LayerOutput]


class MoEModel(MoEPreTrainedModel):
    """Embedding, decoder layers and final norm. Maps token ids to hidden states and the outputs of MoE layers.

    gradient_checkpointing: in training, store only the input of each decoder layer and compute the layer again in the
        backward pass, with the same random numbers. Not with a cache, which each pass would extend.
    """

    gradient_checkpointing: bool = False  # transformers' names
    _gradient_checkpointing_func = staticmethod(functools.partial(checkpoint, use_reentrant=False))

    def __init__(self, config: MoEConfig, *, trusted: bool = False) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        layers = range(config.num_hidden_layers)
        self.layers = nn.ModuleList(DecoderLayer(config, index, trusted=trusted) for index in layers)
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
        input_ids: Int[Tensor, "B S"] | None = None,
        *,
        knobs: Knobs | None = None,
        capacity: float | None = None,
        drop: str = "position",
        load: Shaped[Tensor, "L C E"] | None = None,
        orthogonality: bool = False,
        compared: Int[Tensor, "N"] | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Int[Tensor, "#B S"] | None = None,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        inputs_embeds: Float[Tensor, "B S D"] | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        output_router_logits: bool | None = None,
        return_dict: bool | None = None,
    ) -> MoEModelOutput | tuple[Any, ...]:
        """Return hidden states and the outputs of MoE layers. The arguments are those of `MoEForCausalLM.forward`."""
        config = self.config
        keep_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        keep_attentions = config.output_attentions if output_attentions is None else output_attentions
        keep_logits = config.output_router_logits if output_router_logits is None else output_router_logits
        if keep_attentions and config._attn_implementation != "eager":
            allowed = 'False, or the model loaded with attn_implementation="eager"'
            raise ConfigError(f"output_attentions=True: must be {allowed}")
        inputs, ids = _inputs(input_ids, inputs_embeds, config.hidden_size)
        cache = self._cache(past_key_values if cache is None else cache, use_cache=bool(use_cache))
        self._check_routers(cached=cache is not None, by_id=inputs_embeds is None)
        if knobs is None:
            knobs = Knobs.of(temperature=config.router_temperature, noise=config.router_noise, device=inputs.device)
        context = Context(ids, knobs, capacity, drop, orthogonality=orthogonality, compared=compared)
        if attention_mask is not None:
            context = context.without_padding(attention_mask)
        elif position_ids is not None:
            context = context._replace(document_position=document_positions(position_ids.expand_as(ids)))
        x = self._embed(inputs)
        attention = self._attention_inputs(x, attention_mask, position_ids, cache)
        x, seen = self._run_layers(
            x, context, load, attention, keep_states=bool(keep_states), keep_attentions=bool(keep_attentions)
        )
        last = self.dropout(self.norm(x))
        output = MoEModelOutput(
            last,
            hidden_states=(*seen.states, last) if keep_states else None,
            attentions=tuple(seen.attentions) if keep_attentions else None,
            router_logits=_router_logits(seen.outputs, context) if keep_logits else None,
            layers=seen.outputs,
            **{CACHE: None if use_cache is False else cache},
        )
        as_object = config.return_dict if return_dict is None else return_dict
        return output if as_object else output.to_tuple()

    def _embed(self, inputs: Int[Tensor, "B S"] | Float[Tensor, "B S D"]) -> Float[Tensor, "B S D"]:
        try:
            x = inputs if inputs.is_floating_point() else self.embed_tokens(inputs)
        except IndexError:  # raised on the CPU alone: on a GPU the host would have to wait for the ids
            allowed = f"from 0 to {self.config.vocab_size - 1}, the ids of the model's vocabulary"
            found = f"{inputs.min().item()} to {inputs.max().item()}"
            raise ConfigError(f"input_ids: must be {allowed}; they are {found}") from None
        if self.training and self.config.neftune_noise_alpha:
            x = x + neftune_noise(x, self.config.neftune_noise_alpha)
        if self.config.embed_scale:
            x = x * math.sqrt(self.config.hidden_size)
        return self.dropout(x)

    def _attention_inputs(
        self,
        x: Float[Tensor, "B S D"],
        attention_mask: Tensor | None,
        position_ids: Int[Tensor, "#B S"] | None,
        cache: Cache | None,
    ) -> tuple[Any, Any, Cache | None]:
        """Return what attention gets beside hidden states: rotary embeddings of the positions, mask and cache."""
        if position_ids is not None and attention_mask is None and cache is None:
            self._check_documents(position_ids)
        # Positional arguments here and for the attention, because transformers 5.24 renamed the argument for the cache.
        # With positions, transformers makes the host wait for the device to find out whether there are documents.
        mask = create_causal_mask(self.config, x, attention_mask, cache, position_ids)
        if position_ids is None:
            seen = cache.get_seq_length() if cache is not None else 0
            position_ids = torch.arange(seen, seen + x.shape[1], device=x.device)[None]
        return self.rotary_emb(x, position_ids=position_ids), mask, cache

    def _run_layers(
        self,
        x: Float[Tensor, "B S D"],
        context: Context,
        load: Shaped[Tensor, "L C E"] | None,
        attention: tuple[Any, Any, Cache | None],
        *,
        keep_states: bool,
        keep_attentions: bool,
    ) -> tuple[Float[Tensor, "B S D"], _Seen]:
        """Return the output of the last decoder layer, and what was asked for of each layer."""
        seen = _Seen([], [], [])
        recompute = self.gradient_checkpointing and self.training and attention[-1] is None
        for layer in self.layers:
            if load is not None:
                context = context._replace(load=load[min(len(seen.outputs), len(load) - 1)])  # dense layers ignore it
            run: Callable[..., Any] = layer
            if recompute:
                run = functools.partial(self._gradient_checkpointing_func, layer)
            if keep_states:
                seen.states.append(x)
            x, weights, output = run(x, context, *attention)
            if keep_attentions:
                seen.attentions.append(weights)
            if output is not None:
                seen.outputs.append(output)
                context = context._replace(state=output.routing[-1].state)
        return x, seen

    def _cache(self, given: Cache | None, *, use_cache: bool) -> Cache | None:
        """Return the cache that is given, or a new one if it is asked for. Raises ConfigError for one of fixed size."""
        allowed = 'a cache that grows, as DynamicCache does (cache_implementation="dynamic")'
        require(given is None or not given.is_compileable, "past_key_values", type(given).__name__, allowed)
        return DynamicCache(config=self.config) if given is None and use_cache else given

    def _check_routers(self, *, cached: bool, by_id: bool) -> None:
        """Raise ConfigError if a router needs what it does not get.

        cached: it does not see earlier tokens of the text again.
        by_id: it gets token ids.
        """
        for router in self._routers:
            causal = router.causal if self.training else router.causal_in_evaluation
            allowed = f"False, because {type(router).__name__} compares tokens of a text to choose experts"
            require((causal and not router.reads_earlier_tokens) or not cached, "use_cache", True, allowed)
            if router.uses_ids and not by_id:
                raise ConfigError(f"inputs_embeds: must be input_ids, because {type(router).__name__} routes token ids")

    def _check_documents(self, position_ids: Int[Tensor, "#B S"]) -> None:
        """Raise ConfigError if sequences contain several documents and this model cannot keep them apart.

        FlashAttention would need their lengths, and some routers compare all tokens. Only then the host waits for the
        device to find out whether there are several.
        """
        flash = self.config._attn_implementation == "flash_attention_2"
        mixing = bool(self._routers) and not self._routers[0].decides_alone
        if (flash or mixing) and bool((position_ids.diff() != 1).any()):
            allowed = "sdpa or eager for blocks of several documents"
            require(not flash, "model.attention", "flash_attention_2", allowed)
            self._routers[0].require_documents_apart()


def neftune_noise(x: Float[Tensor, "B S D"], alpha: float) -> Float[Tensor, "B S D"]:
    """Return noise in the shape of x, uniform on +-alpha / sqrt(S D) (NEFTune 2310.05914).

    The noise of a sequence has length alpha / sqrt(3).
    """
    return torch.empty_like(x).uniform_(-1, 1) * (alpha / math.sqrt(x.shape[1] * x.shape[2]))


def _second_names(module: nn.Module) -> dict[str, str]:
    """Return {further name: first name} for parameters with several names, which `save_pretrained` must write once."""
    first = {p: name for name, p in module.named_parameters()}
    return {name: first[p] for name, p in module.named_parameters(remove_duplicate=False) if name != first[p]}


def _inputs(input_ids: Tensor | None, inputs_embeds: Tensor | None, dim: int) -> tuple[Tensor, Int[Tensor, "B S"]]:
    """Return what the first layer gets, and the token ids, zeros if there are none.

    Raises ConfigError unless there is one of them, with its shape: ids (B, S), or vectors (B, S, D).
    """
    if (inputs_embeds is None) == (input_ids is None):
        raise ConfigError("input_ids, inputs_embeds: give exactly one of them")
    if input_ids is not None:
        fits = input_ids.ndim == 2 and input_ids.dtype in (torch.int32, torch.int64)
        _require_tensor(
            "input_ids", input_ids, "whole numbers (int64 or int32) of shape (sequences, tokens)", fits=fits
        )
        return input_ids, input_ids
    assert inputs_embeds is not None
    shaped = inputs_embeds.ndim == 3 and inputs_embeds.shape[-1] == dim
    allowed = f"floating-point numbers of shape (sequences, tokens, {dim})"
    _require_tensor("inputs_embeds", inputs_embeds, allowed, fits=shaped and inputs_embeds.is_floating_point())
    return inputs_embeds, inputs_embeds.new_zeros(inputs_embeds.shape[:2], dtype=torch.long)


def _require_tensor(name: str, tensor: Tensor, allowed: str, *, fits: bool) -> None:
    if not fits:
        kind = str(tensor.dtype).removeprefix("torch.")
        raise ConfigError(f"{name}: must be {allowed}; it has {kind} and shape {tuple(tensor.shape)}")


def _router_logits(layers: list[LayerOutput], context: Context) -> tuple[Float[Tensor, "BS E"], ...]:
    """Return the logits of each router of each MoE layer. Raises ConfigError if a router has none."""
    logits = [routing.logits for layer in layers for routing in layer.routing]
    known = [each for each in logits if each is not None]
    require(len(known) == len(logits), "output_router_logits", True, "False for a router without logits")
    return tuple(fill_places(each, context.place, context.ids.numel()) for each in known)
