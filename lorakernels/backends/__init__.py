"""Which code runs a primitive.

A backend is a module of functions with the names and signatures of `reference`. ORDER is the table of what is tried on
a device when nobody asked for a backend; `use_backend(name)` or LORAKERNELS_BACKEND asks for one, which then runs or
raises. Falling to `reference` where ORDER names something better is said once, with the reason.
"""

import contextlib
import functools
import importlib
import os
import warnings

NAMES = ("cuda", "triton", "cpu", "composed", "reference")
PRIMITIVES = ("lowrank_down", "linear_lowrank", "lowrank_grad", "nf4_linear_lowrank", "dequantize_nf4", "quantize_nf4", "multi_route", "multi_lowrank_down", "multi_add_lowrank", "multi_lowrank_grad")

# No kernel of this library has been timed on a GPU yet: there the composition of torch's own products is the default,
# and "triton" and "cuda" are opt-in.
ORDER = {"cpu": ("cpu", "reference"), "cuda": ("composed", "reference")}

# One deliberate global: autograd's device threads do not inherit context variables, and a backward must run on the
# backend that was asked for.
_forced = os.environ.get("LORAKERNELS_BACKEND") or None


def load(name):
    """The backend's module. Triton is imported only here."""
    if name not in NAMES:
        raise ValueError(f"backend: expected one of {', '.join(NAMES)}, got {name!r}")
    return importlib.import_module(f".{name}", __name__)


@functools.lru_cache(maxsize=None)
def why_not(name, device_type, dtype):
    """None where the backend can run on this device type and dtype, else the reason."""
    return load(name).why_not(device_type, dtype)


def available():
    """{backend: "ok" or why not}, for the device type that each is made for."""
    import torch

    home = {"cuda": "cuda", "triton": "cuda" if torch.cuda.is_available() else "cpu"}
    return {name: why_not(name, home.get(name, "cpu"), torch.float32) or "ok" for name in NAMES}


@functools.lru_cache(maxsize=None)
def _choose(forced, device_type, dtype):
    """The backend's module; looked up once for each kind of call, since every call comes through here."""
    order = (forced,) if forced else ORDER.get(device_type, ("reference",))
    reasons = {}
    for name in order:
        reasons[name] = why_not(name, device_type, dtype)
        if reasons[name] is None:
            break
    else:
        raise RuntimeError(f"backend {forced!r} was asked for and cannot run on {device_type} in {dtype}: {reasons[forced]}")
    skipped = [f"{other}: {reason}" for other, reason in reasons.items() if reason]
    if skipped:
        warnings.warn(f"lorakernels runs {dtype} on {device_type} through {name!r} ({'; '.join(skipped)})", stacklevel=2)
    return load(name)


def kind(tensor):
    """The type of a tensor's device. tensor.device.type makes two objects for it: 20 us of a decode step, whose caches are cold."""
    return "cpu" if tensor.is_cpu else tensor.device.type


def chosen(device_type, dtype):
    """The module whose functions run the primitives for a base of `dtype` on `device_type`."""
    return _choose(_forced, device_type, dtype)


def forced():
    """The backend that was asked for, or None."""
    return _forced


@contextlib.contextmanager
def use_backend(name):
    """Run everything inside through one backend ("cuda", "triton", "cpu", "composed", "reference"), in every thread of the process.

    Raises ValueError for an unknown name at once; a backend that cannot run raises RuntimeError at its first use.
    """
    global _forced
    if name not in NAMES:
        raise ValueError(f"backend: expected one of {', '.join(NAMES)}, got {name!r}")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before
