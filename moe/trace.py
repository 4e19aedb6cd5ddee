"""Which experts each token of a fixed set of validation blocks chose, written at 10, 25, 50, 75 and 100 % of a run.

From these traces follow router saturation, churn, and the agreement of seeds, without keeping the weights.
"""

import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from moe.data import Prepared, batch
from moe.model import MoEForCausalLM
from moe.routing import Knobs, Routing

FRACTIONS = (0.1, 0.25, 0.5, 0.75, 1.0)
BLOCKS = 32


def milestones(steps: int) -> set[int]:
    """The numbers of optimizer steps after which a run of `steps` is traced."""
    return {max(1, round(fraction * steps)) for fraction in FRACTIONS}


def probe_blocks(data: Prepared) -> list[int]:
    """Evenly spaced validation blocks, so that domains keep their shares: the same for every run on the same data."""
    count = min(BLOCKS, len(data.val))
    return [index * len(data.val) // count for index in range(count)]


@torch.no_grad()
def choices(model: MoEForCausalLM, data: Prepared, *, temperature: float) -> Bool[Tensor, "L N E"] | None:
    """Which experts the N tokens of the probe blocks ask for in each MoE layer; None where experts take no tokens."""
    probes = batch(data.val, probe_blocks(data)).to(model.device)
    knobs = Knobs.of(temperature=temperature, device=model.device)
    training = model.training
    model.eval()
    parts = []
    for ids, _, _, positions in probes.split(4):
        routing = model(ids, position_ids=positions, knobs=knobs).routing
        if not routing or any(decision.slots is not None for layer in routing for decision in layer):
            break
        experts = model.config.num_experts
        parts.append(torch.stack([chosen(layer, tokens=ids.numel(), experts=experts) for layer in routing]))
    model.train(training)
    return torch.cat(parts, 1).cpu() if parts else None


def chosen(decisions: tuple[Routing, ...], *, tokens: int, experts: int) -> Bool[Tensor, "N E"]:
    """Which experts each token asks for, in any iteration of a chain."""
    mask = torch.zeros(tokens, experts, dtype=torch.bool, device=decisions[0].token.device)
    for decision in decisions:
        mask[decision.token, decision.expert] = True
    return mask


class Trace(NamedTuple):
    """step: optimizer steps done; chosen: by layer, token and expert."""

    step: int
    chosen: Bool[np.ndarray, "L N E"]


def write(folder: Path, step: int, mask: Bool[Tensor, "L N E"]) -> None:
    """Write `folder/step-NNNNNNNN.npz`, atomically, eight choices to a byte."""
    folder.mkdir(exist_ok=True)
    temporary = folder / f".tmp-{step}.npz"
    np.savez_compressed(temporary, bits=np.packbits(mask.numpy()), shape=np.array(mask.shape))
    os.replace(temporary, folder / f"step-{step:08d}.npz")


def read(folder: Path) -> list[Trace]:
    """The traces of a run in the order of their steps; empty if there are none."""
    traces = []
    for path in sorted(folder.glob("step-*.npz")):
        with np.load(path, allow_pickle=False) as file:
            shape = tuple(file["shape"])
            bits = np.unpackbits(file["bits"], count=int(np.prod(shape)))
        traces.append(Trace(int(path.stem.removeprefix("step-")), bits.reshape(shape).astype(bool)))
    return traces


def overlap(a: Bool[np.ndarray, "L N E"], b: Bool[np.ndarray, "L N E"]) -> dict[str, Float[np.ndarray, "L"]]:
    """|A_t ∩ B_t| / k, by layer, the mean over tokens, and the same with chance taken out: (o - c) / (1 - c).

    kappa: c = k/E, tokens choosing at random. kappa_shuffled: c is what the same loads would share if the tokens of one
    side were shuffled, which is more than k/E when loads are uneven: it alone is agreement about tokens. Where the
    number of experts varies, the larger set counts as k. NaN where every token takes every expert.
    """
    size = np.maximum(a.sum(-1), b.sum(-1)).sum(-1)
    shared = (a & b).sum((1, 2)) / size
    uniform = (a.sum(-1) * b.sum(-1)).sum(-1) / a.shape[-1] / size
    shuffled = (a.sum(1) * b.sum(1)).sum(-1) / a.shape[1] / size
    return {
        "overlap": shared,
        "kappa": beyond_chance(shared, uniform),
        "kappa_shuffled": beyond_chance(shared, shuffled),
    }


def beyond_chance(observed: np.ndarray, chance: Any) -> np.ndarray:
    """(observed - chance) / (1 - chance); NaN where chance leaves no room."""
    room = np.asarray(1 - chance, dtype=float)
    return np.divide(observed - chance, room, out=np.full(room.shape, np.nan), where=room > 1e-12)


def consistency(traces: list[Trace]) -> dict[str, float | None]:
    """`overlap` and `kappa_shuffled` of the last two traces, of 75 and 100 % of a run, means over layers; None where
    there are no two, or where every token takes every expert."""
    names = {"routing/consistency": "overlap", "routing/consistency_kappa": "kappa_shuffled"}
    if len(traces) < 2:
        return dict.fromkeys(names)
    shared = overlap(traces[-2].chosen, traces[-1].chosen)
    means = {name: float(shared[part].mean()) for name, part in names.items()}
    return {name: mean if math.isfinite(mean) else None for name, mean in means.items()}
