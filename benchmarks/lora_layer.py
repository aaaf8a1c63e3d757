"""Time of a LoRA layer's forward + backward over its frozen base (forward + dx), in one run, every contender in its turn
(A B C A B C), so that drift cancels: python benchmarks/lora_layer.py

On a CPU: one thread, then all; on a GPU: the design's training shapes. Best and median of the rounds that fit in --seconds
a row, at least three. Ratios only mean something beside the machine that they were taken on; the first lines name it. Rows
over their mark, and rows that lose to another contender, are listed again at the end.
"""

import argparse
import contextlib
import os
import platform
import statistics
import time

import torch
from torch import nn
from torch.nn import functional as F

from lorakernels import __version__, backends
from lorakernels.modules import LoraLinear

F32, BF16 = torch.float32, torch.bfloat16
CPU_SHAPES = [(512, 2048, 2048), (2048, 2048, 2048), (512, 576, 1536)]
GPU_SHAPES = [(8192, 4096, 4096), (8192, 4096, 14336), (2048, 4096, 4096)]


def mark(M, K, N, adapter, p):
    """What the design asks of time / base on a CPU, for r=16."""
    if (K, N) == (576, 1536):
        return 1.20 if adapter == F32 else 1.15
    return {(F32, 0.0): 1.07, (F32, 0.1): 1.10, (BF16, 0.0): 1.05, (BF16, 0.1): 1.08}[adapter, p]


