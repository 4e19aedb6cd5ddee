"""Set up the process once before training: threads, matrix precision, memory allocator."""

import ctypes
import gc
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.utils.deterministic

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # as in malloc.h


def configure(*, threads: int, matmul_precision: str = "highest") -> dict[str, object]:
    """Set threads, precision and allocator, and return these settings for the run record.

    threads: number of threads of torch. It determines the order of sums, and so the last bits of every result.
    matmul_precision: precision of fp32 matrix products: highest, high or medium, as torch names it.

    With glibc, the process keeps freed memory instead of returning it to the system. By default glibc requests every
    memory block over 32 MB from the system anew. Each tensor of the size of the logits would then cost fresh zeroed
    pages at every step. The drawback is that the process holds its peak memory until it ends.

    On a GPU, kernels are left out whose results differ from run to run; see `repeatable_gradients`.
    """
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(matmul_precision)
    torch.backends.cuda.enable_cudnn_sdp(False)  # its gradients of attention differ from run to run
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it, torch refuses to promise equal products
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if not gc.isenabled():  # train.py switches it off while it imports
        gc.freeze()  # what has been imported is no garbage, so it need not be searched again and again
        gc.enable()
    kept = False
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        options = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_TOP_PAD, 256 * 2**20))
        kept = sum(libc.mallopt(option, value) for option, value in options) == len(options)
    return {"threads": threads, "matmul_precision": matmul_precision, "keeps_freed_memory": kept}


@contextmanager
def full_precision() -> Iterator[None]:
    """Multiply fp32 matrices in fp32, whatever `matmul_precision` is."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def repeatable_gradients(device: torch.device) -> Iterator[None]:
    """Make backward passes on a GPU give bitwise the same gradients in each run.

    Otherwise the gradients of attention differ from run to run in their last bits, because atomic additions add in no
    fixed order. On an H200, repeatable gradients of attention take 1.06 to 1.15 times as long. Forward passes need no
    such setting, and some of their operators would be slower. On a CPU nothing changes.
    """
    if device.type != "cuda":
        yield
        return
    torch.set_deterministic_debug_mode("error")  # "error" where an operator has no such algorithm
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode("default")
