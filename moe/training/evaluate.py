"""Evaluate a model on the whole validation set: the same blocks for every seed, without noise and dropout."""

import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from moe.data.blocks import batch
from moe.data.labels import IGNORED, next_token
from moe.data.table import BlockTable
from moe.distributed import ranks
from moe.distributed.sharding import full_tensors
from moe.metrics.agreement import drift
from moe.metrics.purity import domain_agreement
from moe.metrics.summary import drop_rate_by_position, summarize, utilization
from moe.model.causal_lm import MoEForCausalLM
from moe.routers.base import Router
from moe.routers.seeding import seed_all
from moe.routing.decision import Knobs, Routing, count
from moe.routing.stats import RoutingStats
from moe.runs.documents import DocumentLosses, write_documents
from moe.training.optim import learning_rate
from moe.training.probe import routes
from moe.training.schedules import knob_settings
from moe.training.setup import Training

COMPARED = 251  # the outputs of experts are compared on one token in this many


def validate(training: Training, step: int, folder: Path | None = None) -> dict[str, Any]:
    """Return the validation metrics of a run after `step` optimizer steps, what these cost, and the present settings.

    Validation is dropless. If the run has a capacity factor, it is repeated with the limit, as `val_capacity/...`.
    folder: of the run, after its last step: then the loss of each validation document is written there, and the metrics
    of the test text are returned too, as `test/...`.
    """
    config, data = training.config, training.data
    settings = knob_settings(config, training.schedule, step)
    arguments: dict[str, Any] = {
        "domains": data.domains,
        "trained": config.data.train_domains,
        "batch_size": config.batch_size,
        "temperature": settings["temperature"],
    }
    by_block = torch.zeros(2, len(data.val), dtype=torch.float64, device=training.model.device)
    of_val = arguments | {"text_bytes": data.predicted_bytes("val")}
    values = evaluate(training.model, data.val, by_block=by_block, **of_val)
    if folder is not None:
        _write_documents(folder, data.val, by_block)
    if folder is not None and data.test is not None:
        tested = evaluate(training.model, data.test, text_bytes=data.predicted_bytes("test"), **arguments)
        values |= {name.replace("val/", "test/"): value for name, value in tested.items() if name.startswith("val/")}
    if config.capacity is not None:
        limited = evaluate(training.model, data.val, capacity=config.capacity, drop=config.drop, **of_val)
        for name in ("val/loss", "val/perplexity", "routing/drop_rate", "routing/unrouted_rate"):
            values[f"val_capacity/{name.split('/')[1]}"] = limited.get(name)
        for decile, rate in enumerate(limited.get("routing/drop_rate_by_position", [])):
            values[f"val_capacity/drop_rate/decile{decile}"] = rate
    values |= _drift(training, settings["temperature"])
    values["train/flops"] = training.flops.total
    return values | {"learning_rate": learning_rate(training.optimizers)} | settings


def _drift(training: Training, temperature: float) -> dict[str, Any]:
    """Return how far the routing has moved from the base; nothing for a run that does not start from a checkpoint."""
    base = training.base
    now = None if base is None else routes(training.model, training.data, temperature=temperature)
    if base is None or now is None:
        return {}
    known = base.probs is not None and now.probs is not None
    return drift(base.chosen, now.chosen, (base.probs, now.probs) if known else None)  # type: ignore[arg-type]


