"""The functions, in the manner of torch.nn.functional: equation, shapes, argument errors."""

import torch

from . import adapter_ids as noted_ids
from . import dropout, multi_ops, nf4, ops
from .checks import FLOATS, check_flag, check_layout, check_number, check_probability, check_tensor, kind_of, names_of
from .nf4 import NF4Tensor


def lora_linear(x, weight, lora_A, lora_B, scaling=1.0, bias=None, *, dropout_p=0.0, training=True, lora_bias=None):
    """y = x W^T + bias + scaling * (drop(x) A^T B^T + lora_bias)

    x (..., K), weight (N, K), dense or an NF4Tensor, lora_A (R, K), lora_B (N, R), bias (N,), lora_bias (N,) -> y (..., N), any strides.

    dtypes: x, a dense weight and bias share one of bfloat16, float16, float32, float64; lora_A, lora_B and lora_bias share
    that one or float32. y has x's dtype; adapter sums run in float32. Under autocast every operand is cast to autocast's
    dtype, and y has it. Gradients come back contiguous, in their tensor's dtype, for everything that requires one.

    Dropout (training only) acts on the adapter's x alone; each call draws its own mask from torch's generator and
    keeps a 64-bit seed of it for the backward. Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021.

    Raises TypeError (dtypes, types) or ValueError (shapes, devices, ranges) naming the argument, before any kernel.
    """
    dtype = _autocast_dtype(x)
    _check_lora(x, weight, lora_A, lora_B, bias, lora_bias, dtype)
    weight, lora_A, lora_B, bias, lora_bias = ops.own(weight), ops.own(lora_A), ops.own(lora_B), ops.own(bias), ops.own(lora_bias)
    scaling = check_number("scaling", scaling)
    dropout_p = check_probability("dropout_p", dropout_p)
    seed = None
    if check_flag("training", training) and dropout.threshold(dropout_p):
        seed = dropout.draw_seed(x.device)
    dropout_p = dropout_p if seed is not None else 0.0
    if isinstance(weight, NF4Tensor):
        pieces = weight.absmax, weight.nested, weight.format
        return ops.lora_linear(x, weight.packed, lora_A, lora_B, bias, lora_bias, seed, scaling, dropout_p, dtype, *pieces)
    return ops.lora_linear(x, weight, lora_A, lora_B, bias, lora_bias, seed, scaling, dropout_p, dtype)


def nf4_linear(x, weight, bias=None):
    """y = x W^T + bias, W in NF4

    x (..., K), weight an NF4Tensor (N, K), bias (N,) -> y (..., N), any strides. x is bfloat16, float16, float32 or
    float64, bias has its dtype, and y too; under autocast they are cast to autocast's dtype. W's values are code * absmax,
    rounded once at most; sums run in float32. Gradients for x and bias, from the packed bytes: no dense copy is kept.
    Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", 2023.

    Raises TypeError or ValueError naming the argument, before any kernel.
    """
    dtype = _autocast_dtype(x)
    _check_x(x)
    if not isinstance(weight, NF4Tensor):
        raise TypeError(f"weight: expected an NF4Tensor, got {kind_of(weight)}; quantize_nf4() makes one")
    _check_nf4(weight, x)
    if bias is not None:
        _check_tensor("bias", bias, (weight.format.N,), "N", x)
        if dtype is None:
            _check_dtype("bias", bias, [x.dtype], "x's dtype")
    return ops.nf4_linear(x, weight, ops.own(bias), dtype)


