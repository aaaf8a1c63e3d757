"""Launch configurations: pure functions of shape and dtype, no tuning at run time. `every_*` lists what a function can
return, for ahead-of-time compilation. None was measured on a GPU yet: they come from `python -m benchmarks model` and from what
compiles without spills for sm_80 to sm_100 and gfx942. Where `python -m lorakernels tune` ran, its rows come before (measured.py).

`half`: x is bfloat16 or float16, whose products run on matrix units; float32 runs on plain FMA, where a smaller tile keeps
its operands in registers. tl.dot needs at least 16 of each dimension.
"""

import itertools
from typing import NamedTuple

from ..reference import TILE_ROWS
from .measured import table


def _power_of_two(value, low, high):
    return min(high, max(low, 1 << (value - 1).bit_length()))


class Tile(NamedTuple):
    BLOCK_M: int
    BLOCK_N: int
    BLOCK_R: int
    num_warps: int
    num_stages: int


@table(Tile)
def add_lowrank(M, N, R, half):
    """y (M,N) += u v^T in place.

    128 columns or 64 ranks spill registers. Of a 16-row tile 32 ranks spill on sm_90.
    """
    block_m = _power_of_two(M, 16, 64)
    if half:
        return Tile(block_m, 64, _power_of_two(R, 16, 16 if block_m == 16 else 32), 8 if block_m == 64 else 4, 2)
    return Tile(min(block_m, 32), 64, 16, 4, 2)


def every_add_lowrank(half):
    return sorted({add_lowrank(M, 4096, R, half) for M, R in itertools.product((1, 32, 64), (16, 32))})


class DownTile(NamedTuple):
    BLOCK_M: int
    BLOCK_K: int
    BLOCK_R: int
    num_warps: int
    num_stages: int


@table(DownTile)
def lowrank_down(M, K, R, half):
    """u (M,R) = x A^T: rows fewer than 64 to a program where M is small, so that there are programs enough.

    More ranks than a tile's read x again, from the L2 cache. 64 ranks spill on sm_80, 32 ranks of 16 rows on sm_90, three
    stages or 4 warps of 64 rows on sm_100.
    """
    if half:
        if M <= 1024:
            return DownTile(16, 64, 16, 2, 2)
        return DownTile(32, 64, _power_of_two(R, 16, 32), 4, 2) if M <= 4096 else DownTile(64, 64, _power_of_two(R, 16, 32), 8, 2)
    return DownTile(16 if M <= 1024 else 32, 32, _power_of_two(R, 16, 32), 4, 2)


def every_lowrank_down(half):
    return sorted({lowrank_down(M, 4096, R, half) for M, R in itertools.product((1, 2048, 8192), (16, 32))})


PROGRAMS = 256  # of lowrank_grad_up at most: each has its own part of dB, which bounds the workspace


class UpTile(NamedTuple):
    BLOCK_M: int
    BLOCK_N: int
    BLOCK_R: int
    num_warps: int
    num_stages: int


@table(UpTile)
def lowrank_grad_up(M, N, R, half):
    """du and dB in one pass over dy. A program owns whole rows: fewer rows, more programs and more parts of dB.

    32 ranks spill for a float16 base, two stages on sm_100 (or, with 8 warps, on gfx942).
    """
    if half:
        return UpTile(16 if M <= 512 else 32 if M <= 4096 else 64, 64, 16, 4, 1)
    return UpTile(16 if M <= 1024 else 32, 32, 16, 4, 2)


def every_lowrank_grad_up(half):
    return sorted({lowrank_grad_up(M, 4096, R, half) for M, R in itertools.product((1, 2048, 8192), (16, 32))})


class GradDownTile(NamedTuple):
    BLOCK_M: int
    BLOCK_K: int
    BLOCK_R: int
    num_warps: int
    num_stages: int


@table(GradDownTile)
def lowrank_grad_down(M, K, R, half):
    """dA in one pass over x. With 4 warps 32 ranks spill on sm_90, with three stages on gfx942."""
    if half:
        return GradDownTile(32, 64, 16, 4, 3) if R <= 16 else GradDownTile(32, 128, 32, 8, 2)
    return GradDownTile(32, 32, 16, 4, 2)


def every_lowrank_grad_down(half):
    return sorted({lowrank_grad_down(8192, 4096, R, half) for R in (16, 32)})


