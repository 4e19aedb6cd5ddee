"""What our decoder and imported models share: how they are called, what they return, and what routers demand."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import local_torch_dtype

from moe.checks import ConfigError, require
from moe.config import layer_experts
from moe.config.classes import build
from moe.model.architecture import MoEConfig
from moe.model.layer import LayerOutput, MoELayer
from moe.routers.base import Router
from moe.routers.seeding import Initializable, seeded
from moe.routing.decision import LABELS, Context, Knobs, document_positions, fill_places

WRAPPED = """\
router: must not be inside {name}, because layers ask a router for more than its outputs; with peft, train all of it: \
modules_to_save=["router"] instead of LoRA"""
CACHE = fields(BaseModelOutputWithPast)[1].name  # "past_key_values" before transformers 5.24


def build_router(config: MoEConfig, layer: int, *, trusted: bool) -> Router:
    """Return the router of a decoder layer, with parameters of at least fp32. Raises ConfigError if it does not fit."""
    with local_torch_dtype(torch.promote_types(torch.get_default_dtype(), torch.float32), "a router"):
        experts = config.experts_of(layer)
        try:
            return build(config.router_of(layer), "router", config.hidden_size, experts, trusted=trusted)
        except ConfigError as error:
            where = layer_experts.named(config.experts_by_layer, experts, config.num_experts)
            raise ConfigError(f"{where}{error}") from error


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
    logits: of the positions to keep, if the model computes them itself. None: they are `lm_head` of
        `last_hidden_state`.
    """

    __no_type_check__ = True  # as in `moe.model.causal_lm.MoEOutput`

    router_logits: tuple[Tensor, ...] | None = None
    layers: list[LayerOutput] | None = None
    logits: Tensor | None = None


class Attended(NamedTuple):
    """What attention gets beside the hidden states.

    mask: as in `MoEForCausalLM.forward`. position_ids: as there. cache: of the tokens before these. use_cache: whether
        to return one; if there is none yet, the layers make it.
    """

    mask: Tensor | None
    position_ids: Int[Tensor, "#B S"] | None
    cache: Cache | None
    use_cache: bool


class Wanted(NamedTuple):
    """What the layers return beside what is always needed.

    states, attentions: whether to return those of each decoder layer. logits: `logits_to_keep` of
    `MoEForCausalLM.forward`, for a model that computes them itself.
    """

    states: bool
    attentions: bool
    logits: int | Int[Tensor, " N"]


class Seen(NamedTuple):
    """What the layers of a model return.

    last: after the final norm. None if `logits` is given and `states` was not asked for.
    states, attentions: the input and the attention weights of each decoder layer, if asked for.
    outputs: the output of each MoE layer.
    logits: None if they are `lm_head` of `last`.
    cache: with these tokens, or None.
    """

    last: Float[Tensor, "B S D"] | None
    states: list[Tensor]
    attentions: list[Any]
    outputs: list[LayerOutput]
    logits: Float[Tensor, "B N V"] | None = None
    cache: Cache | None = None


