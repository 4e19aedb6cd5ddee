"""Random numbers of a tensor's initial values that depend on nothing but the seed, its name and its shape."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class Initializable(Protocol):
    """A module that says how its tensors are initialized. The model that contains it calls this once at its start."""

    def initialize(self, std: float, names: dict[Tensor, str]) -> None:
        """Draw the initial values of the tensors in `names`, each `seeded` by its name in the model.

        std: the standard deviation of the model's matrices. Tensors that `names` leaves out keep their values.
        """


def seed_all(seed: int) -> None:
    """Seed the random numbers of every device, as `torch.manual_seed` does, which takes a millisecond without a GPU.

    It notes a stack trace for each kind of device that this PyTorch knows, in case that one is used later.
    """
    if torch.accelerator.is_available():
        torch.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)


@contextmanager
def seeded(name: str, *shapes: torch.Size) -> Iterator[None]:
    """Draw the random numbers inside from a generator seeded by `torch.initial_seed()`, the name and the shapes.

    The default generator of the CPU is as before afterward, so that further tensors do not depend on this one.
    """
    identity = f"{torch.initial_seed()} {name} {[list(shape) for shape in shapes]}"
    seed = int.from_bytes(hashlib.sha256(identity.encode()).digest()[:8]) >> 1
    with torch.random.fork_rng(devices=[]):
        seed_all(seed)
        yield
