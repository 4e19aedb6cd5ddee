"""A Mixture of Experts of the transformers library to import: what its config.json says about it.

Only commands that import a model import torch here, because every command line should be checked fast.
"""

from collections.abc import Collection
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from moe.checks import require
from moe.config.checkpoints import files, saved
from moe.config.checkpoints.transformers_config import EXPERTS, PER_TOKEN, WIDTH, longest_text, number, parse

if TYPE_CHECKING:  # importing transformers' configurations imports torch
    from transformers import PretrainedConfig

# Architectures whose routers decide as one of ours does. Softmax: the k largest logits of one matrix, weighted by their
# probabilities, which sum to 1 always, never, or if this key of the configuration says so. Sigmoid: as DeepSeek-V3.
SOFTMAX: dict[str, bool | str] = {
    **dict.fromkeys(("mixtral", "granitemoe", "minimax", "hunyuan_v1_moe"), True),
    "jamba": False,
    **dict.fromkeys(("olmoe", "flex_olmo", "qwen2_moe", "qwen3_moe", "qwen3_next"), "norm_topk_prob"),
}
SIGMOID = ("deepseek_v3", "glm4_moe")

# Keys of the `model` group that have a value where nobody gives one. A model of transformers has parts of its own in
# place of most of these.
DEFAULTED = {
    "expert": "silu",
    "embed_scale": True,
    "first_k_dense_replace": 0,
    "shared_experts": 0,
    "shared_gate": False,
    "latent_dim": None,
    "router_input": "feed_forward",
    "router_precision": "fp32",
    "routers": None,
    "experts_by_layer": None,
}

# Architectures whose blocks no layer of ours can take the place of.
UNFIT = {
    "llama4_text": "the router's scores multiply what the experts read, and every expert runs on every token",
    "jetmoe": "attention has experts too, and a router decides inside of them",
    "doge": "each expert is a vector of a table, and no part runs the experts",
    "longcat_flash": "some of the experts that its router chooses return the token as it is",
    "deepseek_v4": "the first layers choose experts by a table of token ids",
}


def resolve(model: dict[str, Any], told: Collection[str] = ()) -> dict[str, Any]:
    """Return the keys of the `model` group that the checkpoint `model["checkpoint"]` fixes: sizes and checksum.

    told: the flat keys that the command sets. A key that is not given is None in `model`, or has its default. Raises
    ConfigError for a checkpoint that is missing or cannot be imported, and for a given value that differs from the
    checkpoint's.
    """
    name, revision = model["checkpoint"], model["checkpoint_digest"]
    values = (saved.resolve if saved.is_saved(name, revision) else _sizes)(name, revision)
    values["checkpoint_digest"] = files.digest(name, revision, key="model.checkpoint")
    for key, value in values.items():
        given = key in DEFAULTED and f"model.{key}" in told
        untouched = not given and model[key] in (None, DEFAULTED.get(key))
        allowed = f"{value}, as in {name}; leave it out"
        require(untouched or model[key] == value, f"model.{key}", model[key], allowed)
    return values


def _sizes(name: str, revision: str | None) -> dict[str, Any]:
    """Return the keys of the `model` group that a model of transformers fixes, apart from its checksum."""
    config = read(name, revision)
    stored = files.stored_shapes(name, revision, "model.checkpoint", layers=config.num_hidden_layers)
    sizes = {size for shape in stored.values() for size in shape}
    for key in ("vocab_size", "hidden_size"):
        where = f"{key} in config.json of model.checkpoint={name}"
        require(getattr(config, key) in sizes, where, getattr(config, key), "a dimension of one of its weights")
    return DEFAULTED | {
        "dim": config.hidden_size,
        "heads": config.num_attention_heads,
        "layers": config.num_hidden_layers,
        "ffn": number(config, WIDTH),
        "num_experts": number(config, EXPERTS),
        "expert": "swiglu",
        "embed_scale": False,
        "first_k_dense_replace": getattr(config, "first_k_dense_replace", 0),
        "dense_ffn": getattr(config, "intermediate_size", None) or number(config, WIDTH),
        "dropout": 0.0,
    }


def router(config: "PretrainedConfig") -> tuple[str | None, dict[str, Any]]:
    """Return the option of `conf/router` and the settings with which our router decides as that of the checkpoint.

    The option is None where the checkpoint decides by itself; the settings are then those of
    `moe.routers.imported.Imported`.
    """
    k, kind = number(config, PER_TOKEN), config.model_type
    normalized = SOFTMAX.get(kind, False)
    if isinstance(normalized, str):
        normalized = bool(getattr(config, normalized))
    if kind in SOFTMAX and (k > 1 or not normalized):  # our gate of k=1 is never the constant 1
        return "topk", {"k": k, "gate": "renorm" if normalized else "softmax_all"}
    if kind in SIGMOID and (k > 1 or not config.norm_topk_prob):
        return "sigmoid_bias", {
            "k": k,
            "normalize": bool(config.norm_topk_prob),
            "scale": float(config.routed_scaling_factor),
            "groups": config.n_group,
            "top_groups": config.topk_group,
        }
    return None, {"k": k}


def check_data(name: str, revision: str | None, *, tokenizer: str, seq_len: int) -> None:
    """Raise ConfigError if the tokenizer is not the checkpoint's, or if sequences are longer than it has positions."""
    if saved.is_saved(name, revision):
        content = saved.read(name, revision)
        tokens, longest = content["vocab_size"], content["max_position_embeddings"]
    else:
        config = read(name, revision)
        tokens, longest = config.vocab_size or 0, longest_text(config) or seq_len
    files.check_tokenizer(tokenizer, "model.checkpoint", name, most=tokens)
    require(seq_len <= longest, "data.seq_len", seq_len, f"at most {longest}, the number of positions of {name}")


@lru_cache
def read(name: str, revision: str | None) -> "PretrainedConfig":
    """Return the configuration of a checkpoint, a folder or a name on the hub. Raises ConfigError like `parse`."""
    content = files.content("model.checkpoint", name, revision)
    config = parse(content, f"config.json of model.checkpoint={name}")
    where = f"model_type in config.json of model.checkpoint={name}"
    alone = getattr(config, "text_config", None) is None
    require(alone, where, config.model_type, "that of a language model alone; this one has parts for other input")
    reason = UNFIT.get(config.model_type)
    require(reason is None, where, config.model_type, f"another architecture; in this one, {reason}")
    for names in (EXPERTS, PER_TOKEN, WIDTH):
        number(config, names, of=name)
    return config