def quantize_nf4(weight, blocksize=64, double_quant=True):
    """NF4 of a weight (N, K): the code nearest to w / absmax of its block, a tie to the lower code.

    weight bfloat16, float16 or float32 -> NF4Tensor of that dtype. blocksize: elements that share a scale, a power of two
    from 32 to 4096; blocks run on over the ends of rows. double_quant: scales as bytes with a second level of scales in
    blocks of 256. All backends give the same bytes. Dettmers et al., 2023.

    Raises TypeError, or ValueError naming the argument; weights that are not finite, with the position of the first.
    """
    check_layout("weight", check_tensor("weight", weight))
    if weight.dtype not in nf4.FLOATS.values():
        raise TypeError(f"weight: expected {names_of(nf4.FLOATS.values())}, got {names_of([weight.dtype])}")
    if weight.dim() != 2 or 0 in weight.shape:
        raise ValueError(f"weight: expected shape (N, K) with N and K of at least 1, got {tuple(weight.shape)}")
    if type(blocksize) is not int or blocksize not in nf4.BLOCKSIZES:
        raise ValueError(f"blocksize: expected one of {', '.join(map(str, nf4.BLOCKSIZES))}, got {blocksize!r}")
    check_flag("double_quant", double_quant)
    weight = ops.own(weight.detach().contiguous())
    format, dtype = nf4.Format(*weight.shape, blocksize), weight.dtype
    if weight.is_meta:
        blocks = -(-weight.numel() // blocksize)
        absmax = weight.new_empty(blocks if double_quant else 4 * blocks, dtype=torch.uint8)
        nested = weight.new_empty(4 * (257 + -(-blocks // nf4.NESTED_BLOCKSIZE)), dtype=torch.uint8) if double_quant else None
        return NF4Tensor(weight.new_empty((weight.numel() + 1) // 2, dtype=torch.uint8), absmax, nested, weight.new_empty(0, dtype=torch.uint8), format, dtype)
    packed, absmax = ops.quantize_nf4(weight, blocksize)
    if not bool(torch.isfinite(absmax).all()):  # a block's absmax tells of all that are in it
        n, k = (~torch.isfinite(weight)).nonzero()[0].tolist()
        raise ValueError(f"weight: not finite at [{n}, {k}]: {weight[n, k].item()}")
    absmax, nested = nf4.double_quantize(absmax) if double_quant else (nf4.bytes_of(absmax), None)
    return NF4Tensor(packed, absmax, nested, nf4.make_quant_state(format, dtype, nested).to(weight.device), format, dtype)


def multi_lora_linear(x, weight, lora_A, lora_B, adapter_ids, scaling, bias=None, *, ranks=None, pages=None, dropout_p=0.0, training=True, check_ids="async"):
    """y = x W^T + bias + scaling_e * drop(x) A_e^T B_e^T for each row's adapter e; rows with id -1 have none

    x (..., K), weight (N, K), dense or an NF4Tensor, lora_A (E, R, K), lora_B (E, N, R), bias (N,) -> y (..., N), any strides.
    adapter_ids: int32 or int64, of shape x.shape[:-1], or (batch,) for x (batch, tokens, K); from -1 to E - 1, rows in any order; or
    what route() made of them, once for all layers with rows like x's and E adapters.
    scaling: a number, or float32 (E,). ranks: int64 (E,), how many of its R ranks each adapter uses, from 1 to R; None: all. On a GPU,
    where looking at them would wait for it, those out of range are taken as the nearest within.
    pages: int64 (E, R), with rank rows that stand anywhere in place of stacks: rank r of adapter e is lora_A[pages[e, r]] of
    lora_A (P, K), and lora_B[pages[e, r]] of lora_B (P, N). Those get no gradient, and autocast leaves them as they are.
    dropout_p: a number, or a list of E of them: each adapter's own; the mask is as lora_linear's, of x's rows where they lie.

    dtypes and autocast: as lora_linear. Gradients for x, weight, lora_A, lora_B and bias, contiguous; zeros for adapters that no
    row names. A row's result does not depend on the adapters of the rows beside it; without an adapter it is the base's own.
    check_ids: a row whose id is out of range never gets the base's answer. "sync": it raises before anything runs, on a GPU too,
    which that waits for; "async": so on the CPU, while on a GPU nothing is waited for, the row becomes NaN, and the next call
    with ids raises, or lorakernels.check(); "off": the row becomes NaN, and nothing raises.

    Raises TypeError or ValueError naming the argument, before any kernel.
    """
    dtype = _autocast_dtype(x)
    if pages is None:
        E, R = _check_multi(x, weight, lora_A, lora_B, bias, dtype)
    else:
        E, R = _check_paged(x, weight, lora_A, lora_B, bias, pages, dtype)
        lora_A, lora_B = lora_A[:, None], lora_B[:, :, None]
    routed = _check_routed(adapter_ids, x, E) if isinstance(adapter_ids, multi_ops.Routed) else route(_check_device_of_ids(adapter_ids, x), x.shape, E, check_ids)
    scaling = _per_adapter("scaling", scaling, E, x.device)
    ranks = _check_ranks(ranks, E, R, x.device)
    thresholds = None
    probabilities = [check_probability("dropout_p", p) for p in (dropout_p if isinstance(dropout_p, (list, tuple)) else [dropout_p])]
    if len(probabilities) not in (1, E) or (isinstance(dropout_p, (list, tuple)) and len(probabilities) != E):
        raise ValueError(f"dropout_p: expected a number or {E} of them, got {len(probabilities)}")
    if check_flag("training", training) and any(dropout.threshold(p) for p in probabilities):
        thresholds = torch.tensor([dropout.threshold(p) for p in probabilities], dtype=torch.int32, device=x.device).expand(E).contiguous()
    lora_A, lora_B, bias = ops.own(lora_A), ops.own(lora_B), ops.own(bias)
    return _multi(x, weight, lora_A, lora_B, bias, scaling, routed, ranks, pages, thresholds, dtype)


def _multi(x, weight, lora_A, lora_B, bias, scaling, routed, ranks, pages, thresholds, dtype, u=None):
    seed = None if thresholds is None else dropout.draw_seed(x.device)
    segments = (*routed, ranks, pages, seed, thresholds)
    pieces = (weight.absmax, weight.nested, weight.format) if isinstance(weight, NF4Tensor) else (None, None, None)
    W = weight.packed if isinstance(weight, NF4Tensor) else ops.own(weight)
    return multi_ops.multi_lora_linear(x, W, lora_A, lora_B, bias, scaling, *segments, dtype, *pieces, u)


def route(adapter_ids, shape, E, check_ids="async"):
    """What multi_lora_linear takes in the place of adapter_ids, for x of `shape` (..., K) and E adapters: the order of its rows, made
    once for all layers that such an x meets. adapter_ids, check_ids and errors: multi_lora_linear's."""
    if check_ids not in ("sync", "async", "off"):
        raise ValueError(f"check_ids: expected 'sync', 'async' or 'off', got {check_ids!r}")
    ids = _ids_of_rows(adapter_ids, shape[:-1])
    routed = multi_ops.route(ids, E)
    if check_ids == "off" or ids.is_meta or torch.compiler.is_compiling():
        return routed
    known = routed.starts[-1]  # how many rows have an id from -1 to E - 1
    if check_ids == "async" and ids.is_cuda:
        noted_ids.note(known < len(ids))
    elif known.item() < len(ids):
        at = routed.order[known].item()
        raise ValueError(f"adapter_ids: expected ids from -1 (no adapter) to {E - 1}, got {ids[at].item()} for row {at}")
    return routed


def pooled_down(x, rows_A, routed, ranks, pages):
    """u of multi_lora_linear for the G parts of rank rows (P, G, K) that share x, ranks (G, E): (S, M, G * R), in the order of `routed`."""
    dtype = _autocast_dtype(x)
    x = ops.rows(x if dtype is None else x.to(dtype))
    return multi_ops.down(ops.way(x, rows_A), x, rows_A, *routed, ranks, pages, None, None)


def routed_linear(x, weight, bias, lora_A, lora_B, scaling, routed, ranks, pages=None, u=None, thresholds=None):
    """multi_lora_linear of a layer that has checked what it holds: stacks, or rank rows (P, 1, K) and (P, N, 1) of a pool; with rows
    as `route` has them, u where pooled_down has made it, and thresholds of dropout."""
    dtype = _autocast_dtype(x)
    _check_base(x, weight, bias, dtype)
    if dtype is None and pages is None:
        _check_adapter_dtypes(x, lora_A, lora_B)
    _check_routed(routed, x, len(scaling))
    return _multi(x, weight, lora_A, lora_B, bias, scaling, routed, ranks, pages, thresholds, dtype, u)


# -- argument errors ---------------------------------------------------------------------------------------------------

def _autocast_dtype(x):
    check_tensor("x", x)
    if not torch._C._is_any_autocast_enabled():  # which costs a third of the question below
        return None
    kind = x.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return None


def _check_tensor(name, tensor, shape, letters, like):
    fits = check_tensor(name, tensor).dim() == len(shape)
    if fits:
        for have, want in zip(tensor.shape, shape):
            fits = fits and (want is None or have == want)
    if not fits:
        wanted = ", ".join(letter if want is None else f"{letter}={want}" for letter, want in zip(letters, shape))
        raise ValueError(f"{name}: expected shape ({wanted}), got {tuple(tensor.shape)}")
    if tensor.dtype not in FLOATS:
        raise TypeError(f"{name}: expected a floating-point dtype ({names_of(FLOATS)}), got {names_of([tensor.dtype])}")
    if tensor.device != like.device:
        raise ValueError(f"{name}: expected device {like.device}, as x is, got {tensor.device}")
    check_layout(name, tensor)


def _check_dtype(name, tensor, allowed, why):
    if tensor.dtype not in allowed:
        raise TypeError(f"{name}: expected {' or '.join(names_of([d]) for d in dict.fromkeys(allowed))} ({why}), got {names_of([tensor.dtype])}")


def _check_x(x):
    if x.dtype not in FLOATS:
        raise TypeError(f"x: expected a floating-point dtype ({names_of(FLOATS)}), got {names_of([x.dtype])}")
    check_layout("x", x)
    if x.dim() == 0:
        raise ValueError("x: expected shape (..., K), got a 0-dimensional tensor")
    if x.shape[-1] == 0:
        raise ValueError(f"x: expected shape (..., K) with K of at least 1, got {tuple(x.shape)}")


def _check_nf4(weight, x):
    if weight.format.K != x.shape[-1]:
        raise ValueError(f"weight: expected shape (N, K={x.shape[-1]}), got {tuple(weight.shape)}")
    if weight.packed.device != x.device:
        raise ValueError(f"weight: expected device {x.device}, as x is, got {weight.packed.device}")


def _check_base(x, weight, bias, autocast):
    """What every layer's base is held to; returns N, K."""
    _check_x(x)
    packed = isinstance(weight, NF4Tensor)
    if packed:
        _check_nf4(weight, x)
        N, K = weight.format.N, weight.format.K
    else:
        _check_tensor("weight", weight, (None, x.shape[-1]), "NK", x)
        N, K = weight.shape
    if N == 0:
        raise ValueError(f"weight: expected shape (N, K) with N of at least 1, got {tuple(weight.shape)}")
    if bias is not None:
        _check_tensor("bias", bias, (N,), "N", x)
    if autocast is None:
        if not packed:
            _check_dtype("weight", weight, [x.dtype], "x's dtype; cast one of them, or use autocast")
        if bias is not None:
            _check_dtype("bias", bias, [x.dtype], "the weight's dtype")
    return N, K


def _check_lora(x, weight, lora_A, lora_B, bias, lora_bias, autocast):
    N, K = _check_base(x, weight, bias, autocast)
    _check_tensor("lora_A", lora_A, (None, K), "RK", x)
    R = lora_A.shape[0]
    if R == 0:
        raise ValueError("lora_A: expected a rank of at least 1, got shape " + str(tuple(lora_A.shape)))
    _check_tensor("lora_B", lora_B, (N, R), "NR", x)
    if lora_bias is not None:
        _check_tensor("lora_bias", lora_bias, (N,), "N", x)
    if autocast is None:
        _check_adapter_dtypes(x, lora_A, lora_B, lora_bias)


def _check_adapter_dtypes(x, lora_A, lora_B, lora_bias=None):
    adapter = [x.dtype] if x.dtype == torch.float64 else [x.dtype, torch.float32]
    _check_dtype("lora_A", lora_A, adapter, "the base's dtype or float32")
    _check_dtype("lora_B", lora_B, [lora_A.dtype], "lora_A's dtype")
    if lora_bias is not None:
        _check_dtype("lora_bias", lora_bias, [lora_B.dtype], "lora_B's dtype")


def _check_multi(x, weight, lora_A, lora_B, bias, autocast):
    """As _check_lora for stacks of adapters; returns E, R."""
    for name, tensor, letters in (("lora_A", lora_A, "E, R, K"), ("lora_B", lora_B, "E, N, R")):
        if check_tensor(name, tensor).dim() != 3 or tensor.shape[0] == 0:
            raise ValueError(f"{name}: expected shape ({letters}) with E of at least 1, got {tuple(tensor.shape)}")
    if lora_A.shape[0] != lora_B.shape[0]:
        raise ValueError(f"lora_B: expected E={lora_A.shape[0]} adapters, as lora_A has, got {lora_B.shape[0]}")
    _check_lora(x, weight, lora_A[0], lora_B[0], bias, None, autocast)
    return lora_A.shape[:2]


def _check_paged(x, weight, lora_A, lora_B, bias, pages, autocast):
    """As _check_lora for rank rows; returns E, R."""
    N, K = _check_base(x, weight, bias, autocast)
    _check_tensor("lora_A", lora_A, (None, K), "PK", x)
    P = lora_A.shape[0]
    _check_tensor("lora_B", lora_B, (P, N), "PN", x)
    _check_adapter_dtypes(x, lora_A, lora_B)
    if lora_A.requires_grad or lora_B.requires_grad:
        raise ValueError(f"lora_{'A' if lora_A.requires_grad else 'B'}: rank rows with pages get no gradient; train stacks (E, R, K) and (E, N, R)")
    if not isinstance(pages, torch.Tensor) or pages.dtype != torch.int64 or pages.dim() != 2 or 0 in pages.shape or pages.device != x.device:
        got = f"{names_of([pages.dtype])} {tuple(pages.shape)} on {pages.device}" if isinstance(pages, torch.Tensor) else kind_of(pages)
        raise TypeError(f"pages: expected int64 of shape (E, R) on {x.device}, got {got}")
    if not pages.is_cuda and not pages.is_meta and not torch.compiler.is_compiling() and not bool(((pages >= 0) & (pages < P)).all()):
        raise ValueError(f"pages: expected rows from 0 to {P - 1}, got {pages.min().item()} to {pages.max().item()}")
    if pages.stride(1) != 1:
        raise ValueError(f"pages: expected the ranks of an adapter side by side, got strides {pages.stride()}")
    return pages.shape


def _check_device_of_ids(ids, x):
    if isinstance(ids, torch.Tensor) and ids.device != x.device:
        raise ValueError(f"adapter_ids: expected device {x.device}, as x is, got {ids.device}")
    return ids


def _check_routed(routed, x, E):
    M = x.shape[:-1].numel()
    if routed.order.shape != (M,) or routed.starts.shape != (E + 1,):
        raise ValueError(f"adapter_ids: expected what route() makes for {M} rows and {E} adapters, got it for {len(routed.order)} and {len(routed.starts) - 1}")
    if routed.order.device != x.device:
        raise ValueError(f"adapter_ids: expected device {x.device}, as x is, got {routed.order.device}")
    return routed


def _ids_of_rows(ids, rows):
    """adapter_ids as one id for each row."""
    if check_tensor("adapter_ids", ids).dtype not in (torch.int32, torch.int64):
        raise TypeError(f"adapter_ids: expected int32 or int64, got {names_of([ids.dtype])}")
    if ids.shape != rows:
        if len(rows) != 2 or ids.shape != rows[:1]:
            also = f" or ({rows[0]},)" if len(rows) == 2 else ""
            raise ValueError(f"adapter_ids: expected shape {tuple(rows)}{also}, got {tuple(ids.shape)}")
        ids = ids[:, None].expand(rows)
    return ids.reshape(-1)


def _per_adapter(name, value, E, device):
    """A number for all adapters, or one for each: float32 (E,)."""
    if isinstance(value, torch.Tensor):
        if value.shape != (E,) or value.dtype != torch.float32:
            raise ValueError(f"{name}: expected a number or float32 of shape ({E},), got {names_of([value.dtype])} {tuple(value.shape)}")
        if value.device != device:
            raise ValueError(f"{name}: expected device {device}, as x is, got {value.device}")
        return value.detach().contiguous()
    return torch.full((E,), check_number(name, value), device=device)


def _check_ranks(ranks, E, R, device):
    if ranks is None:
        return None
    if not isinstance(ranks, torch.Tensor) or ranks.dtype != torch.int64 or ranks.shape != (E,):
        got = f"{names_of([ranks.dtype])} {tuple(ranks.shape)}" if isinstance(ranks, torch.Tensor) else kind_of(ranks)
        raise TypeError(f"ranks: expected int64 of shape ({E},), got {got}")
    if ranks.device != device:
        raise ValueError(f"ranks: expected device {device}, as x is, got {ranks.device}")
    if ranks.is_cuda:
        return ranks.clamp(1, R)
    if not ranks.is_meta and not torch.compiler.is_compiling() and not bool(((ranks >= 1) & (ranks <= R)).all()):
        raise ValueError(f"ranks: expected ranks from 1 to {R} (lora_A's), got {ranks.tolist()}")
    return ranks.contiguous()
