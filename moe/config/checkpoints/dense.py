"""A dense checkpoint to start from: its checksum, and the sizes that its config.json gives to the model.

Every command line is checked with this module and should be checked fast. So it does not import torch, and the
libraries of the hub and of tokenizers only where a checkpoint is read.
"""

import re
from typing import TYPE_CHECKING, Any, NamedTuple

from moe.checks import ConfigError, first_line, require
from moe.config.checkpoints import files, transformers_config

if TYPE_CHECKING:  # importing transformers' configurations imports torch
    from transformers import PretrainedConfig

# The architecture of our decoder. Other ones run with the code of transformers, except for their MLPs.
OURS = "llama"

# The architectures that can be upcycled: the key in config.json of the activation of their MLPs, and its usual value.
KINDS = {
    **dict.fromkeys((OURS, "mistral", "qwen2", "qwen3"), ("hidden_act", "silu")),
    "gemma": ("hidden_act", "gelu_pytorch_tanh"),
    **dict.fromkeys(("gemma2", "gemma3_text"), ("hidden_activation", "gelu_pytorch_tanh")),
}

# Models of images and text -> the part of them that is a language model of `KINDS`.
LANGUAGE_PARTS = {"smolvlm": "text_model"}

# Activation -> form of the experts.
FORMS = {"silu": "swiglu", "gelu_pytorch_tanh": "geglu"}

# Key of `moe.config.model.ModelConfig` -> key of config.json.
SIZES = {
    "dim": "hidden_size",
    "heads": "num_attention_heads",
    "ffn": "intermediate_size",
    "dense_ffn": "intermediate_size",
}

# Settings that the model takes over in addition to the sizes, under the names of transformers' LlamaConfig.
INHERITED = """num_key_value_heads head_dim max_position_embeddings rope_parameters rms_norm_eps attention_bias
    attention_dropout initializer_range tie_word_embeddings bos_token_id eos_token_id pad_token_id""".split()

# Settings of config.json in which checkpoints must agree to be averaged.
SHARED = """model_type num_hidden_layers vocab_size num_key_value_heads head_dim max_position_embeddings rope_parameters
    rope_theta rope_scaling rms_norm_eps attention_bias tie_word_embeddings hidden_act hidden_activation
    layer_types use_sliding_window sliding_window max_window_layers query_pre_attn_scalar attn_logit_softcapping
    final_logit_softcapping""".split()


class Parent(NamedTuple):
    """A dense checkpoint to start from: its folder or name on the hub, and its checksum if that is known."""

    name: str
    digest: str | None


def parents(model: dict[str, Any]) -> list[Parent]:
    """Return the dense checkpoints of the `model` group, which has `dense`."""
    names = [model["dense"], *(model["upcycle_parents"] or ())]
    digests = (model["dense_digest"] or "").split("+")
    known = len(digests) == len(names) and all(digests)
    return [Parent(*each) for each in zip(names, digests if known else [None] * len(names), strict=True)]


def resolve(model: dict[str, Any]) -> dict[str, Any]:
    """Return the keys of the `model` group that the checkpoint `model["dense"]` fixes.

    These are the sizes, with experts that are parts of an MLP if `upcycle_split` says so, and `dense_digest`. A key
    that is not given is None in `model`; if `layers` is not given, it is fixed too. Raises ConfigError for a checkpoint
    that is missing or is not a Llama, and for a given value that differs from the checkpoint's.
    """
    (name, revision), *others = parents(model)
    settings = _settings(name, revision)
    values = {key: settings[llama_key] for key, llama_key in SIZES.items()}
    width, split = values["dense_ffn"], model["upcycle_split"]
    allowed = f"a divisor of {width}, the width of the MLPs of {name}"
    require(split >= 1 and width % split == 0, "model.upcycle_split", split, allowed)
    values["ffn"] = width // split
    _check_weights(name, revision, settings)
    digests = [files.digest(name, revision)]
    for other, revision in others:
        key = "model.upcycle_parents"
        found = _settings(other, revision, key)
        for setting in (*dict.fromkeys(SIZES.values()), *SHARED):
            allowed = f"{settings.get(setting)}, as in model.dense={name}"
            same = found.get(setting) == settings.get(setting)
            require(same, f"{setting} in config.json of {key}={other}", found.get(setting), allowed)
        _check_weights(other, revision, found, key)
        digests.append(files.digest(other, revision, key=key))
        require(digests[-1] not in digests[:-1], key, other, "another checkpoint than the other ones")
    values |= {"expert": _form(settings), "embed_scale": False, "dense_digest": "+".join(digests)}
    for key, value in values.items():
        allowed = f"{value}, as in {name}; model=upcycled leaves this key out"
        untouched = (None, value, "silu") if key == "expert" else (None, value)  # silu: the default
        require(model[key] in untouched, f"model.{key}", model[key], allowed)
    most = settings["num_hidden_layers"]
    layers = most if model["layers"] is None else model["layers"]
    if settings["model_type"] != OURS:
        require(layers == most, "model.layers", layers, f"{most}, the number of layers of {name}, or left out")
    require(layers <= most, "model.layers", layers, f"at most {most}, the number of layers of {name}")
    return values | {"layers": layers}


def check_data(name: str, revision: str | None, *, tokenizer: str, seq_len: int) -> None:
    """Raise ConfigError if the tokenizer is not the checkpoint's, or if sequences are longer than it has positions."""
    settings = _settings(name, revision)
    size = settings["vocab_size"]
    files.check_tokenizer(
        tokenizer, "model.dense", name, least=size if settings["model_type"] == OURS else 1, most=size
    )
    longest = settings.get("max_position_embeddings", 2048)
    require(seq_len <= longest, "data.seq_len", seq_len, f"at most {longest}, the number of positions of {name}")


