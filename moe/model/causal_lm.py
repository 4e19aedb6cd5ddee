"""The language model with its output matrix: loss, generation, and saved models as transformers loads them."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, Cache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils.hub import cached_file
from transformers.utils.logging import disable_progress_bar

from moe.checks import ConfigError, first_line, require
from moe.config.classes import build
from moe.config.options import use
from moe.data.labels import IGNORED, next_token
from moe.files import Find, require_files, require_no_adapter, tensor_shapes
from moe.model.architecture import MoEConfig
from moe.model.decoder import MoEModel
from moe.model.experts import Experts
from moe.model.imported import ImportedModel
from moe.model.layer import LayerOutput, MoELayer
from moe.model.routed import CACHE, MoEPreTrainedModel, RoutedModel
from moe.model.vocabulary_loss import cross_entropy, linear_cross_entropy
from moe.routing.decision import Knobs, Routing
from moe.routing.stats import RoutingStats, stack_padded


@dataclass
class MoEOutput(CausalLMOutputWithPast):
    """transformers' output plus the results of routing.

    loss: cross-entropy in nats. If router logits are asked for, plus `router_aux_loss_coef` times `aux_loss`.
    aux_loss: mean over layers of `aux["load_balance"]`; None unless router logits are asked for.
    router_logits: as in `MoEModelOutput`. None unless asked for.
    aux: {name: (L)} unweighted auxiliary losses of each MoE layer, 0 if its router lacks one that another router has.
        None without MoE layers.
    stats: sums for metrics, of all layers: `RoutingStats.stack`. None without MoE layers.
    routing: for each MoE layer the decision of each router of its chain. None without MoE layers.
    load: (L, C, E) the load of each router of the chain of each MoE layer, 0 for experts that a layer lacks. None
        without MoE layers.
    beside: the fields aux, stats, routing and load of the layers that an adapter has put beside the MoE layers. None if
        there are none.
    """

    __no_type_check__ = True  # accelerate builds it from a dict that transformers unpacks

    aux_loss: Tensor | None = None
    router_logits: tuple[Tensor, ...] | None = None
    aux: dict[str, Tensor] | None = None
    stats: RoutingStats | None = None
    routing: list[tuple[Routing, ...]] | None = None
    load: Tensor | None = None
    beside: dict[str, Any] | None = None


class MoEForCausalLM(MoEPreTrainedModel, GenerationMixin):
    """`MoEModel` plus output matrix. `save_pretrained`, `from_pretrained` and `generate` are those of transformers.

    trusted: the router may be a class outside of this project (`moe.config.classes.locate`), also one in a folder that
        MOE_SEARCH_PATH names. A saved model that somebody else wrote must not be trusted, because
        `from_pretrained(folder, trust_remote_code=True)` runs the code that it names.
    """

    lm_head: nn.Linear
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    accepts_loss_kwargs = True  # for transformers' Trainer: `forward` takes num_items_in_batch

    def __init__(self, config: MoEConfig, *, trusted: bool = False, causal_lm: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        if config.imported is None:
            self.model: RoutedModel = MoEModel(config, trusted=trusted)
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        else:
            self.model = ImportedModel(config, trusted=trusted, causal_lm=causal_lm)
            self._tied_weights_keys = {}  # those of the imported model count
        self.adapter: Any = None
        self.adapter_names: frozenset[str] = frozenset()
        if config.adapter is not None:
            self.attach(build(config.adapter, "adapter", trusted=trusted), config.adapter, trusted=trusted)
        self.post_init()

    def attach(self, adapter: Any, spec: dict[str, Any], *, trusted: bool) -> None:
        """Add an adapter (`moe.adapters.base.Adapter`), and note the names of its parameters in `adapter_names`.

        spec: its class and its settings. If the adapter stays in saved models, it becomes a part of the configuration.
        """
        known = {*self.parameters()}
        adapter.attach(self, trusted=trusted)
        self.adapter = adapter
        self.adapter_names = frozenset(name for name, p in self.named_parameters() if p not in known)
        self.config.adapter = spec if adapter.stays else None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any) -> Any:
        """Return the saved model as transformers loads it, if its config.json fits the shapes of its weights.

        The file may be a stranger's. So its sizes are compared before memory is allocated for them. Only safetensors
        are read. Raises ConfigError.

        The weights are copied to memory of their own. A file that is mapped into memory has them at addresses that no
        allocator would choose, and some processors then add in another order: the loaded model would differ in its last
        bits from the model that was saved.

        trust_remote_code: trust the saved model, see the class; `trusted=True` means the same.
        """
        name = pretrained_model_name_or_path
        trusted = kwargs.pop("trusted", False) or kwargs.get("trust_remote_code") is True
        if trusted:
            use()
        source = {key: kwargs[key] for key in HUB_OPTIONS if key in kwargs}
        config = kwargs.get("config")
        if not isinstance(config, MoEConfig):
            config = MoEConfig.from_pretrained(name if config is None else config, **source)
        check_weights(config, str(name), file_finder(name, source), trusted=trusted)
        loaded = super().from_pretrained(name, *model_args, trusted=trusted, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.device.type == "cpu":
                tensor.data = tensor.data.clone()
        return loaded

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Write the model as transformers does, with the names that its weights have here.

        By default transformers renames the weights of some architectures, also those of an imported model.
        """
        super().save_pretrained(*args, **{"save_original_format": False, **kwargs})

    @property
    def decoder(self) -> Any:
        """Our decoder. Raises ConfigError for an imported model, which has the layers of transformers."""
        allowed = "our decoder; an imported model has the layers of transformers"
        require(isinstance(self.model, MoEModel), "model", type(self.model).__name__, allowed)
        return self.model

    @property
    def moe_layers(self) -> list[MoELayer]:
        """The MoE layers, in the order in which `aux` and `stats` stack them."""
        return self.model.moe_layers

    @property
    def beside_layers(self) -> list[MoELayer]:
        """The MoE layers that an adapter has put beside those of the model."""
        return [layer.beside for layer in self.moe_layers if isinstance(layer.beside, MoELayer)]

    def experts_kernel(self, dtype: torch.dtype) -> str | None:
        """Return the kernel of the routed experts in `dtype`, see `moe.model.experts.choose_kernel`.

        None without MoE layers.
        """
        found = [module for layer in self.moe_layers for module in layer.modules() if isinstance(module, Experts)]
        return found[0].kernel(dtype) if found else None

    def loss_kernel(self) -> str:
        """Return how `loss_only` computes the loss.

        chunks: with `linear_cross_entropy`. docs/benchmarks.md has the measurements.
        whole: from all logits at once. Imported models make them themselves, and an adapter may change the output
            matrix.
        """
        plain = self.config.imported is None and type(self.lm_head) is nn.Linear
        return "chunks" if plain else "whole"

    def forward(
        self,
        input_ids: Int[Tensor, "B S"] | None = None,
        labels: Int[Tensor, "B S"] | None = None,
        *,
        knobs: Knobs | None = None,
        capacity: float | None = None,
        drop: str = "position",
        told: Int[Tensor, "B 2"] | None = None,
        load: Shaped[Tensor, "L C E"] | None = None,
        costly: frozenset[str] = frozenset(),
        compared: Int[Tensor, " N"] | None = None,
        loss_only: bool = False,
        attention_mask: Tensor | None = None,
        position_ids: Int[Tensor, "#B S"] | None = None,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        inputs_embeds: Float[Tensor, "B S D"] | None = None,
        logits_to_keep: int | Int[Tensor, " N"] = 0,
        num_items_in_batch: int | Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        output_router_logits: bool | None = None,
        return_dict: bool | None = None,
    ) -> MoEOutput | tuple[Any, ...]:
        """Return logits, loss, auxiliary losses, sums for metrics and routing decisions.

        labels: token ids, not shifted, with IGNORED where nothing is predicted. None: no loss.
        knobs: default to the temperature and noise of the model's configuration.
        capacity, drop, told, costly, compared: see `moe.routing.decision.Context`.
        loss_only: return no logits where the loss can do without them, see `loss_kernel`.
        load: as in `Context`, for each MoE layer. It is the sum of `MoEOutput.load` over earlier micro-batches.
        attention_mask: (B, S), or (B, tokens in the cache + S), 0 for padding. Padding is no token: it is not attended
            to and not routed, takes no capacity, and counts in no loss and no metric.
        position_ids: where they do not increase by 1, a new document begins. A document does not attend to the
            documents before it. (Only without cache and attention_mask. transformers makes the mask.)

        The other arguments are those of transformers' models:

        past_key_values: the name of `cache` in transformers before 5.24. Caches of a fixed size are refused, because
            `generate` gives them a mask of 4 dimensions, which does not tell what is padding.
        use_cache: whether to return the cache. Default: if one was given.
        inputs_embeds: vectors to use instead of the embeddings of `input_ids`.
        logits_to_keep: compute logits for this many last positions only, or for the positions in a tensor. 0: for all.
            All are needed for a loss.
        num_items_in_batch: the number of labels in all micro-batches of a step, without the first label of each row, as
            transformers' Trainer counts them. The losses of these micro-batches add up to a mean over the step, in
            which each has its share of that number. (The Trainer also counts the first token after padding on the left,
            which nothing predicts, and a micro-batch does not see the others. So with several micro-batches padded on
            the left, their shares are not exactly in proportion to their labels. Logits, and the loss of each
            micro-batch by itself, are exact. Padded on the right, the mean is exactly the one over all labels.)
        output_hidden_states: return the input of each layer, and the output of the final norm.
        output_attentions: return the attention weights of each layer. Needs attn_implementation="eager".
        output_router_logits: return `MoEOutput.router_logits` and `MoEOutput.aux_loss`, and add the latter to the loss
            with the weight `router_aux_loss_coef` of the configuration, which is 0 unless it is set.
        return_dict: False: return a tuple of the fields that are not None.

        Raises ConfigError for a value that this model cannot use.
        """
        if labels is not None and (not isinstance(logits_to_keep, int) or logits_to_keep):
            raise ConfigError("logits_to_keep: must be 0 with labels, because the loss needs all logits")
        in_chunks = loss_only and labels is not None and self.loss_kernel() == "chunks"
        hidden = self.model(
            input_ids,
            knobs=knobs,
            capacity=capacity,
            drop=drop,
            told=told,
            load=load,
            costly=costly,
            compared=compared,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            past_key_values=past_key_values,
            use_cache=use_cache,
            inputs_embeds=inputs_embeds,
            logits_to_keep=logits_to_keep,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            output_router_logits=output_router_logits,
            return_dict=True,
        )
        logits = hidden.logits
        if logits is None and not in_chunks:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden.last_hidden_state[:, kept])
        routed = _routing_fields(hidden.layers or [])
        if hidden.router_logits and "load_balance" in routed["aux"]:  # dense models have none
            routed["aux_loss"] = routed["aux"]["load_balance"].mean()
        loss = None
        if labels is not None:
            targets = _targets(labels, attention_mask)
            if in_chunks:
                loss = linear_cross_entropy(hidden.last_hidden_state, self.lm_head.weight, targets)
            else:
                loss = cross_entropy(logits, targets)
            # Counted losses are 0 without labels, instead of nan, because their share below is 0.
            labeled = targets.ne(IGNORED).sum()
            loss = loss / (labeled if num_items_in_batch is None else labeled.clamp(min=1))
            if "aux_loss" in routed:
                loss = loss + self.config.router_aux_loss_coef * routed["aux_loss"]
            if num_items_in_batch is not None:
                loss = loss * labels[:, 1:].ne(IGNORED).sum() / num_items_in_batch
        names = (CACHE, "hidden_states", "attentions", "router_logits")
        output = MoEOutput(loss, logits, **{name: hidden.get(name) for name in names}, **routed)
        as_object = self.config.return_dict if return_dict is None else return_dict
        return output if as_object else output.to_tuple()


