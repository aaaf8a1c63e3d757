"""The fused product with an NF4 weight: tiles of W are decoded on their way to it. M rows, N columns of the result, K the summed
dimension, R rank. The weight has `rows` of `width` elements each; turned, its rows are what is summed."""

import triton
import triton.language as tl

from .language import dropped, grouped, lowrank_tile
from .nf4 import code_values, scales


@triton.jit
def weight_tile(
    packed, absmax, nested, row, column0, rows, width, half_width, block_shift, nested_blocksize,
    NESTED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """code * absmax, float32, of rows `row` (ROWS,) and COLUMNS columns from column0 on ; zero outside of the weight. width and
    column0 are multiples of 32, as blocks are: a byte is of one row and 32 neighbours are of one block."""
    in_row = row < rows
    pair = column0 // 2 + tl.arange(0, COLUMNS // 2)
    byte = tl.load(packed + row[:, None] * half_width + pair[None, :], mask=in_row[:, None] & (pair < half_width)[None, :], other=0).to(tl.int32)
    codes = tl.join(code_values(byte >> 4), code_values(byte & 15))
    group = column0 + 32 * tl.arange(0, COLUMNS // 32)
    inside = in_row[:, None] & (group < width)[None, :]
    scale = scales(absmax, nested, (row[:, None] * width + group[None, :]) >> block_shift, inside, nested_blocksize, NESTED)
    scale = tl.where(inside, scale, 0.0)
    return tl.reshape(tl.reshape(codes, [ROWS, COLUMNS // 32, 32]) * scale[:, :, None], [ROWS, COLUMNS])


@triton.jit
def nf4_linear_lowrank(
    # pointers
    x, packed, absmax, nested, u, v, bias, lowrank_bias, seed, y,
    # sizes
    M, rows, width, half_width, R,
    # scalars
    scaling, threshold, dropout_scale, block_shift, nested_blocksize,
    # strides
    stride_xm, stride_xk, stride_um, stride_vn, stride_vr, stride_bias, stride_lowrank_bias, stride_ym,
    # what the kernel is made for
    HAS_LOWRANK: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_LOWRANK_BIAS: tl.constexpr, DROPOUT: tl.constexpr, MODE: tl.constexpr,
    NESTED: tl.constexpr, TURNED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """y[m, n] = sum_k x[m, k] w[n, k] + bias[n] + scaling * (drop'(sum_r u[m, r] v[n, r]) + lowrank_bias[n])

    w (N, K) is the weight, its transpose where TURNED; each value is rounded once to x's dtype, sums are float32.
    """
    if TURNED:
        N, K = width, rows
    else:
        N, K = rows, width
    row, column = grouped(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    m0, n0 = row * BLOCK_M, column * BLOCK_N
    m = (m0 + tl.arange(0, BLOCK_M)).to(tl.int64)
    n = (n0 + tl.arange(0, BLOCK_N)).to(tl.int64)
    in_m, in_n = m < M, n < N

    if HAS_LOWRANK:
        acc = scaling * lowrank_tile(u, v, m, n, in_m, in_n, R, stride_um, stride_vn, stride_vr, MODE, BLOCK_M, BLOCK_N, BLOCK_R)
        if DROPOUT:
            acc = dropped(acc, tl.load(seed), threshold, m, n0, BLOCK_M, BLOCK_N) * dropout_scale
    else:
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)

    for k0 in range(0, K, BLOCK_K):
        k = (k0 + tl.arange(0, BLOCK_K)).to(tl.int64)
        x_tile = tl.load(x + m[:, None] * stride_xm + k[None, :] * stride_xk, mask=in_m[:, None] & (k < K)[None, :], other=0.0)
        if TURNED:
            w_tile = weight_tile(packed, absmax, nested, k, n0, rows, width, half_width, block_shift, nested_blocksize, NESTED, BLOCK_K, BLOCK_N)
        else:
            w_tile = weight_tile(packed, absmax, nested, n, k0, rows, width, half_width, block_shift, nested_blocksize, NESTED, BLOCK_N, BLOCK_K).T
        acc = tl.dot(x_tile, w_tile.to(x.dtype.element_ty), acc)
    if HAS_LOWRANK_BIAS:
        acc += scaling * tl.load(lowrank_bias + n * stride_lowrank_bias, mask=in_n, other=0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        acc += tl.load(bias + n * stride_bias, mask=in_n, other=0.0).to(tl.float32)[None, :]
    tl.store(y + m[:, None] * stride_ym + n[None, :], acc.to(y.dtype.element_ty), mask=in_m[:, None] & in_n[None, :])
