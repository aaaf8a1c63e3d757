"""Products on tensors whose last byte lies before memory that nobody may touch: a process of its own, which a read or a write
behind an end would end. `python tests/guarded.py cpu` runs the native kernels, `... emulated MODULE` those of CUDA C++."""

import ctypes
import importlib.util
import mmap
import sys

import interpreter
import torch

from lorakernels import backends, functional
from lorakernels.backends import cpu, cuda

kept = []
libc = ctypes.CDLL(None, use_errno=True)


def guarded(tensor):
    """The same values, contiguous, before a page without access."""
    count = tensor.numel() * tensor.element_size()
    if not count:
        return tensor
    size = -(-count // mmap.PAGESIZE) * mmap.PAGESIZE + mmap.PAGESIZE
    memory = mmap.mmap(-1, size)
    kept.append(memory)
    last = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + size - mmap.PAGESIZE
    if libc.mprotect(ctypes.c_void_p(last), mmap.PAGESIZE, 0):
        raise OSError(ctypes.get_errno(), "mprotect")
    out = torch.frombuffer(memory, dtype=torch.uint8, count=count, offset=size - mmap.PAGESIZE - count).view(tensor.dtype).view(tensor.shape)
    return out.copy_(tensor)


real = torch.Tensor.new_empty, torch.nn.functional.linear
torch.Tensor.new_empty = lambda self, *size, **more: guarded(real[0](self, *size, **more))
torch.nn.functional.linear = lambda *operands: guarded(real[1](*operands))  # to which a kernel then adds


def layers(M, N, K, R, dtype, adapter):
    x, dy, W, bias = (guarded(torch.randn(*shape).to(dtype)) for shape in ((M, K), (M, N), (N, K), (N,)))
    A, B, lora_bias = (guarded(torch.randn(*shape).to(adapter)) for shape in ((R, K), (N, R), (N,)))
    for weight in (W, functional.quantize_nf4(W), functional.quantize_nf4(W, 32, False)):
        if weight is not W:
            weight = weight._replace(packed=guarded(weight.packed), absmax=guarded(weight.absmax), nested=None if weight.nested is None else guarded(weight.nested))
        for p in (0.0, 0.4):
            leaves = [t.requires_grad_() for t in (x, A, B)]
            functional.lora_linear(leaves[0], weight, leaves[1], leaves[2], 0.5, bias, lora_bias=lora_bias, dropout_p=p).backward(dy)
        with torch.no_grad():
            functional.nf4_linear(x, weight, bias) if weight is not W else None


def half_bases(M, N, K):
    """The product that stands in for torch's where that has no library for half precision."""
    for dtype in (torch.bfloat16, torch.float16):
        x, W, turned, bias = (guarded(torch.randn(*shape).to(dtype)) for shape in ((M, K), (N, K), (K, N), (N,)))
        for w in (W, turned.t()):
            cpu.linear(x, w, bias)


def many(M, N, K, R, dtype, adapter):
    x, dy, W = (guarded(torch.randn(*shape).to(dtype)) for shape in ((M, K), (M, N), (N, K)))
    A, B, ids = guarded(torch.randn(3, R, K).to(adapter)), guarded(torch.randn(3, N, R).to(adapter)), guarded(torch.arange(M) % 4 - 1)
    ranks, scaling = guarded(torch.tensor([1, R, (R + 1) // 2])), guarded(torch.ones(3))
    for p in (0.0, [0.0, 0.4, 0.7]):
        leaves = [t.requires_grad_() for t in (x, A, B)]
        functional.multi_lora_linear(leaves[0], W, leaves[1], leaves[2], ids, scaling, ranks=ranks, dropout_p=p).backward(dy)
    pages = guarded(torch.randperm(3 * R).view(3, R))
    rows_A, rows_B = guarded(torch.randn(3 * R, K).to(adapter)), guarded(torch.randn(3 * R, N).to(adapter))
    functional.multi_lora_linear(x.requires_grad_(), W, rows_A, rows_B, ids, scaling, ranks=ranks, pages=pages).backward(dy)


def main(which, module=None):
    if which == "emulated":
        if backends.why_not("triton", "cpu", torch.float32) is None:  # what CUDA C++ leaves to Triton runs in its interpreter
            interpreter.repair()
        spec = importlib.util.spec_from_file_location("_cuda_emulated", module)
        emulated = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(emulated)
        cuda.module, cuda.architecture = lambda: emulated, lambda tensor: (9, 0)
        cuda.launch = lambda name, tensor, arguments: getattr(emulated, name)(0, *arguments)
        backends.chosen = lambda *_: cuda
    float32, bfloat16, float16 = torch.float32, torch.bfloat16, torch.float16
    for dtype, adapter in ((float32, float32), (bfloat16, float32), (bfloat16, bfloat16), (float16, float32)):
        for M, N, K, R in ((1, 16, 64, 8), (4, 24, 136, 3), (16, 40, 192, 16), (5, 17, 75, 2), (33, 9, 7, 1), (37, 64, 128, 20), (7, 24, 100, 8)):
            layers(M, N, K, R, dtype, adapter)
            if which == "cpu":
                many(M, N, K, R, dtype, adapter)
        if which == "cpu":
            layers(64, 96, 96, 8, dtype, adapter)
    for M, N, K in ((1, 16, 64), (3, 17, 75), (4, 130, 300), (8, 5, 1030), (9, 33, 258), (270, 40, 17)):
        if which == "cpu":
            half_bases(M, N, K)
    print("nothing behind an end was touched")


if __name__ == "__main__":
    main(*sys.argv[1:])
