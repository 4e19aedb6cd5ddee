"""The FLOPs of a composed configuration, before any model is built in memory."""

import json
from collections.abc import Callable
from functools import cache
from typing import Any

from omegaconf import DictConfig, OmegaConf

from moe.checks import require
from moe.config import layer_experts
from moe.config.model import ModelConfig

GRAIN = 8  # the width of an expert is a multiple of this
PLAIN = {"_target_": "moe.routers.topk.TopK", "k": 2, "gate": "renorm"}  # the router of `equal_flops`


def forward_flops(model: dict[str, Any], router: dict[str, Any], *, vocab_size: int, seq_len: int) -> int:
    """Return the forward FLOPs of one token, by `moe.model.cost.flops_per_token`."""
    return _flops(json.dumps([model, router, vocab_size, seq_len]))[0]


def training_flops(model: dict[str, Any], router: dict[str, Any], *, vocab_size: int, seq_len: int) -> int:
    """Return the FLOPs of one token in training, by `moe.model.cost.training_flops_per_token`."""
    return _flops(json.dumps([model, router, vocab_size, seq_len]))[1]


@cache
def _flops(key: str) -> tuple[int, int]:
    """Return the FLOPs of one token, of a forward pass and of training."""
    import torch

    from moe.model.causal_lm import MoEConfig, MoEForCausalLM
    from moe.model.cost import flops_per_token, training_flops_per_token

    model, router, vocab_size, seq_len = json.loads(key)
    settings = MoEConfig.of(ModelConfig(**model), router, vocab_size=vocab_size, seq_len=seq_len)
    with torch.device("meta"):  # shapes without memory
        built = MoEForCausalLM(settings, trusted=True)
    return flops_per_token(built, seq_len), training_flops_per_token(built, seq_len)


def equal_flops(ffn: int, config: DictConfig) -> int:
    """Return the width of an expert at which the configured router costs as much as top-2 routing with width `ffn`.

    The cost is that of a forward pass with the mean number of experts that the router is set to in training, and with
    what it computes beside the experts. So the model of `dense_mixer` is as large as that of top-2 routing, although it
    trains with more work: experts that run for the router alone do not count. FLOPs rise linearly with the width, so
    two widths tell all others. The result is a multiple of 8. Raises ConfigError if a layer has fewer than two experts.
    """
    _check_reference(config.model)
    router = _plain(config.router)
    goal = _of(config, PLAIN, ffn=ffn)
    narrow, wide = _of(config, router, ffn=ffn), _of(config, router, ffn=2 * ffn)
    width = ffn + (goal - narrow) * ffn / (wide - narrow)
    return max(GRAIN, GRAIN * round(width / GRAIN))


def _check_reference(model: DictConfig) -> None:
    """Raise ConfigError if a layer has too few experts for the router `PLAIN`."""
    text, others = model.experts_by_layer, model.num_experts
    for layer in range(model.first_k_dense_replace, model.layers):
        experts = layer_experts.of_layer(text, layer, others)
        key, value = ("model.num_experts", others) if experts == others else (layer_experts.KEY, text)
        allowed = "at least 2 experts in each layer, because equal_flops compares with top-2 routing"
        require(experts >= 2, key, value, allowed)


def steps_of(flops: float, config: DictConfig) -> int:
    """Return the number of optimizer steps after which training has cost this many FLOPs."""
    tokens = config.batch_size * config.grad_accum * config.data.seq_len
    return max(1, round(flops / (tokens * _of(config, _plain(config.router), cost=training_flops))))


def _of(config: DictConfig, router: dict[str, Any], *, cost: Callable[..., int] = forward_flops, **changes: int) -> int:
    unresolved = OmegaConf.to_container(config.model, resolve=False)
    assert isinstance(unresolved, dict)
    names = [str(name) for name in unresolved if name not in changes]
    model = {name: config.model[name] for name in names} | changes
    model = {name: _plain(value) if OmegaConf.is_config(value) else value for name, value in model.items()}
    return cost(model, router, vocab_size=config.data.vocab_size, seq_len=config.data.seq_len)


def _plain(config: Any) -> Any:
    return OmegaConf.to_container(config, resolve=True)
