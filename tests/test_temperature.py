"""The temperature study's figures and reports: who belongs to them, and that their numbers and sentences follow."""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from moe.results import history, load
from moe.summaries import with_causality

TEMPERATURES = (0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0)
SCHEDULES = ("linear", "cosine", "exponential", "step")


def write_run(
    folder: Path, *, temp: float = 1.0, seed: int = 42, steps: int = 20, schedule: str = "constant", **config: Any
) -> Path:
    """A finished run of a temperature router, with evaluations at every fifth of it; what they hold follows from its
    name: `loss` is its final validation loss (default: 4 + a parabola in log T + a bit per seed)."""
    loss = config.pop("loss", 4 + 0.01 * math.log(temp) ** 2 + 0.002 * (seed - 42) + 0.001 * math.sin(seed * temp))
    layers, experts = config.pop("shape", (2, 4))
    moving = {"_target_": f"moe.{schedule}"} | ({} if schedule == "constant" else {"knob": "temperature", "start": 5.0})
    record = {
        "status": config.pop("status", "finished"),
        "error": None,
        "causal": True,
        "experiment": folder.parent.name,
        "name": folder.name,
        "choices": {"router": "temperature", "schedule": schedule},
        "config": {"seed": seed, "steps": steps, "noise": 0.1, "threads": 1, "router": {"temp": temp}}
        | {"schedule": moving, "data": {"seed": seed}}
        | config,
    }
    random = np.random.default_rng([seed, steps, int(10 * temp)])
    tilt = 0.3 * random.standard_normal((layers, experts))
    events: list[dict[str, Any]] = []
    for step in range(0, steps + 1, max(1, steps // 20)):
        progress = step / steps
        at = temp if schedule == "constant" else 5 + (temp - 5) * progress ** (1 + SCHEDULES.index(schedule))
        share = np.exp(progress * tilt)
        share /= share.sum(1, keepdims=True)
        if step:
            events.append({"kind": "train", "step": step, "train/load_balance": 1 + 0.02 * progress * temp})
        event = {
            "kind": "eval",
            "step": step,
            "val/loss": loss + 4 * (1 - progress) ** 4 if step < steps else loss,
            "val/accuracy": progress * (5 - loss) / 5,
            "temperature": at,
            "time/elapsed": 60.0 * step / 10 + seed / 10,
            "routing/entropy": 2 - progress / (1 + temp) + 0.01 * (seed - 43),
            "routing/entropy_t1": 2 - 0.1 * progress * temp**0.3 + 0.01 * (seed - 43),
            "routing/confidence": 0.2 + 0.3 * progress / temp,
            "routing/confidence_t1": 0.2 + 0.02 * progress * temp**0.3 + 0.001 * (seed - 43),
            "routing/load_gini": gini(share).mean(),
            "routing/load_gini/worst": gini(share).max(),
            "routing/load_gini/pooled": gini(share.mean(0, keepdims=True))[0],
            "routing/utilization": share.tolist(),
        }
        events.append(event)
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(record))
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    (folder / "metrics.json").write_text(json.dumps({"final_metrics": {k: v for k, v in event.items() if "/" in k}}))
    return folder


def gini(shares: np.ndarray) -> np.ndarray:
    """Mean absolute difference of all pairs over twice the mean: slow and obvious."""
    pairs = np.abs(shares[:, :, None] - shares[:, None, :]).mean((1, 2))
    return pairs / (2 * shares.mean(1))


def read(folder: Path) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    runs = with_causality(load([folder]))
    return runs, history(runs["folder"]).events, history(runs["folder"], kind="train").events


def write_ablation(
    root: Path, temps: Iterable[float] = TEMPERATURES, seeds: Iterable[int] = (42, 43, 44), **more: Any
) -> Path:
    for temp in temps:
        for seed in seeds:
            write_run(root / "temperature_ablation" / f"router.temp={temp},seed={seed}", temp=temp, seed=seed, **more)
    return root
