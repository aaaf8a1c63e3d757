"""The Triton kernels of the NF4 format. They are launched without fusing a product and a sum: the format rounds each."""

import triton
import triton.language as tl

from ... import nf4

CODES = tl.constexpr(nf4.CODES)
BOUNDARIES = tl.constexpr(tuple(nf4.boundaries().tolist()))
TINY = tl.constexpr(nf4.TINY)


@triton.jit
def code_values(code):
    """The codebook's values of codes 0..15, chosen bit by bit: no memory is read."""
    b0, b1, b2, b3 = (code & 1) != 0, (code & 2) != 0, (code & 4) != 0, (code & 8) != 0
    low0 = tl.where(b1, tl.where(b0, CODES[3], CODES[2]), tl.where(b0, CODES[1], CODES[0]))
    low1 = tl.where(b1, tl.where(b0, CODES[7], CODES[6]), tl.where(b0, CODES[5], CODES[4]))
    high0 = tl.where(b1, tl.where(b0, CODES[11], CODES[10]), tl.where(b0, CODES[9], CODES[8]))
    high1 = tl.where(b1, tl.where(b0, CODES[15], CODES[14]), tl.where(b0, CODES[13], CODES[12]))
    return tl.where(b3, tl.where(b2, high1, high0), tl.where(b2, low1, low0))


@triton.jit
def scales(absmax, nested, block, inside, nested_blocksize, NESTED: tl.constexpr):
    """absmax of blocks, float32. absmax: bytes where NESTED, else float32; nested: float32 offset, map, nested_absmax."""
    if NESTED:
        level = tl.load(absmax + block, mask=inside, other=0).to(tl.int32)
        product = tl.load(nested + 1 + level, mask=inside, other=0.0) * tl.load(nested + 257 + block // nested_blocksize, mask=inside, other=0.0)
        return product + tl.load(nested)
    else:
        return tl.load(absmax + block, mask=inside, other=0.0)


@triton.jit
def dequantize_nf4(
    # pointers
    packed, absmax, nested, out,
    # sizes
    K, n0, k0, rows, columns,
    # scalars
    blocksize, nested_blocksize,
    # strides
    stride_out,
    # what the kernel is made for
    NESTED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[n, k] = code * absmax of W[n0 + n, k0 + k], rounded once"""
    blocks_k = tl.cdiv(columns, BLOCK_K)
    pid = tl.program_id(0)
    n = (pid // blocks_k).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = (pid % blocks_k).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = (n < rows)[:, None] & (k < columns)[None, :]
    element = (n0 + n)[:, None] * K + (k0 + k)[None, :]
    pair = tl.load(packed + element // 2, mask=inside, other=0).to(tl.int32)
    code = tl.where(element % 2 == 0, pair >> 4, pair & 15)
    value = code_values(code) * scales(absmax, nested, element // blocksize, inside, nested_blocksize, NESTED)
    tl.store(out + n[:, None] * stride_out + k[None, :], value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def size(value):
    """|value|; infinite where it is not finite, NaN too, which a maximum would drop."""
    return tl.where(tl.abs(value) <= 3.402823466e38, tl.abs(value), float("inf"))


@triton.jit
def codes_for(value):
    """How many boundaries lie below each value."""
    code = tl.zeros(value.shape, tl.int32)
    for i in tl.static_range(15):
        code += (value > BOUNDARIES[i]).to(tl.int32)
    return code


@triton.jit
def quantize_nf4(
    # pointers
    weight, packed, absmax,
    # sizes
    count,
    # what the kernel is made for
    BLOCKSIZE: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """packed and absmax of BLOCKS blocks of the weight; a pair's even element in the high half of its byte"""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    pair = tl.arange(0, BLOCKSIZE // 2)
    element = block[:, None] * BLOCKSIZE + 2 * pair[None, :]
    even = tl.load(weight + element, mask=element < count, other=0.0).to(tl.float32)
    odd = tl.load(weight + element + 1, mask=element + 1 < count, other=0.0).to(tl.float32)
    most = tl.max(tl.maximum(size(even), size(odd)), axis=1)
    tiny = tl.full([BLOCKS], TINY, tl.float32)  # as a literal it is below float32's normal numbers: older Triton makes it float64
    inverse = tl.div_rn(tl.full([BLOCKS], 1.0, tl.float32), tl.maximum(most, tiny))[:, None]
    low = tl.where(element + 1 < count, codes_for(odd * inverse), 0)
    byte = codes_for(even * inverse) * 16 + low
    tl.store(packed + element // 2, byte.to(tl.uint8), mask=element < count)
    tl.store(absmax + block, most, mask=block * BLOCKSIZE < count)
