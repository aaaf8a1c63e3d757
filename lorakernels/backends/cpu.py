"""The native C++ kernels for the CPU (csrc/cpu): AVX-512, AVX2 or portable by what the processor has."""

import ctypes
import functools
from pathlib import Path

import torch

from . import native, reference
from .nf4_path import FEW, SLABS, nf4_path
from .reference import nf4_product, stack_shape, summed


@functools.lru_cache(maxsize=None)
def module():
    """lorakernels._cpu, set to share work over torch's own thread pool."""
    _cpu = native.load("_cpu")
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        _cpu.use_pool(*(ctypes.cast(function, ctypes.c_void_p).value for function in (library.torch_parallel_for, library.torch_get_num_threads)))
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


@functools.lru_cache(maxsize=None)
def left_to_torch(dtype):
    """Whether torch has a library for products of this dtype. Half precision that oneDNN does not take on this processor runs in loops of
    torch's own. bfloat16 with AVX2, to `linear` in C++ and float32 through torch, ms with two threads on a Zen 3, 4096x14336: 1 row 8.5 to 7.6
    and 17, 4 rows 27 to 11 and 89, 16 rows 96 to 34 and 105, 64 rows 390 to 83 and 147; 2048x2048: 1 row 0.50 to 0.36 and 1.3, 256 rows 109 to 14
    and 16. float16 with AVX-512 goes the same way, unmeasured."""
    if dtype == torch.float32 or module().isa() == "portable":
        return True
    supported = {torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported, torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported}
    return torch.backends.mkldnn.is_available() and supported[dtype]()


def base_product(x, w, bias):
    """x w^T + bias: F.linear, or, where torch has no library for half precision, sums in float32 in C++."""
    return reference.base_product(x, w, bias) if left_to_torch(x.dtype) else linear(x, w, bias)


def linear(x, w, bias):
    """x w^T + bias of half-precision operands, the sums in float32, in C++."""
    y = x.new_empty(x.shape[0], w.shape[0])
    module().linear(*y.shape, x.shape[1], native.matrix(x), native.matrix(w), native.matrix(y), native.vector(bias))
    return y


def lowrank_down(x, A, seed, dropout_p):
    """u (M,R) = drop(x) A^T, float32, in one pass over x, in C++."""
    u = x.new_empty(x.shape[0], sum(a.shape[0] for a in A), dtype=torch.float32)
    for parts, columns, seeds in native.lowrank_down_groups(A, u, seed):
        module().lowrank_down(*native.lowrank_down_arguments(x, parts, columns, seeds, dropout_p))
    return u


def linear_lowrank(x, w, u, v, scaling, bias, lowrank_bias, seed, dropout_p):
    """y = x w^T + bias through torch (oneDNN) or, where that has no such product, in C++; then y += scaling * (drop(u v^T) + lowrank_bias) in place, in C++."""
    y = base_product(x, w, bias)
    module().add_lowrank(*native.add_lowrank_arguments(y, u, v, scaling, lowrank_bias, seed, dropout_p))
    return y


def lowrank_grad(dy, x, u, B, seed, dropout_p, scaling, dtype):
    """du and dB in one pass over dy, then dA in one pass over x, in C++."""
    du, dA, dB = native.lowrank_grad_results(dy, x, u, B, dtype)
    module().lowrank_grad(*native.lowrank_grad_arguments(dy, x, u, B, du, dA, dB, scaling, seed, dropout_p))
    return du, dA, dB


# -- NF4 -----------------------------------------------------------------------------------------------------------------------

SLAB = 8 << 20  # bytes of W that are dense at a time: within the last cache, and columns enough that x is not read too often


@functools.lru_cache(maxsize=None)
def multiplied_in(dtype):
    """The dtype that torch's product runs in: bfloat16 where the processor has instructions for it, else float32, which is
    faster than torch's emulation of a half-precision product by two orders of magnitude, and rounds less."""
    return dtype if dtype == torch.bfloat16 and torch.cpu._is_avx512_bf16_supported() else torch.float32


def dequantize_nf4(packed, absmax, nested, N, K, blocksize, nested_blocksize, n0, k0, rows, columns, dtype):
    """W[n0 : n0 + rows, k0 : k0 + columns]: code * absmax in float32, rounded once to dtype, in C++."""
    out = packed.new_empty(rows, columns, dtype=dtype)
    weight = native.nf4_weight(packed, absmax, nested, N, K, blocksize, nested_blocksize)
    module().dequantize_nf4(weight, n0, k0, rows, columns, native.matrix(out))
    return out


