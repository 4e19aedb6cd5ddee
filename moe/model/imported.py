"""Models of the transformers library whose MoE blocks run our MoE layer.

Everything else of such a model (attention, norms, shared experts, scaling) stays the code of transformers. In all its
Mixtures of Experts, a block asks its router and then calls `experts(hidden_states, index, weights)`. Our layer takes
the place of that call. So losses, metrics, capacity and interventions work for each of them as for our decoder.

In a dense model that is upcycled, our layer takes the place of each MLP.
"""

import inspect
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    Cache,
    DynamicCache,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.integrations.moe import _default_apply_gate
from transformers.utils.logging import disable_progress_bar

from moe.checks import ConfigError, first_line
from moe.config import dense_checkpoint, imported
from moe.config.schema import ModelConfig
from moe.model.architecture import MoEConfig
from moe.model.decoder import make_layer, neftune_noise
from moe.model.experts import Experts
from moe.model.layer import LayerOutput, MoELayer
from moe.model.routed import CACHE, Attended, RoutedModel, Seen, build_router
from moe.routers.base import LinearRouter, Router
from moe.routers.imported import Imported
from moe.routing.decision import Context, Routing

CLOSE = 1e-3  # how far a router's weights may be from the probabilities that are tried, relative to the largest


class Block(NamedTuple):
    """A Mixture-of-Experts block of a transformers model.

    name: in the model. module: the block. gate: the name of its router in the block, or None if none was found.
    """

    name: str
    module: nn.Module
    gate: str | None

    @property
    def experts(self) -> nn.Module:
        return self.module.experts  # type: ignore[return-value]


def find_blocks(model: nn.Module) -> list[Block]:
    """Return the MoE blocks of a model, in the order in which they run.

    A block is a module with a part `experts` that is called with hidden states, the experts of each token and their
    weights. Its router is the other part that has a matrix or vector with an entry for each expert.
    """
    found = []
    for name, module in model.named_modules():
        experts = getattr(module, "experts", None)
        if isinstance(experts, nn.Module) and _takes_decision(experts):
            number = count_experts(experts)
            gates = [part for part, child in module.named_children() if part != "experts" and _has_rows(child, number)]
            found.append(Block(name, module, gates[0] if gates else None))
    return found


def find_dense(model: nn.Module) -> list[nn.Module]:
    """Return the decoder layers of a dense model, in their order.

    Their part `mlp` computes down(act(gate x) * up x).
    """
    parts = {"gate_proj", "up_proj", "down_proj"}
    mlps = {module: getattr(module, "mlp", None) for module in model.modules()}
    return [module for module, mlp in mlps.items() if isinstance(mlp, nn.Module) and parts <= {*mlp._modules}]


def find_routed(model: nn.Module) -> list[nn.Module]:
    """Return the blocks of an imported model whose own router decides."""
    parents = [module for module in model.modules() if isinstance(getattr(module, "experts", None), RoutedExperts)]
    return [module for module in parents if isinstance(module.experts.layer.router, Imported)]  # type: ignore[union-attr]


def count_experts(experts: nn.Module) -> int:
    """Return the number of experts of a part `experts`."""
    number = getattr(experts, "num_experts", None)
    if isinstance(number, int):
        return number
    stacks = {len(p) for p in experts.parameters() if p.ndim == 3}
    if len(stacks) != 1:
        raise ConfigError(f"{type(experts).__name__}: its number of experts is unknown")
    return stacks.pop()


def _takes_decision(experts: nn.Module) -> bool:
    if type(experts).forward is nn.Module.forward or isinstance(experts, nn.ModuleList | nn.ModuleDict):
        return False
    return len(inspect.signature(type(experts).forward).parameters) == 4  # self, hidden states, index, weights


def _has_rows(part: nn.Module, number: int) -> bool:
    return any(p.ndim in (1, 2) and len(p) == number for p in part.parameters())


class OwnExperts(Experts):
    """The experts of an imported model, which the code of transformers runs."""

    def __init__(self, module: nn.Module) -> None:
        nn.Module.__init__(self)
        self.module = module
        self.number = count_experts(module)

    def kernel(self, dtype: torch.dtype) -> str:
        """Return the name of what multiplies the matrices."""
        return "transformers"

    @torch.compiler.disable
    def forward(self, x: Float[Tensor, "R D"], counts: Int[Tensor, "E"]) -> Float[Tensor, "R D"]:
        """Return the outputs for rows that are sorted by expert, `counts` rows for each expert."""
        if not len(x):
            return x
        index = torch.arange(self.number, device=x.device).repeat_interleave(counts.to(x.device))[:, None]
        outputs: Tensor = self.module(x, index, torch.ones_like(index, dtype=x.dtype))
        return outputs.view_as(x)

    def initialize(self, std: float, names: dict[Tensor, str]) -> None:
        """Do nothing: transformers initializes the module."""


