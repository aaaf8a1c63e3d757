"""What a row of the benchmark is, and what takes part in it."""

import contextlib
from dataclasses import asdict, dataclass, field
from typing import Callable

import torch

from lorakernels import backends

LOOK = 64  # rows of y and dx whose results are looked at
SEED = 7  # before every call whose result is looked at: contenders draw their masks from it
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Case:
    """One row. M rows of x (K), N columns of y, R ranks; `adapters` resident ones in `rows` order; dropout p."""

    op: str
    mode: str
    shapes: str
    M: int
    K: int
    N: int
    R: int = 0
    dtype: str = "float32"
    adapter: str = "float32"
    p: float = 0.0
    adapters: int = 1
    rows: str = ""
    cache: str = "warm"  # or cold: weights in turn, more of them than the last cache holds
    launch: str = "eager"  # or graph: a captured CUDA graph
    device: str = "cpu"
    threads: int = 0  # of a CPU

    def key(self):
        return " ".join(str(value) for value in asdict(self).values() if value != "")

    def label(self):
        text = f"{self.M} x {self.K}→{self.N}" if self.N and self.M else f"{self.K}→{self.N}" if self.N else f"{self.M} tokens"
        text += f" r{self.R}" if self.R else ""
        text += f" p{self.p}" if self.p else ""
        text += f" {self.adapters} adapters" if self.adapters > 1 else ""
        return text + (f" {self.rows}" if self.rows else "")

    @property
    def base(self):
        return DTYPES[self.dtype]

    @property
    def given(self):
        """The adapters' dtype."""
        return DTYPES[self.adapter]


@dataclass
class Contender:
    """Who takes part: `call` is timed and gives its results by name; `ready` runs before it, untimed."""

    name: str
    call: Callable
    ready: Callable = None
    context: Callable = contextlib.nullcontext
    mask: Callable = None  # what x is multiplied by, after torch.manual_seed(SEED), as (M, K) in float64
    cast: bool = False  # adapters go into products in the base's dtype: held against an eager layer that does the same
    bare: bool = False  # the base alone, whose results are not the row's
    turns: int = 1  # weights that its calls take in turn
    within: int = 1  # calls that one call makes: a graph holds one for each of the weights
    restart: Callable = None  # before a call whose results are looked at: weights in turn begin with the first
    look: Callable = None  # gives the results to compare where those of `call` cannot be


@dataclass
class Work:
    """A row made ready: its contenders in turn, the first of them the base; the results that float64 gives."""

    contenders: list
    reference: Callable  # (mask) -> {name: float64}
    eager: Callable  # (cast) -> ({name: result}, mask): PEFT's eager layer, the measure of error
    lengths: dict  # {name of a result: length of its sums}
    flops: float
    bytes: float
    skipped: dict = field(default_factory=dict)  # {who: why}
    look: Callable = staticmethod(lambda name, tensor: tensor)  # the part of a result that is looked at
    parameters: list = field(default_factory=list)  # what is not counted as kept for backward

    def leave_out(self, contender, why):
        self.skipped[contender.name] = why
        self.contenders.remove(contender)


def ours(device, dtype, fused=False):
    """{name: context} of this library on a device: what a user gets, and on a GPU every other backend that can run."""
    found, usual = {"lorakernels": contextlib.nullcontext}, backends.ORDER.get(device, ("reference",))[0]
    if device != "cpu":
        for name in backends.NAMES:
            if backends.why_not(name, device, dtype) is None and name not in ("reference", usual):
                found[f"lorakernels: {name}"] = lambda name=name: backends.use_backend(name)
        if fused and "lorakernels: triton" in found:
            found["lorakernels: triton fused"] = fused_product
    return found


def is_ours(name):
    return name.partition(":")[0] == "lorakernels"


@contextlib.contextmanager
def fused_product():
    """Triton's fused product in both passes, whatever the table says."""
    from lorakernels.backends import triton

    kept, triton.linear_lowrank = triton.linear_lowrank, triton.linear_lowrank_fused
    try:
        with backends.use_backend("triton"):
            yield
    finally:
        triton.linear_lowrank = kept


def passes(mode, forward, leaves, dy):
    """(call, ready) of a mode: `forward` gives y, `leaves` are {name: tensor} that get a gradient."""
    names, tensors = ["d" + name for name in leaves], list(leaves.values())

    def gradients(y):
        return dict(zip(names, torch.autograd.grad(y, tensors, dy)))

    if mode == "fwd+bwd":

        def both():
            y = forward()
            return gradients(y) | {"y": y}

        return both, None
    if mode == "bwd":
        kept = []
        return lambda: gradients(kept.pop()), lambda: kept.append(forward())
    return lambda: {"y": forward()}, None


def recording(call, on):
    """The call with autograd's recording on or off."""

    def within():
        with torch.set_grad_enabled(on):
            return call()

    return within


def looking(M, device):
    """(some of M rows, a Work's `look`): y and dx are compared in LOOK rows, the adapters' gradients whole."""
    some = torch.linspace(0, M - 1, min(M, LOOK), device=device).long()
    return some, lambda name, tensor: tensor[some] if name in ("y", "dx") else tensor


def in_turn(items, function):
    """A call on one of the items after the other, and on the first again when they are through."""
    at = [0]

    def call():
        item = items[at[0]]
        at[0] = (at[0] + 1) % len(items)
        return function(item)

    call.restart = lambda: at.__setitem__(0, 0)
    return call
