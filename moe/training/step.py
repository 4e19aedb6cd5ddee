"""Carry out one optimizer step: its micro-batches, loss, gradients and update.

Data order, noise, dropout, schedules and learning rates are pure functions of (configuration, step). A resumed run
therefore repeats them exactly without restoring any random state.
"""

import functools
import itertools
import math
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe.config.schema import Config
from moe.data.blocks import Batch, Prepared, batch, batch_indices
from moe.data.labels import IGNORED, next_token
from moe.distributed import ranks
from moe.distributed.sharding import global_norm, local_part
from moe.metrics.formulas import Sums
from moe.metrics.summary import fetch, summarize
from moe.routers.seeding import seed_all
from moe.routing.decision import Knobs
from moe.routing.stats import RoutingStats
from moe.runs.collapse import sentences
from moe.training import gradients
from moe.training.divergence import Diverged, locate_nonfinite
from moe.training.objective import Outcome, mean_losses, merged_stats
from moe.training.optim import learning_rate, scale_learning_rates
from moe.training.passes import LossWeights, PassInput, PassResult, forward_backward
from moe.training.schedules import knob_settings
from moe.training.setup import Training


def train_step(training: Training, step: int, *, measure_updates: bool = False) -> dict[str, Any]:
    """Carry out optimizer step `step` (0-based) and return its values for the event log.

    The values are the losses (unweighted), the FLOPs of all steps so far, the routing metrics, the gradient norms, the
    learning rate, temperature and noise, and `collapse`, a text, if the `LoadWatch` tells something. With
    `measure_updates`, they include the relative changes of the routers and of the experts. Raises Diverged before the
    update if the loss or a gradient is not finite. The weights are then unchanged.
    """
    config, optimizers = training.config, training.optimizers
    settings = knob_settings(config, training.schedule, step)
    knobs = Knobs.of(**settings, device=training.accelerator.device)
    scale_learning_rates(config, optimizers, step=step)
    training.wrapped.train()
    outcomes, last_blocks = accumulate_gradients(training, step, knobs)

    grads = [p.grad for p in training.wrapped.parameters() if p.grad is not None]
    norms: dict[str, Tensor] = dict(gradients.gradient_norms(training.parts))
    norm = norms["grad_norm"] = global_norm(grads)
    sums = merged_stats([outcome.stats for outcome in outcomes])
    beside = merged_stats([outcome.beside for outcome in outcomes])
    training.ahead.clear()
    if norm.is_cuda and step + 1 < config.steps:
        training.ahead[step + 1] = micro_batches(config, training.data, step + 1)
    known = [each for each in (sums, beside) if each is not None]
    losses, sizes, *numbers = fetch(
        [mean_losses(outcomes), torch.stack([n.to(norm.device) for n in norms.values()]), *itertools.chain(*known)]
    )
    if not math.isfinite(losses[0] + sizes[-1]):
        where = locate_nonfinite(training.model, last_blocks.inputs, knobs)
        raise Diverged(step, where)

    before = gradients.copy_parameters(training.parts) if measure_updates else {}
    _update(training, grads, norm)

    # A GPU carries out the update while the host computes metrics.
    named = [f"train/{name}" for name in ("loss", *outcomes[0].aux)]
    values: dict[str, Any] = dict(zip(named, losses.tolist(), strict=True))
    names = RoutingStats._fields
    starts = range(0, len(numbers), len(names))
    fetched = [Sums(dict(zip(names, numbers[start : start + len(names)], strict=True))) for start in starts]
    training.flops.add(
        config.batch_size * config.grad_accum * config.data.seq_len,
        kept=[count for each in fetched for count in np.nansum(each.kept, -1)],  # NaN: experts that a layer lacks
        forward_only=[count for each in fetched for count in each.forward_only],
    )
    values["train/flops"] = training.flops.total
    if sums is not None:
        values |= _routing_values(training, step, fetched[0])
    values |= dict(zip(norms, sizes.tolist(), strict=True))
    if measure_updates:
        values |= gradients.relative_updates(training.parts, before)
    for routers, seen in ((training.routers, sums), (training.adapter_routers, beside)):
        for index, router in enumerate(routers):
            if seen is not None and router in training.learning:
                router.after_step(seen.layer(index, router.num_experts))
    return values | {"learning_rate": learning_rate(optimizers)} | settings


