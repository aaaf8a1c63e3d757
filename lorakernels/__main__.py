"""`python -m lorakernels`: what this machine has, what was built, and which backends can run; `python -m lorakernels tune`: tune.py."""

import importlib.metadata
import platform
import sys

import torch

from . import __version__, backends
from .backends import native


def _version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _devices():
    yield f"cpu: {platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        yield f"cuda:{index}: {properties.name}, {properties.major}.{properties.minor}, {properties.total_memory / 2**30:.0f} GiB"


def _build():
    info = native.build_info()
    if info is None:
        yield f"nothing: {native.PACKAGE} is a source tree that was never built; run `pip install -e .` in {native.PACKAGE.parent}"
        yield from _installed_elsewhere()
        return
    for name in info["built"]:
        architectures = f" for {', '.join(info['architectures'])} with CUDA {info['cuda']}" if name == "_cuda" else ""
        yield f"{name}: built{architectures}"
    for name, remedy in info["left_out"].items():
        yield f"{name}: left out: {remedy}"
    try:
        cpu = backends.load("cpu").module()
        yield f"_cpu: uses {cpu.isa()} of " + ", ".join(f"{isa}{'' if usable else ' (not on this processor)'}" for isa, usable in cpu.isas().items())
        if not cpu.has_pool():
            yield "_cpu: this torch has no torch_parallel_for: kernels run on one thread"
    except (ImportError, RuntimeError) as error:
        yield f"_cpu: {error}"


def _installed_elsewhere():
    """An installed build that this source tree hides, as it does when python is started beside it."""
    # all of them: building leaves an egg-info in the source tree, which stands first
    files = [file for found in importlib.metadata.distributions(name="lorakernels") for file in found.files or []]
    for path in {file.locate() for file in files}:
        if path.name == "_build.json" and path.parent.resolve() != native.PACKAGE.resolve():
            yield f"an installed build is hidden by this source tree: {path.parent}; start python elsewhere to use it"


def _tuned():
    """The measured rows of each card."""
    from .backends.triton import measured

    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        path = measured.place(torch.cuda.get_device_name(index))
        yield f"cuda:{index}: {path or 'off'}" + ("" if path is None or path.exists() else ": not there; `python -m lorakernels tune` measures this card")


def main():
    if sys.argv[1:2] == ["tune"]:
        from . import tune

        return tune.main(sys.argv[2:])
    if sys.argv[1:]:
        print(f"python -m lorakernels: expected nothing, or tune, got {' '.join(sys.argv[1:])}", file=sys.stderr)
        return 2
    print(f"lorakernels {__version__}, {native.PACKAGE}")
    print(f"python {platform.python_version()}, torch {torch.__version__}, triton {_version('triton')}, {platform.platform()}")
    print("tested on torch 2.13 with Triton 3.9 and on torch 2.11 with Triton 3.6; other versions are untested")
    for title, lines in (
        ("devices", _devices()),
        ("built", _build()),
        ("backends", (f"{name}: {state}" for name, state in backends.available().items())),
        ("tuned", _tuned()),
        ("order", (f"{device}: {', '.join(names)}" for device, names in backends.ORDER.items())),
    ):
        print(title)
        for line in lines:
            print(f"  {line}")


if __name__ == "__main__":
    sys.exit(main())