def kind(name: str, revision: str | None) -> str:
    """Return the architecture of a checkpoint, a key of `KINDS`."""
    return str(_settings(name, revision)["model_type"])


def language_model(key: str, name: str, revision: str | None) -> dict[str, Any]:
    """Return `content`, or what a model of images and text says there about its language part."""
    found = files.content(key, name, revision)
    if found.get("model_type") not in LANGUAGE_PARTS:
        return found
    text = found.get("text_config")
    require(isinstance(text, dict), f"text_config in config.json of {key}={name}", type(text).__name__, "an object")
    return {**found["text_config"], "tie_word_embeddings": bool(found.get("tie_word_embeddings", False))}


def _settings(name: str, revision: str | None, at: str = "model.dense") -> dict[str, Any]:
    """Return the content of config.json. Raises ConfigError if the model cannot take over the weights.

    The architecture must be one of `KINDS`, and its MLPs SwiGLU or GEGLU without bias.
    """
    settings = language_model(at, name, revision)
    model_type = settings.get("model_type")
    known = isinstance(model_type, str) and model_type in KINDS
    require(known, f"model_type in config.json of {at}={name}", model_type, f"one of {', '.join(KINDS)}")
    mlp = (_activation(settings), settings.get("mlp_bias", False))
    needed = ("vocab_size", "num_hidden_layers", *SIZES.values())
    missing = [key for key in needed if key not in settings]
    require(mlp[0] in FORMS and not mlp[1], at, name, f"a {model_type} with SwiGLU or GEGLU without bias, not {mlp}")
    require(not missing, at, name, f"a {model_type} whose config.json has {', '.join(missing)}")
    optional = [key for key in ("num_key_value_heads", "head_dim") if settings.get(key) is not None]
    for key in (*needed, *optional):
        ok = type(settings[key]) is int and settings[key] > 0
        require(ok, f"{key} in config.json of {at}={name}", settings[key], "a whole number > 0")
    code = (
        *("attn_implementation", "_attn_implementation", "experts_implementation", "quantization_config"),
        files.WEIGHTS,
    )
    for key in (*code, "num_labels"):  # transformers makes a list of so many labels
        ok = settings.get(key) in (None, "eager", "sdpa", "flash_attention_2")  # others may load code from the hub
        require(ok, f"{key} in config.json of {at}={name}", settings.get(key), "left out")
    return settings


def _activation(settings: dict[str, Any]) -> str:
    key, usual = KINDS[settings["model_type"]]
    value = settings.get(key)
    return usual if value is None else str(value)


def _form(settings: dict[str, Any]) -> str:
    return FORMS[_activation(settings)]


def _check_weights(name: str, revision: str | None, settings: dict[str, Any], at: str = "model.dense") -> None:
    """Raise ConfigError unless the checkpoint has all weights that its config.json describes, with these shapes.

    Memory is allocated for the sizes of config.json, so a stranger's must not be larger than the files. Only headers of
    safetensors are read.
    """
    stored = files.stored_shapes(name, revision, at, layers=settings["num_hidden_layers"])
    parts = "|".join(LANGUAGE_PARTS.values())
    stored = {re.sub(rf"^model\.(({parts})\.)?", "", tensor): shape for tensor, shape in stored.items()}
    try:
        described = _described(settings) if settings["model_type"] == OURS else _built(settings)
    except Exception as error:  # whatever a wrong value makes a library raise
        raise ConfigError(f"{at}={name}: its config.json describes no model ({first_line(error)})") from error
    for tensor, shape in described.items():
        if tensor not in stored:
            raise ConfigError(f"{at}={name}: its config.json describes {tensor}, which its weights lack")
        if stored[tensor] != shape:
            found = f"but in the weights it is {stored[tensor]}"
            raise ConfigError(f"{at}={name}: config.json describes {tensor} as {shape}, {found}")


def _described(settings: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shape of each weight of a Llama by its name, without the prefix `model.`."""
    dim, width, heads = (settings[key] for key in ("hidden_size", "intermediate_size", "num_attention_heads"))
    size = settings.get("head_dim") or dim // heads
    queries, keys = heads * size, (settings.get("num_key_value_heads") or heads) * size
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (settings["vocab_size"], dim), "norm.weight": (dim,)}
    if not settings.get("tie_word_embeddings", False):
        shapes["lm_head.weight"] = (settings["vocab_size"], dim)
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (dim,),
        "post_attention_layernorm.weight": (dim,),
        "mlp.gate_proj.weight": (width, dim),
        "mlp.up_proj.weight": (width, dim),
        "mlp.down_proj.weight": (dim, width),
    }
    bias = settings.get("attention_bias", False)
    for part, rows, columns in (("q", queries, dim), ("k", keys, dim), ("v", keys, dim), ("o", dim, queries)):
        layer[f"self_attn.{part}_proj.weight"] = (rows, columns)
        if bias:
            layer[f"self_attn.{part}_proj.bias"] = (rows,)
    for number in range(settings["num_hidden_layers"]):
        shapes |= {f"layers.{number}.{tensor}": shape for tensor, shape in layer.items()}
    return shapes


def _built(settings: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the same for an architecture of transformers, which builds it without memory. This imports torch."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(transformers_config.parse(settings, "config.json"))
    tensors = {name.removeprefix("model."): p for name, p in model.state_dict(keep_vars=True).items()}
    embedding = model.get_input_embeddings().weight
    return {name: tuple(p.shape) for name, p in tensors.items() if p is not embedding or name == "embed_tokens.weight"}


def is_dense(config: "PretrainedConfig") -> bool:
    """Return whether this is a dense model that is upcycled."""
    return config.model_type in KINDS
