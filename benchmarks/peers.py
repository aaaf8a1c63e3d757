"""Other people's packages: which are there, why the others are not, and the few lines that call each.

None of it is kept here. Kernels that come in no package of their own are serving.py's.
"""

import contextlib
import functools
import importlib
import importlib.metadata
import io
import logging
import warnings

import torch

PACKAGES = {"peft": "peft", "bitsandbytes": "bitsandbytes", "torchao": "torchao", "gemlite": "gemlite", "liger_kernel": "liger-kernel", "unsloth": "unsloth"}
CUDA_ONLY = ("gemlite", "unsloth")


@contextlib.contextmanager
def _silence():
    """While somebody else's package is imported."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


@functools.lru_cache(maxsize=None)
def _load(name):
    """(module, None) or (None, why not). Some of them print and warn when they are imported."""
    try:
        importlib.metadata.version(PACKAGES[name])
    except importlib.metadata.PackageNotFoundError:
        return None, f"{PACKAGES[name]} is not installed"
    if name in CUDA_ONLY and not torch.cuda.is_available():
        return None, f"{PACKAGES[name]} needs a GPU"
    try:
        with _silence():
            return importlib.import_module(name), None
    except BaseException as error:  # a package may end the interpreter where it misses something
        if isinstance(error, KeyboardInterrupt):
            raise
        return None, f"{PACKAGES[name]} does not import: {type(error).__name__}: {str(error).splitlines()[0][:100] if str(error) else ''}"


def why_not(name):
    """None where the package can be used, else the reason."""
    return _load(name)[1]


def module(name):
    return _load(name)[0]


def versions():
    found = {}
    for name, package in PACKAGES.items():
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


# -- LoRA ----------------------------------------------------------------------------------------------------------------------------


def lora(folder):
    """{name: function (x, W, A, B, scaling) -> y, or why not}."""
    found = {}
    if reason := why_not("unsloth"):
        found["Unsloth"] = reason
    else:
        fast = importlib.import_module("unsloth.kernels.fast_lora")
        found["Unsloth"] = lambda x, W, A, B, s: fast.LoRA_W.apply(x, W, None, A, B, s)
    found["Liger"] = why_not("liger_kernel") or "has no adapter of its own; it takes part in whole models"
    found["LoRAFusion"] = "needs a GPU" if not torch.cuda.is_available() else "no adapter is written for it yet: its operators were never at hand"
    return found


# -- NF4 -----------------------------------------------------------------------------------------------------------------------------


def torchao_nf4(N, K):
    """(to_nf4, linear_nf4), or why not for a weight (N, K)."""
    if reason := why_not("torchao"):
        return reason
    if N * K % (64 * 256):
        return "it takes weights of whole blocks of 64 x 256 elements alone"
    for path in ("torchao.quantization.quantize_.workflows.nf4.nf4_tensor", "torchao.dtypes.nf4tensor"):
        with contextlib.suppress(ImportError), _silence():
            found = importlib.import_module(path)
            return found.to_nf4, found.linear_nf4
    return f"torchao {versions()['torchao']} has no NF4 tensor where one is looked for"
