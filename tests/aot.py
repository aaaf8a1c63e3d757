"""Ahead-of-time compilation of the Triton kernels, run as a process of its own: the interpreter's jit functions cannot
be compiled. `python tests/aot.py FOLDER TARGET [--full]` compiles every kernel x configuration that is not in the cache yet
and prints one JSON line each: what the compiled code uses."""

import hashlib
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)
os.environ["TRITON_DISABLE_LINE_INFO"] = "1"  # nobody steps through this code: a sixth of the time of compiling and reading it

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import triton.language as tl

from lorakernels.backends.triton import kernels, language, matmul, mode, multi, nf4, nf4_matmul, terms, tiles

TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 166912),
    "sm_90": (GPUTarget("cuda", 90, 32), 232448),
    "sm_100": (GPUTarget("cuda", 100, 32), 232448),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 65536),
}
MATRIX = r"HMMA|HGMMA|UTCHMMA|UTCQMMA|v_mfma"
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


DTYPES = {torch.float32: (tl.float32, "fp32"), torch.bfloat16: (tl.bfloat16, "bf16"), torch.float16: (tl.float16, "fp16")}
MIXES = [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32), (torch.float16, torch.float16)]
FLOATS = ("scaling", "dropout_scale", "A_scale", "B_scale")
NVIDIA = ("sm_80", "sm_90", "sm_100")


class Job:
    """A kernel with all that it is compiled for, in the types that its launcher would pass on ordinary tensors: row strides
    and sizes are multiples of 16, the last dimension is contiguous."""

    def __init__(self, kernel, base, adapter, tile, pointers, constants, ones=(), targets=TARGETS, common=True, fused=True):
        self.kernel, self.half, self.targets = kernel, base != torch.float32, targets
        values = tile._asdict()
        self.options = {name: values.pop(name) for name in ("num_warps", "num_stages")}
        self.options |= {} if fused else {"enable_fp_fusion": False}
        self.constants = constants | values | dict.fromkeys(ones, 1)
        self.signature, self.attrs = {}, {}
        for i, name in enumerate(kernel.arg_names):
            if name in self.constants:
                self.signature[name] = "constexpr"
                continue
            self.signature[name] = pointers.get(name, "fp32" if name in FLOATS else "i32")
            if self.signature[name].startswith("*") or (self.signature[name] == "i32" and name not in ("R", "E", "threshold", "block_shift")):
                self.attrs[(i,)] = [["tt.divisibility", 16]]
        made = " ".join(f"{name}={getattr(value, 'name', value)}" for name, value in {**self.constants, **self.options}.items() if not name.startswith("stride"))
        self.name = f"{kernel.__name__} {DTYPES[base][1]}+{DTYPES[adapter][1]} {made}"
        self.quick = common and (base == adapter or (base, adapter) == MIXES[1]) and (base != torch.float16) and ((base, adapter) != MIXES[2] or not fused)


