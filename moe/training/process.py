"""Settings of the whole process, made once before work starts: threads, the precision of products, the allocator."""

import ctypes
import gc
import platform

import torch

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # names of malloc.h


def set_up(*, threads: int, matmul_precision: str = "highest") -> dict[str, object]:
    """Use `threads` threads, which decide the order of sums; multiply fp32 matrices in `matmul_precision`, as torch
    names it; keep freed memory instead of handing it back. Returns what was set, for the record.

    glibc maps every block over 32 MB afresh, so each logits-sized tensor pays for zeroed pages at every step. With
    mapping off and trimming off, the process keeps its peak memory until it ends.
    """
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(matmul_precision)
    gc.enable()  # which train.py has off while it imports
    kept = False
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        options = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 256 * 2**20))
        kept = sum(libc.mallopt(option, value) for option, value in options) == len(options)
    return {"threads": threads, "matmul_precision": matmul_precision, "keeps_freed_memory": kept}
