"""Sparse upcycling (2212.05055): turns a dense Llama-type checkpoint into a Mixture of Experts with equal outputs."""

from typing import Any

import torch
from torch import nn
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.utils.logging import disable_progress_bar

from moe.checks import first_line
from moe.config import dense_checkpoint
from moe.config.schema import ModelConfig
from moe.model.causal_lm import MoEForCausalLM
from moe.model.decoder import DenseFFN
from moe.model.experts import Experts
from moe.model.layer import MoELayer


def upcycle(model: MoEForCausalLM, settings: ModelConfig) -> None:
    """Copy the weights of the checkpoint `settings.dense` into `model`.

    Attention, norms, embeddings and head are copied by name. Each dense MLP is copied into every expert of its layer.
    Routers keep their initial weights.

    Shared experts are copies too, and are frozen. With n shared experts a layer would return 1 + n times the output of
    the MLP, so the output matrices of routed and shared experts are divided by 1 + n. The logits then equal those of
    the dense model for every router whose weights of a token sum to one. (Top-1 with its probability as weight, for
    example, is not such a router.)

    The experts start equal. They stay equal only as long as they get the same tokens with the same weights; the random
    initial weights of the router, and noise if there is some, send them different tokens from the first step on. While
    the experts are equal, it does not matter which of them a token takes, so at first the router learns from auxiliary
    losses alone.

    Only safetensors are read. Raises ValueError if the checkpoint cannot be read or lacks weights.
    """
    assert settings.dense is not None
    disable_progress_bar()
    revision = dense_checkpoint.revision(settings.dense, settings.dense_digest)
    options: dict[str, Any] = {"revision": revision, "dtype": torch.float32, "use_safetensors": True}
    try:
        loaded: Any = LlamaForCausalLM.from_pretrained(settings.dense, output_loading_info=True, **options)
    except Exception as error:  # whatever a wrong file makes a library raise
        raise ValueError(f"model.dense={settings.dense}: cannot be read ({first_line(error)})") from error
    source, info = loaded
    if info["missing_keys"]:
        raise ValueError(f"model.dense={settings.dense}: has no weights for {', '.join(sorted(info['missing_keys']))}")
    weights = source.state_dict()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if ".mlp." not in name:
                tensor.copy_(weights[name])
        # The model may have fewer layers than the checkpoint. It then gets the checkpoint's first layers.
        for block, dense_block in zip(model.decoder.layers, source.model.layers, strict=False):
            _copy_mlp(block.mlp, dense_block.mlp, shared=settings.shared_experts)
    model.generation_config = source.generation_config


def _copy_mlp(feed_forward: nn.Module, mlp: LlamaMLP, *, shared: int) -> None:
    """Copy a dense MLP into a dense or MoE layer that has `shared` shared experts."""
    if isinstance(feed_forward, DenseFFN):
        _copy_to_experts(feed_forward.experts, mlp)
        return
    assert isinstance(feed_forward, MoELayer)
    _copy_to_experts(feed_forward.experts, mlp, divided_by=1 + shared)
    if isinstance(feed_forward.shared, DenseFFN):
        _copy_to_experts(feed_forward.shared.experts, mlp, divided_by=1 + shared)
        feed_forward.shared.requires_grad_(False)


def _copy_to_experts(experts: Experts, mlp: LlamaMLP, *, divided_by: int = 1) -> None:
    """Copy the MLP into every expert. An expert that is n times as wide gets n copies side by side.

    The output matrix is divided by `divided_by`.
    """
    assert experts.gate is not None
    times = experts.up.shape[1] // len(mlp.up_proj.weight)
    experts.gate.copy_(mlp.gate_proj.weight.repeat(times, 1))
    experts.up.copy_(mlp.up_proj.weight.repeat(times, 1))
    experts.down.copy_(mlp.down_proj.weight.repeat(1, times) / divided_by)
