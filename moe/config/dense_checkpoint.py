"""A dense checkpoint to start from: its digest, and the sizes that its config.json gives to the model.

Every command line is checked with this module and should be checked fast. So it does not import torch, and the
libraries of the hub and of tokenizers only where a checkpoint is read.
"""

import hashlib
import json
import re
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from moe.checks import ConfigError, first_line, require
from moe.files import read_text, require_files, require_no_adapter, sha256, tensor_shapes

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

WEIGHTS = "transformers_weights"  # key of config.json by which transformers reads another file of weights

# Settings that the model takes over in addition to the sizes, under the names of transformers' LlamaConfig.
INHERITED = """num_key_value_heads head_dim max_position_embeddings rope_parameters rms_norm_eps attention_bias
    attention_dropout initializer_range tie_word_embeddings bos_token_id eos_token_id pad_token_id""".split()

# Settings of config.json in which checkpoints must agree to be averaged.
SHARED = """model_type num_hidden_layers vocab_size num_key_value_heads head_dim max_position_embeddings rope_parameters
    rope_theta rope_scaling rms_norm_eps attention_bias tie_word_embeddings hidden_act hidden_activation
    layer_types use_sliding_window sliding_window max_window_layers query_pre_attn_scalar attn_logit_softcapping
    final_logit_softcapping""".split()


class Parent(NamedTuple):
    """A dense checkpoint to start from: its folder or name on the hub, and its digest if that is known."""

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
    digests = [digest(name, revision)]
    for other, revision in others:
        key = "model.upcycle_parents"
        found = _settings(other, revision, key)
        for setting in (*dict.fromkeys(SIZES.values()), *SHARED):
            allowed = f"{settings.get(setting)}, as in model.dense={name}"
            same = found.get(setting) == settings.get(setting)
            require(same, f"{setting} in config.json of {key}={other}", found.get(setting), allowed)
        _check_weights(other, revision, found, key)
        digests.append(digest(other, revision, key=key))
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
    check_tokenizer(tokenizer, "model.dense", name, least=size if settings["model_type"] == OURS else 1, most=size)
    longest = settings.get("max_position_embeddings", 2048)
    require(seq_len <= longest, "data.seq_len", seq_len, f"at most {longest}, the number of positions of {name}")


def check_tokenizer(tokenizer: str, key: str, name: str, *, most: int, least: int = 1) -> None:
    """Raise ConfigError unless `data.tokenizer` is one of from `least` to `most` tokens, for the checkpoint `name`."""
    from tokenizers import Tokenizer

    require(tokenizer != "bpe", "data.tokenizer", tokenizer, f"the tokenizer of {key}={name}")
    path = _file("data.tokenizer", tokenizer, "tokenizer.json")
    try:
        size = Tokenizer.from_file(str(path)).get_vocab_size()
    except Exception as error:  # the library raises no other class
        raise ConfigError(f"data.tokenizer={tokenizer}: {path.name} cannot be read ({first_line(error)})") from error
    number = f"of {most} tokens like {name}" if least == most else f"of at most {most} tokens, for {name}"
    require(least <= size <= most, "data.tokenizer", tokenizer, f"{number}; it has {size}")


def digest(name: str, revision: str | None = None, *, key: str = "model.dense") -> str:
    """Return the digest of a checkpoint: sha256 of config.json and all weights of a folder, or the commit on the hub.

    This reads all weights, about a second per GB, but only once per process while the files do not change.
    """
    folder = _file(key, name, "config.json", revision).parent
    if not Path(name).is_dir():
        return folder.name
    weights = sorted(folder.glob("*.safetensors"))
    sums = [_sum(path, path.stat().st_size, path.stat().st_mtime_ns) for path in [folder / "config.json", *weights]]
    return hashlib.sha256("".join(sums).encode()).hexdigest()


def kind(name: str, revision: str | None) -> str:
    """Return the architecture of a checkpoint, a key of `KINDS`."""
    return str(_settings(name, revision)["model_type"])


def revision(name: str, digest: str | None) -> str:
    """Return the `revision` with which transformers loads exactly the checkpoint of this `digest` from the hub."""
    return "main" if Path(name).is_dir() or digest is None else digest


def content(key: str, name: str, revision: str | None) -> dict[str, Any]:
    """Return the content of config.json of a checkpoint. Raises ConfigError if it is no JSON object."""
    path = _file(key, name, "config.json", revision)
    try:
        require_no_adapter(Path(name))
    except ValueError as error:
        raise ConfigError(f"{key}={name}: {error}") from None
    try:
        settings = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{key}={name}: config.json cannot be read ({first_line(error)})") from error
    require(isinstance(settings, dict), f"config.json of {key}={name}", type(settings).__name__, "an object")
    return settings


def language_model(key: str, name: str, revision: str | None) -> dict[str, Any]:
    """Return `content`, or what a model of images and text says there about its language part."""
    found = content(key, name, revision)
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
    code = (*("attn_implementation", "_attn_implementation", "experts_implementation", "quantization_config"), WEIGHTS)
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
    stored = stored_shapes(name, revision, at, layers=settings["num_hidden_layers"])
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

    from moe.config import imported

    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(imported.parse(settings, "config.json"))
    tensors = {name.removeprefix("model."): p for name, p in model.state_dict(keep_vars=True).items()}
    embedding = model.get_input_embeddings().weight
    return {name: tuple(p.shape) for name, p in tensors.items() if p is not embedding or name == "embed_tokens.weight"}


def stored_shapes(name: str, revision: str | None, at: str, *, layers: int) -> dict[str, tuple[int, ...]]:
    """Return the shape of each weight of a checkpoint by its name.

    layers: the number in its config.json, which may be a stranger's. Raises ConfigError if the weights cannot be read,
    or are fewer tensors than layers.
    """
    try:
        stored = _shapes(name, revision, at)
    except Exception as error:  # the hub's library raises classes of its own
        raise ConfigError(f"{at}={name}: {first_line(error)}") from error
    most = f"at most {len(stored)}, the number of tensors in its weights"
    require(layers <= len(stored), f"num_hidden_layers in config.json of {at}={name}", layers, most)
    return stored


def _shapes(name: str, revision: str | None, at: str) -> dict[str, tuple[int, ...]]:
    """Return the shape of each weight by its name. For a name on the hub, only headers are downloaded."""
    from huggingface_hub import get_safetensors_metadata

    folder = _file(at, name, "config.json", revision).parent

    def find(file: str) -> Path | None:
        return path if (path := folder / file).is_file() else None

    try:
        return tensor_shapes(find)
    except ValueError:
        if Path(name).is_dir():
            raise
    files = get_safetensors_metadata(name, revision=folder.name).files_metadata.values()
    return {tensor: tuple(info.shape) for file in files for tensor, info in file.tensors.items()}


def _file(key: str, name: str, file: str, revision: str | None = None) -> Path:
    """Return the path of a file in a local folder, or of a repository on the hub, which is downloaded."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import logging

    if Path(name).is_dir():
        path = Path(name, file)
        try:
            require_files(path.parent)
        except OSError as error:
            raise ConfigError(f"{key}={name}: cannot be read ({error})") from None
        require(path.exists(), key, name, f"a folder with {file}, or a name on the hub")
        return path
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # without a network, the library prints each of its attempts for half a minute
    try:
        return Path(hf_hub_download(name, file, revision=revision))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{key}={name}: no such folder, and none on the hub ({first_line(error)})") from error
    finally:
        logging.set_verbosity(verbosity)


@lru_cache
def _sum(path: Path, size: int, changed: int) -> str:
    return sha256(path)