def grad_down_slabs(M, K, tile):
    """Slabs of rows that share a column block's work: about PROGRAMS programs in all, each of 8 row tiles or more."""
    columns = -(-K // tile.BLOCK_K)
    return max(1, min(PROGRAMS // columns, -(-M // (8 * tile.BLOCK_M)), 64))


class SumTile(NamedTuple):
    PARTS: int  # added at a time
    BLOCK: int  # elements of a program
    num_warps: int
    num_stages: int


def sum_parts():
    """The sums of dA's and dB's parts, in one launch."""
    return SumTile(8, 256, 4, 2)


class DequantizeTile(NamedTuple):
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int


def dequantize_nf4():
    """Eight elements a thread, along a row: one 16-byte store of half precision."""
    return DequantizeTile(8, 128, 4, 1)


class QuantizeTile(NamedTuple):
    BLOCKS: int  # of the weight, in one program
    num_warps: int
    num_stages: int


def quantize_nf4(blocksize):
    """About 1,024 elements a program."""
    return QuantizeTile(max(1, 1024 // blocksize), 4, 1)


def every_quantize_nf4():
    return [(blocksize, quantize_nf4(blocksize)) for blocksize in (32, 64, 128, 256, 512, 1024, 2048, 4096)]


class MatmulTile(NamedTuple):
    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    BLOCK_R: int
    GROUP_M: int
    num_warps: int
    num_stages: int


@table(MatmulTile)
def nf4_linear_lowrank(M):
    """The fused product with an NF4 weight: as many rows as there are share a decoded tile, up to 128. With those a depth of
    64 spills, on sm_80 with two stages, on sm_100 with one; fewer rows spill on sm_100 with two."""
    return MatmulTile(128, 64, 32, 16, 8, 8, 2) if M > 64 else MatmulTile(_power_of_two(M, 16, 64), 64, 64, 16, 8, 4, 3)


def every_nf4_linear_lowrank():
    return [nf4_linear_lowrank(M) for M in (16, 32, 64, 128)]


# Many adapters: tiles of TILE_ROWS rows, which routing counts for all layers (backends/reference.py); more would be padding where an
# adapter has few, and spill in places.


@table(DownTile)
def multi_down(R, half):
    if half:
        return DownTile(TILE_ROWS, 64, 16, 4, 3)  # 2 warps spill on sm_100, 2 stages and 32 ranks on sm_90
    return DownTile(TILE_ROWS, 32, _power_of_two(R, 16, 32), 4, 2)


def every_multi_down(half):
    return sorted({multi_down(R, half) for R in (16, 32)})


@table(Tile)
def multi_add(half):
    # two stages, 64 columns of float32 and, where K is split, 4 warps of half precision spill on sm_100
    return Tile(TILE_ROWS, 64, 16, 2, 1) if half else Tile(TILE_ROWS, 32, 16, 4, 1)


def every_multi_add(half):
    return [multi_add(half)]


def multi_outer(half):
    return GradDownTile(32, 64, 16, 4, 1) if half else GradDownTile(32, 32, 16, 4, 2)  # two stages spill on sm_100


@table(MatmulTile)
def linear_lowrank(M, N, K, R, half, hopper, plain):
    """The fused product. `hopper`: tensor descriptors feed it (sm_90 and later), from deeper tiles. `plain`: without
    dropout and biases; with them 128 columns spill, those with a mask everywhere, those with biases on sm_100. From
    descriptors 16 rows spill with two stages."""
    if not half:
        return MatmulTile(32, 32, 32, 16, 8, 4 if hopper else 8, 2)  # 64 columns spill on sm_80, 8 warps with descriptors, 4 without on sm_90
    depth = 64 if hopper else 32
    if M <= 64:
        return MatmulTile(_power_of_two(M, 16, 64), 64, depth, 16, 8, 4, 3 if hopper and M <= 16 else 2)
    return MatmulTile(128, 128 if plain else 64, depth, 16, 8, 8, 3)


def every_linear_lowrank(half, hopper, plain):
    return sorted({linear_lowrank(M, 4096, 4096, 16, half, hopper, plain) for M in (1, 32, 64, 8192)})


# Compute capabilities on which the fused product was measured faster than cuBLAS and an in-place add, and for which
# shapes; everywhere else the composition runs. None yet.
FUSED = {}


@table(bool)
def fuses(M, N, K, R, dtype, capability):
    """Whether linear_lowrank runs as one product on this device."""
    measured = FUSED.get(capability)
    return measured is not None and measured(M, N, K, R, dtype)