def jobs():
    """Every kernel x dtypes x configuration that the tables can return. `quick` is what `make test` compiles: of most kernels the largest tile. What a flag
    adds to a kernel (a mask, a bias) is compiled in its largest form for float16, in each form for the others."""
    for base, adapter in MIXES:
        (_, x), (_, a) = DTYPES[base], DTYPES[adapter]
        half, count = base != torch.float32, {"MODE": mode(base, adapter)}
        named = count | {"DTYPE": DTYPES[adapter][0]}
        forms = (True,) if base == torch.float16 else (True, False)
        for dropout in forms:
            for tile in (every := tiles.every_lowrank_down(half)):
                yield Job(kernels.lowrank_down, base, adapter, tile, {"x": f"*{x}", "A": f"*{a}", "seed": "*i64", "u": "*fp32"},
                          count | {"DROPOUT": dropout, "X_TERMS": terms(base)}, ("stride_xk", "stride_ak"),
                          common=dropout and tile == every[-1])  # fmt: skip
            for bias in forms:
                for tile in (every := tiles.every_add_lowrank(half)):
                    yield Job(kernels.add_lowrank, base, adapter, tile, {"y": f"*{x}", "u": "*fp32", "v": f"*{a}", "bias": f"*{a}", "seed": "*i64"},
                              count | {"HAS_BIAS": bias, "DROPOUT": dropout}, ("stride_vr",),
                              common=dropout and bias and tile == every[-1])  # fmt: skip
            for tile in (every := tiles.every_lowrank_grad_down(half)):
                yield Job(kernels.lowrank_grad_down, base, adapter, tile, {"x": f"*{x}", "du": "*fp32", "seed": "*i64", "dA_parts": "*fp32"},
                          named | {"DROPOUT": dropout, "X_TERMS": terms(base)}, ("stride_xk",), common=dropout and tile == every[-1])  # fmt: skip
            for hopper, turned, biases in itertools.product((False, True), (False, True), (False, True)):
                if (turned and not hopper) or (dropout and biases):
                    continue  # pointers and strides are one kernel; a mask is drawn for dx, which has no biases
                for tile in (every := tiles.every_linear_lowrank(half, hopper, not dropout and not biases)):
                    w_block = (tile.BLOCK_K, tile.BLOCK_N) if turned else (tile.BLOCK_N, tile.BLOCK_K)
                    operands = {"x": f"tensordesc<{x}[{tile.BLOCK_M},{tile.BLOCK_K}]>", "w": f"tensordesc<{x}[{w_block[0]},{w_block[1]}]>"} if hopper else {"x": f"*{x}", "w": f"*{x}"}
                    yield Job(matmul.linear_lowrank, base, adapter, tile,
                              operands | {"u": "*fp32", "v": f"*{a}", "bias": f"*{x}", "lowrank_bias": f"*{a}", "seed": "*i64", "y": f"*{x}"},
                              count | {"HAS_BIAS": biases, "HAS_LOWRANK_BIAS": biases, "DROPOUT": dropout,
                                       "PRECISION": "ieee", "DESCRIPTORS": hopper, "W_TURNED": turned},
                              ("stride_xk", "stride_wk", "stride_vr"), NVIDIA[1:] if hopper else TARGETS,
                              common=tile == every[-1] and dropout != biases)  # fmt: skip
        for need_du, need_dB in ((True, True), (True, False), (False, True)):
            for tile in (every := tiles.every_lowrank_grad_up(half)):
                yield Job(kernels.lowrank_grad_up, base, adapter, tile, {"dy": f"*{x}", "u": "*fp32", "B": f"*{a}", "du": "*fp32", "dB_parts": "*fp32"},
                          named | {"NEED_DU": need_du, "NEED_DB": need_dB, "Y_TERMS": terms(base)}, ("stride_yn", "stride_br"),
                          common=need_du and need_dB and tile == every[-1])  # fmt: skip
    routed = {"order": "*i64", "starts": "*i64", "tiles": "*i64", "ranks": "*i64", "pages": "*i64", "seed": "*i64", "thresholds": "*i32", "scaling": "*fp32"}
    for base, adapter in MIXES:
        (_, x), (_, a), half = DTYPES[base], DTYPES[adapter], base != torch.float32
        for dropout, scaled, paged in ((True, False, False), (False, True, False), (False, True, True)):
            shared = {"HAS_RANKS": True, "DROPOUT": dropout, "SCALED": scaled, "MODE": mode(base, adapter)}
            for tile in (every := tiles.every_multi_down(half)):
                for turned in (False, True) if scaled and not paged else (False,):  # du walks B with its ranks side by side
                    yield Job(multi.multi_down, base, adapter, tile, routed | {"x": f"*{x}", "A": f"*{a}", "u": "*fp32"},
                              shared | {"PAGED": paged, "X_TERMS": terms(base), "STEPS": 7},
                              ("stride_xk", "stride_ar" if turned else "stride_ak"), common=tile == every[-1] and turned == (scaled and not paged))  # fmt: skip
            for tile in (every := tiles.every_multi_add(half)):
                for split in (False, True) if not dropout else (False,):  # a mask falls on dx, whose du is whole
                    yield Job(multi.multi_add, base, adapter, tile, routed | {"y": f"*{x}", "u": "*fp32", "B": f"*{a}"}, shared | {"PAGED": paged, "SPLIT": split, "STEPS": 7},
                              ("stride_bn" if dropout or paged else "stride_br",), common=tile == every[-1] and split == paged)  # fmt: skip
            if paged:
                continue
            yield Job(multi.multi_outer, base, adapter, tiles.multi_outer(half), routed | {"small": "*fp32", "large": f"*{x}", "out": f"*{a}"},
                      shared | {"DTYPE": DTYPES[adapter][0], "L_TERMS": terms(base)}, ("stride_lk", "stride_or" if scaled else "stride_ok"))  # fmt: skip
    for base, adapter in MIXES[1:]:
        (_, x), (_, a) = DTYPES[base], DTYPES[adapter]
        usual = (base, adapter) == MIXES[1]
        for turned, nested, lowrank in itertools.product((False, True), repeat=3):
            if not (nested and lowrank) and not usual:
                continue  # how a weight is decoded does not meet the adapter
            for tile in (every := tiles.every_nf4_linear_lowrank()):
                yield Job(nf4_matmul.nf4_linear_lowrank, base, adapter, tile,
                          {"x": f"*{x}", "packed": "*u8", "absmax": "*u8" if nested else "*fp32", "nested": "*fp32", "u": "*fp32", "v": f"*{a}",
                           "bias": f"*{x}", "lowrank_bias": f"*{a}", "seed": "*i64", "y": f"*{x}"},
                          {"HAS_LOWRANK": lowrank, "HAS_BIAS": not turned, "HAS_LOWRANK_BIAS": lowrank and not turned, "DROPOUT": lowrank and turned,
                           "MODE": mode(base, adapter), "NESTED": nested, "TURNED": turned},
                          ("stride_xk", "stride_vr"), common=usual and nested and lowrank and tile in (every[0], every[-1]))  # fmt: skip
    for dtype in DTYPES:
        yield Job(kernels.sum_parts, torch.float32, dtype, tiles.sum_parts(), {"A_parts": "*fp32", "B_parts": "*fp32", "dA": f"*{DTYPES[dtype][1]}", "dB": f"*{DTYPES[dtype][1]}"}, {})


    for dtype in DTYPES:
        (_, x), common = DTYPES[dtype], dtype == torch.bfloat16
        for nested in (True, False):
            pointers = {"packed": "*u8", "absmax": "*u8" if nested else "*fp32", "nested": "*fp32", "out": f"*{x}"}
            yield Job(nf4.dequantize_nf4, dtype, dtype, tiles.dequantize_nf4(), pointers, {"NESTED": nested}, common=common, fused=False)
        for blocksize, tile in tiles.every_quantize_nf4():
            yield Job(nf4.quantize_nf4, dtype, dtype, tile, {"weight": f"*{x}", "packed": "*u8", "absmax": "*fp32"}, {"BLOCKSIZE": blocksize},
                      common=common and blocksize in (64, 4096), fused=False)  # fmt: skip


