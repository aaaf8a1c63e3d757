"""What the two native backends share: how tensors become the arguments of csrc/bindings/arguments.h."""

import importlib
import json
from pathlib import Path

import torch

from .. import dropout
from ..pages import on_huge_pages

PACKAGE = Path(__file__).parent.parent
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # DType in csrc/params.h


def build_info():
    """What setup.py built and left out, and why; None in a source tree that was never built."""
    try:
        return json.loads((PACKAGE / "_build.json").read_text())
    except FileNotFoundError:
        return None


def load(name):
    """The native module `lorakernels.<name>`, or ImportError with the remedy."""
    try:
        return importlib.import_module(f"lorakernels.{name}")
    except ImportError as error:
        info = build_info()
        if info is None:
            raise ImportError(f"lorakernels.{name} is not built: this is a source tree; run `pip install -e .` in {PACKAGE.parent}") from error
        raise ImportError(f"lorakernels.{name} is not usable: {info['left_out'].get(name, error)}") from error


def unsupported(dtype):
    """None, or why a base of this dtype has no native kernel."""
    if dtype in DTYPES:
        return None
    return f"has float32, bfloat16 and float16 kernels, not {str(dtype).removeprefix('torch.')}"


def matrix(tensor):
    """Tensor in csrc/bindings/arguments.h."""
    return (0, 0, 0, 0) if tensor is None else (tensor.data_ptr(), DTYPES[tensor.dtype], *tensor.stride())


def vector(tensor):
    return (0, 0, 0, 0) if tensor is None else (tensor.data_ptr(), DTYPES[tensor.dtype], 0, tensor.stride(0))


def nf4_weight(packed, absmax, nested, N, K, blocksize, nested_blocksize):
    """NF4 in csrc/bindings/arguments.h."""
    shifts = blocksize.bit_length() - 1, nested_blocksize.bit_length() - 1
    return (packed.data_ptr(), absmax.data_ptr(), 0 if nested is None else nested.data_ptr(), N, K, *shifts)


def quantize_nf4_results(weight, blocksize):
    """Fresh packed and absmax for quantize_nf4."""
    count = weight.numel()
    packed = on_huge_pages(weight.new_empty((count + 1) // 2, dtype=torch.uint8))
    return packed, weight.new_empty(-(-count // blocksize), dtype=torch.float32)


def quantize_nf4_arguments(weight, blocksize, packed, absmax):
    return (weight.data_ptr(), DTYPES[weight.dtype], weight.numel(), blocksize.bit_length() - 1, packed.data_ptr(), absmax.data_ptr())


def drop(seed, dropout_p):
    return (0, 0, 1.0) if seed is None else (seed.data_ptr(), dropout.threshold(dropout_p), dropout.scale(dropout_p))


def add_lowrank_arguments(y, u, v, scaling, bias, seed, dropout_p):
    return (*y.shape, 0 if u is None else u.shape[1], matrix(y), matrix(u), matrix(v), vector(bias), scaling, drop(seed, dropout_p))


def lowrank_down_arguments(x, A, u, seed, dropout_p):
    return (*x.shape, matrix(x), matrix(u), [(matrix(a), a.shape[0]) for a in A], drop(seed, dropout_p))


def lowrank_grad_arguments(dy, x, u, B, du, dA, dB, scaling, seed, dropout_p, workspace=None):
    M, N = dy.shape
    R = u.shape[1] if B is None else B.shape[1]
    return (
        M, N, 0 if x is None else x.shape[1], R,
        matrix(dy), matrix(x), matrix(u), matrix(B), matrix(None if B is None else du), matrix(None if x is None else dA),
        matrix(None if u is None else dB), scaling, drop(seed, dropout_p), 0 if workspace is None else workspace.data_ptr(),
    )  # fmt: skip


def lowrank_grad_results(dy, x, u, B, dtype):
    """Fresh du, dA, dB for lowrank_grad; what is not asked for is empty."""
    M, N = dy.shape
    R = u.shape[1] if B is None else B.shape[1]
    new = dy.new_empty if M else dy.new_zeros  # no kernel runs over no rows
    du = new((0,) if B is None else (M, R), dtype=torch.float32)
    dA = new((0,) if x is None else (R, x.shape[1]), dtype=dtype)
    dB = new((0,) if u is None else (N, R), dtype=dtype)
    return du, dA, dB


MAX_PARTS = 8  # csrc/params.h: A's that one launch of lowrank_down takes


def lowrank_down_groups(A, u, seed):
    """lowrank_down's A's in groups that one launch takes: (A's, their columns of u, their seeds)."""
    if len(A) <= MAX_PARTS:
        return ((A, u, seed),)
    groups, column = [], 0
    for i in range(0, len(A), MAX_PARTS):
        some = A[i : i + MAX_PARTS]
        ranks = sum(a.shape[0] for a in some)
        groups.append((some, u[:, column : column + ranks], None if seed is None else seed[i : i + MAX_PARTS]))
        column += ranks
    return groups


# -- many adapters ---------------------------------------------------------------------------------------------------------------


def address(tensor):
    return 0 if tensor is None else tensor.data_ptr()


def segments(E, R, order, starts, ranks, pages, seed, thresholds, scaling=None):
    """Segmented in csrc/bindings/arguments.h."""
    paged = (0, 0) if pages is None else (pages.data_ptr(), pages.stride(0))
    return (len(order), E, R, *map(address, (order, starts, ranks)), *paged, *map(address, (seed, thresholds, scaling)))


def stack(tensor):
    """Stacked in csrc/bindings/arguments.h, of (E, rows, columns)."""
    return ((0, 0, 0, 0), 0) if tensor is None else ((tensor.data_ptr(), DTYPES[tensor.dtype], *tensor.stride()[1:]), tensor.stride(0))
