"""Experiment B: drop rate and speed of the dispatcher alone, over experts, experts per token and capacity factor.

Routing is random (independent normal logits), experts are the identity, gates are 1: what is timed is packing tokens by
expert under a capacity limit and summing them back, as the routing bench did.
"""

import itertools
import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import pandas as pd
import torch

from moe.dispatch import combine, plan
from moe.routing import Routing


def measure(
    *, experts: int, k: int, capacity: float, tokens: int, dim: int, seed: int, iterations: int
) -> dict[str, Any]:
    """One line of the result: drop rate, and median time over `iterations` packs and combines after two uncounted.

    The bytes of a token are those that must move at least: it is read once and written once, and each of its k copies
    is written and read once, (2 + 2k) D values.
    """
    generator = torch.Generator().manual_seed(seed)
    expert = torch.randn(tokens, experts, generator=generator).topk(k).indices
    routing = Routing.token_choice(expert, torch.ones(expert.shape))
    x = torch.randn(tokens, dim, generator=generator)
    seconds = []
    for _ in range(iterations + 2):
        tick = time.perf_counter()
        todo = plan(routing, experts, capacity=capacity, seq_len=tokens)
        combine(x.index_select(0, todo.token), todo, tokens)
        seconds.append(time.perf_counter() - tick)
    middle = median(seconds[2:])
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
        "avg_ms": 1e3 * middle,
        "tokens_per_s": tokens / middle,
        "bytes_per_token_strict": bytes_per_token,
        "bw_GiBps_strict": bytes_per_token * tokens / middle / 2**30,
    }


def sweep(out: Path, *, experts: list[int], ks: list[int], capacities: list[float], **settings: Any) -> pd.DataFrame:
    """Measure the grid; write capacity_cf_multi.jsonl and its two figures into `out`; return the table."""
    from moe.analysis.figures import capacity_lines

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
