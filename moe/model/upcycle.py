"""Sparse upcycling (2212.05055): a dense Llama-type checkpoint becomes a Mixture of Experts that computes the same."""

from typing import Any

import torch
from torch import nn
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.utils.logging import disable_progress_bar

from moe.config import dense_checkpoint
from moe.config.schema import ModelConfig
from moe.model.decoder import DenseFFN, MoEForCausalLM
from moe.model.experts import Experts
from moe.model.layer import MoELayer


def upcycle(model: MoEForCausalLM, settings: ModelConfig) -> None:
    """Give `model` the weights of the checkpoint `settings.dense`: attention, norms, embeddings and head by name, its
    MLP to every expert of its layer; routers stay as they were initialized.

    Shared experts are copies too, and are frozen. With n of them, a layer would give 1 + n times the MLP, so that the
    output matrices of routed and shared experts are divided by 1 + n. The logits are then those of the dense model for
    every router whose weights of a token sum to one (not, for example, top-1 with its probability as weight).

    Experts start equal and stay equal only as long as they see the same tokens with the same weights: the router's own
    initialization (and noise, where there is some) sends them different ones from the first step. While they are equal
    it does not matter which ones a token takes, so that the router learns from auxiliary losses alone at first.

    Raises ValueError if the checkpoint lacks weights.
    """
    assert settings.dense is not None
    disable_progress_bar()
    revision = dense_checkpoint.revision(settings.dense, settings.dense_digest)
    options: dict[str, Any] = {"revision": revision, "dtype": torch.float32, "output_loading_info": True}
    loaded: Any = LlamaForCausalLM.from_pretrained(settings.dense, **options)  # a pair, because of the last option
    source, info = loaded
    if info["missing_keys"]:
        raise ValueError(f"model.dense={settings.dense}: without weights for {', '.join(sorted(info['missing_keys']))}")
    weights = source.state_dict()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if ".mlp." not in name:
                tensor.copy_(weights[name])
        for block, original in zip(model.model.layers, source.model.layers, strict=False):  # the first ones of all
            _fill(block.mlp, original.mlp, shared=settings.shared_experts)
    model.generation_config = source.generation_config


def _fill(feed_forward: nn.Module, mlp: LlamaMLP, *, shared: int) -> None:
    if isinstance(feed_forward, DenseFFN):
        _copy(feed_forward.experts, mlp)
        return
    assert isinstance(feed_forward, MoELayer)
    _copy(feed_forward.experts, mlp, divided_by=1 + shared)
    if isinstance(feed_forward.shared, DenseFFN):
        _copy(feed_forward.shared.experts, mlp, divided_by=1 + shared)
        feed_forward.shared.requires_grad_(False)


def _copy(experts: Experts, mlp: LlamaMLP, *, divided_by: int = 1) -> None:
    """Every expert becomes the MLP; one that is n times as wide, n of them side by side."""
    assert experts.gate is not None
    times = experts.up.shape[1] // len(mlp.up_proj.weight)
    experts.gate.copy_(mlp.gate_proj.weight.repeat(times, 1))
    experts.up.copy_(mlp.up_proj.weight.repeat(times, 1))
    experts.down.copy_(mlp.down_proj.weight.repeat(1, times) / divided_by)
