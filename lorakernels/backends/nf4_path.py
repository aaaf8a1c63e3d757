"""Which form the product with an NF4 weight takes: a pure function, with the thresholds of every backend."""

import torch

ISAS = ("portable", "avx2", "avx512", "avx512bf16", "amx")
PAIRING = ISAS[-2:]  # multiply pairs of bfloat16
FEW = "few"  # the packed codes meet the rows as they are, every code looked up once for all of them
FUSED = "fused"  # a product whose tiles of W are decoded on their way to it
SLABS = "slabs"  # W is decoded slab by slab, and torch multiplies each

# GPU, not measured: two tiles of the tensor cores' 8 columns, past which decoding is no longer what the few rows wait for.
FEW_ROWS = 16

# float32 on AVX-512, ms with two threads on a Zen 5, 14336x4096 / 4096x14336 / 4096x4096, few rows' kernel against the fused product: 12 rows 4.8 to 6.6 / 5.1
# to 6.6 / 1.4 to 1.8, 16 rows 6.1 to 7.6 / 7.1 to 7.9 / 1.9 to 2.2, 20 rows 8.0 to 9.2 / 8.2 to 9.0 / 2.2 to 2.5, 24 rows 9.5 to 9.8 / 9.7 to 9.5 / 2.7 to
# 2.7. On a Zen 4, before long rows of few met x in parts: 16 rows 12.1 to 14.5 / 11.2 to 13.0 / 6.4 to 6.3, 20 rows 16.0 to 16.8 / 15.3 to 16.1 / 4.4 to 4.7.
AVX512_ROWS = 20

# AVX2, on the Zen 4: 8 rows 9.4 to 12.2 / 10.5 to 13.3 / 3.1 to 3.5, 12 rows 12.0 to 11.5 / 13.1 to 13.1 / 3.5 to 3.3, 16 rows 16.2 to 13.7 / 16.3 to 14.0 / 5.0 to 4.3.
AVX2_ROWS = 12

# bfloat16 on AVX-512-BF16, the same shapes, on a Zen 5: 8 rows 1.8 to 1.8 / 2.2 to 2.2 / 0.51 to 0.48, 9 rows 2.1 to 2.3 / 2.7 to 2.7 / 0.69 to 0.67, 12 rows
# 3.2 to 2.8 / 3.3 to 2.9 / 0.75 to 0.70; with one thread 9 rows 4.0 to 4.5 / 3.9 to 4.6 / 1.20 to 1.25, 12 rows 4.8 to 4.6 / 4.7 to 4.9 / 1.41 to 1.35. On a
# Zen 4, with older kernels: 8 rows 3.2 to 3.7 / 3.1 to 3.6 / 0.9 to 1.0, 10 rows 4.2 to 4.1 / 4.2 to 4.1 / 1.2 to 1.2.
PAIRED_ROWS = 9

# bfloat16 on AMX, ms with two threads on a Xeon with it (best of several, its neighbours use the tiles too), few rows' kernel against tiles, 14336x4096 /
# 4096x14336 / 4096x4096: 1 row 1.57 to 2.63 / 1.47 to 2.21 / 0.38 to 0.60, 2 rows 1.73 to 2.35 / 1.82 to 2.19 / 0.51 to 0.60, 3 rows 2.34 to 2.41 / 2.25 to 2.17 /
# 0.65 to 0.59, 4 rows 2.69 to 2.45 / 2.69 to 2.22 / 0.77 to 0.58; one thread, 2 rows 3.31 to 4.50 / 3.49 to 4.15 / 0.94 to 1.09, 3 rows 4.48 to 4.69 / 4.32 to 4.15 / 1.25 to 1.11.
TILED_ROWS = 2

# Beyond few rows the fused product is ahead of slabs, or level, on a CPU with vectors for all rows. bfloat16 on the Zen 4, the same, older kernels, to slabs and
# dense F.linear: 64 rows 18.9 to 23.1 and 21.8 / 20.0 to 22.0 and 20.4 / 5.8 to 6.6 and 6.0, 256 rows 70 to 73 and 69 / 71 to 73 and 69 / 20.6 to 21.9 and 20.1, 2048
# rows 585 to 593 and 587 / 569 to 565 and 551 / 165 to 174 and 169; one thread, 256 rows 141 to 146 and 137. float32, 256 rows 141 to 189 and 212.

# float32 on a processor with AMX, where torch's product of many rows (MKL) is ahead of the fused one, ms with two threads, fused to slabs (and dense), 4096x14336 /
# 4096x4096: 256 rows 140 to 138 (128) / 31 to 33 (30), 384 rows 174 to 179 (150) / 71 to 57 (54), 512 rows 348 to 301 (243) / 62 to 60 (58), 2048 rows 1079 to 1002
# (748) / 302 to 295 (237); dx of 256 rows 113 to 116 (108) / 32 to 33 (30), of 2048 969 to 864 (816) / 325 to 268 (234). Best of three to five, on a busy machine.
SINGLES_ROWS = 384

# GPU, not measured. Where e is the share of the matrix rate that the fused product reaches, it wins below 231 e / (1 - e) rows
# against decoding W and multiplying at full rate (H200: 0.585 ps to decode a value, 790 TFLOP/s). Choosing a code takes about 16
# instructions, which bounds e to a third where 128 rows share it: 115 rows, a tile's 128 rounded up.
FUSED_ROWS = 128


def few_rows(architecture, dtype, K):
    """The most rows that meet a processor's packed codes."""
    if architecture in PAIRING and dtype == torch.bfloat16 and (K % 64 == 0 or architecture == "amx"):
        return TILED_ROWS if architecture == "amx" else PAIRED_ROWS
    if architecture == "avx2":
        return AVX2_ROWS
    return FEW_ROWS if architecture == "portable" or K % 64 else AVX512_ROWS


def nf4_path(M, N, K, dtype, architecture, turned):
    """The form of x W^T (of x W where turned) for x (M, K). architecture: a processor's instruction set, a compute capability such as
    (9, 0), or AMD's name of an architecture."""
    if architecture in ISAS:
        if not turned and M <= few_rows(architecture, dtype, K):
            return FEW
        unpaired = architecture == "avx512bf16" and dtype == torch.bfloat16 and not turned and K % 64
        many = architecture == "amx" and dtype == torch.float32 and M > SINGLES_ROWS
        return SLABS if architecture == "portable" or unpaired or many else FUSED
    if dtype == torch.float32:
        return SLABS  # its products run on plain FMA, of which a fused one has no more
    if M <= FEW_ROWS and not turned and isinstance(architecture, tuple):
        return FEW
    return FUSED if M <= FUSED_ROWS and K % 32 == 0 else SLABS  # where blocks begin within a row, tiles' scales spill registers
