"""What the two native backends share: how tensors become the arguments of csrc/bindings/arguments.h."""

import importlib
import json
from pathlib import Path

import torch

from .. import dropout

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


def _vector(tensor):
    return (0, 0, 0) if tensor is None else (tensor.data_ptr(), DTYPES[tensor.dtype], tensor.stride(0))


def add_lowrank_arguments(y, u, v, scaling, bias, seed, dropout_p):
    dropped = (0, 0, 1.0) if seed is None else (seed.data_ptr(), dropout.threshold(dropout_p), dropout.scale(dropout_p))
    return (
        y.shape[0], y.shape[1], u.shape[1],
        y.data_ptr(), DTYPES[y.dtype], y.stride(0),
        u.data_ptr(), u.stride(0),
        v.data_ptr(), DTYPES[v.dtype], v.stride(0), v.stride(1),
        *_vector(bias), scaling, *dropped,
    )  # fmt: skip
