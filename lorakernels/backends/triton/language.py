"""Triton functions that several kernels share, and every workaround for the compiler."""

import triton
import triton.language as tl


@triton.jit
def dot_terms(a, b, acc, TERMS: tl.constexpr, DTYPE: tl.constexpr):
    """acc + a b for float32 tiles a (M,R) and b (R,N).

    TERMS 1: operands rounded to DTYPE, one product: half-precision adapters.
    TERMS 2: each operand as two bfloat16 terms (16 significant bits), three products: float32 adapters on a half base.
    TERMS 3: float32 operands, for a float32 base.
    """
    if TERMS == 1:
        acc = tl.dot(a.to(DTYPE), b.to(DTYPE), acc)
    elif TERMS == 2:
        a_high = a.to(tl.bfloat16)
        b_high = b.to(tl.bfloat16)
        a_low = (a - a_high.to(tl.float32)).to(tl.bfloat16)
        b_low = (b - b_high.to(tl.float32)).to(tl.bfloat16)
        acc = tl.dot(a_low, b_high, acc)
        acc = tl.dot(a_high, b_low, acc)
        acc = tl.dot(a_high, b_high, acc)
    else:
        acc = tl.dot(a, b, acc, input_precision="ieee")
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
