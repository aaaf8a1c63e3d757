"""How the primitives of a dense LoRA layer split over the ranks of a DTensor's mesh (tensor parallelism). A leaf.

Each is a sum over named axes, so a split follows from the letters: where one axis is split, a tensor that has it is sharded
along it, any other is whole on every rank, and a result that lacks it is a partial sum where its sum runs over it, else whole.
torch.distributed.tensor is not imported here: the rules are put in when a DTensor comes.

With dropout no rule splits an axis of what is dropped: the mask counts rows and columns of the whole matrix.
"""

import sys

import torch

# axis: (the results' placements, the arguments'); "whole" is on every rank, "sum" a partial sum, a number the sharded dimension
LOWRANK_DOWN = {  # u (M,R) = drop(x (M,K)) A (R,K)^T
    "M": ((0,), (0, "whole")),
    "K": (("sum",), (1, 1)),
    "R": ((1,), ("whole", 0)),
}
LINEAR_LOWRANK = {  # y (M,N) = x (M,K) w (N,K)^T + bias (N,) + s (drop(u (M,R) v (N,R)^T) + lowrank_bias (N,))
    "M": ((0,), (0, "whole", 0, "whole", "whole", "whole")),
    "N": ((1,), ("whole", 0, "whole", 0, 0, 0)),
    "K": (("sum",), (1, 1, "sum", "whole", "sum", "sum")),
}
LOWRANK_GRAD = {  # du (M,R), dA (R,K), dB (N,R) of dy (M,N), x (M,K), u (M,R), B (N,R)
    "M": ((0, "sum", "sum"), (0, 0, 0, "whole")),
    "N": (("sum", "sum", 0), (1, "whole", "whole", 0)),
    "K": (("whole", 1, "whole"), ("whole", 1, "whole", "whole")),
    "R": ((1, 0, 1), ("whole", "whole", 1, 1)),
}
_registered = False


def _lowrank_down(x, A, seed, dropout_p):
    axes = ("M", "K") if seed is None else ()
    for axis in (*axes, "R") if len(A) == 1 else axes:  # several A's share a result, side by side
        (u,), (of_x, of_A) = LOWRANK_DOWN[axis]
        yield (u,), (of_x, *[of_A] * len(A), _whole(seed), None)
    yield ("whole",), ("whole", *["whole"] * len(A), _whole(seed), None)


def _linear_lowrank(x, w, u, v, scaling, bias, lowrank_bias, seed, dropout_p):
    def split(of_x, of_w, of_u, of_v, of_bias, of_lowrank_bias):
        biases = None if bias is None else of_bias, None if lowrank_bias is None else of_lowrank_bias
        return of_x, of_w, of_u, of_v, None, *biases, _whole(seed), None

    for axis in ("M", "N", "K") if seed is None else ("K",):
        results, arguments = LINEAR_LOWRANK[axis]
        yield results, split(*arguments)
    yield ("whole",), split(*["whole"] * 6)


def _lowrank_grad(dy, x, u, B, seed, dropout_p, scaling, dtype):
    there = [tensor is not None for tensor in (dy, x, u, B)]
    asked = [B is not None, x is not None, u is not None]  # a result that nobody asked for is empty

    def split(results, arguments):
        results = tuple(placement if wanted else "whole" for placement, wanted in zip(results, asked))
        return results, (*(placement if here else None for placement, here in zip(arguments, there)), _whole(seed), None, None, None)

    for axis in ("M", "N", "K", "R") if seed is None else ("N", "R"):
        yield split(*LOWRANK_GRAD[axis])
    yield split(["whole"] * 3, ["whole"] * 4)


def _whole(tensor):
    return None if tensor is None else "whole"


RULES = {"lowrank_down": _lowrank_down, "linear_lowrank": _linear_lowrank, "lowrank_grad": _lowrank_grad}


def prepared(arguments):
    """A primitive's arguments, not all of them plain tensors: among DTensors the seed becomes one, the first rank's, or else the
    ranks' copies of A would get other gradients."""
    if "torch.distributed.tensor" not in sys.modules:
        return arguments  # another subclass of Tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    _register()
    mesh = next((a.device_mesh for a in arguments if isinstance(a, DTensor)), None)
    return [distribute_tensor(a, mesh) if mesh is not None and _is_seed(a) else a for a in arguments]


def _is_seed(argument):
    return type(argument) is torch.Tensor and argument.dtype == torch.int64 and argument.numel() == 1


def _register():
    global _registered
    if _registered:
        return
    _registered = True
    from torch.distributed.tensor import Partial, Replicate, Shard
    from torch.distributed.tensor.experimental import register_sharding

    def placements(rule):
        made = {None: None, "whole": Replicate(), "sum": Partial()}
        return lambda *arguments: [tuple([made[p] if p in made else Shard(p) for p in side] for side in split) for split in rule(*arguments)]

    for name, rule in RULES.items():
        register_sharding(getattr(torch.ops.lorakernels, name).default)(placements(rule))
