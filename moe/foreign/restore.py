"""Give an imported model back as the plain model of transformers that it was, with the weights that it has now."""

from typing import Any, cast

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from moe.config.checkpoints import dense, imported, transformers_config
from moe.foreign.rules import Rule, bias_of, matrix_of, rule_of
from moe.foreign.targets import GATES, Target
from moe.model.blocks import find_blocks
from moe.model.causal_lm import MoEForCausalLM
from moe.model.imported import ImportedModel
from moe.routers.imported import Imported


def own_layout(model: MoEForCausalLM) -> Target | None:
    """Return the architecture from which a Mixture of Experts was imported, with the rules that its router follows.

    These are none if no router of ours decides as its own one. The result is None for a model that was not imported,
    and for a dense one that was upcycled.
    """
    kind = (model.config.imported or {}).get("model_type")
    if kind is None or kind in dense.KINDS:
        return None
    if kind in imported.SIGMOID:
        return Target(name=kind, scores=("sigmoid",), weights=GATES, biased=True, grouped=True)
    normalized = imported.SOFTMAX.get(kind)
    if normalized is None:
        return Target(name=kind, scores=(), weights=())
    always: Any = ("normalized",) if normalized else ("raw",)
    return Target(name=kind, scores=("softmax",), weights=GATES if isinstance(normalized, str) else always)


def can_restore(model: MoEForCausalLM, layout: Target) -> bool:
    """Return whether the model has its own router, or one whose rule its own one can follow."""
    router = model.moe_layers[0].router
    rule = rule_of(router, temperature=model.config.router_temperature)
    return isinstance(router, Imported) or (rule is not None and layout.follows(rule))


def restore(model: MoEForCausalLM) -> PreTrainedModel:
    """Return an imported model that `can_restore` as a model of its own architecture, in evaluation mode.

    A router of ours that took the place of the model's own one gives its matrix, divided by its temperature, and its
    bias. The keys of the configuration for k, for weights that sum to 1, for their factor and for groups become those
    of that router.
    """
    source = transformers_config.parse(model.config.imported or {}, "config.json.imported")
    router = model.moe_layers[0].router
    rule = None if isinstance(router, Imported) else rule_of(router, temperature=model.config.router_temperature)
    if rule is not None:
        _follow(source, rule)
    with torch.random.fork_rng(devices=[]):  # the model draws initial weights, which are replaced
        found: Any = AutoModelForCausalLM.from_config(source, dtype=torch.float32)
    weights: dict[str, Any] = cast(ImportedModel, model.model).plain_weights()
    if rule is not None:
        for block, layer in zip(find_blocks(found), model.moe_layers, strict=True):
            for name in block.module.get_submodule(str(block.gate)).state_dict():
                matrix, bias = matrix_of(layer.router), bias_of(layer.router)
                assert matrix is not None, "a router with a rule has a matrix"
                if name == "e_score_correction_bias":
                    given = matrix.new_zeros(len(matrix)) if bias is None else bias
                else:
                    given = matrix / rule.temperature
                weights[f"{block.name}.{block.gate}.{name}"] = given
    found.load_state_dict(weights, strict=True)
    return cast(PreTrainedModel, found.eval())


def _follow(config: Any, rule: Rule) -> None:
    """Set the keys of a configuration that say how its router decides."""
    for name in transformers_config.PER_TOKEN:
        if getattr(config, name, None) is not None:
            setattr(config, name, rule.k)
            break
    if getattr(config, "norm_topk_prob", None) is not None:
        config.norm_topk_prob = rule.weights == "normalized"
    if rule.scores == "sigmoid":
        config.routed_scaling_factor = rule.factor
        config.n_group, config.topk_group = rule.groups, rule.top_groups
