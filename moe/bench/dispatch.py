"""Experiment B: drop rate and speed of the dispatcher alone, over experts, experts per token and capacity factor.

Routing is random (independent normal logits), experts are the identity, gates are 1: what is timed is packing tokens by
expert under a capacity limit and summing them back, as the routing bench did.
"""

import argparse
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from moe.bench.timing import Table, device, interleave
from moe.routing.decision import Routing
from moe.routing.dispatch import Dispatch, combine, dispatch, gather


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--experts", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--k", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--capacity", type=float, nargs="+", default=[0.9, 1.0, 1.05, 1.1, 1.15, 1.25, 1.5])
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--seed", type=int, default=17)
    parser.add_argument("--iterations", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("results"))


def answer(arguments: argparse.Namespace) -> Iterator[Table]:
    grid = {"experts": arguments.experts, "ks": arguments.k, "capacities": arguments.capacity}
    sizes = {name: getattr(arguments, name) for name in ("tokens", "dim", "seed", "iterations")}
    rows = sweep(arguments.out, **grid, **sizes)
    for title, column in (("drop rate by capacity factor", "avg_drop_rate"), ("tokens per second", "tokens_per_s")):
        table = rows.pivot(index=["num_experts", "top_k"], columns="capacity_factor", values=column).rename(columns=str)
        yield Table(title, [{"E, K": f"{e}, {k}", **row} for (e, k), row in table.T.to_dict().items()])


def measure(
    *, experts: int, k: int, capacity: float, tokens: int, dim: int, seed: int, iterations: int
) -> dict[str, Any]:
    """One line of the result: drop rate, and median time over `iterations` packs and combines after two uncounted.

    The bytes of a token are those that must move at least: it is read once and written once, and each of its k copies
    is written and read once, (2 + 2k) D values.
    """
    generator = torch.Generator().manual_seed(seed)
    expert = torch.randn(tokens, experts, generator=generator).topk(k).indices.to(device())
    routing = Routing.token_choice(expert, torch.ones(expert.shape, device=device()))
    x = torch.randn(tokens, dim, generator=generator).to(device())

    def pack_and_combine() -> Dispatch:
        todo = dispatch(routing, experts, capacity=capacity, seq_len=tokens)
        combine(gather(x, todo), todo, tokens)
        return todo

    seconds = interleave([("pack_combine", pack_and_combine)], rounds=iterations)["pack_combine"]
    todo = pack_and_combine()
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
        "avg_drop_rate": 1 - (todo.kept.sum() / todo.offered.sum()).item(),
        "avg_ms": 1e3 * seconds,
        "tokens_per_s": tokens / seconds,
        "bytes_per_token_strict": bytes_per_token,
        "bw_GiBps_strict": bytes_per_token * tokens / seconds / 2**30,
    }


def sweep(out: Path, *, experts: list[int], ks: list[int], capacities: list[float], **settings: Any) -> pd.DataFrame:
    """Measure the grid; write capacity_cf_multi.jsonl and its two figures into `out`; return the table."""
    from moe.analysis.figures.effects import capacity_lines

    rows = [
        measure(experts=e, k=k, capacity=capacity, **settings)
        for e, k, capacity in itertools.product(experts, ks, capacities)
    ]
    out.mkdir(parents=True, exist_ok=True)
    (out / "capacity_cf_multi.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = pd.DataFrame(rows)
    for name in ("drop_rate", "tokens_per_s"):
        column = "avg_drop_rate" if name == "drop_rate" else name
        capacity_lines(table, column).savefig(out / f"capacity_{name}_multi.png")
    return table
