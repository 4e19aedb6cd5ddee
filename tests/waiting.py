"""Find, on a CPU, the operators that would make the host wait for a GPU."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# The host waits for their result, for its size, or (lift_fresh, which is `torch.tensor`) for a copy to the device.
WAITING = {
    *("_local_scalar_dense", "nonzero", "masked_select", "bincount", "_unique2", "unique_dim", "equal", "lift_fresh"),
    "repeat_interleave",
}


class WaitingOperators(TorchDispatchMode):
    """Lists in `calls` the names of the waiting operators that are called inside the context."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name == "index" and any(t is not None and t.dtype == torch.bool for t in args[1])
        if by_mask or name in WAITING:
            self.calls.append(name)
        return func(*args, **(kwargs or {}))
