"""Build the native core through CMake. Needs no torch.

LORAKERNELS_BUILD=auto|cpu|cuda|none   auto: the CPU kernels where there is a C++ compiler, the CUDA ones where there is nvcc
FORCE_CUDA=1                           as LORAKERNELS_BUILD=cuda; FORCE_CUDA=0 leaves the CUDA kernels out
TORCH_CUDA_ARCH_LIST="8.0;9.0a+PTX"    default: the visible GPU's own, else 80, 90a, 100, 120 and PTX of 80
MAX_JOBS                               parallel compile jobs; CUDACXX, CUDA_HOME, CXX, CMAKE_ARGS are honoured too

What is asked for and cannot be built is an error. What `auto` leaves out is written, with its remedy, to
lorakernels/_build.json, because pip hides a build's output; `python -m lorakernels` shows it.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()
DEFAULT_ARCHITECTURES = ["80-real", "90a-real", "100-real", "120-real", "80-virtual"]


def output_of(*command):
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def find_nvcc():
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    candidates = [os.environ.get("CUDACXX"), *(f"{home}/bin/nvcc" for home in homes if home), "nvcc", "/usr/local/cuda/bin/nvcc"]
    return next((found for c in candidates if c and (found := shutil.which(c))), None)


def find_cxx():
    return next((found for c in (os.environ.get("CXX"), "c++", "g++", "clang++") if c and (found := shutil.which(c.split()[0]))), None)


def cuda_architectures(nvcc):
    """CMake's names: 90a-real is machine code for 9.0a, 80-virtual the PTX of 8.0."""
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    if asked:
        found = []
        for item in re.split(r"[;,\s]+", asked.strip()):
            match = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", item)
            if not match:
                sys.exit(f"lorakernels: TORCH_CUDA_ARCH_LIST: expected entries such as 8.0, 9.0a or 12.0+PTX, got {item!r}")
            name = match[1] + match[2] + match[3]
            found += [f"{name}-real"] + ([f"{name}-virtual"] if match[4] else [])
        return found
    visible = set(re.findall(r"^(\d+)\.(\d+)$", output_of("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"), re.M))
    known = set(re.findall(r"compute_(\d+)", output_of(nvcc, "--list-gpu-arch")))
    if visible:
        names = sorted({major + minor for major, minor in visible})
        found = [("90a" if name == "90" else name) + "-real" for name in names]
    else:
        found = DEFAULT_ARCHITECTURES
    return [a for a in found if re.match(r"\d+", a)[0] in known] or ["80-virtual"]


def plan():
    """What to build and what is left out: {"built": [...], "left_out": {module: remedy}, ...}."""
    mode = os.environ.get("LORAKERNELS_BUILD", "auto")
    if mode not in ("auto", "cpu", "cuda", "none"):
        sys.exit(f"lorakernels: LORAKERNELS_BUILD: expected auto, cpu, cuda or none, got {mode!r}")
    force = os.environ.get("FORCE_CUDA")
    if force == "1":
        if mode in ("cpu", "none"):
            sys.exit(f"lorakernels: FORCE_CUDA=1 contradicts LORAKERNELS_BUILD={mode}")
        mode = "cuda"
    cxx, nvcc = find_cxx(), find_nvcc()
    asked_by = "FORCE_CUDA=1" if force == "1" else f"LORAKERNELS_BUILD={mode}"
    built, left_out = [], {}
    if mode == "none":
        left_out = dict.fromkeys(("_cpu", "_cuda"), "LORAKERNELS_BUILD=none was set; install again without it")
    elif cxx is None:
        remedy = "no C++ compiler found (looked for CXX, c++, g++, clang++); install one, then install lorakernels again with --no-cache-dir"
        if mode != "auto":
            sys.exit(f"lorakernels: {asked_by}, but {remedy}")
        left_out = dict.fromkeys(("_cpu", "_cuda"), remedy)
    else:
        built.append("_cpu")
        if mode == "cpu" or (force == "0" and mode == "auto"):
            left_out["_cuda"] = ("LORAKERNELS_BUILD=cpu" if mode == "cpu" else "FORCE_CUDA=0") + " was set; install again without it"
        elif nvcc is None:
            remedy = "nvcc was not found (looked at CUDACXX, CUDA_HOME, CUDA_PATH, PATH); install the CUDA toolkit or set CUDA_HOME, then install lorakernels again with --no-cache-dir"
            if mode == "cuda":
                sys.exit(f"lorakernels: {asked_by}, but {remedy}")
            left_out["_cuda"] = remedy
        else:
            built.append("_cuda")
    info = {"built": built, "left_out": left_out, "cxx": cxx}
    if "_cuda" in built:
        version = re.search(r"release ([\d.]+)", output_of(nvcc, "--version"))
        info.update(nvcc=nvcc, cuda=version[1] if version else "unknown", architectures=cuda_architectures(nvcc))
    return info


PLAN = plan()
for module, reason in PLAN["left_out"].items():
    print(f"lorakernels: {module} left out: {reason}", file=sys.stderr)


class BuildPy(build_py):
    def run(self):
        if not self.editable_mode:  # an earlier build's modules must not slip into this wheel
            shutil.rmtree(Path(self.build_lib, "lorakernels"), ignore_errors=True)
        super().run()
        package = ROOT / "lorakernels" if self.editable_mode else Path(self.build_lib, "lorakernels")
        if self.editable_mode:
            for stale in package.glob("_c*" + sysconfig.get_config_var("EXT_SUFFIX")):
                stale.unlink()
        package.mkdir(parents=True, exist_ok=True)
        (package / "_build.json").write_text(json.dumps(PLAN, indent=1))


class CMakeBuild(build_ext):
    """Configure and build once, in a folder that is kept between builds, then install next to the package."""

    def run(self):
        self.done = False
        super().run()

    def build_extension(self, ext):
        if self.done:
            return
        self.done = True
        import pybind11

        beside = os.pathsep.join([os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent)])  # a venv that is not activated
        tool = shutil.which("cmake", path=beside), shutil.which("ninja", path=beside)
        if None in tool:
            sys.exit("lorakernels: cmake and ninja are needed to build: pip install cmake ninja, or set LORAKERNELS_BUILD=none")
        folder = ROOT / "build" / f"cmake-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        configure = [
            tool[0], "-S", ROOT, "-B", folder, "-G", "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={tool[1]}",  # a kept cache may name the ninja of a build environment that is gone
            f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DLORAKERNELS_CUDA={'ON' if '_cuda' in PLAN['built'] else 'OFF'}",
        ]  # fmt: skip
        if "_cuda" in PLAN["built"]:
            configure += [f"-DCMAKE_CUDA_COMPILER={PLAN['nvcc']}", f"-DLORAKERNELS_CUDA_ARCHITECTURES={';'.join(PLAN['architectures'])}"]
        destination = Path(self.get_ext_fullpath(ext.name)).parent.resolve()
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        try:
            subprocess.run([*configure, *shlex.split(os.environ.get("CMAKE_ARGS", ""))], check=True)
            subprocess.run([tool[0], "--build", folder, *jobs], check=True)
            subprocess.run([tool[0], "--install", folder, "--prefix", destination], check=True)
        except subprocess.CalledProcessError as error:
            without = "cpu to leave the CUDA kernels out" if "_cuda" in PLAN["built"] else "none for a pure Python package"
            sys.exit(f"lorakernels: the native build failed ({error}); LORAKERNELS_BUILD={without}")


setup(
    ext_modules=[Extension(f"lorakernels.{name}", sources=[]) for name in PLAN["built"]],
    cmdclass={"build_py": BuildPy, "build_ext": CMakeBuild},
)
