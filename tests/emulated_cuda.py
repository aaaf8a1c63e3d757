"""The CUDA C++ kernels' own bodies compiled as host C++ (csrc/emulation): a module that takes the place of the GPU's."""

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lorakernels import backends
from lorakernels.backends import cuda

ROOT = Path(__file__).parent.parent


def cuda_headers():
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    nvcc = shutil.which("nvcc")
    homes += [str(Path(nvcc).resolve().parent.parent)] if nvcc else []
    for home in filter(None, homes):
        for folder in ("include", "targets/x86_64-linux/include"):
            if Path(home, folder, "cuda_bf16.h").exists():
                return Path(home, folder)
    return None


def included(path, texts):
    """A file of csrc and all that it includes from there."""
    found, waiting = [], [path]
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        found.append(path)
        waiting += [other for name in re.findall(r'#include "(.*?)"', texts[path]) if (other := Path(os.path.normpath(path.parent / name))) in texts]
    return sorted(found)


def build(edit=lambda file, text: text):
    """Compile the emulated kernels, after `edit` of each file of csrc/cuda; objects and module are kept by the hash of all that went in."""
    pybind11 = pytest.importorskip("pybind11", reason="pybind11 is not installed")
    headers, compiler = cuda_headers(), shutil.which("g++")
    if headers is None or compiler is None or not (ROOT / "csrc").exists():
        pytest.skip("needs the source tree, g++ and the CUDA toolkit's headers")
    csrc, cache = ROOT / "csrc", ROOT / ".cache" / "emulated"
    texts = {path.relative_to(csrc): path.read_text() for folder in (".", "bindings", "cuda", "emulation") for path in sorted((csrc / folder).iterdir()) if path.is_file()}
    texts = {path: edit(path.name, text) if path.parent.name == "cuda" else text for path, text in texts.items()}
    flags = ["-O1", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing", "-ffp-contract=off", "-w", "-DLK_CUDA_EMULATION"]
    flags += [f"-I{folder}" for folder in (headers, pybind11.get_include(), sysconfig.get_paths()["include"])]
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    keys = {}  # of each object
    for path in [path for path in texts if path.suffix == ".cu"] + [Path("emulation/binding.cpp")]:
        went_in = [suffix, *flags, *(f"{file}\n{texts[file]}" for file in included(path, texts))]
        keys[path] = hashlib.sha256("\0".join(went_in).encode()).hexdigest()[:16]
    key = hashlib.sha256("".join(keys.values()).encode()).hexdigest()[:16]
    module = cache / key / f"_cuda_emulated{suffix}"
    if not module.exists():
        module.parent.mkdir(parents=True, exist_ok=True)
        work = cache / f"source-{key}-{os.getpid()}"  # csrc with the edited files
        for path, text in texts.items():
            (work / path).parent.mkdir(parents=True, exist_ok=True)
            (work / path).write_text(text)

        def compiled(path):
            made, beside = cache / f"{keys[path]}.o", work / f"{keys[path]}.o"
            if not made.exists():
                subprocess.run([compiler, "-c", *flags, "-x", "c++", work / path, "-o", beside], check=True)
                os.replace(beside, made)
            return made

        with ThreadPoolExecutor(2) as pool:
            objects = list(pool.map(compiled, keys))
        subprocess.run([compiler, "-shared", *objects, "-o", work / module.name], check=True)
        os.replace(work / module.name, module)
        shutil.rmtree(work)
    # a name of its own: Python hands out the first module that was loaded under a name again
    spec = importlib.util.spec_from_file_location(f"emulated_{key}._cuda_emulated", module)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def put_on_emulation(module, monkeypatch):
    """The cuda backend, for every tensor, with the module's launches for its own."""
    monkeypatch.setattr(cuda, "module", lambda: module)
    monkeypatch.setattr(cuda, "architecture", lambda tensor: (9, 0))
    monkeypatch.setattr(cuda, "launch", lambda name, tensor, arguments: getattr(module, name)(0, *arguments))
    monkeypatch.setattr(backends, "chosen", lambda *_: cuda)