def measure(compiled, target):
    """{"registers", "spills", "shared", "matrix", "wide"} of compiled code."""
    shared = compiled.metadata.shared
    if target.startswith("gfx"):
        text = compiled.asm["amdgcn"]
        number = {key: int(re.search(rf"\.{key}:\s+(\d+)", text)[1]) for key in ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size")}
        return {"registers": number["vgpr_count"], "spills": number["vgpr_spill_count"] + number["private_segment_fixed_size"], "shared": shared,
                "matrix": len(re.findall(MATRIX, text)), "wide": len(re.findall(r"_load_dwordx4|_store_dwordx4", text))}  # fmt: skip
    cubin = Path(os.environ["AOT_FOLDER"], f"{os.getpid()}.cubin")
    cubin.write_bytes(compiled.asm["cubin"])
    usage = subprocess.run([TOOLS / "cuobjdump", "--dump-resource-usage", cubin], check=True, capture_output=True, text=True).stdout
    sass = subprocess.run([TOOLS / "nvdisasm", "-c", cubin], check=True, capture_output=True, text=True).stdout
    cubin.unlink()
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "spills": int(re.search(r"STACK:(\d+)", usage)[1]) + len(re.findall(r"\b(?:STL|LDL)\b", sass)),
        "shared": shared,
        "matrix": len(re.findall(MATRIX, sass)),
        "wide": len(re.findall(r"\b(?:LDG|STG|LDGSTS)\.E[.\w]*\.128\b|UTMALDG", sass)),
    }


def source_hash():
    text = "".join(Path(module.__file__).read_text() for module in (kernels, language, matmul, multi, nf4, nf4_matmul)) + Path(__file__).read_text() + triton.__version__
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def main(folder, target, full):
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["AOT_FOLDER"] = str(folder)
    cache = folder / f"{target}-{source_hash()}.json"
    known = json.loads(cache.read_text()) if cache.exists() else {}
    gpu, limit = TARGETS[target]
    for job in jobs():
        if target not in job.targets or not (full or job.quick):
            continue
        if job.name not in known:
            source = ASTSource(fn=job.kernel, signature=job.signature, constexprs=job.constants, attrs=job.attrs)
            try:
                compiled = triton.compile(source, target=gpu, options=job.options)
            except Exception as error:
                raise RuntimeError(f"{job.name} {target}") from error
            matrix = "BLOCK_R" in job.constants and (job.half or gpu.backend == "hip")  # AMD has float32 matrix instructions
            known[job.name] = measure(compiled, target) | {"limit": limit, "expects_matrix": matrix}
            cache.write_text(json.dumps(known))
        print(json.dumps({"name": job.name, "target": target} | known[job.name]))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], "--full" in sys.argv)
