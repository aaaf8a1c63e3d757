"""The native C++ kernels for the CPU (csrc/cpu): AVX-512, AVX2 or portable by what the processor has."""

import ctypes
import functools
from pathlib import Path

import torch

from . import native
from .reference import base_product, lowrank_down, lowrank_grad_down, lowrank_grad_up  # noqa: F401  torch's products until native ones win


@functools.lru_cache(maxsize=None)
def module():
    """lorakernels._cpu, set to share work over torch's own thread pool."""
    _cpu = native.load("_cpu")
    try:
        pool = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")).torch_parallel_for
        _cpu.use_pool(ctypes.cast(pool, ctypes.c_void_p).value)
    except (OSError, AttributeError):
        pass  # another build of torch: the kernels run on the calling thread, and `python -m lorakernels` says so
    return _cpu


def why_not(device_type, dtype):
    if device_type != "cpu":
        return f"runs on CPU tensors, not on {device_type}"
    try:
        module().isa()
    except (ImportError, RuntimeError) as error:
        return str(error)
    return native.unsupported(dtype)


def linear_lowrank(x, w, u, v, scaling, bias, lowrank_bias, seed, dropout_p):
    """y = x w^T + bias through torch (oneDNN), then y += scaling * drop(u v^T) + scaling * lowrank_bias in place, in C++."""
    y = base_product(x, w, bias)
    add = None if lowrank_bias is None else lowrank_bias.float() * scaling
    module().add_lowrank(*native.add_lowrank_arguments(y, u, v, scaling, add, seed, dropout_p))
    return y
