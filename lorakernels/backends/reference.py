"""Every primitive in plain torch: the contract, the oracle of the tests, and the fallback.

M rows of x (tokens), K in_features, N out_features, R rank. Adapter products and their sums run in float32 (float64 for
float64 inputs); the base product x W^T runs in its own dtype through torch and is rounded once, the sum once more.
Products are written with out= forms, which autocast does not see, or outside of it.
"""

import torch

from .. import dropout, nf4


def why_not(device_type, dtype):
    return None


def accumulator(dtype):
    """The dtype of sums, of u and of du."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def base_product(x, w, bias):
    """y = x w^T + bias, in x's dtype: F.linear, whose operands autocast would cast."""
    if not torch._C._is_any_autocast_enabled():  # without the context, whose making a decode step would notice
        return torch.nn.functional.linear(x, w, bias)
    with torch.autocast(x.device.type, enabled=False):
        return torch.nn.functional.linear(x, w, bias)


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
    return add_lowrank(base_product(x, w, bias), u, v, scaling, lowrank_bias, seed, dropout_p)


def add_lowrank(y, u, v, scaling, lowrank_bias, seed, dropout_p):
    """y += scaling * (drop(u v^T) + lowrank_bias), the sum in float32. Returns y."""
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


# -- NF4 -----------------------------------------------------------------------------------------------------------------------


def dequantize_nf4(packed, absmax, nested, N, K, blocksize, nested_blocksize, n0, k0, rows, columns, dtype):
    """W[n0 : n0 + rows, k0 : k0 + columns]: code * absmax in float32, rounded once to dtype, by torch's indexing."""
    device = packed.device
    element = (torch.arange(n0, n0 + rows, device=device) * K + k0)[:, None] + torch.arange(columns, device=device)
    pairs = packed.flatten()[element >> 1]
    codes = torch.where(element & 1 == 0, pairs >> 4, pairs & 15).long()
    scales = nf4.block_scales(absmax, nested, nested_blocksize)
    return (nf4.codebook(device)[codes] * scales[element // blocksize]).to(dtype)


def quantize_nf4(weight, blocksize):
    """Codes, two to a byte, and float32 absmax of the weight's blocks: code = how many boundaries lie below w / absmax."""
    flat = weight.float().flatten()
    blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % blocksize)).view(-1, blocksize)
    absmax = blocks.abs().amax(dim=1)
    scaled = blocks * (1.0 / absmax.clamp(min=nf4.TINY))[:, None]
    codes = torch.bucketize(scaled, nf4.boundaries(weight.device)).to(torch.uint8).flatten()[: flat.numel()]
    pairs = torch.nn.functional.pad(codes, (0, flat.numel() % 2)).view(-1, 2)
    return pairs[:, 0] << 4 | pairs[:, 1], absmax


SLAB = 4 << 20  # bytes of W that are dense at a time: within a CPU's last cache


