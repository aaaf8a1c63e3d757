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


def test_cuda_kernels_do_not_spill(cuda_module):
    for architecture in machine_architectures(cuda_module):
        usage = dump(cuda_module, "-res-usage", "-arch", f"sm_{architecture}")
        found = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
        reserved = 0 if architecture == "80" else 1024  # by the system, from 9.0 on
        # 3 dtypes x (dropout x width: add_lowrank, lowrank_down, grad_down; width x what is wanted: grad_up; width:
        # dequantize; quantize), sum_parts; 2 dtypes x 2 groups of rows x (3 numbers of tiles, and the narrow one): nf4_linear
        assert len(found) == 3 * (3 * 4 + 2 * 3 + 2 + 1) + 1 + 2 * 2 * 4, architecture
        for registers, stack, shared, local in found:
            assert int(registers) <= 255 and int(stack) == 0 and int(local) == 0 and int(shared) - reserved <= 48 << 10, usage


# which bool of its template; the access that the kernel is bound by
WIDE = {"add_lowrank_kernel": 1, "lowrank_down_kernel": 1, "grad_up_kernel": 0, "grad_down_kernel": 1, "dequantize_kernel": 0, "decode_kernel": 0}
ACCESS = dict.fromkeys(WIDE, ["LDG.E"]) | {"add_lowrank_kernel": ["LDG.E", "STG.E"], "dequantize_kernel": ["STG.E"], "decode_kernel": ["LDG.E.EF"]}


def test_cuda_kernels_use_16_byte_accesses(cuda_module):
    sass = dump(cuda_module, "-sass", "-arch", f"sm_{machine_architectures(cuda_module)[0]}")
    assert not re.search(r"\b(STL|LDL)\b", sass)
    wide = dict.fromkeys(WIDE, 0)
    for body in re.split(r"Function : ", sass)[1:]:
        name = next((kernel for kernel in WIDE if kernel in body.splitlines()[0]), None)
        if name is None or re.findall(r"Lb([01])E", body.splitlines()[0])[WIDE[name]] == "0":
            continue
        wide[name] += 1
        assert name != "decode_kernel" or len(re.findall("HMMA.16816.F32", body)) >= 8, body[:200]
        assert all(f"{access}.128" in body for access in ACCESS[name]), body[:200]
    assert wide == {"add_lowrank_kernel": 6, "lowrank_down_kernel": 6, "grad_up_kernel": 9, "grad_down_kernel": 6, "dequantize_kernel": 3, "decode_kernel": 12}


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
