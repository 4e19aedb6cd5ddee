"""Read a checkpoint of a transformers model, into memory or with its experts on the disk."""

import contextlib
import copy
import ctypes
import logging
import shutil
import tempfile
import warnings
import weakref
from pathlib import Path
from typing import Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from moe.checks import ConfigError, first_line, require
from moe.config.checkpoints import files, imported
from moe.config.model import ModelConfig
from moe.model.blocks import find_blocks

M_MMAP_THRESHOLD = -3  # in malloc.h of glibc


def attention_of(source: PretrainedConfig, wanted: str | None) -> str | None:
    """Return the name of a model's attention: the one that is wanted.

    Where a model has no `sdpa`, it gets `eager`, which computes the same.
    """
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(source)]
    return "eager" if wanted == "sdpa" and not kind._supports_sdpa else wanted


def read_checkpoint(settings: ModelConfig) -> PreTrainedModel:
    """Return the model of `settings.checkpoint` with its weights in fp32, which holds those of bf16 and fp16 exactly.

    With `settings.offload`, the experts lie in files of a new folder there, until the model is deleted. A layer reads
    its experts whenever it runs, so the memory holds those of one layer at a time, and it computes on the CPU.

    Only safetensors are read, and no code of the checkpoint's folder runs. Raises ValueError if it cannot be read or
    lacks weights.
    """
    assert settings.checkpoint is not None
    name = settings.checkpoint
    disable_progress_bar()
    logging.getLogger("accelerate.big_modeling").setLevel(logging.ERROR)  # it warns that weights are offloaded
    source = imported.read(name, settings.checkpoint_digest)
    experts, places = None, None
    if settings.offload is not None:
        places = _places(source)
        experts = _new_folder(Path(settings.offload).expanduser())
    warnings.filterwarnings("ignore", "The following device_map keys do not match")  # they are those of tensors
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name,
            config=source,
            revision=files.revision(name, settings.checkpoint_digest),
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            attn_implementation=attention_of(source, settings.attention),
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, with their names
            offload_folder=experts,
            device_map=places,
        )
    except Exception as error:  # whatever a wrong file makes a library raise
        if experts is not None:
            shutil.rmtree(experts, ignore_errors=True)
        raise ValueError(f"model.checkpoint={name}: cannot be read ({first_line(error)})") from error
    model, info = loaded
    if experts is not None:
        weakref.finalize(model, shutil.rmtree, experts, ignore_errors=True)
    wrong = {"missing_keys": "has no weights for", "mismatched_keys": "has weights of other shapes for"}
    wrong["unexpected_keys"] = "has weights that its config.json does not describe:"
    for key, what in wrong.items():
        if info[key]:
            raise ValueError(f"model.checkpoint={name}: {what} {', '.join(sorted(map(str, info[key]))[:5])}")
    return model


def _new_folder(parent: Path) -> str:
    """Return a new folder for experts. Let the system have memory back at once when a tensor of 1 MB or more is freed.

    glibc would keep it for later and return less and less of it, because small tensors come to lie in between.
    """
    with contextlib.suppress(AttributeError, OSError):  # without glibc
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**20)
    try:
        parent.mkdir(parents=True, exist_ok=True)
        return tempfile.mkdtemp(prefix="experts-", dir=parent)
    except OSError as error:
        raise ConfigError(f"model.offload={parent}: cannot be written ({error})") from None


def _places(source: PretrainedConfig) -> dict[str, str]:
    """Return where each tensor of a model lies: experts on the disk, everything else in memory.

    This is a `device_map` of transformers. Only modules that it names, and no others, load their weights when they run.
    Raises ConfigError for experts whose weights are those of parts: they would be needed before the part runs that
    reads them.
    """
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(copy.deepcopy(source))
    blocks = find_blocks(model)
    allowed = f"null, because the experts of a {source.model_type} keep their weights in parts of their own"
    require(all(block.experts._parameters for block in blocks), "model.offload", "a folder", allowed)
    experts = [f"{block.name}.experts" for block in blocks]
    inside = tuple(f"{name}." for name in experts)
    tensors = [name for name, _ in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]]
    others = [name for name in tensors if not name.startswith(inside)]
    return dict.fromkeys(others, "cpu") | dict.fromkeys(experts, "disk")
