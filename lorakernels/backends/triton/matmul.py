"""The fused product: base and low-rank term in one accumulator, one store. M rows, K the summed dimension, N columns, R rank."""

import triton
import triton.language as tl

from .language import dropped, grouped, lowrank_tile


@triton.jit
def linear_lowrank(
    # pointers; x and w may be tensor descriptors
    x, w, u, v, bias, lowrank_bias, seed, y,
    # sizes
    M, N, K, R,
    # scalars
    scaling, threshold, dropout_scale,
    # strides
    stride_xm, stride_xk, stride_wn, stride_wk, stride_um, stride_vn, stride_vr, stride_bias, stride_lowrank_bias, stride_ym,
    # what the kernel is made for
    HAS_BIAS: tl.constexpr, HAS_LOWRANK_BIAS: tl.constexpr, DROPOUT: tl.constexpr, MODE: tl.constexpr,
    PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr, W_TURNED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """y[m, n] = sum_k x[m, k] w[n, k] + bias[n] + scaling * (drop'(sum_r u[m, r] v[n, r]) + lowrank_bias[n])

    The low-rank tile goes into the accumulator first, where it waits for nobody. With strides for x and w the same kernel
    is dx = dy W + drop'(du A). DESCRIPTORS: x and w come as descriptors of row-major matrices; W_TURNED: w's matrix is (K, N).
    """
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for tile in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        row, column = grouped(tile, tiles_m, tiles_n, GROUP_M)
        m0, n0 = row * BLOCK_M, column * BLOCK_N
        m = (m0 + tl.arange(0, BLOCK_M)).to(tl.int64)
        n = (n0 + tl.arange(0, BLOCK_N)).to(tl.int64)
        in_m, in_n = m < M, n < N

        acc = scaling * lowrank_tile(u, v, m, n, in_m, in_n, R, stride_um, stride_vn, stride_vr, MODE, BLOCK_M, BLOCK_N, BLOCK_R)
        if DROPOUT:
            acc = dropped(acc, tl.load(seed), threshold, m, n0, BLOCK_M, BLOCK_N) * dropout_scale

        for k0 in range(0, K, BLOCK_K):
            if DESCRIPTORS:
                x_tile = x.load([m0, k0])
                w_tile = w.load([k0, n0]) if W_TURNED else w.load([n0, k0]).T
            else:
                k = (k0 + tl.arange(0, BLOCK_K)).to(tl.int64)
                in_k = k < K
                x_tile = tl.load(x + m[:, None] * stride_xm + k[None, :] * stride_xk, mask=in_m[:, None] & in_k[None, :], other=0.0)
                w_tile = tl.load(w + n[None, :] * stride_wn + k[:, None] * stride_wk, mask=in_k[:, None] & in_n[None, :], other=0.0)
            acc = tl.dot(x_tile, w_tile, acc, input_precision=PRECISION)
        if HAS_LOWRANK_BIAS:
            acc += scaling * tl.load(lowrank_bias + n * stride_lowrank_bias, mask=in_n, other=0.0).to(tl.float32)[None, :]
        if HAS_BIAS:
            acc += tl.load(bias + n * stride_bias, mask=in_n, other=0.0).to(tl.float32)[None, :]
        tl.store(y + m[:, None] * stride_ym + n[None, :], acc.to(y.dtype.element_ty), mask=in_m[:, None] & in_n[None, :])
