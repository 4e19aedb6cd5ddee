"""Measure drop rate and speed of the dispatcher alone, over experts, experts per token and capacity (experiment B).

Routing is random (independent normal logits), experts are the identity, and gate weights are 1. The time covers
gathering tokens by expert under a capacity limit, and summing them back. The routing bench timed the same.
"""

import argparse
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from moe.bench.timing import TimingTable, time_in_turns, timed_device
from moe.checks import require
from moe.routing.decision import Routing
from moe.routing.dispatch import Dispatch, combine, dispatch, gather


def answer(arguments: argparse.Namespace) -> Iterator[TimingTable]:
    """Measure every combination of the listed values. Raises ConfigError if one of them is impossible."""
    k, experts = max(arguments.k), min(arguments.experts)
    require(k <= experts, "--k", k, f"at most {experts}, the smallest of --experts")
    grid = {"experts": arguments.experts, "ks": arguments.k, "capacities": arguments.capacity}
    sizes = {name: getattr(arguments, name) for name in ("tokens", "dim", "seed", "iterations")}
    rows = measure_grid(arguments.out, **grid, **sizes)
    for title, column in (("drop rate by capacity factor", "avg_drop_rate"), ("tokens per second", "tokens_per_s")):
        table = rows.pivot(index=["num_experts", "top_k"], columns="capacity_factor", values=column).rename(columns=str)
        yield TimingTable(title, [{"E, K": f"{e}, {k}", **row} for (e, k), row in table.T.to_dict().items()])


def measure_dispatch(
    *, experts: int, k: int, capacity: float, tokens: int, dim: int, seed: int, iterations: int
) -> dict[str, Any]:
    """Return one row of the result: drop rate, and the median time of `iterations` rounds of packing and combining.

    `bytes_per_token_strict` is the smallest number of bytes that must be moved for a token: those of (2 + 2k) D values.
    The token is read once and written once, and each of its k copies is written once and read once.
    """
    generator = torch.Generator().manual_seed(seed)
    expert = torch.randn(tokens, experts, generator=generator).topk(k).indices.to(timed_device())
    routing = Routing.token_choice(expert, torch.ones(expert.shape, device=timed_device()))
    x = torch.randn(tokens, dim, generator=generator).to(timed_device())

    def pack_and_combine() -> Dispatch:
        plan = dispatch(routing, experts, capacity=capacity, seq_len=tokens)
        combine(gather(x, plan), plan, tokens)
        return plan

    seconds = time_in_turns([("pack_combine", pack_and_combine)], rounds=iterations)["pack_combine"]
    plan = pack_and_combine()
    bytes_per_token = (2 + 2 * k) * dim * x.element_size()
    return {
        "name": "pack_combine",
        "num_experts": experts,
        "top_k": k,
        "capacity_factor": capacity,
        "num_tokens": tokens,
        "hidden_dim": dim,
        "dtype": str(x.dtype).removeprefix("torch."),
        "device": str(x.device),
        "avg_drop_rate": 1 - (plan.kept.sum() / plan.offered.sum()).item(),
        "avg_ms": 1e3 * seconds,
        "tokens_per_s": tokens / seconds,
        "bytes_per_token_strict": bytes_per_token,
        "bw_GiBps_strict": bytes_per_token * tokens / seconds / 2**30,
    }


def measure_grid(
    out: Path, *, experts: list[int], ks: list[int], capacities: list[float], **settings: Any
) -> pd.DataFrame:
    """Measure all combinations, write capacity_cf_multi.jsonl and two figures to `out`, and return the table."""
    from moe.analysis.studies.routing_bench import capacity_lines

    rows = [
        measure_dispatch(experts=e, k=k, capacity=capacity, **settings)
        for e, k, capacity in itertools.product(experts, ks, capacities)
    ]
    out.mkdir(parents=True, exist_ok=True)
    (out / "capacity_cf_multi.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = pd.DataFrame(rows)
    for name in ("drop_rate", "tokens_per_s"):
        column = "avg_drop_rate" if name == "drop_rate" else name
        capacity_lines(table, column).savefig(out / f"capacity_{name}_multi.png")
    return table
