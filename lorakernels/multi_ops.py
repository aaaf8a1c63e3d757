"""The operators of many adapters in one batch, the autograd.Function over them, and the order of rows that they work in.

M rows of x (tokens), E adapters of at most R ranks; A (E,R,K), B (E,N,R). `order` and the rest: backends/reference.py.
"""

from typing import NamedTuple

import torch

from .backends import kind
from .backends.reference import accumulator, splits_of, stack_shape, summed, tiles_of
from .ops import cast, gradient, in_shape, primitive, product, refuse_second_derivatives, rows, way


@primitive("multi_route(Tensor ids, int E) -> (Tensor, Tensor)", dtype_of=lambda arguments: torch.float32)
def multi_route(ids, E):
    return ids.new_empty(ids.shape, dtype=torch.int64), ids.new_empty(E + 1, dtype=torch.int64)  # order (M,), starts (E + 1,)


@primitive("multi_lowrank_down(Tensor x, Tensor A, Tensor order, Tensor starts, Tensor? tiles, Tensor? ranks, Tensor? pages, Tensor? seed, Tensor? thresholds, int splits) -> Tensor")
def multi_lowrank_down(x, A, order, starts, tiles, ranks, pages, seed, thresholds, splits):
    width = A.shape[1] if pages is None else A.shape[1] * pages.shape[1]
    return x.new_empty(splits, x.shape[0], width, dtype=accumulator(x.dtype))  # u (S,M,R), in the order of the adapters


@primitive(
    "multi_add_lowrank(Tensor(a!) y, Tensor u, Tensor B, Tensor? scaling, Tensor order, Tensor starts, Tensor? tiles, Tensor? ranks, Tensor? pages, Tensor? seed,"
    " Tensor? thresholds) -> ()"
)
def multi_add_lowrank(y, u, B, scaling, order, starts, tiles, ranks, pages, seed, thresholds):
    return None


@primitive(
    "multi_lowrank_grad(Tensor dy, Tensor? x, Tensor? u, Tensor B, Tensor? scaling, Tensor order, Tensor starts, Tensor? tiles, Tensor? ranks, Tensor? pages,"
    " Tensor? seed, Tensor? thresholds, ScalarType dtype) -> (Tensor, Tensor, Tensor)"
)
def multi_lowrank_grad(dy, x, u, B, scaling, order, starts, tiles, ranks, pages, seed, thresholds, dtype):
    E, N, R = stack_shape(B, pages)
    du = dy.new_empty(dy.shape[0], R, dtype=accumulator(dy.dtype))
    dA = dy.new_empty((0,) if x is None else (E, R, x.shape[1]), dtype=dtype)
    dB = dy.new_empty((0,) if u is None else (E, N, R), dtype=dtype)
    return du, dA, dB


class Routed(NamedTuple):
    """Rows sorted by adapter, each adapter's in their own order; where each adapter's begin; and how many tiles they make (None on
    the CPU). First come rows with id -1, last those whose id is none."""

    order: torch.Tensor  # (M,)
    starts: torch.Tensor  # (E + 1,)
    tiles: torch.Tensor | None  # (E + 1,)


def route(ids, E):
    """Routed rows of adapter ids (M,). On a GPU nothing is read on the host, and sizes depend on shapes alone."""
    order, starts = way(ids, dtype=torch.float32).multi_route(ids, E)
    return Routed(order, starts, None if ids.is_cpu else tiles_of(starts, len(ids)))


def base(run, x, W, scales, turned, bias):
    """x W^T + bias, or x W where turned: where W is dense, the product that the backend's layers of one adapter have."""
    if scales is not None:
        return product(run, x, W, scales, turned, None, None, 1.0, bias, None, None, 0.0)
    return run.base_product(x, W.t() if turned else W, bias)


def down(run, x, A, *segments):
    """u of rows x (M, K), in as many parts of K as pay there."""
    return run.multi_lowrank_down(x, A, *segments, splits_of(*x.shape, kind(x)))