def quantize_nf4(weight, blocksize):
    """Codes, two to a byte, and float32 absmax of the weight's blocks, in C++."""
    packed, absmax = native.quantize_nf4_results(weight, blocksize)
    module().quantize_nf4(*native.quantize_nf4_arguments(weight, blocksize, packed, absmax))
    return packed, absmax


def nf4_linear_lowrank(
    x, packed, absmax, nested, N, K, blocksize, nested_blocksize, turned, u, v, scaling, bias, lowrank_bias, seed, dropout_p
):  # fmt: skip
    """linear_lowrank with W in NF4: few rows meet the packed codes in C++, more meet tiles of W that are decoded on their way; or
    a slab at a time is decoded in C++ and multiplied by torch (oneDNN). Then the low-rank term in place, in C++."""
    weight = native.nf4_weight(packed, absmax, nested, N, K, blocksize, nested_blocksize)
    path = nf4_path(x.shape[0], N, K, x.dtype, module().isa(), turned)
    if path != SLABS:
        y = x.new_empty(x.shape[0], K if turned else N)
        lowrank = native.add_lowrank_arguments(y, u, v, scaling, lowrank_bias, seed, dropout_p)
        arguments = (weight, native.matrix(x), native.vector(bias), *lowrank)
        module().nf4_linear(*arguments) if path == FEW else module().nf4_product(turned, *arguments)
        return y
    decode = lambda n0, k0, out: module().dequantize_nf4(weight, n0, k0, *out.shape, native.matrix(out))  # noqa: E731
    y = nf4_product(x, (N, K), turned, bias, decode, SLAB, multiplied_in(x.dtype))
    if u is not None:
        module().add_lowrank(*native.add_lowrank_arguments(y, u, v, scaling, lowrank_bias, seed, dropout_p))
    return y


# -- many adapters ---------------------------------------------------------------------------------------------------------------


def multi_route(ids, E):
    """order and starts of adapter ids (M,), int32 or int64: counted and put in their places, in C++."""
    order, starts = ids.new_empty(ids.shape, dtype=torch.int64), ids.new_empty(E + 1, dtype=torch.int64)
    module().multi_route(ids.data_ptr(), ids.dtype == torch.int64, len(ids), ids.stride(0), E, order.data_ptr(), starts.data_ptr())
    return order, starts


def multi_lowrank_down(x, A, order, starts, tiles, ranks, pages, seed, thresholds, splits):
    """u (splits,M,R), whose sum is drop(x) A_e^T of each row's adapter e, float32, not written elsewhere, in C++: all of it in the first."""
    (E, R, K), parts = A.shape, 1
    if pages is not None:
        parts, (E, R) = R, pages.shape
    u = x.new_empty(splits, x.shape[0], parts * R, dtype=torch.float32)
    if splits > 1:
        u[1:].zero_()
    module().multi_lowrank_down(native.segments(E, R, order, starts, ranks, pages, seed, thresholds), K, parts, native.matrix(x), native.stack(A), native.matrix(u[0]))
    return u


def multi_add_lowrank(y, u, B, scaling, order, starts, tiles, ranks, pages, seed, thresholds):
    """y (M,N) += scaling_e * drop(u B_e^T) of each row's adapter e, u (S,M,R) summed over S, in place, in C++; rows without adapter are
    not touched, those whose id is none become NaN."""
    E, N, R = stack_shape(B, pages)
    module().multi_add_lowrank(native.segments(E, R, order, starts, ranks, pages, seed, thresholds, scaling), N, native.matrix(y), native.matrix(summed(u)), native.stack(B))


def multi_lowrank_grad(dy, x, u, B, scaling, order, starts, tiles, ranks, pages, seed, thresholds, dtype):
    """du, dA and dB of every adapter, each one's rows in their order, in C++."""
    E, N, R = stack_shape(B, pages)
    K = 0 if x is None else x.shape[1]
    du = dy.new_empty(dy.shape[0], R, dtype=torch.float32)
    dA = None if x is None else dy.new_zeros(E, R, K, dtype=dtype)
    dB = None if u is None else dy.new_zeros(E, N, R, dtype=dtype)
    module().multi_lowrank_grad(
        native.segments(E, R, order, starts, ranks, pages, seed, thresholds, scaling), N, K,
        native.matrix(dy), native.matrix(x), native.matrix(u), native.stack(B), native.matrix(du), native.stack(dA), native.stack(dB),
    )  # fmt: skip
    return du, *(dy.new_empty(0, dtype=dtype) if t is None else t for t in (dA, dB))