def _update(training: Training, grads: list[Tensor], norm: Tensor) -> None:
    """Clip the gradients, whose norm is given and finite, take a step of each optimizer, and forget the gradients.

    With a norm that is not finite, every gradient would become non-finite, which hides the source.
    """
    clip = (training.config.optimizer.clip / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_([local_part(gradient) for gradient in grads], clip)
    for optimizer in training.optimizers:
        if training.graphs is None:
            optimizer.step()
        else:
            training.graphs.step(optimizer)
        optimizer.zero_grad()


def _routing_values(training: Training, step: int, sums: Sums) -> dict[str, Any]:
    """Return the routing metrics of a step, and `collapse` if the `LoadWatch` tells something."""
    values: dict[str, Any] = {f"train/{name}": value for name, value in summarize(sums, per_layer=False).items()}
    changes = sentences(training.watch.see(step + 1, sums))
    return values | ({"collapse": "; ".join(changes)} if changes else {})


def accumulate_gradients(training: Training, step: int, knobs: Knobs) -> tuple[list[Outcome], Batch]:
    """Add up the gradients of this rank's micro-batches.

    Returns the loss and routing sums of each micro-batch, and the blocks of the last micro-batch.

    Rank r takes micro-batches r, r + world_size, and so on. The ranks work at the same time. Each forward pass also
    gets the load summed over the earlier micro-batches of this step, which `lb_global` needs.
    """
    config, accelerator = training.config, training.accelerator
    _, data_seed = config.seeds
    batches = training.ahead.pop(step, None) or micro_batches(config, training.data, step)
    shares = label_weights(batches)
    router_weights = [router.loss_weights for router in training.routers]
    beside_weights = [router.loss_weights for router in training.adapter_routers]
    outcomes: list[Outcome] = []
    load: Tensor | None = None
    micro_numbers = range(ranks.rank(), config.grad_accum, ranks.world_size())
    for number in micro_numbers:
        blocks = batches[number].to(accelerator.device)
        seed_all(micro_batch_seed(data_seed, step, number))
        inputs = PassInput(blocks.ids, blocks.labels, blocks.position_ids, blocks.told, *knobs, load)
        weights = LossWeights(shares[number], router_weights, beside_weights, passes=len(micro_numbers))
        # DDP exchanges gradients in the backward pass of the last micro-batch only.
        with nullcontext() if number == micro_numbers[-1] else accelerator.no_sync(training.wrapped):
            result = _run_pass(training, inputs, weights)
        outcomes.append(result.outcome)
        if result.load is not None and number != micro_numbers[-1]:
            [offered] = ranks.all_reduce_sum([result.load])
            load = offered if load is None else load + offered
    return outcomes, blocks


def _run_pass(training: Training, inputs: PassInput, weights: LossWeights) -> PassResult:
    """Run a micro-batch, as a CUDA graph where that is possible."""
    run = functools.partial(forward_backward, training, weights=weights)
    if training.graphs is None:
        return run(inputs)
    return training.graphs.run(run, inputs, numbers=repr(weights), keep=weights.passes > 1)


def micro_batches(config: Config, data: Prepared, step: int) -> list[Batch]:
    """Return the blocks of optimizer step `step`, split into micro-batches of `batch_size` blocks."""
    size = config.batch_size * config.grad_accum
    _, data_seed = config.seeds
    indices = batch_indices(len(data.train), size, seed=data_seed, step=step)
    return batch(data.train, indices).split(config.batch_size)


def label_weights(batches: list[Batch]) -> list[float]:
    """Return the weight of each micro-batch's mean loss: its number of labels / the mean number of labels.

    The loss of a step is then the mean over all its labels, however they are divided into micro-batches. All weights
    are 1 if all micro-batches have the same number of labels.
    """
    labels = [int((next_token(blocks.labels) != IGNORED).sum()) for blocks in batches]
    return [count * len(labels) / sum(labels) for count in labels]


def micro_batch_seed(seed: int, step: int, number: int) -> int:
    """Return the seed of all random numbers in micro-batch `number` of a step: noise, dropout and random drops."""
    return int(np.random.SeedSequence((seed, step, number)).generate_state(1, np.uint64)[0] >> 1)
