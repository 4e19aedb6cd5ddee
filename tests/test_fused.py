"""A decorated function runs as it is where joining its operations does not pay, or fails."""

from typing import Any

import pytest
import torch
from torch import Tensor

from moe import fused


class OnGpu(Tensor):
    """A tensor that says it is on a GPU."""

    is_cuda = True


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Return a list of the first arguments of compiled calls. A compiled function returns minus its result."""
    calls: list[Tensor] = []

    def stand_in(function: Any, **options: Any) -> Any:
        def run(first: Tensor, *others: Any) -> Any:
            assert torch.are_deterministic_algorithms_enabled()
            calls.append(first)
            return -function(first, *others)

        return run

    monkeypatch.setattr(torch, "compile", stand_in)
    monkeypatch.setattr(fused, "_can_compile", lambda: True)
    return calls


def test_only_large_tensors_on_a_gpu_are_compiled(compiled: list[Tensor]) -> None:
    double = fused.fused(least=4)(lambda x, factor: x * factor)
    large, small = torch.ones(4), torch.ones(3)
    assert [double(x, 2.0).sum() for x in (large, small, small.as_subclass(OnGpu))] == [8, 6, 6]
    assert not compiled
    assert double(large.as_subclass(OnGpu), 2.0).sum() == -8
    assert len(compiled) == 1
    assert not torch.are_deterministic_algorithms_enabled()