class OwnSwiGLU(OwnExperts):
    """The experts of an imported model whose form is the `swiglu` of `Experts`, which runs them.

    The gradient of the code of transformers would take E times as long: for each expert one of the size of all.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.dropout = 0.0

    def kernel(self, dtype: torch.dtype) -> str:
        return Experts.kernel(self, dtype)

    def forward(self, x: Float[Tensor, "R D"], counts: Int[Tensor, "E"]) -> Float[Tensor, "R D"]:
        return Experts.forward(self, x, counts)

    def stacks(self) -> tuple[Tensor | None, Tensor, Tensor]:
        gate, up = self.module.gate_up_proj.chunk(2, dim=1)  # type: ignore[operator]
        return gate, up, self.module.down_proj  # type: ignore[return-value]

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """Return whether a part `experts` computes down(silu(gate x) * up x), with weights stacked as (E, out, in)."""
        if [name for name, _ in module.named_parameters()] != ["gate_up_proj", "down_proj"]:
            return False
        names = ("has_gate", "is_concatenated", "has_bias", "is_transposed")
        stacked = [getattr(module, name, None) for name in names] == [True, True, False, False]
        silu = type(module.act_fn).__name__ in ("SiLU", "SiLUActivation")
        gated = getattr(type(module), "_apply_gate", None) is _default_apply_gate
        offloaded = hasattr(module, "_hf_hook")  # its weights come to the device when transformers calls it
        return stacked and silu and gated and not offloaded


@dataclass
class Pass:
    """One pass through a model. Blocks pass on nothing but hidden states, so their layers find everything else here.

    contexts: what each MoE layer gets. The first entries are there from the start, the `state` of a later layer when
        the one before it has run. outputs: what the layers have returned, None once the model has read them. A layer
        that runs again after that, for its gradient, gets the same context.
    """

    contexts: list[Context]
    outputs: list[LayerOutput] | None

    def context(self, number: int) -> Context:
        """Return what layer `number` gets."""
        context = self.contexts[number]
        if self.outputs:
            context = context._replace(state=self.outputs[-1].routing[-1].state)
            self.contexts[number] = context
        return context


class RoutedExperts(nn.Module):
    """Our MoE layer, called as the `experts` of an imported block, or as the `mlp` of a layer that was dense.

    number: of the layer, from 0. scores: what the block's router has just returned for all experts. replaced: the
    weights of that router, if another one has taken its place, until they are adopted.
    """

    running: Pass

    def __init__(self, layer: MoELayer, number: int) -> None:
        super().__init__()
        self.layer = layer
        self.number = number
        self.scores: Tensor | None = None
        self.replaced: dict[str, Tensor] = {}

    @torch.no_grad()
    def adopt(self) -> None:
        """Give a linear router of ours the matrix of the router that it replaced, and the bias of its selection."""
        router, before = self.layer.router, self.replaced
        self.replaced = {}
        if isinstance(router, LinearRouter):
            matrix = next((tensor for tensor in before.values() if tensor.shape == router.weight.shape), None)
            if matrix is not None:
                router.weight.copy_(matrix)
        bias = before.get("e_score_correction_bias")
        if bias is not None and "bias" in router.state_dict():
            router.get_buffer("bias").copy_(bias)

    def forward(
        self, hidden_states: Float[Tensor, "*B D"], index: Tensor | None = None, weights: Tensor | None = None
    ) -> Float[Tensor, "*B D"]:
        context = self.running.context(self.number)
        if index is not None and weights is not None:
            context = context._replace(given=self._given(index, weights, context))
        x = hidden_states.reshape(*context.ids.shape, hidden_states.shape[-1])
        output = self.layer(x, context)
        if self.running.outputs is not None:
            self.running.outputs.append(output)
        return output.y.view_as(hidden_states).to(hidden_states.dtype)

    def _given(self, index: Int[Tensor, "N K"], weights: Float[Tensor, "N K"], context: Context) -> Routing:
        """Return the decision of the block's own router, without padding."""
        index, weights = (context.routed(each.reshape(-1, each.shape[-1])) for each in (index, weights))
        index, weights, probs = index.long(), weights.float(), None
        scores, self.scores = self.scores, None
        if scores is not None:
            scores = context.routed(scores.reshape(-1, scores.shape[-1])).float()
            probs = probabilities(scores, index, weights)
        return Routing.token_choice(index, weights, logits=scores, probs=probs)

    def keep_scores(self, gate: nn.Module, inputs: Any, outputs: Any) -> None:
        """Keep the scores of all experts that the block's router returns. A forward hook of that router."""
        number = self.layer.router.num_experts
        tensors = outputs if isinstance(outputs, tuple) else (outputs,)
        fits = [t for t in tensors if isinstance(t, Tensor) and t.is_floating_point() and t.shape[-1] == number]
        self.scores = fits[0] if fits else None


