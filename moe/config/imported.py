"""A Mixture of Experts of the transformers library to import: what its config.json says about it.

Only commands that import a model import torch here, because every command line should be checked fast.
"""

import re
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from moe.checks import ConfigError, first_line, require
from moe.config import dense_checkpoint, saved

if TYPE_CHECKING:  # importing transformers' configurations imports torch
    from transformers import PretrainedConfig

# The names of a number in the configurations of transformers.
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "moe_topk", "moe_k")
WIDTH = ("moe_intermediate_size", "ffn_hidden_size", "intermediate_size")

# Architectures whose routers decide as one of ours does. Softmax: the k largest logits of one matrix, weighted by their
# probabilities, which sum to 1 always, never, or if this key of the configuration says so. Sigmoid: as DeepSeek-V3.
SOFTMAX: dict[str, bool | str] = {
    **dict.fromkeys(("mixtral", "granitemoe", "minimax", "hunyuan_v1_moe"), True),
    "jamba": False,
    **dict.fromkeys(("olmoe", "flex_olmo", "qwen2_moe", "qwen3_moe", "qwen3_next"), "norm_topk_prob"),
}
SIGMOID = ("deepseek_v3", "glm4_moe")

# Keys of the `model` group that have a value where nobody gives one.
DEFAULTED = {"expert": "silu", "embed_scale": True, "first_k_dense_replace": 0, "shared_experts": 0}

# Architectures whose blocks no layer of ours can take the place of.
UNFIT = {
    "llama4_text": "the router's scores multiply what the experts read, and every expert runs on every token",
    "jetmoe": "attention has experts too, and a router decides inside of them",
    "doge": "each expert is a vector of a table, and no part runs the experts",
    "longcat_flash": "some of the experts that its router chooses return the token as it is",
    "deepseek_v4": "the first layers choose experts by a table of token ids",
}

# Keys of a stranger's config.json that make transformers load code or another format of weights.
REFUSED = (
    *("auto_map", "quantization_config", "compression_config"),
    *("attn_implementation", "_attn_implementation", "experts_implementation", dense_checkpoint.WEIGHTS),
)

# The largest numbers in a stranger's config.json. transformers makes lists of so many layers, experts and labels.
MOST_LAYERS, MOST = 1000, 10**6


def resolve(model: dict[str, Any]) -> dict[str, Any]:
    """Return the keys of the `model` group that the checkpoint `model["checkpoint"]` fixes: sizes and digest.

    A key that is not given is None in `model`. Raises ConfigError for a checkpoint that is missing or cannot be
    imported, and for a given value that differs from the checkpoint's.
    """
    name, revision = model["checkpoint"], model["checkpoint_digest"]
    values = (saved.resolve if saved.is_saved(name, revision) else _sizes)(name, revision)
    values["checkpoint_digest"] = dense_checkpoint.digest(name, revision, key="model.checkpoint")
    for key, value in values.items():
        untouched = model[key] is None or (key in DEFAULTED and model[key] == DEFAULTED[key])
        allowed = f"{value}, as in {name}; leave it out"
        require(untouched or model[key] == value, f"model.{key}", model[key], allowed)
    return values


def _sizes(name: str, revision: str | None) -> dict[str, Any]:
    """Return the keys of the `model` group that a model of transformers fixes, apart from its digest."""
    config = read(name, revision)
    stored = dense_checkpoint.stored_shapes(name, revision, "model.checkpoint", layers=config.num_hidden_layers)
    sizes = {size for shape in stored.values() for size in shape}
    for key in ("vocab_size", "hidden_size"):
        where = f"{key} in config.json of model.checkpoint={name}"
        require(getattr(config, key) in sizes, where, getattr(config, key), "a dimension of one of its weights")
    return {
        "dim": config.hidden_size,
        "heads": config.num_attention_heads,
        "layers": config.num_hidden_layers,
        "ffn": number(config, WIDTH),
        "num_experts": number(config, EXPERTS),
        "expert": "swiglu",
        "embed_scale": False,
        "first_k_dense_replace": getattr(config, "first_k_dense_replace", 0),
        "dense_ffn": getattr(config, "intermediate_size", None) or number(config, WIDTH),
        "shared_experts": 0,  # these parts are those of the imported model
        "dropout": 0.0,
    }


