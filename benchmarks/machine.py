"""What machine this is, and what it reaches at best: the ceilings that a row is held against, measured in the same run."""

import datetime
import os
import platform
import re
import subprocess
import time
from pathlib import Path

import torch

import lorakernels
from lorakernels import backends

from . import peers
from .cases import DTYPES

ROOT = Path(__file__).parent.parent
MODEL_NAME = re.compile(r"model name\s*:\s*(.+)")


def output(*command):
    try:
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def processor():
    info = Path("/proc/cpuinfo")
    found = MODEL_NAME.search(info.read_text()) if info.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def revision():
    dirty = output("git", "status", "--porcelain", "--untracked-files=no", "--", "lorakernels", "csrc", "benchmarks/*.py")
    return (output("git", "rev-parse", "--short", "HEAD") or "unknown") + ("+" if dirty else "")


def header(device):
    cpu = backends.why_not("cpu", "cpu", torch.float32)
    about = {
        "device": torch.cuda.get_device_name() if device == "cuda" else processor(),
        "timings": "GPU timings" if device == "cuda" else "CPU timings, not GPU results",
        "date": datetime.datetime.now().isoformat(timespec="seconds"),
        "revision": revision(),
        "lorakernels": lorakernels.__version__,
        "native kernels": cpu or backends.load("cpu").module().isa(),
        "torch": f"{torch.__version__} ({torch.backends.cpu.get_cpu_capability()})",
        "python": platform.python_version(),
        "system": platform.platform(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "peers": peers.versions(),
    }
    if device == "cuda":
        query = "clocks.sm,clocks.mem,clocks.max.sm,driver_version,power.limit,temperature.gpu"
        about["gpu"] = dict(zip(query.split(","), output("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader").split(", ")))
        about["cuda"] = torch.version.cuda
        about["triton"] = __import__("triton").__version__
    else:
        clocks = re.findall(r"cpu MHz\s*:\s*([\d.]+)", Path("/proc/cpuinfo").read_text()) if os.path.exists("/proc/cpuinfo") else []
        about["clock"] = f"{max(map(float, clocks)):.0f} MHz" if clocks else "unknown"
    return about


def last_cache(device):
    """Bytes of the last cache."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).L2_cache_size
    sizes = [text.read_text().strip() for text in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) * {"K": 2**10, "M": 2**20}[size[-1]] for size in sizes), default=32 * 2**20)


def best(call, device, budget=0.25):
    times, end = [], time.perf_counter() + budget
    while len(times) < 4 or time.perf_counter() < end:
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)


def ceilings(device, dtype):
    """{"copy" and "read": bytes a second, "matmul": FLOP a second}: a copy and a sum of 256 MiB, and a square product, at their best."""
    source = torch.ones(2**26, device=device)
    target = torch.empty_like(source)
    n = 8192 if device == "cuda" else 2048 if dtype == "float32" else 512
    a = torch.randn(n, n, device=device).to(DTYPES[dtype])
    return {
        "copy": 2 * source.nbytes / best(lambda: target.copy_(source), device),
        "read": source.nbytes / best(lambda: source.sum(), device),
        "matmul": 2 * n**3 / best(lambda: a @ a, device, 0.5),
    }
