"""Triton functions that several kernels share, and every workaround for the compiler."""

import triton
import triton.language as tl


FLOAT32 = tl.constexpr(0)  # float32 operands: a float32 base
ROUNDED = tl.constexpr(1)  # operands rounded to the adapter's half-precision dtype, one product
TERMS = tl.constexpr(2)  # operands as sums of bfloat16 terms: float32 adapters on a half-precision base


@triton.jit
def dot_terms(a, b, acc, MODE: tl.constexpr, DTYPE: tl.constexpr, A_TERMS: tl.constexpr, B_TERMS: tl.constexpr):
    """acc + a b in one of the modes above.

    A bfloat16 value is one term, a float16 value two, a float32 value three (all of its 24 bits) or two (16 of them).
    Products of terms that lie below the last one kept are left out.
    """
    if MODE == FLOAT32:
        acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    elif MODE == ROUNDED:
        acc = tl.dot(a.to(DTYPE), b.to(DTYPE), acc)
    else:
        a0, b0 = a.to(tl.bfloat16), b.to(tl.bfloat16)
        if A_TERMS > 1:
            a_rest = a.to(tl.float32) - a0.to(tl.float32)
            a1 = a_rest.to(tl.bfloat16)
        if B_TERMS > 1:
            b_rest = b.to(tl.float32) - b0.to(tl.float32)
            b1 = b_rest.to(tl.bfloat16)
        if A_TERMS > 2:
            acc = tl.dot((a_rest - a1.to(tl.float32)).to(tl.bfloat16), b0, acc)
        if B_TERMS > 2:
            acc = tl.dot(a0, (b_rest - b1.to(tl.float32)).to(tl.bfloat16), acc)
        if A_TERMS + B_TERMS > 4:
            acc = tl.dot(a1, b1, acc)
        if A_TERMS > 1:
            acc = tl.dot(a1, b0, acc)
        if B_TERMS > 1:
            acc = tl.dot(a0, b1, acc)
        acc = tl.dot(a0, b0, acc)
    return acc


@triton.jit
def lowrank_tile(
    u, v, m, n, in_m, in_n, R, stride_um, stride_vn, stride_vr,
    MODE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, pages=None, PAGED: tl.constexpr = False,
    splits=1, stride_us=0, SPLIT: tl.constexpr = False,
):  # fmt: skip
    """sum_r u[m, r] v[n, r], float32: rows m (BLOCK_M,) and columns n (BLOCK_N,) where in_m and in_n. PAGED: v[n, pages[r]].
    SPLIT: u is the sum of `splits` matrices, added in their order."""
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for r0 in range(0, R, BLOCK_R):
        r = (r0 + tl.arange(0, BLOCK_R)).to(tl.int64)
        in_r = r < R
        u_tile = tl.load(u + m[:, None] * stride_um + r[None, :], mask=in_m[:, None] & in_r[None, :], other=0.0)
        if SPLIT:
            for s in range(1, splits):
                u_tile += tl.load(u + s * stride_us + m[:, None] * stride_um + r[None, :], mask=in_m[:, None] & in_r[None, :], other=0.0)
        at = r
        if PAGED:
            at = tl.load(pages + r, mask=in_r, other=0)
        v_tile = tl.load(v + n[None, :] * stride_vn + at[:, None] * stride_vr, mask=in_r[:, None] & in_n[None, :], other=0.0)
        acc = dot_terms(u_tile, v_tile, acc, MODE, v.dtype.element_ty, 2, 2)
    return acc


@triton.jit
def dropout_lanes(seed, row, column8, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The 16-bit lanes (BLOCK_M, BLOCK_N) of rows `row` (BLOCK_M,) and counters `column8` (BLOCK_N // 8,): see dropout.py."""
    c0 = (column8[None, :] + tl.zeros([BLOCK_M, 1], tl.int64)).to(tl.uint32)
    c1 = (row[:, None] + tl.zeros([1, BLOCK_N // 8], tl.int64)).to(tl.uint32)
    c2 = ((row >> 32)[:, None] + tl.zeros([1, BLOCK_N // 8], tl.int64)).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, c0, c1, c2, tl.zeros_like(c0), n_rounds=7)
    # column 4 b2 + 2 b1 + b0 of a counter is half b0 of word 2 b2 + b1; join adds the fastest dimension last
    low = tl.join(tl.join(w0 & 0xFFFF, w2 & 0xFFFF), tl.join(w1 & 0xFFFF, w3 & 0xFFFF))
    high = tl.join(tl.join(w0 >> 16, w2 >> 16), tl.join(w1 >> 16, w3 >> 16))
    return tl.reshape(tl.join(low, high), [BLOCK_M, BLOCK_N])


@triton.jit
def dropped(x, seed, threshold, row, column0, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The tile x (BLOCK_M, BLOCK_N) that starts at column0 (a multiple of 8), zero where it is dropped; not scaled."""
    lanes = dropout_lanes(seed, row, column0 // 8 + tl.arange(0, BLOCK_N // 8), BLOCK_M, BLOCK_N)
    return tl.where(lanes >= threshold, x, tl.zeros_like(x))


@triton.jit
def grouped(tile, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Tile number -> (row, column), walking GROUP_M rows of tiles column by column, so that neighbours share operands."""
    per_group = GROUP_M * tiles_n
    first = tile // per_group * GROUP_M
    rows = min(tiles_m - first, GROUP_M)
    within = tile % per_group
    return first + within % rows, within // rows
