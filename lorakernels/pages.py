"""Huge pages for large weights in CPU memory, where Linux has them. Few rows of x read an NF4 weight once, and finding its pages of
4 KiB takes a tenth of that time or more: one row, K = 14336, N = 4096, cold, on a Zen 4, takes 1.41 ms with two threads and 2.28 with one;
on huge pages 1.17 and 1.69 (medians of three runs each, in turn)."""

import ctypes
import functools
from pathlib import Path

import torch

SYSTEM = Path("/sys/kernel/mm/transparent_hugepage")
MADV_HUGEPAGE, MADV_COLLAPSE = 14, 25  # Linux's mman-common.h; the second since 6.1


@functools.lru_cache(maxsize=None)
def _system():
    """madvise(address, bytes, advice) and the bytes of a huge page; None where there are none, or the system's owner wants none."""
    try:
        if "[never]" in (SYSTEM / "enabled").read_text():
            return None
        madvise, size = ctypes.CDLL(None).madvise, int((SYSTEM / "hpage_pmd_size").read_text())
    except (OSError, AttributeError, ValueError):
        return None
    madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    return madvise, size


def on_huge_pages(tensor):
    """The tensor, whose memory Linux is asked to hold in huge pages as far as it fills whole ones. It stays where it is, with its values;
    a system that cannot leaves it as it was. Where nothing was written to yet, pages come huge when it is."""
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or not tensor.is_cpu or not tensor.is_contiguous() or _system() is None:
        return tensor
    madvise, size = _system()
    begin = -(-tensor.data_ptr() // size) * size
    end = (tensor.data_ptr() + tensor.nbytes) // size * size
    if begin < end:
        madvise(begin, end - begin, MADV_HUGEPAGE)
        madvise(begin, end - begin, MADV_COLLAPSE)
    return tensor
