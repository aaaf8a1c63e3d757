"""The CUDA C++ kernels (csrc/cuda), sm_80 and later. The launch goes to the tensor's own device and current stream."""

import functools

import torch

from . import native
from .reference import base_product, lowrank_down, lowrank_grad_down, lowrank_grad_up  # noqa: F401  torch's products until native ones win


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


def linear_lowrank(x, w, u, v, scaling, bias, lowrank_bias, seed, dropout_p):
    """y = x w^T + bias through torch (cuBLAS), then y += scaling * drop(u v^T) + scaling * lowrank_bias in place, in CUDA C++."""
    y = base_product(x, w, bias)
    add = None if lowrank_bias is None else lowrank_bias.float() * scaling
    with torch.cuda.device(y.device):
        stream = torch.cuda.current_stream(y.device).cuda_stream
        module().add_lowrank(stream, *native.add_lowrank_arguments(y, u, v, scaling, add, seed, dropout_p))
    return y
