"""Compiled GPU code, read without a GPU: no spills, shared memory within the limit, matrix instructions where expected."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lorakernels import backends
from lorakernels.backends import native

ROOT = Path(__file__).parent.parent


TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")


def compile_all(target, *flags):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, ROOT / "tests" / "aot.py", ROOT / ".cache" / "aot", target, *flags]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def hold(kernels, target):
    assert {kernel["name"].partition(" ")[0] for kernel in kernels} == {
        "lowrank_down", "add_lowrank", "linear_lowrank", "lowrank_grad_up", "lowrank_grad_down", "sum_parts",
        "dequantize_nf4", "quantize_nf4", "nf4_linear_lowrank",
        "multi_down", "multi_add", "multi_outer",
    }  # fmt: skip
    for kernel in kernels:
        assert kernel["spills"] == 0, kernel
        assert kernel["shared"] <= kernel["limit"], kernel
        assert kernel["registers"] <= (512 if "gfx" in target else 255), kernel
        assert (kernel["matrix"] > 0) == kernel["expects_matrix"], kernel
        # quantising, done once, reads the elements of a pair apart
        assert kernel["wide"] > 0 or kernel["name"].startswith("quantize_nf4"), f"no 16-byte access: {kernel}"


@pytest.mark.parametrize("target", TARGETS)
def test_triton_kernels_compile_clean(target):
    pytest.importorskip("triton", reason="triton is not installed")
    hold(compile_all(target), target)


@pytest.mark.full
@pytest.mark.parametrize("target", TARGETS)
def test_every_triton_configuration_compiles_clean(target):
    pytest.importorskip("triton", reason="triton is not installed")
    hold(compile_all(target, "--full"), target)


def cuobjdump():
    try:
        import triton

        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    except ImportError:
        tool = Path("/nowhere")
    return str(tool) if tool.exists() else shutil.which("cuobjdump")


@pytest.fixture(scope="module")
def cuda_module():
    try:
        module = native.load("_cuda")
    except ImportError as error:
        pytest.skip(str(error))
    if cuobjdump() is None:
        pytest.skip("cuobjdump is neither in Triton nor on the PATH")
    return module


def machine_architectures(module):
    return [name.removesuffix("-real") for name in module.architectures.split() if name.endswith("-real")]


def dump(module, *flags):
    return subprocess.run([cuobjdump(), *flags, module.__file__], check=True, capture_output=True, text=True).stdout


# How many forms each kernel has. float32: dropout x width, grad_up what is wanted x width; half precision: 2 dtypes x 2 of adapters x what their
# files list; dequantize 3 dtypes x width, quantize 3 dtypes; decode 2 dtypes x 2 groups of rows x (3 numbers of tiles, and the narrow one)
KERNELS = {
    "add_lowrank_kernel": 4, "lowrank_down_kernel": 4, "grad_up_kernel": 6, "grad_down_kernel": 4, "sum_parts_kernel": 1,
    "add_lowrank_half_kernel": 16, "lowrank_down_half_kernel": 24, "grad_up_half_kernel": 24, "grad_down_half_kernel": 12,
    "dequantize_kernel": 6, "quantize_kernel": 3, "decode_kernel": 16,
}  # fmt: skip
MATRIX = {name for name in KERNELS if "half" in name} | {"decode_kernel"}  # on the tensor cores
# which bool of its template says that it is wide; the access that the kernel is bound by
WIDE = {"add_lowrank_kernel": 1, "lowrank_down_kernel": 1, "grad_up_kernel": 0, "grad_down_kernel": 1, "dequantize_kernel": 0, "decode_kernel": 0} | {
    name: 0 for name in MATRIX
}
ACCESS = dict.fromkeys(WIDE, ["LDG.E"]) | dict.fromkeys(("add_lowrank_kernel", "add_lowrank_half_kernel"), ["LDG.E", "STG.E"])
ACCESS |= {"dequantize_kernel": ["STG.E"], "decode_kernel": ["LDG.E.EF"]}


def test_cuda_kernels_do_not_spill(cuda_module):
    for architecture in machine_architectures(cuda_module):
        usage = dump(cuda_module, "-res-usage", "-arch", f"sm_{architecture}")
        found = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
        reserved = 0 if architecture == "80" else 1024  # by the system, from 9.0 on
        assert len(found) == sum(KERNELS.values()), architecture
        for registers, stack, shared, local in found:
            assert int(registers) <= 255 and int(stack) == 0 and int(local) == 0 and int(shared) - reserved <= 48 << 10, usage


def test_cuda_kernels_use_16_byte_accesses(cuda_module):
    sass = dump(cuda_module, "-sass", "-arch", f"sm_{machine_architectures(cuda_module)[0]}")
    assert not re.search(r"\b(STL|LDL)\b", sass)
    seen, wide = dict.fromkeys(KERNELS, 0), dict.fromkeys(WIDE, 0)
    for body in re.split(r"Function : ", sass)[1:]:
        title = body.splitlines()[0]
        name = next(kernel for kernel in KERNELS if kernel in title)
        seen[name] += 1
        assert ("HMMA.16816.F32" in body) == (name in MATRIX), title
        if name in WIDE and re.findall(r"Lb([01])E", title)[WIDE[name]] == "1":
            wide[name] += 1
            assert all(f"{access}.128" in body for access in ACCESS[name]), title
    assert seen == KERNELS
    assert wide == {
        "add_lowrank_kernel": 2, "lowrank_down_kernel": 2, "grad_up_kernel": 3, "grad_down_kernel": 2,
        "add_lowrank_half_kernel": 12, "lowrank_down_half_kernel": 20, "grad_up_half_kernel": 20, "grad_down_half_kernel": 8,
        "dequantize_kernel": 3, "decode_kernel": 12,
    }  # fmt: skip


def test_cuda_module_links_no_cuda_runtime(cuda_module):
    if shutil.which("readelf") is None:
        pytest.skip("readelf is not installed")
    needed = subprocess.run(["readelf", "-d", cuda_module.__file__], check=True, capture_output=True, text=True).stdout
    libraries = set(re.findall(r"NEEDED.*\[(.*?)\.so", needed))
    assert libraries <= {"libstdc++", "libgcc_s", "libc", "libm", "libdl", "libpthread", "librt", "ld-linux-x86-64", "ld-linux-aarch64"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_module_without_a_driver_says_so(cuda_module):
    assert cuda_module.versions()[0] >= 12000
    assert "no" in backends.available()["cuda"]
    with pytest.raises(RuntimeError, match="lorakernels CUDA launch failed: cudaError"):
        cuda_module.add_lowrank(0, *native.add_lowrank_arguments(torch.zeros(8, 8), torch.zeros(8, 8), torch.zeros(8, 8), 1.0, None, None, 0.0))
