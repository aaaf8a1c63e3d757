"""Which form the product with an NF4 weight takes: a pure function, with the thresholds of every backend."""

import torch

ISAS = ("portable", "avx2", "avx512", "avx512bf16")
FEW = "few"  # the packed codes meet the rows as they are, every code looked up once for all of them
FUSED = "fused"  # a product whose tiles of W are decoded on their way to it
SLABS = "slabs"  # W is decoded slab by slab, and torch multiplies each

# CPU, AVX2, ms packed against slabs, 4096x14336 / 14336x4096: 12 rows 47 to 47 / 47 to 48 with one thread, 25 to 36 / 25 to 39
# with two; 16 rows 62 to 51 / 62 to 55 and 37 to 39 / 32 to 44: 16 loses least.
# GPU, not measured: two tiles of the tensor cores' 8 columns, past which decoding is no longer what the few rows wait for.
FEW_ROWS = 16

# CPU, AVX-512-BF16, bfloat16 x, the same: 20 rows 11.6 to 9.6 / 12.3 to 9.4 with two threads, 21.5 to 20.4 / 19.2 to 17.6 with one; 24 rows
# 13.1 to 11.4 / 13.3 to 10.9 and 21.9 to 22.6 / 21.0 to 20.7; 28 rows 13.8 to 13.1 / 14.7 to 12.6 and 23.4 to 25.4 / 23.1 to 24.0.
PAIRED_ROWS = 24

# GPU, not measured. Where e is the share of the matrix rate that the fused product reaches, it wins below 231 e / (1 - e) rows
# against decoding W and multiplying at full rate (H200: 0.585 ps to decode a value, 790 TFLOP/s). Choosing a code takes about 16
# instructions, which bounds e to a third where 128 rows share it: 115 rows, a tile's 128 rounded up.
FUSED_ROWS = 128


def nf4_path(M, N, K, dtype, architecture, turned):
    """The form of x W^T (of x W where turned) for x (M, K). architecture: a processor's instruction set, a compute capability such as
    (9, 0), or AMD's name of an architecture."""
    if architecture in ISAS:
        few = PAIRED_ROWS if architecture == "avx512bf16" and dtype == torch.bfloat16 and K % 64 == 0 else FEW_ROWS
        return FEW if M <= few and not turned else SLABS
    if dtype == torch.float32:
        return SLABS  # its products run on plain FMA, of which a fused one has no more
    if M <= FEW_ROWS and not turned and isinstance(architecture, tuple):
        return FEW
    return FUSED if M <= FUSED_ROWS and K % 32 == 0 else SLABS  # where blocks begin within a row, tiles' scales spill registers
