"""The CUDA C++ kernels (csrc/cuda), sm_80 and later. The launch goes to the tensor's own device and current stream."""

import functools

import torch

from . import native
from .reference import base_product


@functools.lru_cache(maxsize=None)
def module():
    """lorakernels._cuda, once its linked-in runtime is known to be served by the driver."""
    _cuda = native.load("_cuda")
    runtime, driver = _cuda.versions()
    if driver and runtime // 1000 > driver // 1000:
        raise ImportError(f"lorakernels._cuda was built with CUDA {runtime // 1000}, but the driver serves CUDA {driver // 1000}; update the driver or build with an older toolkit")
    return _cuda


def why_not(device_type, dtype):
    if device_type != "cuda":
        return f"runs on CUDA tensors, not on {device_type}"
    try:
        module()
    except ImportError as error:
        return str(error)
    if torch.version.cuda is None:
        return "this torch has no CUDA"
    if not torch.cuda.is_available():
        return "no CUDA device is visible"
    if torch.cuda.get_device_capability() < (8, 0):
        return f"needs compute capability 8.0 or later, found {'.'.join(map(str, torch.cuda.get_device_capability()))}"
    return native.unsupported(dtype)


def launch(name, tensor, arguments):
    """One call of the native module, on the tensor's device and its current stream."""
    with torch.cuda.device(tensor.device):
        getattr(module(), name)(torch.cuda.current_stream(tensor.device).cuda_stream, *arguments)


def lowrank_down(x, A, seed, dropout_p):
    """u (M,R) = drop(x) A^T, float32, in one launch for the A's that share x, in CUDA C++."""
    u = x.new_empty(x.shape[0], sum(a.shape[0] for a in A), dtype=torch.float32)
    for parts, columns, seeds in native.lowrank_down_groups(A, u, seed):
        launch("lowrank_down", x, native.lowrank_down_arguments(x, parts, columns, seeds, dropout_p))
    return u


def linear_lowrank(x, w, u, v, scaling, bias, lowrank_bias, seed, dropout_p):
    """y = x w^T + bias through torch (cuBLAS), then y += scaling * (drop(u v^T) + lowrank_bias) in place, in CUDA C++."""
    y = base_product(x, w, bias)
    launch("add_lowrank", y, native.add_lowrank_arguments(y, u, v, scaling, lowrank_bias, seed, dropout_p))
    return y


def lowrank_grad(dy, x, u, B, seed, dropout_p, scaling, dtype):
    """du and the parts of dB in one pass over dy, the parts of dA in one over x, then both sums in one launch, in CUDA C++."""
    du, dA, dB = native.lowrank_grad_results(dy, x, u, B, dtype)
    K, R = 0 if x is None else x.shape[1], (u if B is None else B).shape[1]
    workspace = dy.new_empty(module().lowrank_grad_workspace(*dy.shape, K, R, x is not None, u is not None), dtype=torch.float32)
    launch("lowrank_grad", dy, native.lowrank_grad_arguments(dy, x, u, B, du, dA, dB, scaling, seed, dropout_p, workspace))
    return du, dA, dB
