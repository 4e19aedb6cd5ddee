"""Traces: which experts each token of a fixed set of validation blocks chose, at five milestones of a run.

Router saturation, churn, and the agreement between seeds follow from these traces, without keeping the weights.
"""

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool

from moe.checks import first_line
from moe.files import open_file, replacing

MILESTONES = (0.1, 0.25, 0.5, 0.75, 1.0)  # shares of the steps of a run


def milestones(steps: int) -> set[int]:
    """Return the numbers of optimizer steps after which a run of `steps` steps writes a trace."""
    return {max(min(1, steps), round(fraction * steps)) for fraction in MILESTONES}


class Trace(NamedTuple):
    """Choices after `step` optimizer steps. `chosen` tells, by layer and token, whether each expert was chosen.

    In a file, a layer has as many columns as the layer with the most experts; columns beyond its own are false.
    """

    step: int
    chosen: Bool[np.ndarray, "L N E"]


def write_trace(folder: Path, step: int, mask: Bool[np.ndarray, "L N E"]) -> None:
    """Write `folder/step-NNNNNNNN.npz` atomically, with eight choices per byte."""
    folder.mkdir(exist_ok=True)
    with replacing(folder / f"step-{step:08d}.npz") as file:
        np.savez_compressed(file, bits=np.packbits(mask), shape=np.array(mask.shape))


def read_traces(folder: Path) -> list[Trace]:
    """Return the traces in `folder` in the order of their steps. Raises ValueError, naming the file, for a torn one."""
    traces = []
    for path in sorted(folder.glob("step-*.npz")):
        try:
            with open_file(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
                shape, packed = tuple(map(int, file["shape"])), file["bits"]
                if len(shape) != 3 or min(shape) < 1 or (math.prod(shape) + 7) // 8 != packed.size:
                    raise ValueError(f"shape {shape} does not fit {packed.size} bytes")
                bits = np.unpackbits(packed, count=math.prod(shape))
            traces.append(Trace(int(path.stem.removeprefix("step-")), bits.reshape(shape).astype(bool)))
        except Exception as error:  # whatever a wrong zip archive or array makes the libraries raise
            reason = f"incomplete or not a trace ({first_line(error)})"
            raise ValueError(f"{path}: {reason}; delete the run folder") from None
    return traces
