"""The native C++ kernels for the CPU (csrc/cpu): AVX-512, AVX2 or portable by what the processor has."""

import ctypes
import functools
from pathlib import Path

import torch

from . import native
from .reference import base_product


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


def lowrank_down(x, A, seed, dropout_p):
    """u (M,R) = drop(x) A^T, float32, in one pass over x, in C++."""
    u = x.new_empty(x.shape[0], sum(a.shape[0] for a in A), dtype=torch.float32)
    for parts, columns, seeds in native.lowrank_down_groups(A, u, seed):
        module().lowrank_down(*native.lowrank_down_arguments(x, parts, columns, seeds, dropout_p))
    return u


def linear_lowrank(x, w, u, v, scaling, bias, lowrank_bias, seed, dropout_p):
    """y = x w^T + bias through torch (oneDNN), then y += scaling * (drop(u v^T) + lowrank_bias) in place, in C++."""
    y = base_product(x, w, bias)
    module().add_lowrank(*native.add_lowrank_arguments(y, u, v, scaling, lowrank_bias, seed, dropout_p))
    return y


def lowrank_grad(dy, x, u, B, seed, dropout_p, scaling, dtype):
    """du and dB in one pass over dy, then dA in one pass over x, in C++."""
    du, dA, dB = native.lowrank_grad_results(dy, x, u, B, dtype)
    module().lowrank_grad(*native.lowrank_grad_arguments(dy, x, u, B, du, dA, dB, scaling, seed, dropout_p))
    return du, dA, dB
