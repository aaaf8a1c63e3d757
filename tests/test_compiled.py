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

ROOT = Path(__file__).parent.parent


def compile_all(folder, *flags):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, ROOT / "tests" / "aot.py", folder, *flags], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def hold(kernels):
    assert {kernel["name"].rpartition(" ")[2] for kernel in kernels} == {"sm_80", "sm_90", "sm_100", "gfx942"}
    for kernel in kernels:
        assert kernel["spills"] == 0, kernel
        assert kernel["shared"] <= kernel["limit"], kernel
        assert kernel["registers"] <= (512 if "gfx" in kernel["name"] else 255), kernel
        assert (kernel["matrix"] > 0) == kernel["expects_matrix"], kernel
        assert kernel["wide"] > 0, f"no 16-byte access: {kernel}"


def folder():
    return ROOT / ".cache" / "aot"


def test_triton_kernels_compile_clean_for_every_target():
    pytest.importorskip("triton", reason="triton is not installed")
    hold(compile_all(folder()))


@pytest.mark.full
def test_every_triton_configuration_compiles_clean():
    pytest.importorskip("triton", reason="triton is not installed")
    hold(compile_all(folder(), "--full"))


def cuobjdump():
    try:
        import triton

        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    except ImportError:
        tool = Path("/nowhere")
    return str(tool) if tool.exists() else shutil.which("cuobjdump")


@pytest.fixture(scope="module")
def cuda_module():
    from lorakernels.backends import native

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
        assert len(found) >= 12, architecture  # 3 dtypes x dropout x width
        for registers, stack, shared, local in found:
            assert int(registers) <= 128 and int(stack) == 0 and int(local) == 0 and int(shared) <= 48 << 10, usage


def test_cuda_kernels_use_16_byte_accesses(cuda_module):
    sass = dump(cuda_module, "-sass", "-arch", f"sm_{machine_architectures(cuda_module)[0]}")
    functions = re.split(r"Function : ", sass)[1:]
    wide = [body for body in functions if "Lb1EEEvNS_10AddLowrankE" in body.splitlines()[0]]
    assert len(wide) == 6  # 3 dtypes x dropout
    for body in wide:
        assert re.search(r"LDG\.E\.128", body) and re.search(r"STG\.E\.128", body), body[:200]
    assert not re.search(r"\b(STL|LDL)\b", sass)


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
    arguments = [0] * 19
    arguments[0], arguments[1], arguments[2] = 8, 8, 8
    with pytest.raises(RuntimeError, match="lorakernels CUDA launch failed: cudaError"):
        cuda_module.add_lowrank(0, *arguments)