def _targets(labels: Int[Tensor, "B S"], attention_mask: Tensor | None) -> Int[Tensor, "B S"]:
    """Return what each position has to predict. Padding predicts nothing and is not predicted.

    attention_mask: as in `MoEForCausalLM.forward`, where its shape was checked.
    """
    if attention_mask is None:
        return next_token(labels)
    padding = attention_mask[:, -labels.shape[1] :] == 0
    return next_token(labels.masked_fill(padding, IGNORED)).masked_fill(padding, IGNORED)


def _routing_fields(layers: list[LayerOutput]) -> dict[str, Any]:
    """Return the fields of `MoEOutput` that join the outputs of MoE layers. Empty if there are none."""
    if not layers:
        return {}
    names, zero = dict.fromkeys(name for layer in layers for name in layer.aux), layers[0].y.new_zeros(())
    beside = _routing_fields([layer.beside for layer in layers if layer.beside is not None])
    return {
        "aux": {name: torch.stack([layer.aux.get(name, zero) for layer in layers]) for name in names},
        "stats": RoutingStats.stack([layer.stats for layer in layers]),
        "routing": [layer.routing for layer in layers],
        "load": stack_padded([layer.load for layer in layers]),
    } | ({"beside": beside} if beside else {})


ROUTER = ".router."  # in the names of the weights of our routers

