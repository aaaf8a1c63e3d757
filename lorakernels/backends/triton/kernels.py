"""The Triton kernels. M rows, K in_features, N out_features, R rank.

Rules that keep them right on every compiler and in the interpreter: every masked load says other=, offsets are int64
before they meet a stride, bfloat16 goes into tl.dot or to float32 at once, one cast at the store.
"""

import triton
import triton.language as tl

from .language import dot_terms, dropout_lanes


@triton.jit
def add_lowrank(
    # pointers
    y, u, v, bias, seed,
    # sizes
    M, N, R,
    # scalars
    scaling, threshold, dropout_scale,
    # strides
    stride_ym, stride_um, stride_vn, stride_vr, stride_bias,
    # what the kernel is made for
    HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr, TERMS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """y[m, n] += scaling * drop'(sum_r u[m, r] v[n, r]) + scaling * bias[n], in place, one rounding at the store."""
    blocks_n = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    m = (pid // blocks_n).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n0 = (pid % blocks_n).to(tl.int64) * BLOCK_N
    n = n0 + tl.arange(0, BLOCK_N)
    in_m, in_n = m < M, n < N

    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for r0 in range(0, R, BLOCK_R):
        r = (r0 + tl.arange(0, BLOCK_R)).to(tl.int64)
        in_r = r < R
        u_tile = tl.load(u + m[:, None] * stride_um + r[None, :], mask=in_m[:, None] & in_r[None, :], other=0.0)
        v_tile = tl.load(v + n[None, :] * stride_vn + r[:, None] * stride_vr, mask=in_r[:, None] & in_n[None, :], other=0.0)
        acc = dot_terms(u_tile, v_tile.to(tl.float32), acc, TERMS, v.dtype.element_ty)

    if DROPOUT:
        lanes = dropout_lanes(tl.load(seed), m, n0 // 8 + tl.arange(0, BLOCK_N // 8), BLOCK_M, BLOCK_N)
        acc = tl.where(lanes >= threshold, acc * dropout_scale, 0.0)
    acc *= scaling
    if HAS_BIAS:
        acc += scaling * tl.load(bias + n * stride_bias, mask=in_n, other=0.0).to(tl.float32)[None, :]

    at = y + m[:, None] * stride_ym + n[None, :]
    inside = in_m[:, None] & in_n[None, :]
    total = tl.load(at, mask=inside, other=0.0).to(tl.float32) + acc
    tl.store(at, total.to(y.dtype.element_ty), mask=inside)
