"""Evaluation over the whole validation set: the same blocks for every seed, no noise, no dropout."""

import math
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset

from moe.data.blocks import batch
from moe.data.labels import IGNORED, next_token
from moe.distributed import ranks
from moe.distributed.sharding import full
from moe.metrics.summary import drop_rate_by_position, summarize, utilization
from moe.model.decoder import MoEForCausalLM
from moe.routers.base import Router
from moe.routing.decision import Knobs
from moe.routing.stats import RoutingStats

PROBE_STRIDE = 251  # a prime, so that tokens of all positions take part


@torch.no_grad()
def evaluate(
    model: MoEForCausalLM,
    data: Dataset,
    *,
    domains: tuple[str, ...],
    batch_size: int,
    temperature: float,
    capacity: float | None = None,
    drop: str = "position",
) -> dict[str, Any]:
    """`val/loss` (nats per token), `val/perplexity`, `val/accuracy`, `val/loss/<domain>`, every routing metric, and
    `routing/utilization` (L, E). The outputs of experts are compared on one token in `PROBE_STRIDE`.

    Token-weighted over all blocks, `val/...` over the tokens with a label and routing over all; the model's mode is
    restored. Ranks share the batches and get the same values. Dropless unless a `capacity` factor is given. A limit, or
    a router that is not causal, makes the loss depend on which sequences share a batch: batches mix the domains, as
    those of training do.
    """
    device = model.device
    knobs = Knobs.of(temperature=temperature, device=device)
    loss = torch.zeros(len(domains), dtype=torch.float64, device=device)
    tokens, correct = torch.zeros_like(loss), torch.zeros_like(loss)
    stats: RoutingStats | None = None
    training = model.training
    model.eval()
    batches = math.ceil(len(data) / batch_size)
    for turn in range(ranks.rank(), ranks.world_size() * math.ceil(batches / ranks.world_size()), ranks.world_size()):
        # sharded weights need every rank at every turn: one without a batch left repeats the last, which counts 0 times
        first, times = min(turn, batches - 1), int(turn < batches)
        torch.manual_seed(first)  # for drop=random; training seeds every micro-batch itself
        # every so-manieth block: domains stand in a row, and a batch of one domain would overflow its experts' capacity
        ids, domain, labels, positions = batch(data, range(first, len(data), batches)).to(device)
        limits: dict[str, Any] = {"capacity": capacity, "drop": drop}
        output = model(ids, position_ids=positions, knobs=knobs, probe_stride=PROBE_STRIDE, **limits)
        targets = next_token(labels)
        nats = F.cross_entropy(
            output.logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none"
        )
        loss.index_add_(0, domain, times * nats.view_as(targets).double().sum(1))
        correct.index_add_(0, domain, times * (output.logits.argmax(-1) == targets).double().sum(1))
        tokens.index_add_(0, domain, times * (targets != IGNORED).double().sum(1))
        if output.stats is not None:
            counted = RoutingStats(*(times * field for field in output.stats))
            stats = counted if stats is None else stats.merge(counted)
    model.train(training)
    loss, tokens, correct = ranks.total((loss, tokens, correct))
    stats = None if stats is None else RoutingStats(*ranks.total(stats))

    mean = (loss.sum() / tokens.sum()).item()
    values: dict[str, Any] = {
        "val/loss": mean,
        "val/perplexity": math.exp(mean) if mean < 700 else math.inf,
        "val/accuracy": (correct.sum() / tokens.sum()).item(),
    }
    for name, nats, count in zip(domains, loss.tolist(), tokens.tolist(), strict=True):
        values[f"val/loss/{name}"] = nats / count if count else None
    if stats is not None:
        values |= summarize(stats) | {"routing/utilization": utilization(stats)}
        values["routing/drop_rate_by_position"] = drop_rate_by_position(stats)
        grams = [_mean([router_gram(router) for router in layer.router.chain]) for layer in model.moe_layers]
        values["routing/router_gram"] = _mean(grams)
        values |= {f"routing/router_gram/layer{layer:02d}": gram for layer, gram in enumerate(grams)}
    return values


@torch.no_grad()
def router_gram(router: Router) -> float | None:
    """||W W^T - I||_F / sqrt(E (E - 1)) of the normalized directions of a router's experts: 0 orthogonal, 1 all alike;
    None without any, or with a single one."""
    directions = full(router.expert_directions)
    if directions is None or len(directions) < 2:
        return None
    unit = torch.nn.functional.normalize(directions.double(), dim=-1)
    distance = (unit @ unit.T - torch.eye(len(unit), device=unit.device)).norm()
    return (distance / math.sqrt(len(unit) * (len(unit) - 1))).item()


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if len(known) == len(values) else None
