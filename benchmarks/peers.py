"""Other people's packages: which are there, why the others are not, and the few lines that call each.

What is installed is imported by name. Kernels that come in no package of their own (vLLM's and SGLang's Triton operators) are
imported from the folder that --peers names: `DIR/vllm` and `DIR/sglang` as in their repositories. None of it is kept here.
"""

import contextlib
import functools
import importlib
import importlib.metadata
import io
import logging
import sys
import warnings
from pathlib import Path

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


@functools.lru_cache(maxsize=None)
def _from_folder(folder, path):
    """A module of the peers' folder, or why not."""
    if not torch.cuda.is_available():
        return "needs a GPU"
    if folder is None:
        return "no folder of peers was named (--peers)"
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        return importlib.import_module(path)
    except Exception as error:
        return f"{path} in {Path(folder).name}: {type(error).__name__}: {error}"


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


# -- many adapters -------------------------------------------------------------------------------------------------------------------


def multi(folder):
    """{name: maker (A (E,R,K), B (E,N,R), ids (M,), scaling) -> (function y, x: y += its low-rank part), or why not}."""
    found = {}
    shrink = _from_folder(folder, "vllm.lora.ops.triton_ops")
    found["vLLM"] = shrink if isinstance(shrink, str) else functools.partial(_vllm, shrink)
    triton_ops = _from_folder(folder, "sglang.srt.lora.triton_ops")
    found["SGLang"] = triton_ops if isinstance(triton_ops, str) else functools.partial(_sglang, triton_ops)
    found["Punica"] = "needs a GPU" if not torch.cuda.is_available() else "no adapter is written for it yet: its operators were never at hand"
    return found


def _vllm(ops, A, B, ids, scaling):
    E, R, K = A.shape
    M, device = len(ids), ids.device
    order = torch.argsort(ids, stable=True).int()
    active, counts = torch.unique(ids, return_counts=True)
    lora_ids, number = torch.full((E + 1,), -1, dtype=torch.int32, device=device), torch.zeros(E + 1, dtype=torch.int32, device=device)
    begins = torch.zeros(E + 2, dtype=torch.int32, device=device)
    lora_ids[: len(active)], number[: len(active)], begins[1 : len(active) + 1] = active.int(), counts.int(), counts.cumsum(0).int()
    metadata = (ids.int(), order, number, begins, lora_ids, torch.zeros(1, dtype=torch.bool), torch.tensor([len(active)], dtype=torch.int32))
    a, b = [A[:, None].contiguous()], [B[:, None].contiguous()]

    def add(y, x):
        u = torch.empty(1, M, R, dtype=torch.float32, device=device)
        ops.lora_shrink(x, a, u, *metadata, scaling)
        ops.lora_expand(u, b, y, *metadata, offset_start=0, add_inputs=True)
        return y

    return add


def _sglang(ops, A, B, ids, scaling):
    from types import SimpleNamespace

    order = torch.argsort(ids, stable=True)
    active, counts = torch.unique(ids, return_counts=True)
    device, E = ids.device, len(A)
    batch = SimpleNamespace(
        bs=len(active), num_segments=len(active), max_len=int(counts.max()), seg_lens=counts.int(), seg_indptr=torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int(),
        weight_indices=active.int(), lora_ranks=torch.full((E,), A.shape[1], dtype=torch.int32, device=device),
        scalings=torch.full((E,), scaling, device=device), permutation=order.int(), use_cuda_graph=False,
    )  # fmt: skip

    def add(y, x):
        return ops.sgemm_lora_b_fwd(ops.sgemm_lora_a_fwd(x, A, batch), B, batch, y)

    return add
