"""Launch configurations: pure functions of shape and dtype, no tuning at run time. `every_*` lists what a function can
return, for ahead-of-time compilation."""

import itertools
from typing import NamedTuple


class Tile(NamedTuple):
    BLOCK_M: int
    BLOCK_N: int
    BLOCK_R: int
    num_warps: int
    num_stages: int


def _power_of_two(value, low, high):
    return min(high, max(low, 1 << (value - 1).bit_length()))


def add_lowrank(M, N, R, half):
    """The tile of add_lowrank for y (M,N), rank R, y in half precision or float32. Not measured on a GPU yet.

    tl.dot needs at least 16 ranks. Compiled for sm_80 to sm_100, 128 columns or 64 ranks spill registers. float32 runs on
    plain FMA, where a smaller tile keeps its operands in registers. Of a 16-row tile 32 ranks spill on sm_90.
    """
    block_m = _power_of_two(M, 16, 64)
    if half:
        return Tile(block_m, 64, _power_of_two(R, 16, 16 if block_m == 16 else 32), 8 if block_m == 64 else 4, 2)
    return Tile(min(block_m, 32), 64, 16, 4, 2)


def every_add_lowrank(half):
    return sorted({add_lowrank(M, 4096, R, half) for M, R in itertools.product((1, 32, 64), (16, 32))})
