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
    """u (M,R) = drop(x) A^T, float32: torch product of float32 copies."""
    return product(drop(x, seed, dropout_p), A.t(), accumulator(x.dtype))


def linear_lowrank(x, w, u, v, scaling, bias, lowrank_bias, seed, dropout_p):
    """y (M,N) = x w^T + bias + scaling * (drop(u v^T) + lowrank_bias): torch product, then the sum in float32."""
    y = base_product(x, w, bias)
    delta = drop(product(u, v.t(), u.dtype), seed, dropout_p) * scaling
    if lowrank_bias is not None:
        delta += lowrank_bias.to(u.dtype) * scaling
    return y.copy_(y.to(u.dtype) + delta)


def lowrank_grad_up(dy, u, B, scaling):
    """du (M,R) = scaling * dy B and dB (N,R) = scaling * dy^T u, float32: torch products of a float32 copy.

    Without B (or without u) that result is not computed, and an empty tensor stands in its place.
    """
    dtype = accumulator(dy.dtype)
    dy = dy.to(dtype)
    du = dy.new_empty(0) if B is None else product(dy, B, dtype).mul_(scaling)
    dB = dy.new_empty(0) if u is None else product(dy.t(), u, dtype).mul_(scaling)
    return du, dB


def lowrank_grad_down(x, du, seed, dropout_p):
    """dA (R,K) = du^T drop(x), float32: torch product of float32 copies."""
    return product(du.t(), drop(x, seed, dropout_p), du.dtype)
