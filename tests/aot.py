"""Ahead-of-time compilation of the Triton kernels, run as a process of its own: the interpreter's jit functions cannot
be compiled. `python tests/aot.py FOLDER` compiles every kernel x configuration x target that is not in the cache yet and
prints one JSON line each: what the compiled code uses."""

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lorakernels.backends.triton import kernels, language, tiles

TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 166912),
    "sm_90": (GPUTarget("cuda", 90, 32), 232448),
    "sm_100": (GPUTarget("cuda", 100, 32), 232448),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 65536),
}
MATRIX = r"HMMA|HGMMA|UTCHMMA|UTCQMMA|v_mfma"
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def jobs():
    """(name, kernel, signature, constants, options, whether it multiplies in half precision, whether `make test` has it)."""
    element = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
    for y, v in (("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16"), ("float16", "float32"), ("float16", "float16")):
        half = y != "float32"
        terms = 3 if not half else 2 if v == "float32" else 1
        for dropout in (False, True):
            for bias in (False, True):
                every = tiles.every_add_lowrank(half)
                for tile in every:
                    constants = {"HAS_BIAS": bias, "DROPOUT": dropout, "TERMS": terms, "BLOCK_M": tile.BLOCK_M, "BLOCK_N": tile.BLOCK_N, "BLOCK_R": tile.BLOCK_R}
                    pointers = {"y": f"*{element[y]}", "u": "*fp32", "v": f"*{element[v]}", "bias": f"*{element[v]}", "seed": "*i64"}
                    sizes = dict.fromkeys(("M", "N", "R"), "i32") | {"scaling": "fp32", "threshold": "i32", "dropout_scale": "fp32"}
                    strides = dict.fromkeys(("stride_ym", "stride_um", "stride_vn", "stride_vr", "stride_bias"), "i64")
                    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
                    name = f"add_lowrank y={y} v={v} dropout={int(dropout)} bias={int(bias)} {tile.BLOCK_M}x{tile.BLOCK_N}x{tile.BLOCK_R} warps={tile.num_warps} stages={tile.num_stages}"
                    quick = dropout and bias and y != "float16" and tile in (every[0], every[-1])
                    yield name, kernels.add_lowrank, pointers | sizes | strides, constants, options, half, quick


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
        "wide": len(re.findall(r"\b(?:LDG|STG)\.E[.\w]*\.128\b", sass)),
    }


def source_hash():
    text = "".join(Path(module.__file__).read_text() for module in (kernels, language)) + Path(__file__).read_text() + triton.__version__
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def main(folder, full):
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["AOT_FOLDER"] = str(folder)
    cache = folder / f"aot-{source_hash()}.json"
    known = json.loads(cache.read_text()) if cache.exists() else {}
    for name, kernel, signature, constants, options, half, quick in jobs():
        if not (full or quick):
            continue
        for target, (gpu, limit) in TARGETS.items():
            key = f"{name} {target}"
            if key not in known:
                pointers = [i for i, t in enumerate(signature.values()) if t.startswith("*")]
                source = ASTSource(
                    fn=kernel, signature=signature | dict.fromkeys(constants, "constexpr"), constexprs=constants,
                    attrs={(i,): [["tt.divisibility", 16]] for i in pointers + [5 + 1, 5 + 6]},  # N and y's row stride too
                )  # fmt: skip
                known[key] = measure(triton.compile(source, target=gpu, options=options), target) | {
                    "limit": limit, "expects_matrix": half or gpu.backend == "hip",  # AMD has float32 matrix instructions
                }  # fmt: skip
                cache.write_text(json.dumps(known))
            print(json.dumps({"name": key} | known[key]))


if __name__ == "__main__":
    main(sys.argv[1], "--full" in sys.argv)
