"""The one error rule. No other tolerance is typed in any test.

A result is held against float64: err = |out - ref64| / |ref64| (Frobenius). It may not exceed 1.1 times the error of
PEFT's eager layer in the same dtypes, nor need it fall below a floor: the same float32 arithmetic in another order is
"worse" than eager in half of all draws.
"""

import math

import torch

SLACK = 1.1
UNIT_ROUNDOFF = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24, torch.float64: 2.0**-53}

comparisons = 0
worst = (0.0, "none")


def floor(result, base, K):
    """The error that is always allowed, by the result's dtype, the base's dtype and the length K of the sums (through a
    chain of layers: the product of theirs)."""
    if result in (torch.bfloat16, torch.float16):
        return UNIT_ROUNDOFF[result]
    if base in (torch.bfloat16, torch.float16):
        return 2.0**-16
    return 4 * UNIT_ROUNDOFF[result] * math.sqrt(max(1.0, math.log2(K)))


def relative_error(out, ref64):
    error, size = (out.double() - ref64).norm().item(), ref64.norm().item()
    return error / size if size else error


def allowed(result, eager_error, base, K):
    """The largest error of a result of dtype `result`, where PEFT's eager layer has `eager_error`."""
    return max(SLACK * eager_error, floor(result, base, K))


def check(name, out, ref64, eager, *, base, K):
    """Hold `out` against `ref64`, with `eager` the same result of PEFT's eager layer."""
    global comparisons, worst
    assert out.shape == ref64.shape, f"{name}: shape {tuple(out.shape)}, expected {tuple(ref64.shape)}"
    assert torch.isfinite(out).all(), f"{name}: {int((~torch.isfinite(out)).sum())} of {out.numel()} elements are not finite"
    err, eager_err = relative_error(out, ref64), relative_error(eager, ref64)
    bound = allowed(out.dtype, eager_err, base, K)
    assert err <= bound, f"{name}: error {err:.3e}, allowed {bound:.3e} (eager {eager_err:.3e}), {out.dtype} on {base}"
    comparisons += 1
    worst = max(worst, (err / bound, name))
