"""Read a checkpoint of a transformers model."""

from typing import Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from moe.checks import first_line
from moe.config import dense_checkpoint, imported
from moe.config.schema import ModelConfig


def attention_of(source: PretrainedConfig, wanted: str | None) -> str | None:
    """Return the name of a model's attention: the one that is wanted.

    Where a model has no `sdpa`, it gets `eager`, which computes the same.
    """
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(source)]
    return "eager" if wanted == "sdpa" and not kind._supports_sdpa else wanted


def read_checkpoint(settings: ModelConfig) -> PreTrainedModel:
    """Return the model of `settings.checkpoint` with its weights in fp32.

    Only safetensors are read, and no code of the checkpoint's folder runs. Raises ValueError if it cannot be read or
    lacks weights.
    """
    assert settings.checkpoint is not None
    name = settings.checkpoint
    disable_progress_bar()
    source = imported.read(name, settings.checkpoint_digest)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name,
            config=source,
            revision=dense_checkpoint.revision(name, settings.checkpoint_digest),
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            attn_implementation=attention_of(source, settings.attention),
            output_loading_info=True,
        )
    except Exception as error:  # whatever a wrong file makes a library raise
        raise ValueError(f"model.checkpoint={name}: cannot be read ({first_line(error)})") from error
    model, info = loaded
    wrong = {"missing_keys": "has no weights for", "mismatched_keys": "has weights of other shapes for"}
    wrong["unexpected_keys"] = "has weights that its config.json does not describe:"
    for key, what in wrong.items():
        if info[key]:
            raise ValueError(f"model.checkpoint={name}: {what} {', '.join(sorted(map(str, info[key]))[:5])}")
    return model
