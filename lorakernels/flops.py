"""FLOP formulas of the primitives, for torch.utils.flop_counter. A leaf.

That module imports Triton, so it is not imported here: the formulas are put in when it is seen to be there, which is
looked for at each call until then.
"""

import sys

import torch


def _lowrank_down(x, A, *_, out_shape=None, **__):
    return sum(2 * x[0] * x[1] * a[0] for a in A)


def _linear_lowrank(x, w, u, *_, out_shape=None, **__):
    return 2 * x[0] * w[0] * (x[1] + u[1])


def _lowrank_grad(dy, x, u, B, *_, out_shape=None, **__):
    R = (B or u)[1]
    return 2 * dy[0] * R * (dy[1] * ((u is not None) + (B is not None)) + (x[1] if x is not None else 0))


def _nf4_linear_lowrank(x, packed, absmax, nested, N, K, blocksize, nested_blocksize, turned, u, *_, out_shape=None, **__):
    return 2 * x[0] * (N * K + (0 if u is None else u[1] * (K if turned else N)))


def _multi_down(x, A, *_, out_shape=None, **__):
    return 2 * x[0] * x[1] * out_shape[2]  # as if every row had an adapter of full rank: which have is not known here


def _multi_add(y, u, *_, out_shape=None, **__):
    return 2 * y[0] * y[1] * u[2]


def _multi_grad(dy, x, u, B, *_, out_shape=None, **__):
    return 2 * dy[0] * out_shape[0][1] * (dy[1] * (1 + (u is not None)) + (x[1] if x is not None else 0))


def _none(*_, out_shape=None, **__):
    return 0


FORMULAS = {
    "lowrank_down": _lowrank_down,
    "linear_lowrank": _linear_lowrank,
    "lowrank_grad": _lowrank_grad,
    "nf4_linear_lowrank": _nf4_linear_lowrank,
    "multi_lowrank_down": _multi_down,
    "multi_add_lowrank": _multi_add,
    "multi_lowrank_grad": _multi_grad,
    "dequantize_nf4": _none,
    "quantize_nf4": _none,
}
_registered = False


def register():
    """Once torch's FLOP counter is imported, teach it the formulas; counters that are already running learn them too."""
    global _registered
    if _registered or "torch.utils.flop_counter" not in sys.modules:
        return
    _registered = True
    from torch.utils import _python_dispatch, flop_counter

    packets = {getattr(torch.ops.lorakernels, name): formula for name, formula in FORMULAS.items()}
    for packet, formula in packets.items():
        flop_counter.register_flop_formula(packet)(formula)
    for mode in _python_dispatch._get_current_dispatch_mode_stack():
        counter = getattr(mode, "counter", None)
        if isinstance(counter, flop_counter.FlopCounterMode):
            counter.flop_registry.update({packet: flop_counter.flop_registry[packet] for packet in packets})