class RoutedModel(MoEPreTrainedModel):
    """Maps token ids to hidden states and the outputs of MoE layers. A subclass has the layers and runs them in `_run`.

    gradient_checkpointing: in training, store only the input of each decoder layer and compute the layer again in the
        backward pass, with the same random numbers. Not with a cache, which each pass would extend.
    """

    gradient_checkpointing: bool = False  # transformers' names
    _gradient_checkpointing_func = staticmethod(functools.partial(checkpoint, use_reentrant=False))

    @property
    def moe_layers(self) -> list[MoELayer]:
        """The MoE layers, in the order in which they run."""
        raise NotImplementedError

    def _run(
        self,
        inputs: Int[Tensor, "B S"] | Float[Tensor, "B S D"],
        context: Context,
        load: Shaped[Tensor, "L C E"] | None,
        attended: Attended,
        wanted: Wanted,
    ) -> Seen:
        """Run all layers. inputs: token ids, or what takes the place of their embeddings. load: as in `forward`."""
        raise NotImplementedError

    @property
    def deciding_blocks(self) -> list[nn.Module]:
        """The blocks of an imported model whose own router decides. Our decoder has none."""
        return []

    def _look_up(self, ids: Int[Tensor, "B S"]) -> Float[Tensor, "B S D"]:
        try:
            return cast(Tensor, self.get_input_embeddings()(ids))
        except IndexError:  # raised on the CPU alone: on a GPU the host would have to wait for the ids
            allowed = f"from 0 to {self.config.vocab_size - 1}, the ids of the model's vocabulary"
            raise ConfigError(
                f"input_ids: must be {allowed}; they are {ids.min().item()} to {ids.max().item()}"
            ) from None

    def _with_noise(self, inputs: Tensor) -> Tensor:
        """Return embeddings with the noise of NEFTune in training. Without noise, return the inputs as they are."""
        alpha = self.config.neftune_noise_alpha
        if not (alpha and self.training):
            return inputs
        x = inputs if inputs.is_floating_point() else self._look_up(inputs)
        return x + neftune_noise(x, alpha)

    def first_alike(self) -> list[int]:
        """Return, for each MoE layer, the number of the first one whose router is alike.

        Routers are alike if they have the same class and settings, and the same number of experts.
        """
        config, layers = self.config, range(len(self.moe_layers))
        dense = config.first_k_dense_replace if config.router_layers or config.experts_by_layer else 0
        specs = [(config.router_of(dense + number), config.experts_of(dense + number)) for number in layers]
        return [specs.index(spec) for spec in specs]

    def _tie_routers(self) -> None:
        """Let routers share modules, and tell transformers which weights then have several names."""
        layers = self.moe_layers
        for layer, first in zip(layers, self.first_alike(), strict=True):
            if layer is not layers[first]:
                layer.router.tie_to(layers[first].router)
        self._tied_weights_keys = _second_names(self)

    def forward(
        self,
        input_ids: Int[Tensor, "B S"] | None = None,
        *,
        knobs: Knobs | None = None,
        capacity: float | None = None,
        drop: str = "position",
        told: Int[Tensor, "B 2"] | None = None,
        load: Shaped[Tensor, "L C E"] | None = None,
        costly: frozenset[str] = frozenset(),
        compared: Int[Tensor, " N"] | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Int[Tensor, "#B S"] | None = None,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        inputs_embeds: Float[Tensor, "B S D"] | None = None,
        logits_to_keep: int | Int[Tensor, " N"] = 0,
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
        keep_cache = cache is not None or bool(use_cache)
        if told is not None:
            fits = told.shape == (len(ids), len(LABELS)) and not told.is_floating_point()
            _require_tensor("told", told, f"whole numbers of shape (sequences, {len(LABELS)})", fits=fits)
        self._check_routers(cached=keep_cache, by_id=inputs_embeds is None, told=told is not None)
        if knobs is None:
            knobs = Knobs.of(temperature=config.router_temperature, noise=config.router_noise, device=inputs.device)
        context = Context(ids, knobs, capacity, drop, told, costly=costly, compared=compared)
        if attention_mask is not None:
            context = context.without_padding(attention_mask)
        elif position_ids is not None:
            if cache is None:
                self._check_documents(position_ids)
            context = context._replace(document_position=document_positions(position_ids.expand_as(ids)))
        seen = self._run(
            self._with_noise(inputs),
            context,
            load,
            Attended(attention_mask, position_ids, cache, keep_cache),
            Wanted(bool(keep_states), bool(keep_attentions), logits_to_keep),
        )
        output = MoEModelOutput(
            seen.last,
            hidden_states=(*seen.states, cast(Tensor, seen.last)) if keep_states else None,
            attentions=tuple(seen.attentions) if keep_attentions else None,
            router_logits=_router_logits(seen.outputs, context) if keep_logits else None,
            layers=seen.outputs,
            logits=seen.logits,
            **{CACHE: None if use_cache is False else seen.cache},
        )
        as_object = config.return_dict if return_dict is None else return_dict
        return output if as_object else output.to_tuple()

    def _cache(self, given: Cache | None, *, use_cache: bool) -> Cache | None:
        """Return the cache that is given, or a new one if it is asked for. Raises ConfigError for one of fixed size."""
        allowed = 'a cache that grows, as DynamicCache does (cache_implementation="dynamic")'
        require(given is None or not given.is_compileable, "past_key_values", type(given).__name__, allowed)
        return DynamicCache(config=self.config) if given is None and use_cache else given

    def _check_routers(self, *, cached: bool, by_id: bool, told: bool) -> None:
        """Raise ConfigError if a router needs what it does not get, or is inside a module that hides what it is.

        cached: it does not see earlier tokens of the text again.
        by_id: it gets token ids.
        told: it gets the labels of texts.
        """
        for router in (layer.router for layer in self.moe_layers):
            if not hasattr(router, "chain"):
                raise ConfigError(WRAPPED.format(name=type(router).__name__))
            causal = router.causal if self.training else router.causal_in_evaluation
            allowed = f"False, because {type(router).__name__} compares tokens of a text to choose experts"
            require((causal and not router.reads_earlier_tokens) or not cached, "use_cache", True, allowed)
            if router.told and not told:
                label, name = ", ".join(sorted(router.told)), type(router).__name__
                raise ConfigError(f"told: must have the {label} of each text, because {name} routes by it")
            if router.uses_ids and not by_id:
                raise ConfigError(f"inputs_embeds: must be input_ids, because {type(router).__name__} routes token ids")

    def _check_documents(self, position_ids: Int[Tensor, "#B S"]) -> None:
        """Raise ConfigError if sequences contain several documents and this model cannot keep them apart.

        FlashAttention would need their lengths, and some routers compare all tokens. Only then the host waits for the
        device to find out whether there are several.
        """
        flash = self.config._attn_implementation == "flash_attention_2"
        routers = [layer.router for layer in self.moe_layers]
        mixing = [router for router in routers if not router.decides_alone]
        if (flash or mixing) and bool((position_ids.diff() != 1).any()):
            allowed = "sdpa or eager for blocks of several documents"
            require(not flash, "model.attention", "flash_attention_2", allowed)
            mixing[0].require_documents_apart()


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
