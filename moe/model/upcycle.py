"""Sparse upcycling (2212.05055): turns a dense checkpoint into a Mixture of Experts with equal outputs."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from moe.checks import first_line
from moe.config.checkpoints import dense, files, transformers_config
from moe.config.model import ModelConfig
from moe.model.architecture import MoEConfig
from moe.model.blocks import find_dense
from moe.model.causal_lm import MoEForCausalLM
from moe.model.decoder import DenseFFN
from moe.model.experts import Experts
from moe.model.imported_checkpoint import attention_of
from moe.model.layer import MoELayer
from moe.routers.base import Router
from moe.routers.seeding import seeded


def upcycle(config: MoEConfig, settings: ModelConfig) -> MoEForCausalLM:
    """Return a model with the weights of the checkpoint `settings.dense`, or of several.

    A Llama becomes our decoder. Other architectures keep the code of transformers for everything but their MLPs.

    Attention, norms, embeddings and head are copied by name. Each dense MLP is copied into every expert of its layer.
    Routers keep their initial weights.

    Shared experts are copies too, and are frozen. With n shared experts a layer would return 1 + n times the output of
    the MLP, so the output matrices of routed and shared experts are divided by 1 + n. The logits then equal those of
    the dense model for every router whose weights of a token sum to one. (Top-1 with its probability as weight, for
    example, is not such a router.)

    The experts start equal. They stay equal only as long as they get the same tokens with the same weights; the random
    initial weights of the router, and noise if there is some, send them different tokens from the first step on. While
    the experts are equal, it does not matter which of them a token takes, so at first the router learns from auxiliary
    losses alone. `upcycle_noise` and `upcycle_reset` make the routed experts differ from the start (`_vary`).

    With `upcycle_split` = m, expert i is part i mod m of a copy (2410.07524). The parts of a copy get the same row of
    the router's matrix, so that a token that takes a multiple of m experts takes whole copies ("virtual groups"). Their
    weights sum to one over all parts, so each output matrix is multiplied by m. The paper spreads this factor over the
    three matrices of SwiGLU. The output matrix alone takes it here, because the output is linear in this one. n shared
    experts are n / m copies then.

    With several checkpoints (Branch-Train-MiX, 2403.07816), the first copy is one of the first checkpoint's MLP, the
    second one of the second's, and so on, over and over. Everything else is the mean of the checkpoints: attention,
    norms, embeddings, head, and the MLPs of dense layers and shared experts.

    Only safetensors are read. Raises ValueError if a checkpoint cannot be read or lacks weights.
    """
    disable_progress_bar()
    keys = ["model.dense"] + ["model.upcycle_parents"] * len(settings.upcycle_parents)
    sources = [_load(*each, settings.attention) for each in zip(keys, settings.parents, strict=True)]
    weights = [source.state_dict() for source in sources]
    if len(sources) > 1:  # the model may become the owner of the first one's tensors
        weights[0] = {name: tensor.clone() for name, tensor in weights[0].items()}
    mlps = [[_MLP.of(layer.mlp) for layer in find_dense(source)] for source in sources]
    if config.imported is None:
        model, prefix = MoEForCausalLM(config, trusted=True), ""
        layers = [block.mlp for block in model.decoder.layers]
    else:
        model, prefix = MoEForCausalLM(config, trusted=True, causal_lm=sources[0]), "model.causal_lm."
        layers = [None] * config.first_k_dense_replace + [*model.moe_layers]  # those are still the MLPs of transformers
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            name = name.removeprefix(prefix)
            if name in weights[0]:
                tensor.copy_(_mean([each[name] for each in weights]))
        for number, layer in enumerate(layers):  # of which the checkpoints may have more
            if layer is not None:
                with seeded(f"upcycled layer {number}"):
                    _copy_mlps(layer, [each[number] for each in mlps], settings)
    model.generation_config = sources[0].generation_config
    return model


class _MLP(NamedTuple):
    """The matrices of an MLP, each with a row for each of its F hidden units."""

    gate: Float[Tensor, "F D"]
    up: Float[Tensor, "F D"]
    down: Float[Tensor, "F D"]

    @classmethod
    def of(cls, mlp: Any) -> "_MLP":
        return cls(mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight.T)


def _load(key: str, parent: dense.Parent, attention: str) -> PreTrainedModel:
    """Return a dense model in fp32. `key` is for messages."""
    source = transformers_config.parse(dense.language_model(key, *parent), f"config.json of {key}={parent.name}")
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            parent.name,
            config=source,
            revision=files.revision(*parent),
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            attn_implementation=attention_of(source, attention),
            key_mapping={rf"^model\.{part}\.": "model." for part in dense.LANGUAGE_PARTS.values()},
            output_loading_info=True,
        )
    except Exception as error:  # whatever a wrong file makes a library raise
        raise ValueError(f"{key}={parent.name}: cannot be read ({first_line(error)})") from error
    model, info = loaded
    if info["missing_keys"]:
        raise ValueError(f"{key}={parent.name}: has no weights for {', '.join(sorted(info['missing_keys']))}")
    return model


def _mean(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.stack([*tensors]).mean(0)


def _copy_mlps(feed_forward: nn.Module, mlps: list[_MLP], settings: ModelConfig) -> None:
    """Copy the MLPs of the checkpoints into a dense layer or into the experts of an MoE layer."""
    mean = _MLP(*map(_mean, zip(*mlps, strict=True)))
    if isinstance(feed_forward, DenseFFN):
        _copy_to_experts(feed_forward.experts, [mean])
        return
    assert isinstance(feed_forward, MoELayer)
    split = settings.upcycle_split
    copies = 1 + settings.shared_experts // split  # that a token passes through
    _copy_to_experts(feed_forward.experts, mlps, factor=split / copies)
    _vary(feed_forward.experts, noise=settings.upcycle_noise, reset=settings.upcycle_reset)
    _tie_parts(feed_forward.router, split)
    if isinstance(feed_forward.shared, DenseFFN):
        _copy_to_experts(feed_forward.shared.experts, [mean], factor=1 / copies)
        feed_forward.shared.requires_grad_(False)


def _copy_to_experts(experts: Experts, mlps: list[_MLP], *, factor: float = 1.0) -> None:
    """Fill the experts with the hidden units of the MLPs, in their order, over and over.

    An expert as wide as an MLP gets a copy of one, a wider one several copies side by side, a narrower one a part. The
    output matrix is multiplied by `factor`.
    """
    assert experts.gate is not None
    number, width = experts.up.shape[:2]
    gate, up, down = (torch.cat(matrices) for matrices in zip(*mlps, strict=True))
    units = torch.arange(number * width).view(number, width) % len(up)
    experts.gate.copy_(gate[units])
    experts.up.copy_(up[units])
    experts.down.copy_(down[units].mT * factor)


def _vary(experts: Experts, *, noise: float, reset: float) -> None:
    """Make copies differ: add noise to their matrices, and draw a share of their hidden units anew.

    noise: the standard deviation of the noise, as a share of that of the matrix. 2212.05055 tried such noise.
    reset: the share of the hidden units of each expert, chosen at random, that gets new rows of the input matrices and
        new columns of the output matrix. They are drawn from the normal distribution with the mean and the standard
        deviation of the weights that they replace, in each matrix (Drop-Upcycling, 2502.19261).
    """
    assert experts.gate is not None
    width = experts.up.shape[1]
    for gate, up, down in zip(experts.gate, experts.up, experts.down.mT, strict=True):
        fresh = torch.randperm(width)[: round(reset * width)]
        for matrix in (gate, up, down):
            replaced = matrix[fresh]
            if noise:
                matrix.add_(torch.randn(matrix.shape), alpha=noise * matrix.std().item())
            if len(fresh):
                matrix[fresh] = replaced.mean() + replaced.std() * torch.randn(replaced.shape)


def _tie_parts(router: Router, split: int) -> None:
    """Give the parts of each copy the same row of the router's matrix, the one of the first part."""
    for link in router.chain:
        rows = link.expert_rows
        if rows is not None:
            rows.copy_(rows[::split].repeat_interleave(split, 0))
