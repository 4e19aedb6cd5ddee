"""The files of a checkpoint to start from, a folder or a repository on the hub: config.json, tokenizer and weights.

Every command line is checked with this module and should be checked fast. So it does not import torch, and the
libraries of the hub and of tokenizers only where a checkpoint is read.
"""

import hashlib
import json
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

from moe.checks import ConfigError, first_line, not_on_hub, require
from moe.files import read_text, require_files, require_no_adapter, sha256, tensor_shapes

WEIGHTS = "transformers_weights"  # key of config.json by which transformers reads another file of weights
MOST_LAYERS, MOST = 1000, 10**6  # in a stranger's config.json, of which lists of so many layers or experts are made


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
    """Return the checksum of a checkpoint: sha256 of config.json and all weights of a folder, or the commit on the hub.

    This reads all weights, about a second per GB, but only once per process while the files do not change.
    """
    folder = _file(key, name, "config.json", revision).parent
    if not Path(name).is_dir():
        return folder.name
    weights = sorted(folder.glob("*.safetensors"))
    sums = [_sum(path, path.stat().st_size, path.stat().st_mtime_ns) for path in [folder / "config.json", *weights]]
    return hashlib.sha256("".join(sums).encode()).hexdigest()


def revision(name: str, digest: str | None) -> str:
    """Return the `revision` with which transformers loads exactly the checkpoint of this checksum from the hub."""
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


def check_numbers(content: dict[Any, Any], where: str) -> None:
    """Raise ConfigError for a number of layers, experts, heads or labels that no model has."""
    for key, value in content.items():
        if isinstance(value, dict):
            check_numbers(value, where)
        elif type(value) is int and re.match("num_|n_|moe_num_", str(key)):
            most = MOST_LAYERS if "layer" in key else MOST
            require(value <= most, f"{key} in {where}", value, f"at most {most}")


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
        raise ConfigError(f"{key}={name}: no such folder, and {not_on_hub(error)}") from error
    finally:
        logging.set_verbosity(verbosity)


@lru_cache
def _sum(path: Path, size: int, changed: int) -> str:
    return sha256(path)
