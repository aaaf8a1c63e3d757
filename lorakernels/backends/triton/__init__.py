"""The Triton kernels' launchers: allocate, pick the tile, launch on the tensor's own device and stream.

In the interpreter (TRITON_INTERPRET=1 before Triton is imported) they run on CPU tensors, for tests.
"""

import contextlib
import importlib
import os

import torch

from ... import dropout
from ...nf4 import floats_of
from ..native import lowrank_grad_results, quantize_nf4_results, unsupported
from ..nf4_path import FEW, FUSED, nf4_path
from ..reference import TILE_ROWS, base_product, multi_route, nf4_product, stack_shape, tiles_of  # noqa: F401


def why_not(device_type, dtype):
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device_type != ("cpu" if interpreted else "cuda"):
        return "in the interpreter it runs on CPU tensors only" if interpreted else f"runs on GPU tensors, not on {device_type}"
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"{error}; pip install 'lorakernels[triton]'"
    if not interpreted and not torch.cuda.is_available():
        return "no GPU is visible"
    return unsupported(dtype)


def on_device(tensor):
    """Launch on the tensor's device, whichever is current."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def mode(x_dtype, adapter_dtype):
    """How operands enter an adapter's product: FLOAT32, ROUNDED or TERMS of language.py."""
    if x_dtype == torch.float32:
        return 0
    return 2 if adapter_dtype == torch.float32 else 1


def terms(dtype):
    """How many bfloat16 terms a value of this dtype is."""
    return {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}[dtype]


def element(dtype):
    """Triton's name of a dtype."""
    import triton.language as tl

    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype]


def drop_arguments(seed, dropout_p):
    return (0, 1.0) if seed is None else (dropout.threshold(dropout_p), dropout.scale(dropout_p))


def lowrank_down(x, A, seed, dropout_p):
    """u (M,R) = drop(x) A^T, float32, in one launch for the A's that share x, in Triton."""
    u = x.new_empty(x.shape[0], sum(a.shape[0] for a in A), dtype=torch.float32)
    if x.shape[0] == 0:
        return u
    if len(A) > 1 and (seed is None or len({a.shape[0] for a in A}) == 1):
        parts = 1 if seed is None else len(A)  # one mask, or none: one A of all ranks
        _launch_down(x, torch.cat(A).view(parts, -1, x.shape[1]), seed, dropout_p, u)
        return u
    column = 0
    for i, a in enumerate(A):  # masks of their own and ranks of different sizes: a launch each
        _launch_down(x, a[None], None if seed is None else seed[i : i + 1], dropout_p, u[:, column : column + a.shape[0]])
        column += a.shape[0]
    return u


