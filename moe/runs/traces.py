"""Which experts each token of a fixed set of validation blocks chose, written at 10, 25, 50, 75 and 100 % of a run.

From these traces follow router saturation, churn, and the agreement of seeds, without keeping the weights.
"""

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool
from torch import Tensor

FRACTIONS = (0.1, 0.25, 0.5, 0.75, 1.0)


def milestones(steps: int) -> set[int]:
    """The numbers of optimizer steps after which a run of `steps` is traced."""
    return {max(1, round(fraction * steps)) for fraction in FRACTIONS}


class Trace(NamedTuple):
    """step: optimizer steps done; chosen: by layer, token and expert."""

    step: int
    chosen: Bool[np.ndarray, "L N E"]


def write_trace(folder: Path, step: int, mask: Bool[Tensor, "L N E"]) -> None:
    """Write `folder/step-NNNNNNNN.npz`, atomically, eight choices to a byte."""
    folder.mkdir(exist_ok=True)
    temporary = folder / f".tmp-{step}.npz"
    np.savez_compressed(temporary, bits=np.packbits(mask.numpy()), shape=np.array(mask.shape))
    os.replace(temporary, folder / f"step-{step:08d}.npz")


def read_traces(folder: Path) -> list[Trace]:
    """The traces of a run in the order of their steps; empty if there are none."""
    traces = []
    for path in sorted(folder.glob("step-*.npz")):
        with np.load(path, allow_pickle=False) as file:
            shape = tuple(file["shape"])
            bits = np.unpackbits(file["bits"], count=int(np.prod(shape)))
        traces.append(Trace(int(path.stem.removeprefix("step-")), bits.reshape(shape).astype(bool)))
    return traces
