"""Give an imported model back as the plain model of transformers that it was, with the weights that it has now."""

from typing import Any, cast

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from moe.checks import ConfigError, require
from moe.config import dense_checkpoint, imported
from moe.foreign.rules import Rule, bias_of, matrix_of, rule_of
from moe.model.blocks import find_blocks
from moe.model.causal_lm import MoEForCausalLM
from moe.model.imported import ImportedModel
from moe.routers.imported import Imported


def is_own(model: MoEForCausalLM, target: str) -> bool:
    """Return whether `target` asks for the architecture from which the model was imported."""
    source = model.config.imported
    if source is None or source["model_type"] in dense_checkpoint.KINDS:
        return False
    return target in ("auto", source["model_type"])


def restore(model: MoEForCausalLM) -> PreTrainedModel:
    """Return an imported model as a model of its own architecture, in evaluation mode.

    A router of ours that took the place of the model's own one gives its matrix and bias. The keys of the configuration
    for k, for weights that sum to 1, for their factor and for groups become those of that router.

    Raises ConfigError for a router that has no such rule.
    """
    source = imported.parse(model.config.imported or {}, "config.json.imported")
    kind = source.model_type
    own = isinstance(model.moe_layers[0].router, Imported)
    if not own:
        _follow(source, _rule(model, kind))
    with torch.random.fork_rng(devices=[]):  # the model draws initial weights, which are replaced
        found: Any = AutoModelForCausalLM.from_config(source, dtype=torch.float32)
    weights: dict[str, Any] = cast(ImportedModel, model.model).plain_weights()
    if not own:
        for block, layer in zip(find_blocks(found), model.moe_layers, strict=True):
            for name in block.module.get_submodule(str(block.gate)).state_dict():
                given = bias_of(layer.router) if name == "e_score_correction_bias" else matrix_of(layer.router)
                require(given is not None, "router", type(layer.router).__name__, f"one with the {name} of {kind}")
                weights[f"{block.name}.{block.gate}.{name}"] = given
    found.load_state_dict(weights, strict=True)
    return cast(PreTrainedModel, found.eval())


def _rule(model: MoEForCausalLM, kind: str) -> Rule:
    """Return the rule of the model's routers. Raises ConfigError if the architecture cannot follow it."""
    router = model.moe_layers[0].router
    rule = rule_of(router, temperature=model.config.router_temperature)
    scores = "sigmoid" if kind in imported.SIGMOID else "softmax" if kind in imported.SOFTMAX else None
    fits = rule is not None and rule.scores == scores and rule.weights != "equal" and rule.temperature == 1
    named = f"router={type(router).__name__}"
    if rule is None or not fits:
        said = "what it does in evaluation is no rule of transformers" if rule is None else rule.describe()
        raise ConfigError(f"{named}: {kind} does not follow its rule ({said})")
    if scores == "softmax":
        normalized = imported.SOFTMAX[kind]
        plain = not rule.biased and rule.groups == 1 and rule.factor == 1
        if not plain or (isinstance(normalized, bool) and normalized != (rule.weights == "normalized")):
            raise ConfigError(f"{named}: {kind} does not follow its rule ({rule.describe()})")
    return rule


def _follow(config: Any, rule: Rule) -> None:
    """Set the keys of a configuration that say how its router decides."""
    for name in imported.PER_TOKEN:
        if getattr(config, name, None) is not None:
            setattr(config, name, rule.k)
            break
    if getattr(config, "norm_topk_prob", None) is not None:
        config.norm_topk_prob = rule.weights == "normalized"
    if rule.scores == "sigmoid":
        config.routed_scaling_factor = rule.factor
        config.n_group, config.topk_group = rule.groups, rule.top_groups