@torch.no_grad()
def evaluate(
    model: MoEForCausalLM,
    data: BlockTable,
    *,
    domains: tuple[str, ...],
    text_bytes: tuple[int, ...],
    trained: Sequence[str] | None = None,
    batch_size: int,
    temperature: float,
    capacity: float | None = None,
    drop: str = "position",
    by_block: Float[Tensor, "2 B"] | None = None,
) -> dict[str, Any]:
    """Return the metrics of a model on validation data, dropless unless a `capacity` factor is given.

    These are `val/loss` (nats per token), `val/perplexity`, `val/accuracy`, `val/bits_per_byte`, loss and bits per byte
    of each domain, every routing metric, and `routing/utilization` (L, E). With an adapter that has routers, their
    routing metrics are `adapter/routing/...`. `val/...` are means over the tokens with a
    label, routing metrics over all tokens. With `trained`, the domains whose text trains, there are also
    `val/loss_in_domain` and `val/loss_out_of_domain`. `text_bytes` are the lengths of the domains' texts in
    bytes. The outputs of experts are compared on the tokens of `compared_tokens`. The summed loss of each block and its
    number of tokens are added to `by_block`, on each rank for the micro-batches of that rank.

    With a capacity limit, or a router that is not causal, the loss depends on which sequences share a micro-batch. Each
    micro-batch therefore mixes the domains, as in training.

    All ranks call this together. They share the micro-batches and get the same values. The model's training mode is
    restored.
    """
    context: dict[str, Any] = {"knobs": Knobs.of(temperature=temperature, device=model.device)}
    context |= {"capacity": capacity, "drop": drop}
    numbers = torch.arange(len(domains), device=model.device)[:, None]
    by_domain = torch.zeros(3, len(domains), dtype=torch.float64, device=model.device)
    shape = len(model.moe_layers), len(domains), model.config.most_experts
    by_expert = torch.zeros(shape, dtype=torch.float64, device=model.device)
    stats: list[RoutingStats] = []  # of the MoE layers, and of those that an adapter has put beside them
    training = model.training
    model.eval()
    for blocks, times in _micro_batches(len(data), batch_size):
        domain, sums, routing, asked = _run(model, data, blocks, context, domains=len(domains))
        if by_block is not None:
            by_block[:, list(blocks)] += times * sums[:2]
        # A product, because on CUDA `index_add` adds floating-point numbers in no fixed order.
        members = times * (domain == numbers).double()
        by_domain += torch.stack([members @ each for each in sums])
        by_expert += times * asked
        counted = [RoutingStats(*(times * field for field in each)) for each in routing]
        stats = [old.merge(new) for old, new in zip(stats, counted, strict=True)] if stats else counted
    model.train(training)
    [by_domain] = ranks.all_reduce_sum((by_domain,))
    values = _text_metrics(by_domain, domains, text_bytes)
    if trained is not None:
        values |= _losses_by_training(by_domain, [name in trained for name in domains])
    whole = [RoutingStats(*ranks.all_reduce_sum(each)) for each in stats]
    for each in whole[:1]:
        values |= _routing_metrics(each, model)
        values |= domain_agreement(ranks.all_reduce_sum((by_expert,))[0].cpu().numpy())
    for each in whole[1:]:
        values |= {f"adapter/{name}": value for name, value in summarize(each).items()}
    return values


def _micro_batches(blocks: int, batch_size: int) -> Iterator[tuple[range, int]]:
    """Yield the validation blocks of each micro-batch of this rank, and how often the micro-batch counts.

    The blocks of a micro-batch lie at equal distances. The data are sorted by domain, and a micro-batch of a single
    domain would exceed the capacity of that domain's experts. With sharded weights all ranks must run the model equally
    often. A rank that has no micro-batch left runs the last one again and counts it 0 times.
    """
    number, world = math.ceil(blocks / batch_size), ranks.world_size()
    for turn in range(ranks.rank(), world * math.ceil(number / world), world):
        yield range(min(turn, number - 1), blocks, number), int(turn < number)


def _run(
    model: MoEForCausalLM, data: BlockTable, blocks: range, context: dict[str, Any], *, domains: int
) -> tuple[Int[Tensor, " B"], Float[Tensor, "3 B"], list[RoutingStats], Float[Tensor, "L N E"]]:
    """Run the model on a micro-batch of these blocks.

    Return the domain of each block, its sums over tokens with a label (the loss, the number of these tokens, and how
    many the model predicts), the sums for routing metrics: none, those of the model's routers, or these and those
    of an adapter's routers, and the loads by domain.
    """
    seed_all(blocks.start)  # for drop=random
    read = batch(data, blocks).to(model.device)
    compared = compared_tokens(blocks, read.ids.shape[1]).to(model.device)
    output = model(**read.inputs, compared=compared, **context)
    targets = next_token(read.labels)
    rows = output.logits.float().flatten(0, 1)
    nats = F.cross_entropy(rows, targets.flatten(), ignore_index=IGNORED, reduction="none").view_as(targets)
    sums = [each.double().sum(1) for each in (nats, targets != IGNORED, output.logits.argmax(-1) == targets)]
    routing = [output.stats] if output.beside is None else [output.stats, output.beside["stats"]]
    domain_of_token = read.domain.repeat_interleave(read.ids.shape[1])
    asked = [_loads(layer, domain_of_token, domains, model.config.most_experts) for layer in output.routing or ()]
    loads = torch.stack(asked) if asked else sums[0].new_zeros(0, domains, model.config.most_experts)
    return read.domain, torch.stack(sums), [each for each in routing if each is not None], loads


