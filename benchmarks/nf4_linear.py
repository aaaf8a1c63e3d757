"""NF4 on the CPU, one command: x W^T on the packed weight against bitsandbytes and a dense F.linear, and quantising.

    python benchmarks/nf4_linear.py [--seconds 1] [--shapes 14336x4096,4096x14336,4096x4096] [--rows 1,4,16,64,256]

In turn, best of the rounds, one thread and all. "cold": four weights in turn, more bytes than the last cache holds; "warm": one.
bitsandbytes (0.50 and later) dequantises to x's dtype and multiplies where the processor has no AVX-512-BF16; its own errors
(field widths that blocks cross) are not met at these shapes. A baseline that takes longer than a limit is timed once.
"""

import argparse
import platform
import sys
import time

import torch
from torch.nn import functional as F

import lorakernels as lk
from lorakernels.functional import nf4_linear

try:
    import bitsandbytes as bnb
    from bitsandbytes.functional import quantize_4bit
except ImportError:
    bnb = None

LIMIT = 1.5  # seconds: a call beyond it is not repeated


def best_in_turn(calls, seconds):
    """{name: shortest time in seconds}, the calls in turn for `seconds`, those beyond LIMIT once."""
    times, dropped = {}, set()
    end = time.perf_counter() + seconds * len(calls)
    rounds = 0
    while rounds < 3 or time.perf_counter() < end:
        for name, call in calls.items():
            if name in dropped:
                continue
            start = time.perf_counter()
            call()
            took = time.perf_counter() - start
            times[name] = min(took, times.get(name, took))
            if took > LIMIT:
                dropped.add(name)
        rounds += 1
        if len(dropped) == len(calls):
            break
    return times


def rotated(function, items):
    """A call that takes the items in turn."""
    state = {"next": 0}

    def call():
        state["next"] = (state["next"] + 1) % len(items)
        return function(items[state["next"]])

    return call


def product_rows(shapes, rows, dtypes, seconds, copies):
    for N, K in shapes:
        dense = [torch.randn(N, K) for _ in range(copies)]
        packed = [lk.quantize_nf4(w) for w in dense]
        theirs = [quantize_4bit(w, compress_statistics=True, quant_type="nf4") for w in dense] if bnb else []
        for dtype in dtypes:
            weights = [w.to(dtype) for w in dense]
            for M in rows:
                x = torch.randn(M, K).to(dtype)
                calls = {"lorakernels": rotated(lambda w: nf4_linear(x, w), packed)}
                if bnb:
                    calls["bitsandbytes"] = rotated(lambda w: bnb.matmul_4bit(x, w[0].t(), quant_state=w[1]), theirs)
                calls["F.linear"] = rotated(lambda w: F.linear(x, w), weights)
                times = best_in_turn(calls, seconds)
                ours = times["lorakernels"]
                text = "  ".join(f"{name} {1e3 * t:9.3f} ms ({t / ours:6.2f}x)" for name, t in times.items())
                print(f"{N:>6}x{K:<6} M={M:<4} {str(dtype)[6:]:9} {text}", flush=True)


def quantise_rows(seconds):
    for dtype in (torch.float32, torch.bfloat16):
        w = torch.randn(4096, 4096).to(dtype)
        calls = {"lorakernels": lambda: lk.quantize_nf4(w)}
        if bnb:
            calls["bitsandbytes"] = lambda: quantize_4bit(w, compress_statistics=True, quant_type="nf4")
        calls["dequantise"] = lambda q=lk.quantize_nf4(w): q.dequantize()
        times = best_in_turn(calls, seconds)
        print(f"quantise 4096x4096 {str(dtype)[6:]:9} " + "  ".join(f"{name} {1e3 * t:9.3f} ms ({t / times['lorakernels']:6.2f}x)" for name, t in times.items()), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1.0, help="for each call of a row")
    parser.add_argument("--shapes", default="14336x4096,4096x14336,4096x4096", help="NxK, comma-separated")
    parser.add_argument("--rows", default="1,4,16,64,256")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--threads", default=None, help="default: 1 and all")
    arguments = parser.parse_args()
    shapes = [tuple(map(int, shape.split("x"))) for shape in arguments.shapes.split(",")]
    rows, dtypes = [int(m) for m in arguments.rows.split(",")], [getattr(torch, name) for name in arguments.dtypes.split(",")]
    print(f"CPU timings: {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, kernels {lk.backends.load('cpu').module().isa()}; torch {torch.__version__}, "
          f"bitsandbytes {bnb.__version__ if bnb else 'not installed: left out'}, Python {platform.python_version()}")  # fmt: skip
    print("load:", open("/proc/loadavg").read().strip() if sys.platform == "linux" else "unknown")
    most = torch.get_num_threads()
    with torch.no_grad():
        for threads in [int(n) for n in arguments.threads.split(",")] if arguments.threads else sorted({1, most}):
            torch.set_num_threads(threads)
            for name, copies in (("cold", 4), ("warm", 1)):
                print(f"\n{threads} thread{'s' if threads > 1 else ''}, {name}")
                product_rows(shapes, rows if name == "cold" else rows[:1], dtypes, arguments.seconds, copies)
            quantise_rows(arguments.seconds)


if __name__ == "__main__":
    main()
