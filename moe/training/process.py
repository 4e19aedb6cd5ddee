"""Set up the process once before training: threads, matrix precision, memory allocator."""

import ctypes
import gc
import platform

import torch

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # as in malloc.h


def configure(*, threads: int, matmul_precision: str = "highest") -> dict[str, object]:
    """Set threads, precision and allocator, and return these settings for the run record.

    threads: number of threads of torch. It determines the order of sums, and so the last bits of every result.
    matmul_precision: precision of fp32 matrix products: highest, high or medium, as torch names it.

    With glibc, the process keeps freed memory instead of returning it to the system. By default glibc requests every
    memory block over 32 MB from the system anew. Each tensor of the size of the logits would then cost fresh zeroed
    pages at every step. The drawback is that the process holds its peak memory until it ends.
    """
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(matmul_precision)
    gc.enable()  # train.py switches it off while it imports
    kept = False
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        options = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 256 * 2**20))
        kept = sum(libc.mallopt(option, value) for option, value in options) == len(options)
    return {"threads": threads, "matmul_precision": matmul_precision, "keeps_freed_memory": kept}
