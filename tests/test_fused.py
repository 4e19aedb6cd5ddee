"""A decorated function runs as it is where joining its operations does not pay, or fails."""

import subprocess
import sys
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


def test_a_compiled_function_calls_another_one_as_it_is_if_that_is_asked_for() -> None:
    """The compiler is loaded at the first `torch.compile`. This is a process without the other tests' type checks."""
    code = """
import sys
import torch
from moe.fused import uncompiled
calls = []

@uncompiled
def inner(x):
    calls.append(torch.compiler.is_compiling())
    return x.exp()

def outer(x):
    return inner(x.sin()).cos()

def record(graph, inputs):
    operations.extend(node.name for node in graph.graph.nodes if node.op.startswith("call"))
    return graph.forward

operations = []
x = torch.ones(3)
expected = outer(x)
print("torch._dynamo" in sys.modules)
compiled = torch.compile(outer, backend=record)
print(all(torch.equal(compiled(x), expected) for _ in range(3)), operations, calls)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["False", f"True ['sin', 'cos'] {[False] * 4}"]
