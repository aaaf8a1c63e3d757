"""What each variant must move, compute and launch on a GPU, and so how long it should take: an account, not a measurement.

Bytes are those that must cross the memory bus (x and dy once a pass, y written, parts of sums written and read back); operations are
those of the matrix units, and instructions where decoding takes more of them. A pass takes the longest, stretched where its programs do
not fill the last wave that the compiled kernel's registers and shared memory allow; passes and launches add up. The first choices in
lorakernels/backends/triton/tiles.py come from here; a measurement replaces them, and --measured prints one beside each prediction.
"""

import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from lorakernels.backends.reference import splits_of
from lorakernels.backends.triton import tiles

from .results import load, rows_of

ROOT = Path(__file__).parent.parent
COMPILED = Path(__file__).parent / "compiled.json"
HALF, FULL = 2, 4  # bytes
MMA_SYNC = 0.6  # of the matrix units' rate, which mma.sync does not reach on Hopper (60 to 75 %); taken for every GPU here
NF4 = 0.5 + 1 / 64 + 4 / 64 / 256  # bytes a weight, double-quantised scales included


class GPU(NamedTuple):
    """Rates that a long run reaches, not peaks: bytes a second, FLOP a second on matrix units and on float32 FMA."""

    architecture: str
    processors: int
    bandwidth: float
    matrix: float
    vector: float
    shared: int  # bytes of a processor
    launch: float = 1e-6  # seconds between two kernels of a graph


# Peaks of the data sheets times what copies and large products of others are known to reach (0.83 and 0.7 to 0.8).
GPUS = {
    "a100": GPU("sm_80", 108, 1.6e12, 250e12, 15e12, 164 * 1024),
    "h100": GPU("sm_90", 132, 2.8e12, 700e12, 45e12, 228 * 1024),
    "h200": GPU("sm_90", 132, 4.0e12, 700e12, 45e12, 228 * 1024),
    "b200": GPU("sm_100", 148, 6.6e12, 1600e12, 55e12, 228 * 1024),
}
SHAPES = {
    "lora": [(8192, 4096, 4096), (8192, 4096, 14336), (8192, 14336, 4096), (2048, 4096, 4096), (512, 4096, 4096)],
    "nf4": [(M, 4096, 14336) for M in (1, 16, 64, 128, 256, 1024, 4096)],
    "multi": [(64, 4096, 4096), (8, 4096, 4096), (256, 4096, 4096), (8192, 4096, 4096)],
}


@dataclass
class Pass:
    name: str
    bytes: float = 0
    matrix: float = 0
    vector: float = 0
    launches: int = 1
    kernel: tuple = None  # (name, tile, programs) of a Triton kernel, (programs that a processor holds, programs) of a CUDA C++ one

    def seconds(self, gpu, compiled):
        longest = max(self.bytes / gpu.bandwidth, self.matrix / gpu.matrix, self.vector / gpu.vector)
        return longest / fill(self.kernel, gpu, compiled) + self.launches * gpu.launch


