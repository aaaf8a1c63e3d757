"""The Triton kernels' launchers: allocate, pick the tile, launch on the tensor's own device and stream.

In the interpreter (TRITON_INTERPRET=1 before Triton is imported) they run on CPU tensors, for tests.
"""

import contextlib
import importlib
import os

import torch

from ... import dropout
from ..native import unsupported
from ..reference import base_product, lowrank_down, lowrank_grad_down, lowrank_grad_up  # noqa: F401  torch's products until Triton's win


def why_not(device_type, dtype):
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device_type != ("cpu" if interpreted else "cuda"):
        return "in the interpreter it runs on CPU tensors only" if interpreted else f"runs on GPU tensors, not on {device_type}"
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"{error}; pip install 'lorakernels[triton]'"
    if not interpreted and not torch.cuda.is_available():
        return "no GPU is visible"
    return unsupported(dtype)


def on_device(tensor):
    """Launch on the tensor's device, whichever is current."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def terms(y_dtype, v_dtype):
    """How operands enter a product: see language.dot_terms."""
    if y_dtype == torch.float32:
        return 3
    return 2 if v_dtype == torch.float32 else 1


def linear_lowrank(x, w, u, v, scaling, bias, lowrank_bias, seed, dropout_p):
    """y = x w^T + bias through torch, then y += scaling * (drop(u v^T) + lowrank_bias) in place, in Triton."""
    from . import kernels, tiles

    y = base_product(x, w, bias)
    M, N, R = *y.shape, u.shape[1]
    if M == 0:
        return y
    tile = tiles.add_lowrank(M, N, R, y.dtype != torch.float32)
    grid = (-(-M // tile.BLOCK_M) * -(-N // tile.BLOCK_N),)
    with on_device(y):
        kernels.add_lowrank[grid](
            y, u, v, lowrank_bias if lowrank_bias is not None else u, seed if seed is not None else u,
            M, N, R,
            scaling, dropout.threshold(dropout_p), dropout.scale(dropout_p),
            y.stride(0), u.stride(0), v.stride(0), v.stride(1), 0 if lowrank_bias is None else lowrank_bias.stride(0),
            lowrank_bias is not None, seed is not None, terms(y.dtype, v.dtype),
            **tile._asdict(),
        )  # fmt: skip
    return y