class Elsewhere(nn.Module):
    """Takes the place of a block's router when one of ours decides. Returns no scores, no weights and no experts."""

    def forward(self, *_: Any) -> tuple[None, None, None]:
        return None, None, None


def probabilities(
    scores: Float[Tensor, "T E"], index: Int[Tensor, "T K"], weights: Float[Tensor, "T K"]
) -> Float[Tensor, "T E"]:
    """Return the distribution over experts from which a router took `weights`.

    These are the first of these whose entries at `index` are in the proportions of `weights`: the scores themselves if
    they sum to 1, their softmax, their sigmoid divided by its sum over experts. If none fits (weights after a bias or
    a clamp, say), it is the softmax.
    """
    tried = [scores.softmax(-1), scores.sigmoid() / scores.sigmoid().sum(-1, keepdim=True)]
    if bool((scores >= 0).all()) and torch.allclose(scores.sum(-1), scores.new_ones(()), atol=CLOSE):
        tried.insert(0, scores)
    shares = weights.detach() / weights.detach().sum(-1, keepdim=True)
    for candidate in tried:
        taken = candidate.detach().gather(-1, index.long())
        if torch.allclose(taken / taken.sum(-1, keepdim=True), shares, atol=CLOSE):
            return candidate
    return tried[-2]


class ImportedModel(RoutedModel):
    """A causal language model of transformers whose MoE blocks run `MoELayer`, or whose MLPs are replaced by it.

    causal_lm: the model to use, such as a loaded one; it is changed. None: one with random weights.

    With the router `Imported`, the blocks keep their own routers. Another router replaces them.
    """

    def __init__(self, config: MoEConfig, *, trusted: bool = False, causal_lm: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        if causal_lm is None:
            foreign = imported.parse(config.imported or {}, "imported")
            chosen = implementations(foreign, config._attn_implementation)
            try:
                causal_lm = AutoModelForCausalLM.from_config(foreign, dtype=torch.get_default_dtype(), **chosen)
            except Exception as error:  # whatever a wrong value makes a library raise
                reason = first_line(error)
                raise ConfigError(f"the config.json of a {foreign.model_type} describes no model ({reason})") from error
        self.causal_lm = causal_lm
        if imported.is_dense(causal_lm.config):
            layers = find_dense(causal_lm)[config.first_k_dense_replace :]
            routed = [RoutedExperts(make_layer(config, trusted=trusted), number) for number in range(len(layers))]
            for layer, each in zip(layers, routed, strict=True):
                layer.mlp = each
        else:
            blocks = [(block, build_router(config, trusted=trusted)) for block in find_blocks(causal_lm)]
            routed = [_take_place(block, router, number) for number, (block, router) in enumerate(blocks)]
        self._routed = tuple(routed)  # a tuple, because the blocks have these modules already
        self._tie_routers()
        self.post_init()  # which leaves our routers out, because they are in a model of transformers
        names = {tensor: name for name, tensor in [*self.named_parameters(), *self.named_buffers()]}
        for each in routed:
            for module in each.layer.modules():
                if isinstance(module, Experts):
                    module.initialize(config.initializer_range, names)
            each.layer.router.initialize(config.initializer_range, names)
            each.adopt()

    @property
    def gradient_checkpointing(self) -> bool:
        return any(getattr(module, "gradient_checkpointing", False) for module in self.causal_lm.modules())

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, enable: bool) -> None:
        self.causal_lm._set_gradient_checkpointing(enable, self._gradient_checkpointing_func)

    @property
    def moe_layers(self) -> list[MoELayer]:
        return [routed.layer for routed in self._routed]

    def get_input_embeddings(self) -> nn.Module:
        return self.causal_lm.get_input_embeddings()

    def _cache(self, given: Cache | None, *, use_cache: bool) -> Cache | None:
        """Return the cache that is given, unless it is empty: layers of other kinds than attention make their own."""
        empty = type(given) is DynamicCache and given.get_seq_length() == 0
        return super()._cache(None if empty else given, use_cache=False)

    def _run(
        self,
        inputs: Int[Tensor, "B S"] | Float[Tensor, "B S D"],
        context: Context,
        load: Shaped[Tensor, "L C E"] | None,
        attended: Attended,
        *,
        keep_states: bool,
        keep_attentions: bool,
        logits_to_keep: int | Int[Tensor, "N"],
    ) -> Seen:
        layers = range(len(self._routed))
        contexts = [context if load is None else context._replace(load=load[number]) for number in layers]
        outputs: list[LayerOutput] = []
        running = Pass(contexts, outputs)
        for routed in self._routed:
            routed.running = running
        alpha = self.config.neftune_noise_alpha if self.training else 0.0
        if alpha and not inputs.is_floating_point():
            inputs = self.get_input_embeddings()(inputs)
        if alpha:
            inputs = inputs + neftune_noise(inputs, alpha)
        result = self.causal_lm(
            **{"inputs_embeds" if inputs.is_floating_point() else "input_ids": inputs},
            attention_mask=attended.mask,
            position_ids=attended.position_ids,
            use_cache=attended.use_cache,
            output_hidden_states=keep_states,
            output_attentions=keep_attentions,
            logits_to_keep=logits_to_keep,
            return_dict=True,
            **{CACHE: attended.cache},
        )
        running.outputs = None
        *states, last = result.hidden_states if keep_states else (None,)
        return Seen(last, states, list(result.attentions or ()), outputs, result.logits, result.get(CACHE))


