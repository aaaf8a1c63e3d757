"""The thin Triton kernels, bound by memory. M rows, K in_features, N out_features, R rank.

Rules that keep them right on every compiler and in the interpreter: every masked load says other=, offsets are int64
before they meet a stride, bfloat16 goes into tl.dot or to float32 at once, one cast at the store.
"""

import triton
import triton.language as tl

from .language import dot_terms, dropped, lowrank_tile


@triton.jit
def lowrank_down(
    # pointers
    x, A, seed, u,
    # sizes
    M, K, R,
    # scalars
    threshold, dropout_scale,
    # strides; a part is one of several A's of R ranks each
    stride_xm, stride_xk, stride_ap, stride_ar, stride_ak, stride_um,
    # what the kernel is made for
    DROPOUT: tl.constexpr, MODE: tl.constexpr, X_TERMS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """u[m, part R + r] = dropout_scale * sum_k drop_part(x)[m, k] A[part, r, k]"""
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    r = (tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    part = tl.program_id(2).to(tl.int64)
    in_m, in_r = m < M, r < R
    A += part * stride_ap

    acc = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for k0 in range(0, K, BLOCK_K):
        k = (k0 + tl.arange(0, BLOCK_K)).to(tl.int64)
        in_k = k < K
        x_tile = tl.load(x + m[:, None] * stride_xm + k[None, :] * stride_xk, mask=in_m[:, None] & in_k[None, :], other=0.0)
        A_tile = tl.load(A + r[None, :] * stride_ar + k[:, None] * stride_ak, mask=in_k[:, None] & in_r[None, :], other=0.0)
        if DROPOUT:
            x_tile = dropped(x_tile, tl.load(seed + part), threshold, m, k0, BLOCK_M, BLOCK_K)
        acc = dot_terms(x_tile, A_tile, acc, MODE, A.dtype.element_ty, X_TERMS, 3)
    if DROPOUT:
        acc *= dropout_scale
    tl.store(u + m[:, None] * stride_um + (part * R + r)[None, :], acc, mask=in_m[:, None] & in_r[None, :])


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
    HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr, MODE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """y[m, n] += scaling * drop'(sum_r u[m, r] v[n, r]) + scaling * bias[n], in place, one rounding at the store."""
    blocks_n = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    m = (pid // blocks_n).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n0 = (pid % blocks_n).to(tl.int64) * BLOCK_N
    n = n0 + tl.arange(0, BLOCK_N)
    in_m, in_n = m < M, n < N

    acc = scaling * lowrank_tile(u, v, m, n, in_m, in_n, R, stride_um, stride_vn, stride_vr, MODE, BLOCK_M, BLOCK_N, BLOCK_R)
    if DROPOUT:
        acc = dropped(acc, tl.load(seed), threshold, m, n0, BLOCK_M, BLOCK_N) * dropout_scale
    if HAS_BIAS:
        acc += scaling * tl.load(bias + n * stride_bias, mask=in_n, other=0.0).to(tl.float32)[None, :]

    at = y + m[:, None] * stride_ym + n[None, :]
    inside = in_m[:, None] & in_n[None, :]
    total = tl.load(at, mask=inside, other=0.0).to(tl.float32) + acc
    tl.store(at, total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def lowrank_grad_up(
    # pointers
    dy, u, B, du, dB_parts,
    # sizes
    M, N, R,
    # scalars
    scaling,
    # strides
    stride_ym, stride_yn, stride_um, stride_bn, stride_br,
    # what the kernel is made for
    NEED_DU: tl.constexpr, NEED_DB: tl.constexpr, MODE: tl.constexpr, DTYPE: tl.constexpr, Y_TERMS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """du[m, r] = scaling * sum_n dy[m, n] B[n, r] and dB_parts[program, n, r] = sum of dy[m, n] u[m, r] over the program's rows.

    A program owns whole rows, so du is complete. It walks row tiles program, program + programs, ...; from the second on
    it adds to its own part of dB.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    r = (tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    in_r = r < R
    dB_parts += program.to(tl.int64) * N * R
    for tile in range(program, tl.cdiv(M, BLOCK_M), programs):
        m = (tile * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
        in_m = m < M
        if NEED_DB:
            u_tile = tl.load(u + m[:, None] * stride_um + r[None, :], mask=in_m[:, None] & in_r[None, :], other=0.0)
        acc = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
        for n0 in range(0, N, BLOCK_N):
            n = (n0 + tl.arange(0, BLOCK_N)).to(tl.int64)
            in_n = n < N
            dy_tile = tl.load(dy + m[:, None] * stride_ym + n[None, :] * stride_yn, mask=in_m[:, None] & in_n[None, :], other=0.0)
            if NEED_DU:
                B_tile = tl.load(B + n[:, None] * stride_bn + r[None, :] * stride_br, mask=in_n[:, None] & in_r[None, :], other=0.0)
                acc = dot_terms(dy_tile, B_tile, acc, MODE, DTYPE, Y_TERMS, 3)
            if NEED_DB:
                inside = in_n[:, None] & in_r[None, :]
                at = dB_parts + n[:, None] * R + r[None, :]
                part = tl.zeros([BLOCK_N, BLOCK_R], tl.float32)
                if tile != program:
                    part = tl.load(at, mask=inside, other=0.0)
                part = dot_terms(tl.trans(dy_tile), u_tile, part, MODE, DTYPE, Y_TERMS, 3)
                tl.store(at, part, mask=inside)
        if NEED_DU:
            tl.store(du + m[:, None] * R + r[None, :], acc * scaling, mask=in_m[:, None] & in_r[None, :])
        if NEED_DB:  # the compiler stores and loads a part in layouts of their own: what a thread adds to, another may have stored
            tl.debug_barrier()


@triton.jit
def lowrank_grad_down(
    # pointers
    x, du, seed, dA_parts,
    # sizes
    M, K, R, rows,
    # scalars
    threshold,
    # strides
    stride_xm, stride_xk,
    # what the kernel is made for
    DROPOUT: tl.constexpr, MODE: tl.constexpr, DTYPE: tl.constexpr, X_TERMS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """dA_parts[slab, r, k] = sum over the slab's `rows` rows of du[m, r] drop(x)[m, k], not scaled"""
    k0 = tl.program_id(0).to(tl.int64) * BLOCK_K
    k = k0 + tl.arange(0, BLOCK_K)
    slab = tl.program_id(1).to(tl.int64)
    r = (tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    in_k, in_r = k < K, r < R
    first = slab * rows
    last = tl.minimum(first + rows, M)
    acc = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
    for m0 in range(0, rows, BLOCK_M):
        m = first + m0 + tl.arange(0, BLOCK_M)
        in_m = m < last
        x_tile = tl.load(x + m[:, None] * stride_xm + k[None, :] * stride_xk, mask=in_m[:, None] & in_k[None, :], other=0.0)
        du_tile = tl.load(du + m[None, :] * R + r[:, None], mask=in_m[None, :] & in_r[:, None], other=0.0)
        if DROPOUT:
            x_tile = dropped(x_tile, tl.load(seed), threshold, m, k0, BLOCK_M, BLOCK_K)
        acc = dot_terms(du_tile, x_tile, acc, MODE, DTYPE, 3, X_TERMS)
    tl.store(dA_parts + (slab * R + r[:, None]) * K + k[None, :], acc, mask=in_r[:, None] & in_k[None, :])


@triton.jit
def sum_parts(
    # pointers
    A_parts, B_parts, dA, dB,
    # sizes: parts, and elements of each
    A_count, B_count, A_size, B_size,
    # scalars
    A_scale, B_scale,
    # what the kernel is made for
    PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dA = A_scale * the sum of A_parts, dB = B_scale * the sum of B_parts, each in its parts' order: one launch for both."""
    programs_A = tl.cdiv(A_size, BLOCK)
    pid = tl.program_id(0)
    if pid < programs_A:
        _sum(A_parts, dA, A_count, A_size, A_scale, pid, PARTS, BLOCK)
    else:
        _sum(B_parts, dB, B_count, B_size, B_scale, pid - programs_A, PARTS, BLOCK)


@triton.jit
def _sum(parts, out, count, size, scale, pid, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    i = pid.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for p0 in range(0, count, PARTS):
        p = (p0 + tl.arange(0, PARTS)).to(tl.int64)
        total += tl.sum(tl.load(parts + p[:, None] * size + i[None, :], mask=(p < count)[:, None] & (i < size)[None, :], other=0.0), axis=0)
    tl.store(out + i, (total * scale).to(out.dtype.element_ty), mask=i < size)
