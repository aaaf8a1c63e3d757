"""NF4 in one command: x W^T on the packed weight against bitsandbytes and a dense F.linear, and quantising.

    python benchmarks/nf4_linear.py [--seconds 1] [--shapes 14336x4096,4096x14336,4096x4096] [--rows 1,4,16,64,256]

In turn, best of the rounds; on a CPU with one thread and all, on a GPU (the default where there is one) each usable backend, over
rows across every switch of kernel, with dx beside the forward. "cold": four weights in turn, more bytes than the last cache holds; "warm": one.
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
from lorakernels import backends
from lorakernels.functional import nf4_linear

try:
    import bitsandbytes as bnb
    from bitsandbytes.functional import quantize_4bit
except ImportError:
    bnb = None

LIMIT = 1.5  # seconds: a call beyond it is not repeated


def on_cpu(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def on_gpu(call, calls=10):
    """Seconds a call, of some that are queued one behind the other, so that launching hides behind running where it can."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    call()
    start.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000 / calls


def best_in_turn(calls, seconds):
    """{name: shortest time in seconds}, the calls in turn for `seconds`, those beyond LIMIT once."""
    times, dropped, clock = {}, set(), on_gpu if torch.cuda.is_available() else on_cpu
    end = time.perf_counter() + seconds * len(calls)
    rounds = 0
    while rounds < 3 or time.perf_counter() < end:
        for name, call in calls.items():
            if name in dropped:
                continue
            took = clock(call)
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


def gpu_rows(shapes, rows, dtypes, seconds):
    """Forward and dx of every usable backend, the weights in turn; beside them what one read of the packed bytes takes."""
    names = [name for name in backends.NAMES if backends.why_not(name, "cuda", torch.bfloat16) is None]
    for N, K in shapes:
        dense = [torch.randn(N, K, device="cuda") for _ in range(4)]
        packed = [lk.quantize_nf4(w) for w in dense]
        theirs = [quantize_4bit(w, compress_statistics=True, quant_type="nf4") for w in dense] if bnb else []
        read = best_in_turn({"read": rotated(lambda w: w.packed.view(torch.int64).sum(), packed)}, seconds)["read"]
        for dtype in dtypes:
            weights = [w.to(dtype) for w in dense]
            for M in rows:
                x, dy = torch.randn(M, K, device="cuda").to(dtype), torch.randn(M, N, device="cuda").to(dtype)
                for turned, given in ((False, x), (True, dy)):
                    calls = {}
                    for name in names:
                        run = backends.load(name).nf4_linear_lowrank
                        calls[name] = rotated(lambda w, run=run: run(given, *w[:3], *w.format, turned, None, None, 1.0, None, None, None, 0.0), packed)
                    if bnb and not turned:
                        calls["bitsandbytes"] = rotated(lambda w: bnb.matmul_4bit(x, w[0].t(), quant_state=w[1]), theirs)
                    calls["dense"] = rotated(lambda w: given @ (w if turned else w.t()), weights)
                    text = "  ".join(f"{name} {1e6 * t:8.1f} us" for name, t in best_in_turn(calls, seconds).items())
                    print(f"{N:>6}x{K:<6} M={M:<4} {str(dtype)[6:]:9} {'dx' if turned else 'y ':2} {text}  (packed bytes read once {1e6 * read:.1f} us)", flush=True)


def quantise_rows(seconds):
    for dtype in (torch.float32, torch.bfloat16):
        w = torch.randn(4096, 4096, device="cuda" if torch.cuda.is_available() else "cpu").to(dtype)
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
    gpu = torch.cuda.is_available()
    parser.add_argument("--rows", default="1,4,8,9,16,17,64,128,129,512,4096" if gpu else "1,4,16,64,256")
    parser.add_argument("--dtypes", default="bfloat16" if gpu else "float32,bfloat16")
    parser.add_argument("--threads", default=None, help="default: 1 and all")
    arguments = parser.parse_args()
    shapes = [tuple(map(int, shape.split("x"))) for shape in arguments.shapes.split(",")]
    rows, dtypes = [int(m) for m in arguments.rows.split(",")], [getattr(torch, name) for name in arguments.dtypes.split(",")]
    if gpu:
        print(f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, torch {torch.__version__}, bitsandbytes {bnb.__version__ if bnb else 'not installed: left out'}; cold")
        with torch.no_grad():
            gpu_rows(shapes, rows, dtypes, arguments.seconds)
            quantise_rows(arguments.seconds)
        return
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