# The arguments of `from_pretrained` that say where its files are.
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


def file_finder(name: Any, source: dict[str, Any]) -> Find:
    """Return a function that finds a file of a saved model, in a folder or on the hub; None if there is none.

    source: the `HUB_OPTIONS` that are given.
    """

    def find(file: str) -> Path | None:
        try:
            path = cached_file(name, file, **source)
            return None if path is None else Path(path)
        except OSError:  # there is no such file
            return None

    return find


def check_weights(config: MoEConfig, name: str, find: Find, *, trusted: bool, any_router: bool = False) -> None:
    """Raise ConfigError unless a saved model has the weights of its `config`, with the same shapes.

    name: of the saved model, for messages. find: finds its files. any_router: the weights of routers
    may be others.

    The model is built without memory. A layer has at least 6 tensors: two norms and four matrices of the attention.
    """
    try:
        stored = tensor_shapes(find)
    except ValueError as error:
        raise ConfigError(f"{name}: {error}") from error
    most = len(stored) // 6
    require(
        config.num_hidden_layers <= most,
        f"num_hidden_layers in config.json of {name}",
        config.num_hidden_layers,
        f"at most {most}, because the weights are {len(stored)} tensors",
    )
    config = copy.deepcopy(config)
    config._attn_implementation = "eager"  # the one that needs no other package; all have the same weights
    try:
        with torch.device("meta"):
            tensors = MoEForCausalLM(config, trusted=trusted).state_dict(keep_vars=True)
    except ConfigError:
        raise
    except Exception as error:  # whatever a size that does not fit makes a library raise
        raise ConfigError(f"{name}: config.json describes no model ({first_line(error)})") from error
    if any_router:
        stored, tensors = ({k: v for k, v in each.items() if ROUTER not in k} for each in (stored, tensors))
    names: dict[int, list[str]] = {}  # the names of each tensor, which is stored once
    for key, tensor in tensors.items():
        names.setdefault(id(tensor), []).append(key)
    unexpected = sorted(stored.keys() - tensors.keys())
    missing = [keys[0] for keys in names.values() if not any(key in stored for key in keys)]
    if wrong := missing + unexpected:
        raise ConfigError(f"{name}: its weights are not those of its config.json: {', '.join(wrong[:5])}")
    for key, shape in stored.items():
        if shape != (described := tuple(tensors[key].shape)):
            raise ConfigError(f"{name}: config.json describes {key} as {described}, but in the weights it is {shape}")


def load_model(folder: Path, *, trusted: bool = False) -> MoEForCausalLM:
    """Return the saved model in `folder`, in evaluation mode. `trusted`: as in `MoEForCausalLM`.

    Only safetensors are read. Raises ValueError, with one line that names the folder, for files that are missing, torn
    or wrong.
    """
    disable_progress_bar()  # transformers would show one while it reads a single small file
    try:
        require_files(folder)
        require_no_adapter(folder)
        model = MoEForCausalLM.from_pretrained(folder, trusted=trusted, use_safetensors=True, local_files_only=True)
    except Exception as error:  # whatever a wrong file makes a library raise
        raise ValueError(f"{folder}: cannot be read as a saved model ({first_line(error)})") from error
    return cast(MoEForCausalLM, model.eval())


AutoConfig.register("moe_routing", MoEConfig)
AutoModel.register(MoEConfig, MoEModel)
AutoModelForCausalLM.register(MoEConfig, MoEForCausalLM)
# transformers' Trainer smooths labels itself. It shifts them only for names in this dict, which `register` leaves out.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[MoEConfig.model_type] = MoEForCausalLM.__name__
