"""Few kernels on a GPU: join the operations of a function, or keep a function apart, and convert numbers once."""

import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., Any])


def fused(least: int) -> Callable[[Function], Function]:
    """Decorate a function that `torch.compile` shall join into few kernels where that pays.

    It pays on a GPU, if the first argument has `least` numbers or more: then the time of the separate kernels counts,
    and not the seconds that a compilation takes. Elsewhere, and inside of another compilation, the function runs as it
    is. Intermediate results are not rounded to bf16 in a joined kernel, so the last bits may differ.

    The function must not draw random numbers, nor add to places that an index gives: the order of such sums varies.
    """

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def run(first: torch.Tensor, *others: Any) -> Any:
            if not first.is_cuda or first.numel() < least or torch.compiler.is_compiling() or not _can_compile():
                return function(first, *others)
            before = torch.get_deterministic_debug_mode()
            torch.set_deterministic_debug_mode("error")  # the gradient, too, is then compiled with sums of fixed order
            try:
                return _compiled(function)(first, *others)
            finally:
                torch.set_deterministic_debug_mode(before)

        return run  # type: ignore[return-value]

    return decorate


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the compiled function. This imports the compiler, which takes seconds, so it is left to the first call."""
    return torch.compile(function, dynamic=False)


@functools.cache
def _can_compile() -> bool:
    from torch.utils._triton import has_triton

    return bool(has_triton())


def uncompiled(function: Function) -> Function:
    """Decorate a function that runs as it is, also where a compiled model calls it.

    `torch.compiler.disable` does this, but imports the compiler at once, which takes most of a second. Whatever
    compiles has imported it before.
    """
    apart: Callable[..., Any] | None = None

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        nonlocal apart
        if "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)
        apart = apart or torch.compiler.disable(function)
        return apart(*args, **kwargs)

    return run  # type: ignore[return-value]


def product_type(x: torch.Tensor) -> torch.dtype:
    """Return the type in which matrix products of x compute: that of autocast where it is on, else that of x."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