def _launch_down(x, A, seed, dropout_p, u):
    """A (parts, R, K), seed (parts,): part i of u's columns."""
    from . import kernels, tiles

    (M, K), (parts, R, _) = x.shape, A.shape
    tile = tiles.lowrank_down(M, K, R, x.dtype != torch.float32)
    with on_device(x):
        kernels.lowrank_down[(-(-M // tile.BLOCK_M), -(-R // tile.BLOCK_R), parts)](
            x, A, seed if seed is not None else u, u,
            M, K, R,
            *drop_arguments(seed, dropout_p),
            *x.stride(), *A.stride(), u.stride(0),
            seed is not None, mode(x.dtype, A.dtype), terms(x.dtype),
            **tile._asdict(),
        )  # fmt: skip


def linear_lowrank(x, w, u, v, scaling, bias, lowrank_bias, seed, dropout_p):
    """y = x w^T + bias + scaling * (drop(u v^T) + lowrank_bias): torch's product and an in-place pass in Triton, or one
    fused product where tiles.FUSED has it measured faster."""
    from . import tiles

    capability = torch.cuda.get_device_capability(x.device) if x.is_cuda else None
    if tiles.fuses(x.shape[0], w.shape[0], x.shape[1], u.shape[1], x.dtype, capability):
        return linear_lowrank_fused(x, w, u, v, scaling, bias, lowrank_bias, seed, dropout_p)
    return linear_lowrank_composed(x, w, u, v, scaling, bias, lowrank_bias, seed, dropout_p)


def linear_lowrank_composed(x, w, u, v, scaling, bias, lowrank_bias, seed, dropout_p):
    """torch's product, then the low-rank term in place."""
    return add_lowrank(base_product(x, w, bias), u, v, scaling, lowrank_bias, seed, dropout_p)


def add_lowrank(y, u, v, scaling, lowrank_bias, seed, dropout_p):
    """y += scaling * (drop(u v^T) + lowrank_bias), in place. Returns y."""
    from . import kernels, tiles

    M, N, R = *y.shape, u.shape[1]
    if M == 0:
        return y
    tile = tiles.add_lowrank(M, N, R, y.dtype != torch.float32)
    grid = (-(-M // tile.BLOCK_M) * -(-N // tile.BLOCK_N),)
    with on_device(y):
        kernels.add_lowrank[grid](
            y, u, v, lowrank_bias if lowrank_bias is not None else u, seed if seed is not None else u,
            M, N, R,
            scaling, *drop_arguments(seed, dropout_p),
            y.stride(0), u.stride(0), v.stride(0), v.stride(1), 0 if lowrank_bias is None else lowrank_bias.stride(0),
            lowrank_bias is not None, seed is not None, mode(y.dtype, v.dtype),
            **tile._asdict(),
        )  # fmt: skip
    return y


def descriptors(x, w, tile):
    """(x, w, whether w's matrix is (K, N)) as tensor descriptors, or None where strides or addresses do not allow them."""

    def describable(matrix):
        size = matrix.element_size()
        return matrix.stride(1) == 1 and matrix.stride(0) * size % 16 == 0 and matrix.data_ptr() % 16 == 0 and min(matrix.shape) > 0

    turned = w.stride(1) != 1
    matrix = w.t() if turned else w
    if not (describable(x) and describable(matrix)):
        return None
    from triton.tools.tensor_descriptor import TensorDescriptor

    w_block = [tile.BLOCK_K, tile.BLOCK_N] if turned else [tile.BLOCK_N, tile.BLOCK_K]
    return TensorDescriptor.from_tensor(x, [tile.BLOCK_M, tile.BLOCK_K]), TensorDescriptor.from_tensor(matrix, w_block), turned


def linear_lowrank_fused(x, w, u, v, scaling, bias, lowrank_bias, seed, dropout_p, use_descriptors=None):
    """One product with base and low-rank term in one accumulator, rounded once. use_descriptors None: on sm_90 and later."""
    from . import matmul, tiles

    (M, K), N, R = x.shape, w.shape[0], u.shape[1]
    y = x.new_empty(M, N)
    if M == 0:
        return y
    hopper = (x.is_cuda and torch.version.cuda is not None and torch.cuda.get_device_capability(x.device) >= (9, 0)) if use_descriptors is None else use_descriptors
    plain = seed is None and bias is None and lowrank_bias is None
    tile = tiles.linear_lowrank(M, N, K, R, x.dtype != torch.float32, hopper, plain)
    described = descriptors(x, w, tile) if hopper else None
    x_in, w_in, turned = described or (x, w, False)
    total = -(-M // tile.BLOCK_M) * -(-N // tile.BLOCK_N)
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else total
    programs = min(total, processors) if described else total  # persistent where descriptors feed it
    precision = "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"
    with on_device(x):
        matmul.linear_lowrank[(programs,)](
            x_in, w_in, u, v, bias if bias is not None else u, lowrank_bias if lowrank_bias is not None else u, seed if seed is not None else u, y,
            M, N, K, R,
            scaling, *drop_arguments(seed, dropout_p),
            *x.stride(), *w.stride(), u.stride(0), *v.stride(),
            0 if bias is None else bias.stride(0), 0 if lowrank_bias is None else lowrank_bias.stride(0), y.stride(0),
            bias is not None, lowrank_bias is not None, seed is not None, mode(x.dtype, v.dtype),
            precision, described is not None, turned,
            **tile._asdict(),
        )  # fmt: skip
    return y


def lowrank_grad(dy, x, u, B, seed, dropout_p, scaling, dtype):
    """du and the parts of dB in one pass over dy, the parts of dA in one over x, then both sums in one launch, in Triton."""
    from . import kernels, tiles

    du, dA, dB = lowrank_grad_results(dy, x, u, B, dtype)
    M, N = dy.shape
    R, half = (u if B is None else B).shape[1], dy.dtype != torch.float32
    if M == 0:
        return du, dA, dB
    up = tiles.lowrank_grad_up(M, N, R, half)
    programs = min(-(-M // up.BLOCK_M), tiles.PROGRAMS)
    K, slabs, down = 0, 0, None
    if x is not None:
        K, down = x.shape[1], tiles.lowrank_grad_down(M, x.shape[1], R, half)
        slabs = tiles.grad_down_slabs(M, K, down)
    dB_size, dA_size = (N * R, programs * N * R) if u is not None else (0, 0), (R * K, slabs * R * K)
    workspace = dy.new_empty(dB_size[1] + dA_size[1], dtype=torch.float32)
    dB_parts, dA_parts = workspace.split([dB_size[1], dA_size[1]])
    # the adapter's dtype decides how operands enter: B's where it is here; else dB alone is asked for, in its own dtype
    how, named = mode(dy.dtype, dtype if B is None else B.dtype), element(dtype if B is None else B.dtype)
    with on_device(dy):
        kernels.lowrank_grad_up[(programs, -(-R // up.BLOCK_R))](
            dy, u if u is not None else workspace, B if B is not None else workspace, du, dB_parts,
            M, N, R,
            scaling,
            *dy.stride(), 0 if u is None else u.stride(0), *((0, 0) if B is None else B.stride()),
            B is not None, u is not None, how, named, terms(dy.dtype),
            **up._asdict(),
        )  # fmt: skip
        if x is not None:
            rows = -(-M // slabs)
            kernels.lowrank_grad_down[(-(-K // down.BLOCK_K), slabs, -(-R // down.BLOCK_R))](
                x, du, seed if seed is not None else du, dA_parts,
                M, K, R, rows,
                drop_arguments(seed, dropout_p)[0],
                *x.stride(),
                seed is not None, how, named, terms(x.dtype),
                **down._asdict(),
            )  # fmt: skip
        total = tiles.sum_parts()
        blocks = -(-dA_size[0] // total.BLOCK) + -(-dB_size[0] // total.BLOCK)
        if blocks:
            kernels.sum_parts[(blocks,)](
                dA_parts, dB_parts, dA, dB,
                slabs, programs, dA_size[0], dB_size[0],
                drop_arguments(seed, dropout_p)[1], scaling,
                **total._asdict(),
            )  # fmt: skip
    return du, dA, dB


# -- NF4 -----------------------------------------------------------------------------------------------------------------------

SLAB = 24 << 20  # bytes of W that are dense at a time: they stay in the second-level cache until they are multiplied


def dequantize_nf4(packed, absmax, nested, N, K, blocksize, nested_blocksize, n0, k0, rows, columns, dtype):
    """W[n0 : n0 + rows, k0 : k0 + columns]: code * absmax in float32, rounded once to dtype, in Triton."""
    out = packed.new_empty(rows, columns, dtype=dtype)
    _dequantize(packed, absmax, nested, K, blocksize, nested_blocksize, n0, k0, out)
    return out


def _dequantize(packed, absmax, nested, K, blocksize, nested_blocksize, n0, k0, out):
    from . import nf4, tiles

    rows, columns = out.shape
    tile = tiles.dequantize_nf4()
    with on_device(packed):
        nf4.dequantize_nf4[(-(-rows // tile.BLOCK_N) * -(-columns // tile.BLOCK_K),)](
            packed, floats_of(absmax) if nested is None else absmax, packed if nested is None else floats_of(nested), out,
            K, n0, k0, rows, columns,
            blocksize, nested_blocksize,
            out.stride(0),
            nested is not None,
            **tile._asdict(), enable_fp_fusion=False,
        )  # fmt: skip


def quantize_nf4(weight, blocksize):
    """Codes, two to a byte, and float32 absmax of the weight's blocks, in Triton."""
    from . import nf4, tiles

    packed, absmax = quantize_nf4_results(weight, blocksize)
    tile = tiles.quantize_nf4(blocksize)
    with on_device(weight):
        nf4.quantize_nf4[(-(-absmax.numel() // tile.BLOCKS),)](
            weight, packed, absmax, weight.numel(), blocksize, **tile._asdict(), enable_fp_fusion=False
        )  # fmt: skip
    return packed, absmax


def nf4_linear_lowrank(
    x, packed, absmax, nested, N, K, blocksize, nested_blocksize, turned, u, v, scaling, bias, lowrank_bias, seed, dropout_p
):  # fmt: skip
    """linear_lowrank with W in NF4, in Triton: one product where rows are few; else a slab at a time decoded in Triton and
    multiplied by torch, then the low-rank term in place."""
    path = nf4_path(x.shape[0], N, K, x.dtype, architecture(x), turned)
    if path == FUSED or (path == FEW and K % 32 == 0):  # few rows have no form of their own here
        return nf4_linear_lowrank_fused(
            x, packed, absmax, nested, N, K, blocksize, nested_blocksize, turned, u, v, scaling, bias, lowrank_bias, seed, dropout_p
        )  # fmt: skip
    decode = lambda n0, k0, out: _dequantize(packed, absmax, nested, K, blocksize, nested_blocksize, n0, k0, out)  # noqa: E731
    y = nf4_product(x, (N, K), turned, bias, decode, SLAB)
    return y if u is None else add_lowrank(y, u, v, scaling, lowrank_bias, seed, dropout_p)


def architecture(tensor):
    """For nf4_path. In the interpreter, of which no figure speaks, the least that is served."""
    if not tensor.is_cuda:
        return (8, 0)
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(tensor.device).gcnArchName
    return torch.cuda.get_device_capability(tensor.device)


def nf4_linear_lowrank_fused(
    x, packed, absmax, nested, N, K, blocksize, nested_blocksize, turned, u, v, scaling, bias, lowrank_bias, seed, dropout_p
):  # fmt: skip
    """linear_lowrank with W in NF4 as one product of half precision, rounded once: tiles of W are decoded on their way to it. K is a multiple
    of 32."""
    from . import nf4_matmul, tiles

    M, columns = x.shape[0], K if turned else N
    y = x.new_empty(M, columns)
    if M == 0:
        return y
    tile = tiles.nf4_linear_lowrank(M)
    nobody = packed  # in the place of what there is not
    with on_device(x):
        nf4_matmul.nf4_linear_lowrank[(-(-M // tile.BLOCK_M) * -(-columns // tile.BLOCK_N),)](
            x, packed, floats_of(absmax) if nested is None else absmax, nobody if nested is None else floats_of(nested),
            nobody if u is None else u, nobody if u is None else v, nobody if bias is None else bias,
            nobody if lowrank_bias is None else lowrank_bias, nobody if seed is None else seed, y,
            M, N, K, K // 2, 0 if u is None else u.shape[1],
            scaling, *drop_arguments(seed, dropout_p), blocksize.bit_length() - 1, nested_blocksize,
            *x.stride(), 0 if u is None else u.stride(0), *((0, 0) if u is None else v.stride()),
            0 if bias is None else bias.stride(0), 0 if lowrank_bias is None else lowrank_bias.stride(0), y.stride(0),
            u is not None, bias is not None, lowrank_bias is not None, seed is not None, 0 if u is None else mode(x.dtype, v.dtype),
            nested is not None, turned,
            **tile._asdict(),
        )  # fmt: skip
    return y


# -- many adapters ---------------------------------------------------------------------------------------------------------------


def at_most(M, E):
    """Tiles of TILE_ROWS rows that M rows of E adapters can make: how many there are is known on the device alone."""
    return M // TILE_ROWS + min(E, M)


def multi_lowrank_down(x, A, order, starts, tiles, ranks, pages, seed, thresholds, splits):
    """u (splits,M,R), whose sum is drop(x) A_e^T of each row's adapter e: each of its own part of K, float32, not written elsewhere, in
    Triton."""
    u = x.new_empty(splits, x.shape[0], A.shape[1] * (1 if pages is None else pages.shape[1]), dtype=torch.float32)
    return _multi_down(x, A, None, order, starts, tiles, ranks, pages, seed, thresholds, u)


def _multi_down(x, A, scaling, order, starts, tiles, ranks, pages, seed, thresholds, u):
    from . import multi
    from . import tiles as table

    (M, K), (E, R, _), parts = x.shape, A.shape, 1
    if pages is not None:
        parts, (E, R) = R, pages.shape
    if M == 0:
        return u
    tile, splits = table.multi_down(R, x.dtype != torch.float32), u.shape[0]
    part_of_K = K if splits == 1 else -(-K // (splits * tile.BLOCK_K)) * tile.BLOCK_K
    tiles = tiles_of(starts, M) if tiles is None else tiles
    with on_device(x):
        multi.multi_down[(at_most(M, E), parts * -(-R // tile.BLOCK_R), splits)](
            x, A, order, starts, tiles, order if ranks is None else ranks, order if pages is None else pages, order if seed is None else seed,
            order if seed is None else thresholds, u if scaling is None else scaling, u,
            M, K, R, E, part_of_K,
            *x.stride(), *A.stride(), 0 if pages is None else pages.stride(0), u.stride(0), u.stride(1),
            ranks is not None, pages is not None, seed is not None, scaling is not None, mode(x.dtype, A.dtype), terms(x.dtype), (E + 1).bit_length(),
            **tile._asdict(),
        )  # fmt: skip
    return u


def multi_add_lowrank(y, u, B, scaling, order, starts, tiles, ranks, pages, seed, thresholds):
    """y (M,N) += scaling_e * drop(u B_e^T) of each row's adapter e, u (S,M,R) summed over S, in place, in Triton; rows without adapter are not touched,
    those whose id is none become NaN."""
    from . import multi
    from . import tiles as table

    M, (E, N, R) = y.shape[0], stack_shape(B, pages)
    if M == 0:
        return
    tile = table.multi_add(y.dtype != torch.float32)
    tiles = tiles_of(starts, M) if tiles is None else tiles
    with on_device(y):
        multi.multi_add[(at_most(M, E + 1), -(-N // tile.BLOCK_N))](
            y, u, B, order, starts, tiles, order if ranks is None else ranks, order if pages is None else pages, order if seed is None else seed,
            order if seed is None else thresholds, u if scaling is None else scaling,
            M, N, R, E, u.shape[0],
            y.stride(0), u.stride(0), u.stride(1), *B.stride(), 0 if pages is None else pages.stride(0),
            ranks is not None, pages is not None, seed is not None, scaling is not None, u.shape[0] > 1, mode(y.dtype, B.dtype), (E + 1).bit_length(),
            **tile._asdict(),
        )  # fmt: skip


def multi_lowrank_grad(dy, x, u, B, scaling, order, starts, tiles, ranks, pages, seed, thresholds, dtype):
    """du, dA and dB of every adapter in a launch each, an adapter's rows in their order, in Triton."""
    E, N, R = stack_shape(B, pages)
    du = dy.new_empty(dy.shape[0], R, dtype=torch.float32)
    _multi_down(dy, B.transpose(1, 2), scaling, order, starts, tiles, ranks, pages, None, None, du[None])
    dA = dy.new_empty((0,) if x is None else (E, R, x.shape[1]), dtype=dtype)
    dB = dy.new_empty((0,) if u is None else (E, N, R), dtype=dtype)
    if x is not None:
        _multi_outer(du, x, None, order, starts, ranks, seed, thresholds, dA, B.dtype)
    if u is not None:
        _multi_outer(u, dy, scaling, order, starts, ranks, None, None, dB.transpose(1, 2), B.dtype)
    return du, dA, dB


def _multi_outer(small, large, scaling, order, starts, ranks, seed, thresholds, out, adapter):
    from . import multi
    from . import tiles as table

    E, R, K = out.shape
    tile = table.multi_outer(large.dtype != torch.float32)
    with on_device(large):
        multi.multi_outer[(-(-K // tile.BLOCK_K), E, -(-R // tile.BLOCK_R))](
            small, large, order, starts, order if ranks is None else ranks, order if seed is None else seed,
            order if seed is None else thresholds, small if scaling is None else scaling, out,
            K, R,
            *large.stride(), *out.stride(),
            ranks is not None, seed is not None, scaling is not None, mode(large.dtype, adapter), element(adapter), terms(large.dtype),
            **tile._asdict(),
        )  # fmt: skip
