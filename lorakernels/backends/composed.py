"""Torch's own products and one in-place pass over y: the default on a GPU until a kernel of this library was measured there.

No float32 copy of x, dy or y is made: products of half precision give float32 where the result is u, du, dA or dB, and a float32 adapter
on a bfloat16 base enters as a sum of bfloat16 terms, side by side along the rank, so that one product takes them all. On a float16
base, whose range the terms would leave, it goes `reference`'s way, as many adapters do.
"""

import torch

from .. import dropout, nf4
from . import reference
from .reference import (  # noqa: F401
    base_product,
    multi_add_lowrank,
    multi_lowrank_down,
    multi_lowrank_grad,
    multi_route,
    nf4_product,
    quantize_nf4,
)


def why_not(device_type, dtype):
    return None


def composes(base, adapter):
    """Whether these dtypes have a form of their own here."""
    return adapter == base or (base, adapter) == (torch.bfloat16, torch.float32)


def terms(values, dtype, count):
    """values as `count` terms of dtype, whose sum has 8 significant bits for each."""
    some = [values.to(dtype)]
    while len(some) < count:
        values = values - some[-1].to(values.dtype)
        some.append(values.to(dtype))
    return some


def count_of(base, adapter):
    """As how many terms an adapter, u and du enter where sums stay float32: all of a float32's 24 bits, or rounded once to the adapter's dtype."""
    return 1 if adapter == base else 3


def product(a, b):
    """a b of operands of one dtype, as float32 where they are of half precision."""
    if a.dtype in (torch.float32, torch.float64):
        return reference.product(a, b, a.dtype)
    if a.is_cuda and torch.version.hip is None:
        return torch.mm(a, b, out_dtype=torch.float32)
    return reference.product(a, b, torch.float32)


def summed(parts, count, dim):
    """The sum of `count` results that stand side by side."""
    return parts if count == 1 else torch.stack(parts.chunk(count, dim)).sum(0)


def kept(x, seed, dropout_p):
    """x with what is dropped at zero, whatever it was, not scaled."""
    return x if seed is None else torch.where(dropout.keep_mask(seed, *x.shape, dropout_p), x, x.new_zeros(()))


def lowrank_down(x, A, seed, dropout_p):
    """u (M,R) = drop(x) A^T, float32: one torch product for the A's that share x and its mask."""
    if not composes(x.dtype, A[0].dtype):
        return reference.lowrank_down(x, A, seed, dropout_p)
    if seed is not None and len(A) > 1:
        return torch.cat([lowrank_down(x, [a], one, dropout_p) for a, one in zip(A, seed.split(1))], dim=1)
    some = terms(torch.cat(A) if len(A) > 1 else A[0], x.dtype, count_of(x.dtype, A[0].dtype))
    u = summed(product(kept(x, seed, dropout_p), torch.cat(some).t()), len(some), 1)
    return u if seed is None else u.mul_(dropout.scale(dropout_p))


def linear_lowrank(x, w, u, v, scaling, bias, lowrank_bias, seed, dropout_p):
    """y = x w^T + bias through torch, then y += scaling * (drop(u v^T) + lowrank_bias) in one in-place pass of torch's."""
    if not composes(x.dtype, v.dtype):
        return reference.linear_lowrank(x, w, u, v, scaling, bias, lowrank_bias, seed, dropout_p)
    if lowrank_bias is not None:
        wide = reference.accumulator(x.dtype)
        bias = lowrank_bias.to(wide) * scaling + (0 if bias is None else bias.to(wide))
        bias = bias.to(x.dtype)
    return add_lowrank(base_product(x, w, bias), u, v, scaling, seed, dropout_p)


