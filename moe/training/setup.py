"""What a run is made of: data, model, batches and settings of a step, each a pure function of the configuration."""

from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from moe.checks import build
from moe.config.schema import Config
from moe.data.blocks import Batch, Prepared, batch, batch_indices, prepare
from moe.data.labels import IGNORED, next_token
from moe.model.decoder import MoEConfig, MoEForCausalLM
from moe.model.upcycle import upcycle
from moe.training.optim import learning_rate_scale
from moe.training.schedules import Constant, Schedule


def prepare_data(config: Config) -> Prepared:
    """The prepared data of a configuration, from the cache when it is there."""
    settings = config.data
    return prepare(
        build(settings.source, "data.source"),
        tokenizer=settings.tokenizer,
        vocab_size=settings.vocab_size,
        seq_len=settings.seq_len,
        val_percent=settings.val_percent,
        max_val_blocks=settings.max_val_blocks,
        cache=settings.cache,
    )


def build_model(config: Config, *, vocab_size: int) -> MoEForCausalLM:
    """The untrained model of a configuration, or the one made of its dense checkpoint: a pure function of it and its
    seed."""
    torch.manual_seed(config.seed)
    settings = MoEConfig.of(config.model, config.router, vocab_size=vocab_size, seq_len=config.data.seq_len)
    model = MoEForCausalLM(settings)
    if config.model.dense is not None:
        upcycle(model, config.model)
    model.model.recompute = config.gradient_checkpointing
    return model


def token_counts(data: Prepared) -> Int[Tensor, "V"]:
    """How often each token id occurs in the training blocks."""
    counts = torch.zeros(len(data.tokenizer), dtype=torch.long)
    for rows in data.train.select_columns("input_ids").iter(batch_size=4096):
        counts += torch.from_numpy(rows["input_ids"]).flatten().bincount(minlength=len(counts))
    return counts


def random_stream(seed: int, step: int, micro: int) -> int:
    """The seed of everything random (noise, dropout) in one micro-batch."""
    return int(np.random.SeedSequence((seed, step, micro)).generate_state(1, np.uint64)[0] >> 1)


def micro_batches(config: Config, data: Prepared, step: int) -> list[Batch]:
    """The blocks of optimizer step `step`, cut into micro-batches of `batch_size`."""
    size = config.batch_size * config.grad_accum
    indices = batch_indices(len(data.train), size, seed=config.seed, step=step)
    return batch(data.train, indices).split(config.batch_size)


def label_weights(batches: list[Batch]) -> list[float]:
    """What a micro-batch's mean loss counts for in the step's: its labels / mean labels, 1 if they have equally many.

    So that a step is the mean over its tokens, however they are cut into micro-batches.
    """
    labels = [int((next_token(micro.labels) != IGNORED).sum()) for micro in batches]
    return [count * len(labels) / sum(labels) for count in labels]


def knob_settings(config: Config, schedule: Schedule | Constant, step: int) -> dict[str, float]:
    """Temperature and noise at optimizer step `step`; the last evaluation, at `steps`, sees the run's own settings."""
    progress = step / config.steps
    return {
        "temperature": schedule("temperature", config.temperature, progress),
        "noise": schedule("noise", config.noise, progress),
    }


def scale_learning_rates(config: Config, optimizers: list[Any], *, step: int) -> None:
    """Set every group's learning rate to what its peak and the curve say at optimizer step `step`."""
    curve = config.optimizer
    scale = learning_rate_scale(step, steps=config.steps, warmup=curve.warmup, floor=curve.floor)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = scale * group["initial_lr"]
