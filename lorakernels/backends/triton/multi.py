"""The Triton kernels of many adapters in one batch. E adapters; rows in the order of their adapters (backends/reference.py): place
p of u and du is row order[p] of x, dy and y. M rows, K and N columns, R ranks of a stack."""

import triton
import triton.language as tl

from .language import dot_terms, dropped, lowrank_tile


@triton.jit
def segment_of(tile, starts, tiles, E, M, BLOCK_M: tl.constexpr, STEPS: tl.constexpr):
    """(adapter, first place, end of its places) of a tile of rows, E for rows whose id is none. tiles[e]: how many tiles the
    adapters up to e have, more than `tile` for the last; found by halving, 2 ** STEPS > E + 1."""
    low, high = 0, E
    for _ in tl.static_range(STEPS):
        middle = (low + high) // 2
        later = tl.load(tiles + middle) <= tile
        low, high = tl.where(later, middle + 1, low), tl.where(later, high, middle)
    before = tl.load(tiles + low - 1, mask=low > 0, other=0)
    return low, tl.load(starts + low) + (tile - before) * BLOCK_M, tl.load(starts + low + 1, mask=low < E, other=M)


@triton.jit
def multi_down(
    # pointers
    x, A, order, starts, tiles, ranks, pages, seed, thresholds, scaling, u,
    # sizes
    M, K, R, E, K_PART,
    # strides
    stride_xm, stride_xk, stride_ae, stride_ar, stride_ak, stride_pe, stride_us, stride_um,
    # what the kernel is made for
    HAS_RANKS: tl.constexpr, PAGED: tl.constexpr, DROPOUT: tl.constexpr, SCALED: tl.constexpr, MODE: tl.constexpr, X_TERMS: tl.constexpr, STEPS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """u[place, r] = scaling_e * sum_k drop(x)[row, k] A[e, r, k] for r below the rank of the row's adapter e; the rest stays

    PAGED: A[pages[e, r], part, k], its ranks ranks[part, e], its columns part * R and on of u. The third axis of programs is K's:
    each sums K_PART of it into a u of its own."""
    tile = tl.program_id(0)
    if tile < tl.load(tiles + E - 1):
        e, first, end = segment_of(tile, starts, tiles, E, M, BLOCK_M, STEPS)
        rank = R
        part, r0 = 0, tl.program_id(1) * BLOCK_R
        if PAGED:
            blocks = tl.cdiv(R, BLOCK_R)
            part, r0 = tl.program_id(1) // blocks, tl.program_id(1) % blocks * BLOCK_R
        if HAS_RANKS:
            rank = tl.minimum(tl.load(ranks + part * E + e), R).to(tl.int32)
        if r0 < rank:
            place = first + tl.arange(0, BLOCK_M)
            in_m = place < end
            row = tl.load(order + place, mask=in_m, other=0)
            r = (r0 + tl.arange(0, BLOCK_R)).to(tl.int64)
            in_r = r < rank
            if PAGED:
                A_rows = A + tl.load(pages + e * stride_pe + r, mask=in_r, other=0) * stride_ae + part * stride_ar
            else:
                A_rows = A + e.to(tl.int64) * stride_ae + r * stride_ar
            acc = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
            begin = tl.program_id(2) * K_PART
            if DROPOUT:
                drawn, threshold = tl.load(seed), tl.load(thresholds + e)
            for k0 in range(begin, tl.minimum(begin + K_PART, K), BLOCK_K):
                k = (k0 + tl.arange(0, BLOCK_K)).to(tl.int64)
                in_k = k < K
                x_tile = tl.load(x + row[:, None] * stride_xm + k[None, :] * stride_xk, mask=in_m[:, None] & in_k[None, :], other=0.0)
                A_tile = tl.load(A_rows[None, :] + k[:, None] * stride_ak, mask=in_k[:, None] & in_r[None, :], other=0.0)
                if DROPOUT:
                    x_tile = dropped(x_tile, drawn, threshold, row, k0, BLOCK_M, BLOCK_K)
                acc = dot_terms(x_tile, A_tile, acc, MODE, A.dtype.element_ty, X_TERMS, 3)
            if DROPOUT:
                acc *= kept_scale(threshold)
            if SCALED:
                acc *= tl.load(scaling + e)
            tl.store(u + tl.program_id(2) * stride_us + place[:, None] * stride_um + (part * R + r)[None, :], acc, mask=in_m[:, None] & in_r[None, :])


@triton.jit
def kept_scale(threshold):
    """What a kept element is multiplied by; 0 where nothing is kept."""
    kept = (65536 - threshold).to(tl.float32)
    return tl.where(threshold < 65536, 65536.0 / tl.maximum(kept, 1.0), 0.0)


@triton.jit
def multi_add(
    # pointers
    y, u, B, order, starts, tiles, ranks, pages, seed, thresholds, scaling,
    # sizes
    M, N, R, E, splits,
    # strides
    stride_ym, stride_us, stride_um, stride_be, stride_bn, stride_br, stride_pe,
    # what the kernel is made for
    HAS_RANKS: tl.constexpr, PAGED: tl.constexpr, DROPOUT: tl.constexpr, SCALED: tl.constexpr, SPLIT: tl.constexpr, MODE: tl.constexpr, STEPS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """y[row, n] += scaling_e * drop'(sum_r u[place, r] B[e, n, r]), in place, one rounding at the store

    PAGED: B[pages[e, r], n]. SPLIT: u is the sum of `splits`. Rows of segment E, whose id is none, become NaN."""
    tile = tl.program_id(0)
    if tile < tl.load(tiles + E):
        e, first, end = segment_of(tile, starts, tiles, E, M, BLOCK_M, STEPS)
        known = e < E
        rank = tl.where(known, R, 0)
        if HAS_RANKS:
            rank = tl.minimum(tl.load(ranks + e, mask=known, other=0), R).to(tl.int32)
        place = first + tl.arange(0, BLOCK_M)
        in_m = place < end
        row = tl.load(order + place, mask=in_m, other=0)
        n0 = tl.program_id(1).to(tl.int64) * BLOCK_N
        n = n0 + tl.arange(0, BLOCK_N)
        in_n = n < N
        if PAGED:
            delta = lowrank_tile(
                u, B, place, n, in_m, in_n, rank, stride_um, stride_bn, stride_be, MODE, BLOCK_M, BLOCK_N, BLOCK_R, pages + e * stride_pe, True,
                splits, stride_us, SPLIT,
            )  # fmt: skip
        else:
            delta = lowrank_tile(
                u, B + e.to(tl.int64) * stride_be, place, n, in_m, in_n, rank, stride_um, stride_bn, stride_br, MODE, BLOCK_M, BLOCK_N, BLOCK_R, None, False,
                splits, stride_us, SPLIT,
            )  # fmt: skip
        if SCALED:
            delta *= tl.load(scaling + e, mask=known, other=1.0)
        if DROPOUT:
            threshold = tl.load(thresholds + e, mask=known, other=0)
            delta = dropped(delta, tl.load(seed), threshold, row, n0, BLOCK_M, BLOCK_N) * kept_scale(threshold)
        at = y + row[:, None] * stride_ym + n[None, :]
        inside = in_m[:, None] & in_n[None, :]
        total = tl.load(at, mask=inside, other=0.0).to(tl.float32) + tl.where(known, delta, float("nan"))
        tl.store(at, total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def multi_outer(
    # pointers
    small, large, order, starts, ranks, seed, thresholds, scaling, out,
    # sizes
    K, R,
    # strides
    stride_lm, stride_lk, stride_oe, stride_or, stride_ok,
    # what the kernel is made for
    HAS_RANKS: tl.constexpr, DROPOUT: tl.constexpr, SCALED: tl.constexpr, MODE: tl.constexpr, DTYPE: tl.constexpr, L_TERMS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """out[e, r, k] = scaling_e * the sum over the rows of adapter e, in their order, of small[place, r] drop(large)[row, k]; zero
    beyond its rank and where it has no rows. dA of du and x; dB, transposed, of u and dy."""
    k0 = tl.program_id(0).to(tl.int64) * BLOCK_K
    k = k0 + tl.arange(0, BLOCK_K)
    e = tl.program_id(1).to(tl.int64)
    r = (tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    rank = R
    if HAS_RANKS:
        rank = tl.minimum(tl.load(ranks + e), R).to(tl.int32)
    in_k, in_r = k < K, r < rank
    begin, end = tl.load(starts + e), tl.load(starts + e + 1)
    acc = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
    for p0 in range(begin, end, BLOCK_M):
        place = p0 + tl.arange(0, BLOCK_M)
        in_m = place < end
        row = tl.load(order + place, mask=in_m, other=0)
        large_tile = tl.load(large + row[:, None] * stride_lm + k[None, :] * stride_lk, mask=in_m[:, None] & in_k[None, :], other=0.0)
        small_tile = tl.load(small + place[None, :] * R + r[:, None], mask=in_m[None, :] & in_r[:, None], other=0.0)
        if DROPOUT:
            large_tile = dropped(large_tile, tl.load(seed), tl.load(thresholds + e), row, k0, BLOCK_M, BLOCK_K)
        acc = dot_terms(small_tile, large_tile, acc, MODE, DTYPE, 3, L_TERMS)
    if DROPOUT:
        acc *= kept_scale(tl.load(thresholds + e))
    if SCALED:
        acc *= tl.load(scaling + e)
    at = out + e * stride_oe + r[:, None] * stride_or + k[None, :] * stride_ok
    tl.store(at, acc.to(out.dtype.element_ty), mask=(r < R)[:, None] & in_k[None, :])