def add_lowrank(y, u, v, scaling, seed, dropout_p):
    """y += scaling * drop(u v^T), in place. Returns y."""
    count = 1 if v.dtype == y.dtype else 2
    some, others = terms(u, y.dtype, count), terms(v, y.dtype, count)
    if count == 2:  # what two second terms give lies below what is kept
        some, others = [some[1], some[0], some[0]], [others[0], others[1], others[0]]
    left, right = torch.cat(some, dim=1), torch.cat(others, dim=1).t()
    with torch.autocast(y.device.type, enabled=False):
        if seed is None:
            return y.addmm_(left, right, alpha=scaling)
        return y.add_(kept(product(left, right), seed, dropout_p), alpha=scaling * dropout.scale(dropout_p))


def lowrank_grad(dy, x, u, B, seed, dropout_p, scaling, dtype):
    """du = scaling * dy B, dA = du^T drop(x), dB = scaling * dy^T u: one torch product each."""
    adapter = dtype if B is None else B.dtype
    if not composes(dy.dtype, adapter):
        return reference.lowrank_grad(dy, x, u, B, seed, dropout_p, scaling, dtype)
    wide, count = reference.accumulator(dy.dtype), count_of(dy.dtype, adapter)
    du, dA, dB = dy.new_empty(0, dtype=wide), dy.new_empty(0, dtype=dtype), dy.new_empty(0, dtype=dtype)
    if B is not None:
        some = terms(B, dy.dtype, count)
        du = summed(product(dy, torch.cat(some, dim=1)), len(some), 1).mul_(scaling)
    if x is not None:
        some = terms(du, dy.dtype, count)
        dA = summed(product(torch.cat(some, dim=1).t(), kept(x, seed, dropout_p)), len(some), 0)
        dA = dA.mul_(1.0 if seed is None else dropout.scale(dropout_p)).to(dtype)
    if u is not None:
        some = terms(u, dy.dtype, count)
        dB = summed(product(dy.t(), torch.cat(some, dim=1)), len(some), 1).mul_(scaling).to(dtype)
    return du, dA, dB


# -- NF4 -----------------------------------------------------------------------------------------------------------------------

SLAB = 24 << 20  # bytes of W that are dense at a time


def dequantize_nf4(packed, absmax, nested, N, K, blocksize, nested_blocksize, n0, k0, rows, columns, dtype):
    """W[n0 : n0 + rows, k0 : k0 + columns]: code * absmax in float32, rounded once to dtype, a byte's two codes by one look-up of torch's."""
    if any(size % blocksize for size in (K, k0, columns)):
        return reference.dequantize_nf4(packed, absmax, nested, N, K, blocksize, nested_blocksize, n0, k0, rows, columns, dtype)
    book = nf4.codebook(packed.device)
    pairs = torch.stack([book.repeat_interleave(16), book.repeat(16)], dim=1)  # of each byte
    window = packed.view(N, K // 2)[n0 : n0 + rows, k0 // 2 : (k0 + columns) // 2]
    scales = nf4.block_scales(absmax, nested, nested_blocksize).view(N, K // blocksize)[n0 : n0 + rows, k0 // blocksize : (k0 + columns) // blocksize]
    codes = torch.nn.functional.embedding(window.int(), pairs).view(rows, columns // blocksize, blocksize)
    return codes.mul_(scales[:, :, None]).view(rows, columns).to(dtype)


def nf4_linear_lowrank(
    x, packed, absmax, nested, N, K, blocksize, nested_blocksize, turned, u, v, scaling, bias, lowrank_bias, seed, dropout_p
):  # fmt: skip
    """linear_lowrank with W, or where turned W^T, in NF4: slabs of it dense in x's dtype, a torch product each, then one in-place pass."""
    weight = (packed, absmax, nested, N, K, blocksize, nested_blocksize)
    y = nf4_product(x, (N, K), turned, bias, lambda n0, k0, out: out.copy_(dequantize_nf4(*weight, n0, k0, *out.shape, out.dtype)), SLAB)
    if u is None:
        return y
    if lowrank_bias is not None or not composes(x.dtype, v.dtype):
        return reference.add_lowrank(y, u, v, scaling, lowrank_bias, seed, dropout_p)
    return add_lowrank(y, u, v, scaling, seed, dropout_p)
