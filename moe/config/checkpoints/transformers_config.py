"""The configuration of a model of the transformers library, read from the config.json of a stranger.

Only commands that use such a model import torch here, because every command line should be checked fast.
"""

from typing import TYPE_CHECKING, Any

from moe.checks import ConfigError, first_line, require
from moe.config.checkpoints import saved
from moe.config.checkpoints.files import WEIGHTS, check_numbers

if TYPE_CHECKING:  # importing transformers' configurations imports torch
    from transformers import PretrainedConfig

# The names of a number in the configurations of transformers.
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "moe_topk", "moe_k")
WIDTH = ("moe_intermediate_size", "ffn_hidden_size", "intermediate_size")

# Keys of a stranger's config.json that make transformers load code or another format of weights.
REFUSED = (
    *("auto_map", "quantization_config", "compression_config"),
    *("attn_implementation", "_attn_implementation", "experts_implementation", WEIGHTS),
)


def parse(content: dict[str, Any], where: str) -> "PretrainedConfig":
    """Return the configuration of transformers with this content. `where` it comes from is for messages.

    It may be a stranger's. Raises ConfigError unless it is one of a causal language model, and if it would load code.
    """
    from transformers import AutoConfig, PretrainedConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind = content.get("model_type")
    known = isinstance(kind, str) and kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and kind != saved.KIND
    allowed = "that of a causal language model of the transformers library"
    require(known, f"model_type in {where}", kind, allowed)
    for key in REFUSED:
        require(content.get(key) in (None, "eager", "sdpa"), f"{key} in {where}", content.get(key), "left out")
    check_numbers(content, where)
    try:
        config = AutoConfig.for_model(**PretrainedConfig._decode_special_floats(content))
        config.to_dict()  # which fails for a part of the wrong type
        return config
    except Exception as error:  # whatever a wrong value makes a library raise
        raise ConfigError(f"{where}: cannot be read ({first_line(error)})") from error


def longest_text(config: "PretrainedConfig") -> int | None:
    """Return the number of positions that a model has learned; None if it has no limit."""
    return getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None)


def number(config: Any, names: tuple[str, ...], *, of: str = "") -> int:
    """Return the whole number that a configuration has under one of these names, the same for all layers."""
    for holder in (config, getattr(config, "ffn_config", None)):
        for name in names:
            value = getattr(holder, name, None)
            if isinstance(value, list) and len(set(value)) == 1:
                value = value[0]
            if type(value) is int and value > 0:
                return value
    raise ConfigError(f"model.checkpoint={of}: config.json has none of {', '.join(names)}: no Mixture of Experts")
