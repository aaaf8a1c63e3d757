"""Time of a LoRA layer over its frozen base, backend by backend, paired in turn (A B A B): python benchmarks/lora_layer.py

Ratios only mean something beside the machine that they were taken on; the first line names it.
"""

import argparse
import platform
import statistics
import time

import torch
from torch.nn import functional as F

from lorakernels import backends
from lorakernels.modules import LoraLinear


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


def peft_formula(x, layer):
    """PEFT's Linear.forward in torch: what a plain PEFT layer costs."""
    result = F.linear(x, layer.weight, layer.bias)
    x = F.dropout(x.to(layer.lora_A.dtype), layer.lora_dropout)
    return (result + F.linear(F.linear(x, layer.lora_A), layer.lora_B) * layer.scaling).to(result.dtype)


def rows(M, K, N, r, dtype, p, device, repeats):
    layer = LoraLinear(K, N, bias=False, r=r, lora_dropout=p, dtype=dtype, device=device, init_lora_weights=False)
    x = torch.randn(M, K, device=device).to(dtype).requires_grad_()
    dy = torch.randn(M, N, device=device).to(dtype)

    def with_backend(name):
        def call(x):
            with backends.use_backend(name):
                return layer(x)

        return call

    calls = {"base": lambda x: F.linear(x, layer.weight), "PEFT's formula": lambda x: peft_formula(x, layer)}
    for name in backends.NAMES:
        if backends.why_not(name, device, dtype) is None:
            calls[name] = with_backend(name)
    for backward in (False, True):
        times = {name: [] for name in calls}
        for repeat in range(repeats + 2):
            for name, call in calls.items():

                def once():
                    y = call(x)
                    if backward:
                        with backends.use_backend(name) if name in backends.NAMES else torch.enable_grad():
                            y.backward(dy)

                with torch.set_grad_enabled(backward):
                    taken = seconds(once, device)
                if repeat >= 2:
                    times[name].append(taken)
        base = min(times["base"])
        for name, taken in times.items():
            yield backward, name, min(taken) * 1e3, statistics.median(taken) * 1e3, min(taken) / base


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    gpu = options.device == "cuda"
    where = torch.cuda.get_device_name() if gpu else f"CPU timings: {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    print(f"{where}, torch {torch.__version__}")
    shapes = [(8192, 4096, 4096), (8192, 4096, 14336)] if gpu else [(512, 2048, 2048), (512, 576, 1536)]
    dtypes = [torch.bfloat16] if gpu else [torch.float32]
    print(f"{'shape M,K,N':>18} {'dtype':>9} {'p':>4} {'pass':>8} {'who':>15} {'best ms':>9} {'median':>9} {'x base':>7}")
    for M, K, N in shapes:
        for dtype in dtypes:
            for p in (0.0, 0.1):
                for backward, name, best, median, ratio in rows(M, K, N, 16, dtype, p, options.device, options.repeats):
                    print(f"{M:>6},{K:>5},{N:>5} {str(dtype)[6:]:>9} {p:>4} {'fwd+bwd' if backward else 'fwd':>8} {name:>15} {best:>9.3f} {median:>9.3f} {ratio:>7.3f}")


if __name__ == "__main__":
    main()