class MultiLoraLinear(torch.autograd.Function):
    """y = x W^T + bias + s_e u B_e^T, u = drop(x) A_e^T, for each row's adapter e

    du = s_e dy B_e, dx = dy W + drop'(du A_e), dB_e = s_e dy^T u, dA_e = du^T drop(x): over the rows of adapter e alone.
    Kept for backward: x as given, u, the seed, the order of rows and the parameters.
    """

    @staticmethod
    def forward(ctx, x, W, A, B, bias, scaling, order, starts, tiles, ranks, pages, seed, thresholds, dtype, absmax, nested, format, u):
        y, u = forward(x, W, A, B, bias, scaling, order, starts, tiles, ranks, pages, seed, thresholds, dtype, absmax, nested, format, u)
        keep_x = A.requires_grad or W.requires_grad
        u = summed(u) if B.requires_grad else None
        ctx.save_for_backward(x if keep_x else None, W, A, B, u, scaling, order, starts, tiles, ranks, pages, seed, thresholds, absmax, nested)
        ctx.dtype, ctx.format, ctx.x_shape, ctx.x_dtype = dtype, format, x.shape, x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    def backward(ctx, dy):
        refuse_second_derivatives()
        x, W, A, B, u, scaling, order, starts, tiles, ranks, pages, seed, thresholds, absmax, nested = ctx.saved_tensors
        need_x, need_W, need_A, need_B, need_bias = ctx.needs_input_grad[:5]
        dtypes = W.dtype, A.dtype, B.dtype
        x, W = cast(ctx.dtype, x, W)
        A, B = (A, B) if pages is not None else cast(ctx.dtype, A, B)
        dy = rows(dy)
        x = None if x is None else rows(x)
        dx = dW = dA = dB = dbias = None
        segments = (order, starts, tiles, ranks, pages, seed, thresholds)
        run = way(dy, x, W, A, B, u)
        if need_x or need_A or need_B:
            du, dA, dB = run.multi_lowrank_grad(dy, x if need_A else None, u if need_B else None, B, scaling, *segments, dtypes[1])
            dA, dB = dA if need_A else None, dB.to(dtypes[2]) if need_B else None
        if need_x:
            dx = base(run, dy, W, None if absmax is None else (absmax, nested, ctx.format), True, None)
            run.multi_add_lowrank(dx, du[None], A.transpose(1, 2), None, *segments)
            dx = gradient(dx, ctx.x_shape, ctx.x_dtype)
        if need_W:
            with torch.autocast(dy.device.type, enabled=False):
                dW = torch.mm(dy.t(), x).to(dtypes[0])
        if need_bias:
            dbias = dy.sum(0, dtype=accumulator(dy.dtype)).to(ctx.bias_dtype)
        return dx, dW, dA, dB, dbias, *[None] * 13


def forward(x, W, A, B, bias, scaling, order, starts, tiles, ranks, pages, seed, thresholds, dtype, absmax, nested, format, u):
    """y and u, which may be there already. Rows of a pool are never copied, so autocast leaves them as they are."""
    x, W, bias = cast(dtype, x, W, bias)
    A, B = (A, B) if pages is not None else cast(dtype, A, B)
    x_rows = rows(x)
    run = way(x_rows, W, A, B, bias)
    y = base(run, x_rows, W, None if absmax is None else (absmax, nested, format), False, bias)
    if u is None:
        u = down(run, x_rows, A, order, starts, tiles, ranks, pages, seed, thresholds)
    run.multi_add_lowrank(y, u, B, scaling, order, starts, tiles, ranks, pages, None, None)
    return in_shape(run, y, x.shape), u


def multi_lora_linear(x, W, A, B, bias, *rest):
    """MultiLoraLinear, without the Function where no gradient can be asked for."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, W, A, B, bias)):
        return MultiLoraLinear.apply(x, W, A, B, bias, *rest)
    return forward(x, W, A, B, bias, *rest)[0]