def quoted(text: str) -> str:
    """Return a text as the value of an override, in quotes unless it is a path of plain characters."""
    if re.fullmatch(r"[\w.-]*(/[\w.-]+)+", text):
        return text
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def router(config: "PretrainedConfig") -> list[str]:
    """Return the overrides by which our router decides as that of the checkpoint, or as the checkpoint by itself."""
    k, kind = number(config, PER_TOKEN), config.model_type
    normalized = SOFTMAX.get(kind, False)
    if isinstance(normalized, str):
        normalized = bool(getattr(config, normalized))
    if kind in SOFTMAX and (k > 1 or not normalized):  # our gate of k=1 is never the constant 1
        gate = "renorm" if normalized else "softmax_all"
        return ["router=topk", f"router.k={k}", f"router.gate={gate}"]
    if kind in SIGMOID and (k > 1 or not config.norm_topk_prob):
        settings = {
            "k": k,
            "normalize": str(bool(config.norm_topk_prob)).lower(),
            "scale": float(config.routed_scaling_factor),
            "groups": config.n_group,
            "top_groups": config.topk_group,
        }
        return ["router=sigmoid_bias", *(f"router.{key}={value}" for key, value in settings.items())]
    return [f"router={{_target_: moe.routers.imported.Imported, k: {k}}}"]


def check_data(name: str, revision: str | None, *, tokenizer: str, seq_len: int) -> None:
    """Raise ConfigError if the tokenizer is not the checkpoint's, or if sequences are longer than it has positions."""
    if saved.is_saved(name, revision):
        content = saved.read(name, revision)
        tokens, longest = content["vocab_size"], content["max_position_embeddings"]
    else:
        config = read(name, revision)
        tokens, longest = config.vocab_size or 0, longest_text(config) or seq_len
    dense_checkpoint.check_tokenizer(tokenizer, "model.checkpoint", name, most=tokens)
    require(seq_len <= longest, "data.seq_len", seq_len, f"at most {longest}, the number of positions of {name}")


@lru_cache
def read(name: str, revision: str | None) -> "PretrainedConfig":
    """Return the configuration of a checkpoint, a folder or a name on the hub. Raises ConfigError like `parse`."""
    content = dense_checkpoint.content("model.checkpoint", name, revision)
    config = parse(content, f"config.json of model.checkpoint={name}")
    where = f"model_type in config.json of model.checkpoint={name}"
    alone = getattr(config, "text_config", None) is None
    require(alone, where, config.model_type, "that of a language model alone; this one has parts for other input")
    reason = UNFIT.get(config.model_type)
    require(reason is None, where, config.model_type, f"another architecture; in this one, {reason}")
    for names in (EXPERTS, PER_TOKEN, WIDTH):
        number(config, names, of=name)
    return config


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
    _check_numbers(content, where)
    try:
        config = AutoConfig.for_model(**PretrainedConfig._decode_special_floats(content))
        config.to_dict()  # which fails for a part of the wrong type
        return config
    except Exception as error:  # whatever a wrong value makes a library raise
        raise ConfigError(f"{where}: cannot be read ({first_line(error)})") from error


def _check_numbers(content: dict[Any, Any], where: str) -> None:
    """Raise ConfigError for a number of layers, experts, heads or labels that no model has."""
    for key, value in content.items():
        if isinstance(value, dict):
            _check_numbers(value, where)
        elif type(value) is int and re.match("num_|n_|moe_num_", str(key)):
            most = MOST_LAYERS if "layer" in key else MOST
            require(value <= most, f"{key} in {where}", value, f"at most {most}")


def is_dense(config: "PretrainedConfig") -> bool:
    """Return whether this is a dense model that is upcycled."""
    return config.model_type in dense_checkpoint.KINDS


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
