"""Every primitive in plain torch: the contract, the oracle of the tests, and the fallback.

M rows of x (tokens), K in_features, N out_features, R rank. Adapter products and their sums run in float32 (float64 for
float64 inputs); the base product x W^T runs in its own dtype through torch and is rounded once, the sum once more.
Results are written with out= forms: a primitive called by hand on tensors that need gradients raises instead of
recording half a graph, and autocast, which does not see out= forms, changes nothing here.
"""

import torch

from .. import dropout


def why_not(device_type, dtype):
    return None


def accumulator(dtype):
    """The dtype of sums, of u and of du."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def base_product(x, w, bias):
    """y = x w^T + bias, in x's dtype: what F.linear computes, bit for bit."""
    y = x.new_empty(x.shape[0], w.shape[0])
    return torch.mm(x, w.t(), out=y) if bias is None else torch.addmm(bias, x, w.t(), out=y)


def product(a, b, dtype):
    """a b with both operands in dtype."""
    return torch.mm(a.to(dtype), b.to(dtype), out=a.new_empty(a.shape[0], b.shape[1], dtype=dtype))


def drop(x, seed, dropout_p):
    """Drop elements of x (M,K), in the accumulator's dtype."""
    x = x.to(accumulator(x.dtype))
    if seed is None:
        return x
    kept = dropout.keep_mask(seed, *x.shape, dropout_p)
    return torch.where(kept, x * dropout.scale(dropout_p), x.new_zeros(()))


def lowrank_down(x, A, seed, dropout_p):
    """u (M,R) = drop(x) A^T, float32: torch product of float32 copies. Several A's: side by side, each with its own mask."""
    dtype = accumulator(x.dtype)
    if len(A) == 1:
        return product(drop(x, seed, dropout_p), A[0].t(), dtype)
    seeds = [None] * len(A) if seed is None else seed.split(1)
    u = x.new_empty(x.shape[0], sum(a.shape[0] for a in A), dtype=dtype)
    for a, seed, columns in zip(A, seeds, u.split([a.shape[0] for a in A], dim=1)):
        columns.copy_(product(drop(x, seed, dropout_p), a.t(), dtype))
    return u


def linear_lowrank(x, w, u, v, scaling, bias, lowrank_bias, seed, dropout_p):
    """y (M,N) = x w^T + bias + scaling * (drop(u v^T) + lowrank_bias): torch product, then the sum in float32."""
    y = base_product(x, w, bias)
    delta = drop(product(u, v.t(), u.dtype), seed, dropout_p) * scaling
    if lowrank_bias is not None:
        delta += lowrank_bias.to(u.dtype) * scaling
    return y.copy_(y.to(u.dtype) + delta)


def lowrank_grad(dy, x, u, B, seed, dropout_p, scaling, dtype):
    """du = scaling * dy B, dA = du^T drop(x), dB = scaling * dy^T u: torch products of float32 copies.

    du (M,R) is float32, dA (R,K) and dB (N,R) are rounded once to dtype. Without B no du, without x no dA, without u no dB:
    an empty tensor stands in the place of what is not computed.
    """
    wide = accumulator(dy.dtype)
    dy = dy.to(wide)
    du, dA, dB = dy.new_empty(0), dy.new_empty(0, dtype=dtype), dy.new_empty(0, dtype=dtype)
    if B is not None:
        du = product(dy, B, wide).mul_(scaling)
    if x is not None:
        dA = product(du.t(), drop(x, seed, dropout_p), wide).to(dtype)
    if u is not None:
        dB = product(dy.t(), u, wide).mul_(scaling).to(dtype)
    return du, dA, dB