def _loads(
    decisions: tuple[Routing, ...], domain: Int[Tensor, " T"], domains: int, experts: int
) -> Float[Tensor, "N E"]:
    """Return how many assignments to each expert the tokens of each domain ask for; NaN if experts process slots."""
    if any(decision.slots is not None for decision in decisions):
        return torch.full((domains, experts), math.nan, dtype=torch.float64, device=domain.device)
    pairs = torch.cat([domain[decision.token] * experts + decision.expert for decision in decisions])
    return count(pairs, domains * experts).view(domains, experts).double()


def _text_metrics(
    by_domain: Float[Tensor, "3 N"], domains: tuple[str, ...], text_bytes: tuple[int, ...]
) -> dict[str, Any]:
    """Return the metrics of the loss. by_domain: summed loss, tokens and predicted tokens of each domain."""
    loss, tokens, correct = by_domain.sum(1)
    mean = (loss / tokens).item()
    values: dict[str, Any] = {
        "val/loss": mean,
        "val/perplexity": math.exp(mean) if mean < 700 else math.inf,
        "val/bits_per_byte": _bits_per_byte(loss.item(), sum(text_bytes)),
        "val/accuracy": (correct / tokens).item(),
    }
    for name, nats, labeled, size in zip(domains, *by_domain[:2].tolist(), text_bytes, strict=True):
        values[f"val/loss/{name}"] = nats / labeled if labeled else None
        values[f"val/bits_per_byte/{name}"] = _bits_per_byte(nats, size)
    return values


def _losses_by_training(by_domain: Float[Tensor, "3 N"], trained: list[bool]) -> dict[str, Any]:
    """Return the mean loss over the domains whose text trains, and over the others. None without such tokens."""
    inside = torch.tensor(trained, device=by_domain.device)
    parts = {
        "val/loss_in_domain": by_domain[:2, inside].sum(1),
        "val/loss_out_of_domain": by_domain[:2, ~inside].sum(1),
    }
    return {name: (loss / tokens).item() if tokens else None for name, (loss, tokens) in parts.items()}


def _routing_metrics(stats: RoutingStats, model: MoEForCausalLM) -> dict[str, Any]:
    """Return every routing metric from the sums over the validation set and the weights of the routers."""
    values: dict[str, Any] = summarize(stats) | {"routing/utilization": utilization(stats)}
    values["routing/drop_rate_by_position"] = drop_rate_by_position(stats)
    grams = [_mean([router_gram(router) for router in layer.router.chain]) for layer in model.moe_layers]
    values["routing/router_gram"] = _mean(grams)
    return values | {f"routing/router_gram/layer{layer:02d}": gram for layer, gram in enumerate(grams)}


def _write_documents(folder: Path, data: BlockTable, by_block: Float[Tensor, "2 B"]) -> None:
    """Write the summed losses and numbers of tokens of the documents, which are sums over their blocks."""
    [sums] = ranks.all_reduce_sum((by_block,))
    if ranks.is_first():
        documents = data["document"]
        write_documents(folder, DocumentLosses(*(np.bincount(documents, row) for row in sums.cpu().numpy())))


def compared_tokens(blocks: range, seq_len: int) -> Int[Tensor, " N"]:
    """Return on which tokens of a micro-batch of these validation blocks the outputs of all experts are compared.

    They are one token in 251 of the validation set (or in slightly more, see `distance`), and the same ones for every
    size of a micro-batch. Their distance has no divisor in common with the length of a block, so they do not fall on
    the same few positions of each block: each position takes part once in `distance` blocks. A validation set with
    fewer blocks leaves some positions out.
    """
    distance = next(n for n in itertools.count(COMPARED) if math.gcd(n, seq_len) == 1)
    first_of_block = torch.tensor(blocks)[:, None] * seq_len
    return ((first_of_block + torch.arange(seq_len)).flatten() % distance == 0).nonzero()[:, 0]


@torch.no_grad()
def router_gram(router: Router) -> float | None:
    """Return how similar the directions of a router's experts are: 0 if all are orthogonal, 1 if all are equal.

    This is ||W W^T - I||_F / sqrt(E (E - 1)) with one normalized direction in each row of W. None if the router has no
    directions or a single one.
    """
    directions = full_tensors(router.expert_directions)
    if directions is None or len(directions) < 2:
        return None
    unit = torch.nn.functional.normalize(directions.double(), dim=-1)
    distance = (unit @ unit.T - torch.eye(len(unit), device=unit.device)).norm()
    return (distance / math.sqrt(len(unit) * (len(unit) - 1))).item()


def _bits_per_byte(nats: float, size: int) -> float | None:
    return nats / math.log(2) / size if size else None


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if len(known) == len(values) else None