def peft_layer(linear, r, p, adapter):
    """PEFT's own layer, or its formula where peft is not installed."""
    try:
        import peft
    except ImportError:
        return "PEFT's formula", PeftFormula(linear, r, p, adapter)
    holder = nn.Sequential(nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta"))
    holder[0] = linear
    config = peft.LoraConfig(r=r, lora_alpha=2 * r, lora_dropout=p, target_modules=["0"], init_lora_weights=False)
    layer = peft.get_peft_model(holder, config).base_model.model[0]
    return f"PEFT {peft.__version__}", layer.to(adapter) if adapter != F32 else layer


class PeftFormula(nn.Module):
    def __init__(self, linear, r, p, adapter):
        super().__init__()
        self.weight, self.p = linear.weight, p
        self.A = nn.Parameter(torch.randn(r, linear.in_features, device=linear.weight.device).to(adapter) * linear.in_features**-0.5)
        self.B = nn.Parameter(torch.randn(linear.out_features, r, device=linear.weight.device).to(adapter))

    def forward(self, x):
        result = F.linear(x, self.weight)
        return (result + F.linear(F.linear(F.dropout(x.to(self.A.dtype), self.p), self.A), self.B) * 2.0).to(result.dtype)


class InPlace(torch.autograd.Function):
    """The composition that fast training code uses: adapters cast to the base's dtype, addmm_ onto the base's product."""

    @staticmethod
    def forward(ctx, x, W, A, B, scaling, p):
        dropped, mask = torch.native_dropout(x, p, True) if p else (x, None)
        A_cast, B_cast = A.to(x.dtype), B.to(x.dtype)
        y = torch.mm(x, W.t())
        u = torch.mm(dropped, A_cast.t())
        y.addmm_(u, B_cast.t(), alpha=scaling)
        ctx.save_for_backward(dropped, W, A_cast, B_cast, u, mask)
        ctx.scaling, ctx.p, ctx.dtype = scaling, p, A.dtype
        return y

    @staticmethod
    def backward(ctx, dy):
        dropped, W, A, B, u, mask = ctx.saved_tensors
        du = torch.mm(dy, B).mul_(ctx.scaling)
        dx = torch.mm(dy, W)
        if mask is None:
            dx.addmm_(du, A)
        else:
            dx += torch.mm(du, A) * mask / (1 - ctx.p)
        return dx, None, torch.mm(du.t(), dropped).to(ctx.dtype), (ctx.scaling * torch.mm(dy.t(), u)).to(ctx.dtype), None, None


@contextlib.contextmanager
def fused():
    """Triton's fused product in both passes."""
    from lorakernels.backends import triton as ours

    kept, ours.linear_lowrank = ours.linear_lowrank, ours.linear_lowrank_fused
    try:
        with backends.use_backend("triton"):
            yield
    finally:
        ours.linear_lowrank = kept


def contenders(K, N, r, base, adapter, p, device):
    """{name: (function of x, context that its passes run in)}; the first is the frozen base."""
    linear = nn.Linear(K, N, bias=False, device=device, dtype=base).requires_grad_(False)
    layer = LoraLinear.from_linear(linear, r=r, lora_alpha=2 * r, lora_dropout=p, adapter_dtype=adapter, init_lora_weights=False)
    peft_name, peft = peft_layer(linear, r, p, adapter)
    in_place = lambda x: InPlace.apply(x, linear.weight, layer.lora_A, layer.lora_B, 2.0, p)  # noqa: E731
    calls = {"base": (linear, contextlib.nullcontext), peft_name: (peft, contextlib.nullcontext), "in-place addmm_": (in_place, contextlib.nullcontext)}
    for name in backends.NAMES:
        if name != "reference" and backends.why_not(name, device, base) is None:
            calls[f"ours: {name}"] = (layer, lambda name=name: backends.use_backend(name))
    if "ours: triton" in calls and device == "cuda":
        calls["ours: triton fused"] = (layer, fused)
    return calls


def seconds(function, device):
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def measure(calls, M, K, N, base, device, budget):
    """{name: [seconds]} of forward + backward, in turn."""
    x = torch.randn(M, K, device=device).to(base).requires_grad_()
    dy = torch.randn(M, N, device=device).to(base)
    times, started, rounds = {name: [] for name in calls}, time.perf_counter(), 0
    while rounds < 4 or (time.perf_counter() - started < budget and rounds < 200):
        for name, (call, context) in calls.items():
            with context():
                taken = seconds(lambda: call(x).backward(dy), device)
            x.grad = None
            if rounds:  # the first warms up
                times[name].append(taken)
        rounds += 1
    return times


def overhead(device, rounds=3000):
    """Microseconds a call of a layer too small to compute anything: what Python, autograd and launching cost."""
    for grad in (False, True):
        for name, (call, context) in contenders(16, 16, 4, F32, F32, 0.0, device).items():
            x, best = torch.randn(2, 16, device=device, requires_grad=grad), []
            with context(), torch.set_grad_enabled(grad):
                for _ in range(6):
                    if device == "cuda":
                        torch.cuda.synchronize()
                    start = time.perf_counter()
                    for _ in range(rounds // 6):
                        y = call(x)
                        if grad:
                            y.sum().backward()
                    best.append((time.perf_counter() - start) / (rounds // 6))
            print(f"{'fwd+bwd' if grad else 'fwd':>8} {name:>20} {min(best) * 1e6:>8.1f} us a call")


def where(device):
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, driver CUDA {torch.version.cuda}, torch {torch.__version__}"
    model = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if "model name" in line), platform.processor()) if os.path.exists("/proc/cpuinfo") else platform.processor()
    load = f", load {os.getloadavg()[0]:.2f}" if hasattr(os, "getloadavg") else ""
    return f"CPU timings: {model}, {torch.backends.cpu.get_cpu_capability()}, native kernels {backends.load('cpu').module().isa()}, torch {torch.__version__}{load}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, nargs="*", default=[1, torch.get_num_threads()])
    parser.add_argument("--seconds", type=float, default=3.0, help="a row")
    parser.add_argument("--base", choices=["bfloat16", "float32"], nargs="*", default=["bfloat16", "float32"])
    parser.add_argument("--tokens", type=int, nargs="*", help="only shapes of these M")
    parser.add_argument("--ranks", type=int, nargs="*", default=[16, 64])
    options = parser.parse_args()
    gpu = options.device == "cuda"
    print(f"{where(options.device)}, lorakernels {__version__}\nforward + backward over the frozen base's forward + dx; x base: of the best times")
    notes = []
    for threads in [None] if gpu else dict.fromkeys(options.threads):
        if threads:
            torch.set_num_threads(threads)
            print(f"\n{threads} thread{'s' * (threads > 1)}")
        print("calls of a 16 x 16 layer on 2 rows")
        overhead(options.device)
        print(f"{'M,K,N':>16} {'r':>3} {'base':>8} {'adapter':>8} {'p':>4} {'who':>20} {'best ms':>9} {'median':>9} {'x base':>7}")
        for M, K, N in GPU_SHAPES if gpu else CPU_SHAPES:
            if options.tokens and M not in options.tokens:
                continue
            for base in (getattr(torch, name) for name in options.base):
                for adapter in [F32, BF16] if base == BF16 else [F32]:
                    for r in options.ranks:
                        for p in (0.0, 0.1):
                            times = measure(contenders(K, N, r, base, adapter, p, options.device), M, K, N, base, options.device, options.seconds)
                            best = {name: min(taken) for name, taken in times.items()}
                            row = f"{f'{M},{K},{N}':>16} {r:>3} {str(base)[6:]:>8} {str(adapter)[6:]:>8} {p:>4}"
                            for name, taken in times.items():
                                print(f"{row} {name:>20} {best[name] * 1e3:>9.3f} {statistics.median(taken) * 1e3:>9.3f} {best[name] / best['base']:>7.3f}", flush=True)
                            ours = min((name for name in best if name.startswith("ours")), key=best.get, default=None)
                            if ours is None:
                                continue
                            ratio = best[ours] / best["base"]
                            if not gpu and r == 16 and ratio > mark(M, K, N, adapter, p):
                                notes.append(f"over its mark {mark(M, K, N, adapter, p):.2f}: {ratio:.3f} {row} {threads} threads")
                            notes += [f"{name} is faster: {best[name] / best['base']:.3f} against {ratio:.3f} {row} {threads} threads" for name in best if name not in ("base",) and not name.startswith("ours") and best[name] < best[ours]]
    print("\n" + ("\n".join(notes) if notes else "no row over its mark, none that loses to another contender"))


if __name__ == "__main__":
    main()
