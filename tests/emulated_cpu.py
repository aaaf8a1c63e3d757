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
NO_SIMDE = "SIMDe's headers are not installed (Debian: libsimde-dev)"


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
        return NO_SIMDE
    if shutil.which("g++") is None or not (ROOT / "csrc").exists() or importlib.util.find_spec("pybind11") is None:
        return "needs the source tree, g++ and pybind11"
    return None if os.uname().machine == "x86_64" else "is for x86-64"


def build(isa, tiles=tiles_alone()):
    """The path of a module with this instruction set alone; kept by the hash of its sources. tiles: what else it needs, the processor has."""
    import pybind11

    csrc = ROOT / "csrc"
    sources = [*sorted((csrc / "cpu").iterdir()), *sorted(csrc.glob("*.h")), *sorted((csrc / "bindings").iterdir()), csrc / "emulation" / "avx512_emulation.h", Path(__file__)]
    key = hashlib.sha256("".join([*(path.read_text() for path in sources), sysconfig.get_config_var("EXT_SUFFIX"), isa, str(tiles)]).encode()).hexdigest()[:16]
    folder = ROOT / ".cache" / f"emulated-cpu-{key}"
    module = folder / f"_cpu{sysconfig.get_config_var('EXT_SUFFIX')}"
    if module.exists():
        return module
    work = folder / str(os.getpid())
    work.mkdir(parents=True, exist_ok=True)
    command = ["g++", "-O1", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing", "-ffp-contract=off", "-w", "-DLK_X86", f"-DLK_EMULATED_ISA={isa}"]
    command += ["-DLK_TILE_EMULATION", "-march=native"] if tiles else ["-DLK_AVX512_EMULATION", "-mavx2", "-mfma", "-mf16c", f"-I{simde()}"]
    command += [f"-I{place}" for place in (pybind11.get_include(), sysconfig.get_paths()["include"])]
    jobs = [(csrc / "cpu" / f"{name}.cpp", [f"-DLK_ISA_{isa.upper()}"]) for name in ("add_lowrank", "nf4_linear", "linear", "lowrank_down", "lowrank_grad", "nf4", "nf4_product")]
    jobs += [(path, []) for path in (csrc / "bindings" / "cpu.cpp", *(csrc / "cpu" / f"{name}.cpp" for name in ("dispatch", "multi", "parallel", "scratch")))]
    running, objects = [], []
    for source, flags in jobs:  # a few compilers at a time
        objects.append(work / f"{source.stem}.o")
        running.append(subprocess.Popen([*command, *flags, "-c", source, "-o", objects[-1]]))
        if len(running) == (os.cpu_count() or 1):
            assert running.pop(0).wait() == 0
    assert all(process.wait() == 0 for process in running)
    subprocess.run(["g++", "-shared", *objects, "-o", work / "module.so"], check=True)
    os.replace(work / "module.so", module)
    shutil.rmtree(work)
    return module


def install():
    """Put the one of LORAKERNELS_CPU_ISA where backends.native looks."""
    spec = importlib.util.spec_from_file_location("lorakernels._cpu", build(os.environ["LORAKERNELS_CPU_ISA"]))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["lorakernels._cpu"] = module


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests():
    install()  # before anything imports the one that it stands for