def nf4_product(x, sizes, turned, bias, decode, slab, dtype=None):
    """x W^T + bias, or x W where turned, of a packed W (N,K) = sizes, slab by slab: each element of y is of one product.

    decode(n0, k0, out) writes W[n0 : ..., k0 : ...] to out. slab: bytes of W that are dense at a time. dtype: what is multiplied in, x's own by default; y has x's.
    """
    (N, K), dtype = sizes, dtype or x.dtype
    wide, deep = (K, N) if turned else (N, K)
    y = x.new_empty(x.shape[0], wide)
    x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
    step = min(wide, max(64, slab // (deep * x.element_size()) // 64 * 64))
    room = x.new_empty(step * deep)
    narrow = None if dtype == y.dtype else x.new_empty(x.shape[0], step)
    for i in range(0, wide, step):
        count = min(step, wide - i)
        w = room[: count * deep].view(deep, count) if turned else room[: count * deep].view(count, deep)
        decode(0 if turned else i, i if turned else 0, w)
        w, columns = w if turned else w.t(), y[:, i : i + count]
        out = columns if narrow is None else narrow[:, :count]
        torch.mm(x, w, out=out) if bias is None else torch.addmm(bias[i : i + count], x, w, out=out)
        if narrow is not None:
            columns.copy_(out)
    return y


def nf4_linear_lowrank(
    x, packed, absmax, nested, N, K, blocksize, nested_blocksize, turned, u, v, scaling, bias, lowrank_bias, seed, dropout_p
):  # fmt: skip
    """linear_lowrank with W, or where turned W^T, in NF4: slabs of it dense in x's dtype, a torch product each, then the sum."""
    weight = (packed, absmax, nested, N, K, blocksize, nested_blocksize)
    y = nf4_product(x, (N, K), turned, bias, lambda n0, k0, out: out.copy_(dequantize_nf4(*weight, n0, k0, *out.shape, out.dtype)), SLAB)
    return y if u is None else add_lowrank(y, u, v, scaling, lowrank_bias, seed, dropout_p)


# -- many adapters ---------------------------------------------------------------------------------------------------------------
#
# order (M,) holds the rows sorted by adapter; those of adapter e are order[starts[e] : starts[e + 1]], what lies outside of all
# has none. u and du have their rows in that order. Adapter e uses its first ranks[e] ranks of the stacks A (E,R,K) and B (E,N,R),
# scaling[e], and drops where a lane lies below thresholds[e]. seed, ranks and scaling may be None. What lies from
# order[starts[E]] on has an id that is none. tiles (E + 1,), for kernels that work on TILE_ROWS rows of one adapter at a time: how many
# such tiles the adapters up to each have, the rows whose id is none at the end; None where no such kernel runs.
#
# With pages (E,R) there is no stack: rank r of adapter e is A[pages[e, r]] of A (P,G,K), and B[pages[e, r]] of B (P,N,1). The G
# parts of A share x: ranks is (G,E), part g has columns g * R and on of u. Of u and du nobody reads what is no adapter's, or lies
# beyond its rank: kernels leave it as it is.
#
# Where few rows leave a GPU idle, K is split: multi_lowrank_down makes u (splits, M, R) of as many parts of K, and
# multi_add_lowrank adds them up, in their order. Elsewhere there is one.


TILE_ROWS = 16
FEW_ROWS, SPLIT_DEPTH, MOST_SPLITS = 256, 512, 8  # below a wave of programs for each adapter; u's bytes stay below B's


def multi_route(ids, E):
    """order and starts of adapter ids (M,), int32 or int64: a stable sort. Nothing is read on the host."""
    ordered, order = torch.sort(torch.where((ids < -1) | (ids > E), E, ids), stable=True)
    return order, torch.searchsorted(ordered, torch.arange(E + 1, dtype=ids.dtype, device=ids.device))


def splits_of(M, K, device):
    """Of how many parts of K multi_lowrank_down makes u for M rows."""
    return 1 if device == "cpu" or M > FEW_ROWS else max(1, min(K // SPLIT_DEPTH, MOST_SPLITS))


def tiles_of(starts, M):
    """`tiles`, of M rows. Nothing is read on the host."""
    ends = torch.nn.functional.pad(starts[1:], (0, 1), value=M)
    return ((ends - starts + (TILE_ROWS - 1)) // TILE_ROWS).cumsum(0)


def segments(order, starts, ranks, R, part=0):
    """(adapter, its rows of x, their places in u, its rank) of each adapter that has rows."""
    bounds = starts.tolist()
    used = [R] * (len(bounds) - 1) if ranks is None else ranks.view(-1, len(bounds) - 1)[part].tolist()
    for e, (begin, end) in enumerate(zip(bounds, bounds[1:])):
        if end > begin:
            yield e, order[begin:end], slice(begin, end), used[e]


def _dropped(x, rows, seed, thresholds, e):
    """drop() of some rows of a matrix x, whose mask is drawn for all."""
    p = 0.0 if seed is None else thresholds[e].item() / dropout.LANES
    some = x[rows].to(accumulator(x.dtype))
    if not p:
        return some
    return torch.where(dropout.keep_mask(seed, *x.shape, p)[rows], some * dropout.scale(p), some.new_zeros(()))


def ranks_down(A, pages, e, rank, part):
    """A (rank, K) of one adapter."""
    return A[e, :rank] if pages is None else A[pages[e, :rank], part]


def ranks_across(B, pages, e, rank):
    """B (N, rank) of one adapter."""
    return B[e, :, :rank] if pages is None else B[pages[e, :rank], :, 0].t()


def multi_lowrank_down(x, A, order, starts, tiles, ranks, pages, seed, thresholds, splits):
    """u (splits,M,R), whose sum is drop(x) A_e^T of each row's adapter e, float32, zero elsewhere here: a torch product for each adapter."""
    dtype = accumulator(x.dtype)
    parts, R = (1, A.shape[1]) if pages is None else (A.shape[1], pages.shape[1])
    u = x.new_zeros(splits, x.shape[0], parts * R, dtype=dtype)  # all of it in the first
    for part in range(parts):
        for e, rows, places, rank in segments(order, starts, ranks, R, part):
            u[0, places, part * R : part * R + rank] = product(_dropped(x, rows, seed, thresholds, e), ranks_down(A, pages, e, rank, part).t(), dtype)
    return u


def multi_add_lowrank(y, u, B, scaling, order, starts, tiles, ranks, pages, seed, thresholds):
    """y (M,N) += scaling_e * drop(u B_e^T) of each row's adapter e, u (S,M,R) summed over S, in place; rows without adapter are not
    touched, those whose id is none become NaN."""
    u = summed(u)
    for e, rows, places, rank in segments(order, starts, ranks, u.shape[1]):
        delta = product(u[places, :rank], ranks_across(B, pages, e, rank).t(), u.dtype)
        if seed is not None:
            whole = delta.new_zeros(y.shape).index_copy_(0, rows, delta)
            delta = _dropped(whole, rows, seed, thresholds, e)
        if scaling is not None:
            delta *= scaling[e]
        y[rows] = (y[rows].to(u.dtype) + delta).to(y.dtype)
    y[order[starts[-1] :]] = float("nan")


def summed(u):
    """u (M,R) of its parts."""
    return u[0] if u.shape[0] == 1 else u.sum(0)


def stack_shape(B, pages):
    """E, N, R."""
    return tuple(B.shape) if pages is None else (pages.shape[0], B.shape[1], pages.shape[1])


def multi_lowrank_grad(dy, x, u, B, scaling, order, starts, tiles, ranks, pages, seed, thresholds, dtype):
    """du = scaling_e * dy B_e, dA_e = du^T drop(x), dB_e = scaling_e * dy^T u over each adapter's rows: torch products.

    du (M,R) is float32; dA (E,R,K) and dB (E,N,R) are rounded once to dtype, zero where nothing adds to them. Without x no
    dA, without u no dB: an empty tensor stands in their place. With pages there is neither.
    """
    (E, N, R), wide = stack_shape(B, pages), accumulator(dy.dtype)
    du = dy.new_zeros(dy.shape[0], R, dtype=wide)
    dA = dy.new_zeros((0,) if x is None else (E, R, x.shape[1]), dtype=dtype)
    dB = dy.new_zeros((0,) if u is None else (E, N, R), dtype=dtype)
    for e, rows, places, rank in segments(order, starts, ranks, R):
        scale = 1.0 if scaling is None else scaling[e]
        some = dy[rows].to(wide)
        du[places, :rank] = product(some, ranks_across(B, pages, e, rank), wide).mul_(scale)
        if x is not None:
            dA[e, :rank] = product(du[places, :rank].t(), _dropped(x, rows, seed, thresholds, e), wide)
        if u is not None:
            dB[e, :, :rank] = product(some.t(), u[places, :rank], wide).mul_(scale)
    return du, dA, dB