def resident(name, tile, gpu, compiled):
    """Programs that a processor holds at once, by registers, shared memory and threads; None where it was not compiled."""
    fields = [f"{key}={value}" for key, value in tile._asdict().items()]
    forms = {label: use for label, use in compiled.get(gpu.architecture, {}).items() if label.startswith(f"{name} bf16")}
    found = [use for label, use in forms.items() if all(f" {field} " in f"{label} " for field in fields)]
    found = found or list(forms.values())  # of another tile of it where this one is not among those that were compiled
    if not found:
        return None
    worst = max(found, key=lambda use: use["registers"])
    threads = 32 * tile.num_warps
    return max(1, min(65536 // (max(worst["registers"], 16) * threads), gpu.shared // (worst["shared"] + 1024), 2048 // threads, 32))


def fill(kernel, gpu, compiled):
    """The share of the machine that its programs keep busy, over all waves."""
    if kernel is None:
        return 1.0
    *which, programs = kernel
    held = which[0] if len(which) == 1 else resident(*which, gpu, compiled) or 1
    slots = held * gpu.processors
    waves = programs / slots
    return min(1.0, programs / gpu.processors) if waves < 1 else waves / math.ceil(waves)


def ceil(a, b):
    return -(-a // b)


def base(M, K, N):
    return Pass("base", HALF * (M * K + N * K + M * N), 2 * M * K * N)


def terms(adapter):
    """Products of bfloat16 terms for one of fp32 adapters: language.dot_terms."""
    return 3 if adapter == FULL else 1


def lora_passes(M, K, N, R, adapter):
    """{variant: (contender of the suite, [passes])} of forward + backward, bf16 base, no dropout."""
    thin = lambda a, b: 2 * M * (a + b) * R  # noqa: E731
    small, u = adapter * R * (K + N), FULL * M * R
    frozen, count = [base(M, K, N), base(M, N, K)], terms(adapter)
    yield "frozen base", "base", frozen
    yield "PEFT, adapters in bf16", "PEFT", [
        *frozen,
        Pass("forward: A, B, scale, add", HALF * (M * K + 2 * M * R + 6 * M * N) + small, thin(K, N), launches=4),
        Pass("backward", HALF * (2 * M * K + 7 * M * N + 2 * M * K) + 2 * small, 2 * thin(K, N), launches=8),
    ]
    yield "in-place addmm_", "addmm_", [
        *frozen,
        Pass("u; y += u B^T", HALF * (M * K + 2 * M * N) + small, thin(K, N), launches=2),
        Pass("du, dB, dA, dx += du A", HALF * (2 * M * N + M * K + 2 * M * K) + 2 * small, 2 * thin(K, N), launches=4),
    ]
    down, up, grad_down = tiles.lowrank_down(M, K, R, True), tiles.lowrank_grad_up(M, N, R, True), tiles.lowrank_grad_down(M, K, R, True)
    up_programs, slabs = min(ceil(M, up.BLOCK_M), tiles.PROGRAMS), tiles.grad_down_slabs(M, K, grad_down)
    parts = FULL * N * R * 2 * up_programs + FULL * R * K * 2 * slabs

    def shrink(name="u"):
        return Pass(name, HALF * M * K + u + small, count * thin(K, 0), kernel=("lowrank_down", down, ceil(M, down.BLOCK_M) * ceil(R, down.BLOCK_R)))

    def add(name, columns):
        tile = tiles.add_lowrank(M, columns, R, True)
        return Pass(name, HALF * 2 * M * columns + u, count * thin(0, columns), kernel=("add_lowrank", tile, ceil(M, tile.BLOCK_M) * ceil(columns, tile.BLOCK_N)))

    grads = [
        Pass("du and parts of dB", HALF * M * N + 2 * u + small + parts / 2, count * thin(N, N), kernel=("lowrank_grad_up", up, up_programs * ceil(R, up.BLOCK_R))),
        Pass("parts of dA", HALF * M * K + u, count * thin(K, 0),
             kernel=("lowrank_grad_down", grad_down, ceil(K, grad_down.BLOCK_K) * slabs * ceil(R, grad_down.BLOCK_R))),
        Pass("sums", parts / 2 + small),
    ]  # fmt: skip
    yield "Triton, composed", "lorakernels: triton", [*frozen, shrink(), add("y += u B^T", N), *grads, add("dx += du A", K)]
    fused = []
    for rows, inner, columns in ((M, K, N), (M, N, K)):
        one, tile = base(rows, inner, columns), tiles.linear_lowrank(rows, columns, inner, R, True, True, True)
        one.matrix += count * thin(0, columns)
        one.kernel = ("linear_lowrank", tile, ceil(rows, tile.BLOCK_M) * ceil(columns, tile.BLOCK_N))
        fused.append(one)
    yield "Triton, fused", "lorakernels: triton fused", [*fused, shrink(), *grads]
    # csrc/cuda/*_half.cu: rows and ranks of a block, and how many blocks a processor holds
    deep, tall = R > 16, M > 4096
    rows, ranks, chunk = (64 if deep else 32) if tall else 16, 64 if deep else 16, 32 if deep else 16
    groups, slabs = min(ceil(M, 64 if tall else 32), 256), max(1, min(264 // (ceil(K, 64) * ceil(R, 32)), ceil(M, 128)))
    dB, dA = FULL * N * R * groups, FULL * R * K * slabs

    def thin_half(name, moved, work, held, programs):
        return Pass(name, moved, work / MMA_SYNC, kernel=(held, programs))

    def add_half(name, columns):
        tiles_of_rows = max(1, min(ceil(M, 32) * ceil(columns, 256) // 264, 4))
        return thin_half(name, HALF * 2 * M * columns + u, count * thin(0, columns), 2, ceil(M, 32 * tiles_of_rows) * ceil(columns, 256))

    yield "CUDA C++", "lorakernels: cuda", [
        *frozen,
        thin_half("u", HALF * M * K + u + small, count * thin(K, 0), 1 if deep else 2, ceil(M, rows) * ceil(R, ranks)),
        add_half("y += u B^T", N),
        thin_half("du and parts of dB", HALF * M * N + 2 * u + small + dB, count * thin(N, N), 1, groups * ceil(R, chunk)),
        thin_half("parts of dA", HALF * M * K + u + dA, count * thin(K, 0), 2, ceil(K, 64) * slabs * ceil(R, chunk)),
        Pass("sums", dB + dA + small),
        add_half("dx += du A", K),
    ]


def nf4_passes(M, K, N, R, adapter):
    """Forward of a weight in NF4, without an adapter."""
    size, rows = N * K, HALF * M * (K + N)
    yield "dense bf16", "dense", [base(M, K, N)]
    yield "dequantise + product", "dequantize + product", [Pass("decode", size * (NF4 + HALF)), base(M, K, N)]
    few = Pass("codes as they are", size * NF4 + rows * ceil(M, 8), 2 * max(M, 8) * size, vector=16 * size / 2)  # 16 instructions a pair of codes
    yield "CUDA C++, few rows", "lorakernels: cuda", [few]
    tile = tiles.nf4_linear_lowrank(M)
    again = ceil(M, tile.BLOCK_M)  # every tile of rows decodes the weight once more
    programs = again * ceil(N, tile.BLOCK_N)
    yield "Triton, fused", "lorakernels: triton", [
        Pass("fused", size * NF4 * again + rows, 2 * max(M, 16) * size, vector=16 * size * again, kernel=("nf4_linear_lowrank", tile, programs))
    ]


def multi_passes(M, K, N, R, adapter):
    """Forward of rows that each have an adapter of their own (64 of them at most)."""
    E = min(M, 64)
    splits = splits_of(M, K, "cuda")
    stacks, u = adapter * E * R * (K + N), FULL * M * R * splits
    tiles_of_rows = ceil(M, tiles.TILE_ROWS) if M > 64 else M
    yield "base", "base", [base(M, K, N)]
    yield "gather + bmm", "gather + bmm", [base(M, K, N), Pass("gather, shrink, expand, add", 3 * adapter * M * R * (K + N) + HALF * 3 * M * N, launches=5)]
    yield "torch._grouped_mm", "torch._grouped_mm", [base(M, K, N), Pass("sort, two products, back, add", stacks + HALF * (3 * M * K + 7 * M * N), launches=7)]
    down, add = tiles.multi_down(R, True), tiles.multi_add(True)
    count = terms(adapter) * tiles.TILE_ROWS * tiles_of_rows / M
    yield "Triton", "lorakernels: triton", [
        base(M, K, N),
        Pass("u", HALF * M * K + stacks / 2 + u, count * 2 * M * K * R, kernel=("multi_down", down, tiles_of_rows * ceil(R, down.BLOCK_R) * splits)),
        Pass("y += u B^T", HALF * 2 * M * N + stacks / 2 + u, count * 2 * M * N * R, kernel=("multi_add", add, tiles_of_rows * ceil(N, add.BLOCK_N))),
    ]


VARIANTS = {"lora": lora_passes, "nf4": nf4_passes, "multi": multi_passes}


def record(path=COMPILED):
    """Registers and shared memory of the Triton kernels that `make test` compiles, for each architecture (minutes; no GPU is needed)."""
    found = {}
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    for architecture in sorted({gpu.architecture for gpu in GPUS.values()}):
        command = [sys.executable, ROOT / "tests" / "aot.py", ROOT / ".cache" / "aot", architecture]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=True).stdout
        kernels = (json.loads(line) for line in done.splitlines() if line.startswith("{"))
        found[architecture] = {one["name"]: {key: one[key] for key in ("registers", "shared")} for one in kernels if " bf16" in one["name"]}
    path.write_text("{\n" + ",\n".join(f'"{a}": {{\n' + ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in sorted(kernels.items())) + "}" for a, kernels in found.items()) + "}\n")
    return path


def measured_of(path, op):
    """{(M, K, N, R, adapter bytes, contender): seconds} of a file's rows on a GPU."""
    found = {}
    for row in rows_of(load(path)) if path else ():
        case = row.case
        if case.device == "cuda" and case.op == op and case.p == 0 and case.mode == {"lora": "fwd+bwd"}.get(op, case.mode) and case.mode in ("fwd+bwd", "fwd", "decode"):
            for name in row.names:
                if row.matches(name) and row.times(name):
                    found.setdefault((case.M, case.K, case.N, case.R, FULL if case.adapter == "float32" else HALF, name), row.median(name))
    return found


def account(name, op, measured=None, compiled=None, ranks=(16, 64)):
    """Lines of the account of one operator on one GPU."""
    gpu = GPUS[name]
    compiled = json.loads(COMPILED.read_text()) if compiled is None and COMPILED.exists() else compiled or {}
    seen = measured_of(measured, op)
    yield f"{op}: {'forward + backward' if op == 'lora' else 'forward'} on {name}: an account, not a measurement" + (", with what was measured beside it" if seen else "")
    yield f"{'M,K,N':>16} {'R':>3} {'adapters':>8} {'variant':>24} {'MB':>8} {'TFLOP':>7} {'launches':>8} {'filled':>7} {'us':>9} {'x first':>7}" + ("  measured us, over the account" if seen else "")
    for M, K, N in SHAPES[op]:
        for R in ranks if op != "nf4" else (0,):
            for adapter in (HALF, FULL) if op != "nf4" else (HALF,):
                first, best, lines = None, (math.inf, ""), []
                for variant, contender, passes in VARIANTS[op](M, K, N, R, adapter):
                    total = sum(p.seconds(gpu, compiled) for p in passes)
                    first = first or total
                    worst = min(fill(p.kernel, gpu, compiled) for p in passes)
                    moved, done = sum(p.bytes for p in passes) / 1e6, sum(p.matrix + p.vector for p in passes) / 1e12
                    line = f"{f'{M},{K},{N}':>16} {R:>3} {'bf16' if adapter == HALF else 'fp32':>8} {variant:>24} {moved:>8.0f} {done:>7.3f} {sum(p.launches for p in passes):>8}"
                    line += f" {100 * worst:>5.0f} % {total * 1e6:>9.1f} {total / first:>7.3f}"
                    took = seen.get((M, K, N, R, adapter, contender))
                    lines.append(line + (f"  {took * 1e6:>9.1f} {took / total:>6.2f}" if took else ""))
                    if contender not in ("base", "dense"):
                        best = min(best, (total, variant))
                yield from lines
                yield f"{'':>29} the account's winner: {best[1]}"


def add_arguments(parser):
    parser.add_argument("--gpu", choices=GPUS, default="h200")
    parser.add_argument("--op", choices=VARIANTS, help="default: all")
    parser.add_argument("--measured", metavar="FILE", help="results of a GPU run, to be printed beside the account")
    parser.add_argument("--record", action="store_true", help="compile every Triton kernel first, and note its registers and shared memory")


def main(asked):
    if asked.record:
        print("recorded", record())
    for op in [asked.op] if asked.op else VARIANTS:
        for line in account(asked.gpu, op, asked.measured):
            print(line)
        print()
