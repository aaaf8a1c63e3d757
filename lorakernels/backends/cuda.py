"""The CUDA C++ kernels (csrc/cuda), sm_80 and later. The launch goes to the tensor's own device and current stream."""

import functools

import torch

from . import native, reference, triton
from .nf4_path import FEW, FUSED, nf4_path
from .reference import base_product, multi_route, nf4_product  # noqa: F401


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


def architecture(tensor):
    return torch.cuda.get_device_capability(tensor.device)


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
    workspace = dy.new_empty(module().lowrank_grad_workspace(*dy.shape, K, R, dy.dtype != torch.float32, x is not None, u is not None), dtype=torch.float32)
    launch("lowrank_grad", dy, native.lowrank_grad_arguments(dy, x, u, B, du, dA, dB, scaling, seed, dropout_p, workspace))
    return du, dA, dB


# -- NF4 -----------------------------------------------------------------------------------------------------------------------

SLAB = 24 << 20  # bytes of W that are dense at a time: they stay in the second-level cache until they are multiplied


def dequantize_nf4(packed, absmax, nested, N, K, blocksize, nested_blocksize, n0, k0, rows, columns, dtype):
    """W[n0 : n0 + rows, k0 : k0 + columns]: code * absmax in float32, rounded once to dtype, in CUDA C++."""
    out = packed.new_empty(rows, columns, dtype=dtype)
    weight = native.nf4_weight(packed, absmax, nested, N, K, blocksize, nested_blocksize)
    launch("dequantize_nf4", packed, (weight, n0, k0, rows, columns, native.matrix(out)))
    return out


def quantize_nf4(weight, blocksize):
    """Codes, two to a byte, and float32 absmax of the weight's blocks, in CUDA C++."""
    packed, absmax = native.quantize_nf4_results(weight, blocksize)
    launch("quantize_nf4", weight, native.quantize_nf4_arguments(weight, blocksize, packed, absmax))
    return packed, absmax


def nf4_linear_lowrank(
    x, packed, absmax, nested, N, K, blocksize, nested_blocksize, turned, u, v, scaling, bias, lowrank_bias, seed, dropout_p
):  # fmt: skip
    """linear_lowrank with W in NF4. Few rows meet the packed codes in CUDA C++, the low-rank term with them; more of them in
    Triton's fused product, where Triton is usable; many a slab at a time, decoded in CUDA C++ and multiplied by torch
    (cuBLAS), then the low-rank term in place, in CUDA C++."""
    weight = native.nf4_weight(packed, absmax, nested, N, K, blocksize, nested_blocksize)
    path = nf4_path(x.shape[0], N, K, x.dtype, architecture(x), turned)
    if path == FEW and seed is None:  # a mask is drawn for dx alone
        if K % 64 == 0 and (x.stride(1) != 1 or (x.stride(0) * x.element_size() | x.data_ptr()) % 16):
            x = x.clone(memory_format=torch.contiguous_format)  # 16 rows at most: their copy costs less than reading them bit by bit
        y = x.new_empty(x.shape[0], N)
        lowrank = native.add_lowrank_arguments(y, u, v, scaling, lowrank_bias, seed, dropout_p)
        launch("nf4_linear", x, (weight, native.matrix(x), native.vector(bias), *lowrank))
        return y
    if path == FUSED and triton.why_not(x.device.type, x.dtype) is None:
        return triton.nf4_linear_lowrank_fused(
            x, packed, absmax, nested, N, K, blocksize, nested_blocksize, turned, u, v, scaling, bias, lowrank_bias, seed, dropout_p
        )  # fmt: skip
    decode = lambda n0, k0, out: launch("dequantize_nf4", x, (weight, n0, k0, *out.shape, native.matrix(out)))  # noqa: E731
    y = nf4_product(x, (N, K), turned, bias, decode, SLAB)
    if u is not None:
        launch("add_lowrank", y, native.add_lowrank_arguments(y, u, v, scaling, lowrank_bias, seed, dropout_p))
    return y


# -- many adapters: Triton's kernels, or plain torch where there is no Triton ------------------------------------------------------


def _many(tensor):
    return triton if triton.why_not(tensor.device.type, tensor.dtype) is None else reference


def multi_lowrank_down(x, A, order, starts, tiles, ranks, pages, seed, thresholds, splits):
    """u (splits,M,R), whose sum is drop(x) A_e^T of each row's adapter e, by the triton backend."""
    return _many(x).multi_lowrank_down(x, A, order, starts, tiles, ranks, pages, seed, thresholds, splits)


def multi_add_lowrank(y, u, B, scaling, order, starts, tiles, ranks, pages, seed, thresholds):
    """y (M,N) += scaling_e * drop(u B_e^T) of each row's adapter e, u (S,M,R) summed over S, in place, by the triton backend."""
    return _many(y).multi_add_lowrank(y, u, B, scaling, order, starts, tiles, ranks, pages, seed, thresholds)


def multi_lowrank_grad(dy, x, u, B, scaling, order, starts, tiles, ranks, pages, seed, thresholds, dtype):
    """du, dA and dB of every adapter, by the triton backend."""
    return _many(dy).multi_lowrank_grad(dy, x, u, B, scaling, order, starts, tiles, ranks, pages, seed, thresholds, dtype)
