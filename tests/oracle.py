"""What results are held against: LoRA in float64 with its own dropout mask, and PEFT's eager layer as torch formulas."""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch.nn import functional as F

from numerics import check


def philox(counter, key, rounds=7):
    """Philox4x32 in Python's own integers, straight from the paper."""
    counter, key = list(counter), list(key)
    for _ in range(rounds):
        low0, low1 = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [low1 >> 32 ^ counter[1] ^ key[0], low1 & 0xFFFFFFFF, low0 >> 32 ^ counter[3] ^ key[1], low0 & 0xFFFFFFFF]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return counter


def keep(seed, rows, columns, p):
    """The dropout mask, element by element."""
    seed &= 2**64 - 1
    kept = np.zeros((rows, columns), dtype=bool)
    for m in range(rows):
        for c in range(0, columns, 8):
            words = philox((c // 8, m & 0xFFFFFFFF, m >> 32, 0), (seed & 0xFFFFFFFF, seed >> 32))
            lanes = [half for word in words for half in (word & 0xFFFF, word >> 16)]
            for j in range(min(8, columns - c)):
                kept[m, c + j] = lanes[j] >= round(p * 65536)
    return torch.from_numpy(kept)


def scale(p):
    return 65536 / (65536 - round(p * 65536))


@dataclass
class Case:
    """One call of lora_linear with all that it needs, and the gradient that comes back."""

    x: torch.Tensor
    W: torch.Tensor
    A: torch.Tensor
    B: torch.Tensor
    dy: torch.Tensor
    scaling: float = 1.5
    bias: torch.Tensor = None
    lora_bias: torch.Tensor = None
    p: float = 0.0
    mask: torch.Tensor = field(default=None, repr=False)  # kept elements of x, as rows

    NAMES = ("x", "W", "A", "B", "bias", "lora_bias")

    def tensors(self):
        return {name: getattr(self, name) for name in self.NAMES if getattr(self, name) is not None}


def make_case(M, K, N, R, base, adapter, *, device="cpu", bias=False, lora_bias=False, p=0.0, seed=0, x=None, dy=None):
    """Values as in training: x about 1, W about 1/sqrt(K), an adapter that matters beside it."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, dtype, size=1.0):
        return (torch.randn(*shape, generator=generator, dtype=torch.float32) * size).to(dtype).to(device)

    return Case(
        x=draw(M, K, dtype=base) if x is None else x,
        W=draw(N, K, dtype=base, size=K**-0.5),
        A=draw(R, K, dtype=adapter, size=K**-0.5),
        B=draw(N, R, dtype=adapter, size=R**-0.5),
        bias=draw(N, dtype=base) if bias else None,
        lora_bias=draw(N, dtype=adapter) if lora_bias else None,
        dy=draw(M, N, dtype=base) if dy is None else dy,
        p=p,
    )


def _results(outputs, case):
    """{"y": ..., "x": dx, "A": dA, ...} of y and leaves."""
    y, leaves = outputs
    y.backward(case.dy.to(y.dtype))
    return {"y": y.detach()} | {name: leaf.grad for name, leaf in leaves.items()}


def in_float64(case):
    leaves = {name: t.detach().double().clone().requires_grad_() for name, t in case.tensors().items()}
    x, W, A, B = (leaves[name] for name in ("x", "W", "A", "B"))
    dropped = x if case.mask is None else x * case.mask.view(x.shape) * scale(case.p)
    y = F.linear(x, W, leaves.get("bias")) + case.scaling * F.linear(F.linear(dropped, A), B, leaves.get("lora_bias"))
    return _results((y, leaves), case)


def peft_eager(case, autocast=None):
    """PEFT's Linear.forward in its own dtypes; test_oracle.py holds it against the real one, bit for bit."""
    leaves = {name: t.detach().clone().requires_grad_() for name, t in case.tensors().items()}
    x, W, A, B = (leaves[name] for name in ("x", "W", "A", "B"))
    with torch.autocast(x.device.type, dtype=autocast, enabled=autocast is not None):
        result = F.linear(x, W, leaves.get("bias"))
        cast = x.to(A.dtype)
        if case.mask is not None:
            cast = cast * (case.mask.view(x.shape) * scale(case.p)).to(cast.dtype)
        result = result + F.linear(F.linear(cast, A), B, leaves.get("lora_bias")) * case.scaling
        result = result.to(autocast or x.dtype)
    return _results((result, leaves), case)


def run(function, case):
    """y and every gradient of lora_linear on the case's tensors; views stay views."""
    leaves = {name: t.detach().requires_grad_() for name, t in case.tensors().items()}
    for leaf in leaves.values():
        leaf.grad = None
    x, W, A, B = (leaves[name] for name in ("x", "W", "A", "B"))
    y = function(x, W, A, B, case.scaling, leaves.get("bias"), lora_bias=leaves.get("lora_bias"), dropout_p=case.p)
    y.backward(case.dy.to(y.dtype) if case.dy.dtype != y.dtype else case.dy)
    return {"y": y.detach()} | {name: leaf.grad for name, leaf in leaves.items()}


def hold(results, case, *, autocast=None, label=""):
    """Every result under the error rule."""
    exact, eager = in_float64(case), peft_eager(case, autocast)
    assert results.keys() == exact.keys()
    base, K = autocast or case.W.dtype, max(case.W.shape)
    for name, out in results.items():
        assert out.dtype == eager[name].dtype, f"{label}{name}: {out.dtype}, expected {eager[name].dtype}"
        check(f"{label}{'y' if name == 'y' else 'd' + name}", out, exact[name], eager[name], base=base, K=K)


def hold_shared(base, adapter, p, device="cpu"):
    """lowrank_down of several A's that share x, each with its own mask, under the error rule: one u beside the other."""
    from lorakernels import ops

    generator = torch.Generator().manual_seed(3)
    for ranks in ((3, 3, 3), (16, 1, 17), (2,) * 11):
        M, K = 37, 72
        x = torch.randn(M, K, generator=generator).to(base).to(device)
        A = [torch.randn(r, K, generator=generator).to(adapter).to(device) for r in ranks]
        seeds = torch.arange(100, 100 + len(ranks), device=device) if p else None
        u = ops.lowrank_down(x, A, seeds, p)
        assert u.shape == (M, sum(ranks)) and u.dtype == torch.float32
        for i, (a, part) in enumerate(zip(A, u.split(ranks, dim=1))):
            kept = keep(100 + i, M, K, p).to(device) * scale(p) if p else torch.ones(M, K, device=device)
            exact = (x.double() * kept) @ a.double().t()
            eager = ((x.to(adapter) * kept.to(adapter)) @ a.t()).float()
            check(f"shared x, A {i} of {len(A)}", part, exact, eager, base=base, K=K)


def with_mask(case, seed=11):
    """The case with the mask that its call will draw after torch.manual_seed(seed)."""
    from lorakernels import dropout

    torch.manual_seed(seed)
    drawn = dropout.draw_seed(case.x.device)
    rows = case.x.numel() // case.x.shape[-1]
    case.mask = dropout.keep_mask(drawn, rows, case.x.shape[-1], case.p)
    torch.manual_seed(seed)
    return case


def hold_thin(M, K, N, R, base, adapter, device="cpu", seed=0):
    """u, du, dA and dB by themselves under the error rule. Returns them."""
    from lorakernels import ops

    case = make_case(M, K, N, R, base, adapter, device=device, seed=seed)
    u = ops.lowrank_down(case.x, [case.A], None, 0.0)
    du, dA, dB = ops.lowrank_grad(case.dy, case.x, u, case.B, None, 0.0, 1.5, adapter)

    def formulas(dtype):
        x, dy, A, B = (t.to(dtype) for t in (case.x, case.dy, case.A, case.B))
        u, du = x @ A.t(), 1.5 * dy @ B
        return {"u": u, "du": du, "dA": du.t() @ x, "dB": 1.5 * dy.t() @ u}

    results, exact, eager = {"u": u, "du": du, "dA": dA, "dB": dB}, formulas(torch.float64), formulas(adapter)
    for name, out in results.items():
        check(f"{name} of M={M} K={K} N={N} R={R}", out, exact[name], eager[name].to(out.dtype), base=base, K=max(M, K, N))
    return results