def _take_place(block: Block, router: Router, number: int) -> RoutedExperts:
    """Let our layer run the experts of a block, with the block's own router or with this one."""
    own = OwnSwiGLU(block.experts) if OwnSwiGLU.fits(block.experts) else OwnExperts(block.experts)
    routed = RoutedExperts(MoELayer(router, own), number)
    block.module.experts = routed
    if isinstance(router, Imported):
        if block.gate is not None:
            block.module.get_submodule(block.gate).register_forward_hook(routed.keep_scores)
        return routed
    if block.gate is None or hasattr(block.module, "route_tokens_to_experts"):  # the block itself reads the scores
        raise ConfigError(f"router: the router of {type(block.module).__name__} cannot be replaced; leave router out")
    routed.replaced = block.module.get_submodule(block.gate).state_dict()
    block.module.register_module(block.gate, Elsewhere())
    return routed


def implementations(source: PretrainedConfig, attention: str | None) -> dict[str, Any]:
    """Return the arguments that choose the implementations of a model's attention and experts.

    Where a model has no `sdpa`, it gets `eager`, which computes the same.
    """
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(source)]
    missing = attention == "sdpa" and not kind._supports_sdpa
    return {"attn_implementation": "eager" if missing else attention, "experts_implementation": "eager"}


def read_checkpoint(settings: ModelConfig) -> PreTrainedModel:
    """Return the model of `settings.checkpoint` with its weights in fp32.

    Only safetensors are read, and no code of the checkpoint's folder runs. Raises ValueError if it cannot be read or
    lacks weights.
    """
    assert settings.checkpoint is not None
    name = settings.checkpoint
    disable_progress_bar()
    source = imported.read(name, settings.checkpoint_digest)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name,
            config=source,
            revision=dense_checkpoint.revision(name, settings.checkpoint_digest),
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            **implementations(source, settings.attention),
            output_loading_info=True,
        )
    except Exception as error:  # whatever a wrong file makes a library raise
        raise ValueError(f"model.checkpoint={name}: cannot be read ({first_line(error)})") from error
    model, info = loaded
    wrong = {"missing_keys": "has no weights for", "mismatched_keys": "has weights of other shapes for"}
    wrong["unexpected_keys"] = "has weights that its config.json does not describe:"
    for key, what in wrong.items():
        if info[key]:
            raise ValueError(f"model.checkpoint={name}: {what} {', '.join(sorted(map(str, info[key]))[:5])}")
    return model
