"""The native CPU kernels with what this processor lacks emulated, in the place of the installed module: a pytest plugin. AVX-512 is
emulated by SIMDe; where the processor has AVX-512-BF16, only the tile registers of AMX are (csrc/cpu/tiles.h).

    LORAKERNELS_CPU_ISA=avx512bf16 python -m pytest -p emulated_cpu tests/test_nf4_linear.py
"""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def simde():
    """The folder that SIMDe's headers are in, or None. Debian's package is libsimde-dev."""
    places = (os.environ.get("SIMDE_INCLUDE"), "/usr/include", "/usr/local/include")
    return next((place for place in places if place and Path(place, "simde", "x86", "avx512.h").exists()), None)


def tiles_alone():
    """Whether this processor has all but the tiles."""
    try:
        return "avx512_bf16" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def why_not():
    if simde() is None and not tiles_alone():
        return "SIMDe's headers are not installed (Debian: libsimde-dev)"
    if shutil.which("g++") is None or not (ROOT / "csrc").exists() or importlib.util.find_spec("pybind11") is None:
        return "needs the source tree, g++ and pybind11"
    return None if os.uname().machine == "x86_64" else "is for x86-64"


def build():
    """The module's path; kept by the hash of its sources."""
    import pybind11

    csrc = ROOT / "csrc"
    sources = [*sorted((csrc / "cpu").iterdir()), *sorted(csrc.glob("*.h")), *sorted((csrc / "bindings").iterdir()), csrc / "emulation" / "avx512_emulation.h", Path(__file__)]
    key = hashlib.sha256("".join([*(path.read_text() for path in sources), sysconfig.get_config_var("EXT_SUFFIX"), str(tiles_alone())]).encode()).hexdigest()[:16]
    folder = ROOT / ".cache" / f"emulated-cpu-{key}"
    module = folder / f"_cpu{sysconfig.get_config_var('EXT_SUFFIX')}"
    if module.exists():
        return module
    work = folder / str(os.getpid())
    work.mkdir(parents=True, exist_ok=True)
    command = ["g++", "-O1", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing", "-ffp-contract=off", "-w", "-DLK_X86"]
    command += ["-DLK_TILE_EMULATION", "-march=native"] if tiles_alone() else ["-DLK_AVX512_EMULATION", "-mavx2", "-mfma", "-mf16c", f"-I{simde()}"]
    command += [f"-I{place}" for place in (pybind11.get_include(), sysconfig.get_paths()["include"])]
    jobs = [(path, [], path.stem) for path in (csrc / "bindings" / "cpu.cpp", csrc / "cpu" / "dispatch.cpp", csrc / "cpu" / "multi.cpp", csrc / "cpu" / "parallel.cpp", csrc / "cpu" / "scratch.cpp")]
    kernels = ("add_lowrank", "linear", "lowrank_down", "lowrank_grad", "nf4", "nf4_linear", "nf4_product")
    jobs += [(csrc / "cpu" / f"{name}.cpp", [f"-DLK_ISA_{isa.upper()}"], f"{name}_{isa}") for isa in ("portable", "avx2", "avx512", "avx512bf16", "amx") for name in kernels]
    running, objects = [], []
    for source, flags, name in jobs:  # a few compilers at a time
        objects.append(work / f"{name}.o")
        running.append(subprocess.Popen([*command, *flags, "-c", source, "-o", objects[-1]]))
        if len(running) == (os.cpu_count() or 1):
            assert running.pop(0).wait() == 0
    assert all(process.wait() == 0 for process in running)
    subprocess.run(["g++", "-shared", *objects, "-o", work / "module.so"], check=True)
    os.replace(work / "module.so", module)
    shutil.rmtree(work)
    return module


def install():
    """Put it where backends.native looks."""
    spec = importlib.util.spec_from_file_location("lorakernels._cpu", build())
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["lorakernels._cpu"] = module


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests():
    install()  # before anything imports the one that it stands for
