"""Models of the transformers library whose MoE blocks run our MoE layer.

Everything else of such a model (attention, norms, shared experts, scaling) stays the code of transformers. In all its
Mixtures of Experts, a block asks its router and then calls `experts(hidden_states, index, weights)`. Our layer takes
the place of that call. So losses, metrics, capacity and interventions work for each of them as for our decoder.

In a dense model that is upcycled, our layer takes the place of each MLP.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Cache, DynamicCache, PreTrainedModel

from moe.checks import ConfigError, first_line
from moe.config.checkpoints import dense, transformers_config
from moe.model.architecture import MoEConfig
from moe.model.blocks import Block, find_blocks, find_dense
from moe.model.decoder import make_layer
from moe.model.imported_checkpoint import attention_of
from moe.model.imported_experts import IMPLEMENTATION, ImportedExperts
from moe.model.layer import LayerOutput, MoELayer
from moe.model.routed import CACHE, Attended, RoutedModel, Seen, Wanted, build_router
from moe.routers.base import LinearRouter, Router
from moe.routers.imported import Imported
from moe.routers.seeding import Initializable
from moe.routing.decision import Context, Routing

# In the names of the weights of an imported model: the model of transformers, its experts, what transformers calls
# them, and routers of ours.
PREFIX = "model.causal_lm."
OURS, THEIRS, ROUTER = ".experts.layer.experts.module.", ".experts.", ".experts.layer.router."
CLOSE = 1e-3  # how far a router's weights may be from the probabilities that are tried, relative to the largest


def plain_name(name: str) -> str:
    """Return the name in transformers of a weight of an imported model, or of what peft has put around one."""
    return name.removeprefix(PREFIX).replace(OURS, THEIRS)


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

    number: of the layer, from 0. gate: the name of the block's router in the block, or None. scores: what that router
    has just returned for all experts. replaced: its weights, if another one has taken its place, until they are
    adopted.
    """

    running: Pass

    def __init__(self, layer: MoELayer, number: int, gate: str | None = None) -> None:
        super().__init__()
        self.layer = layer
        self.number = number
        self.gate = gate
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
            self.running.outputs.append(output.without_y())
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
            foreign = transformers_config.parse(config.imported or {}, "imported")
            attention = attention_of(foreign, config._attn_implementation)
            try:
                causal_lm = AutoModelForCausalLM.from_config(
                    foreign, dtype=torch.get_default_dtype(), attn_implementation=attention
                )
            except Exception as error:  # whatever a wrong value makes a library raise
                reason = first_line(error)
                raise ConfigError(f"the config.json of a {foreign.model_type} describes no model ({reason})") from error
        self.causal_lm = causal_lm
        causal_lm.set_experts_implementation(IMPLEMENTATION)
        blocks: list[Block] = []
        if dense.is_dense(causal_lm.config):
            layers = find_dense(causal_lm)[config.first_k_dense_replace :]
            routed = [
                RoutedExperts(make_layer(config, config.first_k_dense_replace + number, trusted=trusted), number)
                for number in range(len(layers))
            ]
            for layer, each in zip(layers, routed, strict=True):
                layer.mlp = each
        else:
            blocks = find_blocks(causal_lm)
            if not blocks:
                raise ConfigError(
                    f"model.checkpoint: this {causal_lm.config.model_type} has no block whose experts can run"
                )
            routers = [build_router(config, 0, trusted=trusted) for _ in blocks]
            routed = [_take_place(*each) for each in zip(blocks, routers, range(len(blocks)), strict=True)]
        self._routed = tuple(routed)  # tuples, because the model has these modules already
        self._blocks = tuple(block.module for block in blocks)
        self._tie_routers()
        self.post_init()  # which leaves our routers out, because they are in a model of transformers
        names = {tensor: name for name, tensor in [*self.named_parameters(), *self.named_buffers()]}
        for each in routed:
            for module in each.layer.modules():
                if isinstance(module, Initializable):
                    module.initialize(config.initializer_range, names)
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

    @property
    def deciding_blocks(self) -> list[nn.Module]:
        own = [isinstance(layer.router, Imported) for layer in self.moe_layers]
        return [block for block, decides in zip(self._blocks, own, strict=False) if decides]

    def plain_weights(self) -> dict[str, Tensor]:
        """Return the weights by their names in transformers, without those of routers of ours."""
        weights = self.causal_lm.state_dict()
        return {plain_name(name): tensor for name, tensor in weights.items() if ROUTER not in name}

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
        wanted: Wanted,
    ) -> Seen:
        layers = range(len(self._routed))
        contexts = [context if load is None else context._replace(load=load[number]) for number in layers]
        outputs: list[LayerOutput] = []
        running = Pass(contexts, outputs)
        for routed in self._routed:
            routed.running = running
        result = self.causal_lm(
            **{"inputs_embeds" if inputs.is_floating_point() else "input_ids": inputs},
            attention_mask=attended.mask,
            position_ids=attended.position_ids,
            use_cache=attended.use_cache,
            output_hidden_states=wanted.states,
            output_attentions=wanted.attentions,
            logits_to_keep=wanted.logits,
            return_dict=True,
            **{CACHE: attended.cache},
        )
        running.outputs = None
        *states, last = result.hidden_states if wanted.states else (None,)
        return Seen(last, states, list(result.attentions or ()), outputs, result.logits, result.get(CACHE))


def _take_place(block: Block, router: Router, number: int) -> RoutedExperts:
    """Let our layer run the experts of a block, with the block's own router or with this one."""
    routed = RoutedExperts(MoELayer(router, ImportedExperts(block.experts)), number, block.gate)
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
