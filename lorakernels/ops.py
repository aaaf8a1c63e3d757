"""The operators: schemas and shape rules (torch.library), and the autograd.Function over them.

M rows of x (tokens), K in_features, N out_features, R rank; W (N,K), A (R,K), B (N,R).
A primitive is opaque to torch.compile; its body is a backend's function of the same name. Primitives have no autograd of
their own: gradients come from the Functions below, which call them by `way`.
"""

import functools

import torch

from . import backends, flops, sharding
from .backends.reference import accumulator, base_product


def primitive(schema, dtype_of=lambda arguments: arguments[0].dtype):
    """Define `lorakernels::<schema>`. The decorated function is its shape rule; a backend's function is its body, chosen by
    the first argument's device and by `dtype_of` the arguments."""
    name = schema.partition("(")[0]
    qualified = f"lorakernels::{name}"

    def register(shape_rule):
        torch.library.define(qualified, schema[len(name) :])
        torch.library.register_fake(qualified)(shape_rule)

        def body(*arguments):
            if torch.is_grad_enabled() and any(isinstance(a, torch.Tensor) and a.requires_grad for a in _flat(arguments)):
                raise RuntimeError(f"{qualified} does not support automatic differentiation; lorakernels.functional does, and torch.no_grad() asks for none")
            return getattr(backends.chosen(backends.kind(arguments[0]), dtype_of(arguments)), name)(*arguments)

        torch.library.impl(qualified, "CompositeExplicitAutograd")(body)
        operator = getattr(torch.ops.lorakernels, name).default

        @functools.wraps(shape_rule)
        def call(*arguments):
            return operator(*(arguments if _plain(arguments) else sharding.prepared(arguments)))

        setattr(Operators, name, staticmethod(call))
        return call

    return register


def _flat(arguments):
    """The arguments, those of lists too."""
    for argument in arguments:
        yield from argument if isinstance(argument, (list, tuple)) else (argument,)


class Operators:
    """The primitives by torch's dispatcher, which shows them to whoever looks at operators; the base's product is F.linear there."""

    base_product = staticmethod(base_product)


def way(x, *tensors, dtype=None):
    """By what to call the primitives for x and what else they take: a backend's module where these are plain tensors and nobody looks
    at operators, for the dispatcher costs more than the call of a kernel; else Operators. Their arguments need no gradient.
    dtype: the base's, where it is not x's."""
    for tensor in tensors:
        if type(tensor) not in PLAIN:
            return Operators
    if type(x) not in PLAIN or _watched() or x.is_meta:
        return Operators
    return backends.chosen(backends.kind(x), dtype or x.dtype)


PLAIN = {torch.Tensor, torch.nn.Parameter, type(None), bool, int, float, torch.dtype}


def _plain(arguments):
    """Whether no tensor is of a subclass with a dispatch of its own (a DTensor, a quantised weight): a kernel reads memory."""
    for argument in arguments:
        if type(argument) not in PLAIN and not (type(argument) is list and _plain(argument)):
            return False
    return True


def _watched():
    """Whether somebody (torch.compile, a dispatch mode, the profiler, torch.jit.trace, torch.vmap) looks at operators."""
    if torch.compiler.is_compiling():
        return True
    if torch._C._len_torch_dispatch_stack() > 0:
        flops.register()  # torch's FLOP counter is such a mode
        return True
    return (
        torch.autograd.profiler._is_profiler_enabled
        or torch._C._get_tracing_state() is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


@primitive("lowrank_down(Tensor x, Tensor[] A, Tensor? seed, float dropout_p) -> Tensor")
def lowrank_down(x, A, seed, dropout_p):
    return x.new_empty(x.shape[0], sum(a.shape[0] for a in A), dtype=accumulator(x.dtype))  # u (M,R); A's share x: side by side


@primitive(
    "linear_lowrank(Tensor x, Tensor w, Tensor u, Tensor v, float scaling, Tensor? bias, Tensor? lowrank_bias,"
    " Tensor? seed, float dropout_p) -> Tensor"
)
def linear_lowrank(x, w, u, v, scaling, bias, lowrank_bias, seed, dropout_p):
    return x.new_empty(x.shape[0], w.shape[0])  # y (M,N)


@primitive(
    "lowrank_grad(Tensor dy, Tensor? x, Tensor? u, Tensor? B, Tensor? seed, float dropout_p, float scaling, ScalarType dtype)"
    " -> (Tensor, Tensor, Tensor)"
)
def lowrank_grad(dy, x, u, B, seed, dropout_p, scaling, dtype):
    R = u.shape[1] if B is None else B.shape[1]
    du = dy.new_empty((0,) if B is None else (dy.shape[0], R), dtype=accumulator(dy.dtype))
    dA = dy.new_empty((0,) if x is None else (R, x.shape[1]), dtype=dtype)
    dB = dy.new_empty((0,) if u is None else (dy.shape[1], R), dtype=dtype)
    return du, dA, dB  # (M,R), (R,K), (N,R)


@primitive(
    "nf4_linear_lowrank(Tensor x, Tensor packed, Tensor absmax, Tensor? nested, int N, int K, int blocksize, int nested_blocksize,"
    " bool turned, Tensor? u, Tensor? v, float scaling, Tensor? bias, Tensor? lowrank_bias, Tensor? seed, float dropout_p) -> Tensor"
)
def nf4_linear_lowrank(
    x, packed, absmax, nested, N, K, blocksize, nested_blocksize, turned, u, v, scaling, bias, lowrank_bias, seed, dropout_p
):  # fmt: skip
    return x.new_empty(x.shape[0], K if turned else N)  # y (M,N), or dx (M,K)


@primitive(
    "dequantize_nf4(Tensor packed, Tensor absmax, Tensor? nested, int N, int K, int blocksize, int nested_blocksize,"
    " int n0, int k0, int rows, int columns, ScalarType dtype) -> Tensor",
    dtype_of=lambda arguments: arguments[-1],
)
def dequantize_nf4(packed, absmax, nested, N, K, blocksize, nested_blocksize, n0, k0, rows, columns, dtype):
    return packed.new_empty(rows, columns, dtype=dtype)


@primitive("quantize_nf4(Tensor weight, int blocksize) -> (Tensor, Tensor)")
def quantize_nf4(weight, blocksize):
    return weight.new_empty((weight.numel() + 1) // 2, dtype=torch.uint8), weight.new_empty(-(-weight.numel() // blocksize), dtype=torch.float32)


def own(tensor):
    """The tensor (or None, or an NF4Tensor), or a copy where its values are those of its memory negated."""
    return tensor.resolve_neg() if isinstance(tensor, torch.Tensor) else tensor


def rows(x):
    """x as a matrix of rows; a copy only where its strides allow no view, or its values are those of its memory negated."""
    x = x.resolve_neg()
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def in_shape(run, y, shape):
    """Fresh rows of y in the shape that x has: to autograd no view, so that what comes after the layer may change it in place."""
    if len(shape) == 2:
        return y
    whole = (*shape[:-1], y.shape[1])
    if run is not Operators:
        return y.resize_(whole)  # of as many elements: it costs the host a third of _unsafe_view
    return y.view(whole) if torch.jit.is_tracing() else torch.ops.aten._unsafe_view.default(y, whole)  # which a trace would take with constant sizes


def gradient(tensor, shape, dtype):
    """A gradient in the shape and dtype of what it belongs to."""
    tensor = tensor if tensor.shape == shape else tensor.view(shape)
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def product(run, x, W, scales, turned, u, v, scaling, bias, lowrank_bias, seed, dropout_p):
    """x W^T, or x W where turned, + bias + scaling (drop'(u v^T) + lowrank_bias). W is dense where scales is None; else it is
    NF4's packed codes and scales (absmax, nested, its Format). run: way's."""
    if scales is None:
        return run.linear_lowrank(x, W.t() if turned else W, u, v, scaling, bias, lowrank_bias, seed, dropout_p)
    absmax, nested, format = scales
    return run.nf4_linear_lowrank(x, W, absmax, nested, *format, turned, u, v, scaling, bias, lowrank_bias, seed, dropout_p)


def cast(dtype, *tensors):
    """The floating-point ones in `dtype` where one is given (autocast)."""
    return tensors if dtype is None else tuple(t if t is None or t.dtype == torch.uint8 else t.to(dtype) for t in tensors)


def forward(x, W, A, B, bias, lora_bias, seed, scaling, dropout_p, dtype, scales):
    """y and u of LoraLinear."""
    x, W, A, B, bias, lora_bias = cast(dtype, x, W, A, B, bias, lora_bias)
    x_rows = rows(x)
    run = way(x_rows, W, A, B, bias, lora_bias)
    u = run.lowrank_down(x_rows, [A], seed, dropout_p)
    y = product(run, x_rows, W, scales, False, u, B, scaling, bias, lora_bias, None, 0.0)
    return in_shape(run, y, x.shape), u


def packed_scales(absmax, nested, format):
    return None if absmax is None else (absmax, nested, format)


def refuse_second_derivatives():
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # else what depends on the adapter would be lost silently
        raise RuntimeError("the backward of lora_linear and nf4_linear cannot be differentiated itself (create_graph=True); it is written for first derivatives")


class LoraLinear(torch.autograd.Function):
    """y = x W^T + bias + s (u B^T + lora_bias), u = drop(x) A^T

    du = s dy B          dx = dy W + drop'(du A)     dW = dy^T x       dbias = sum dy
    dB = s dy^T u        dA = du^T drop(x)           dlora_bias = s sum dy

    Kept for backward: x as given, u, the seed and the parameters. The mask is drawn again from the seed. W is dense, or,
    with absmax, NF4's packed codes, which have no gradient.
    """

    @staticmethod
    def forward(ctx, x, W, A, B, bias, lora_bias, seed, scaling, dropout_p, dtype, absmax, nested, format):
        y, u = forward(x, W, A, B, bias, lora_bias, seed, scaling, dropout_p, dtype, packed_scales(absmax, nested, format))
        keep_x = A.requires_grad or W.requires_grad
        ctx.save_for_backward(x if keep_x else None, W, A, B, u if B.requires_grad else None, seed, absmax, nested)
        ctx.scaling, ctx.dropout_p, ctx.dtype, ctx.format = scaling, dropout_p, dtype, format
        ctx.x_shape, ctx.x_dtype = x.shape, x.dtype
        ctx.bias_dtypes = [None if b is None else b.dtype for b in (bias, lora_bias)]
        return y

    @staticmethod
    def backward(ctx, dy):
        refuse_second_derivatives()
        x, W, A, B, u, seed, absmax, nested = ctx.saved_tensors
        need_x, need_W, need_A, need_B, need_bias, need_lora_bias = ctx.needs_input_grad[:6]
        weight_dtypes = W.dtype, A.dtype, B.dtype
        x, W, A, B = cast(ctx.dtype, x, W, A, B)
        dy = rows(dy)
        x = None if x is None else rows(x)
        run = way(dy, x, W, A, B, u)
        dx = dW = dA = dB = dbias = dlora_bias = None
        if need_x or need_A or need_B:
            du, dA, dB = run.lowrank_grad(
                dy, x if need_A else None, u if need_B else None, B if need_x or need_A else None, seed, ctx.dropout_p, ctx.scaling, weight_dtypes[1]
            )
            dA = dA if need_A else None
            dB = gradient(dB, dB.shape, weight_dtypes[2]) if need_B else None
        if need_x:
            dx = product(run, dy, W, packed_scales(absmax, nested, ctx.format), True, du, A.t(), 1.0, None, None, seed, ctx.dropout_p)
            dx = gradient(dx, ctx.x_shape, ctx.x_dtype)
        if need_W:
            with torch.autocast(dy.device.type, enabled=False):
                dW = torch.mm(dy.t(), x).to(weight_dtypes[0])
        if need_bias or need_lora_bias:
            total = dy.sum(0, dtype=accumulator(dy.dtype))
            dbias = total.to(ctx.bias_dtypes[0]) if need_bias else None
            dlora_bias = (total * ctx.scaling).to(ctx.bias_dtypes[1]) if need_lora_bias else None
        return dx, dW, dA, dB, dbias, dlora_bias, *[None] * 7


class NF4Linear(torch.autograd.Function):
    """y = x W^T + bias, dx = dy W, dbias = sum dy. Kept for backward: the packed weight alone."""

    @staticmethod
    def forward(ctx, x, bias, dtype, packed, absmax, nested, format):
        ctx.save_for_backward(packed, absmax, nested)
        ctx.format, ctx.x_shape, ctx.x_dtype = format, x.shape, x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return nf4_forward(x, bias, dtype, packed, absmax, nested, format)

    @staticmethod
    def backward(ctx, dy):
        refuse_second_derivatives()
        packed, absmax, nested = ctx.saved_tensors
        dy = rows(dy)
        dx = dbias = None
        if ctx.needs_input_grad[0]:
            dx = product(way(dy, packed), dy, packed, (absmax, nested, ctx.format), True, None, None, 1.0, None, None, None, 0.0)
            dx = gradient(dx, ctx.x_shape, ctx.x_dtype)
        if ctx.needs_input_grad[1]:
            dbias = dy.sum(0, dtype=accumulator(dy.dtype)).to(ctx.bias_dtype)
        return dx, dbias, None, None, None, None, None


def nf4_forward(x, bias, dtype, packed, absmax, nested, format):
    x, bias = cast(dtype, x, bias)
    x_rows = rows(x)
    run = way(x_rows, packed, bias)
    y = product(run, x_rows, packed, (absmax, nested, format), False, None, None, 1.0, bias, None, None, 0.0)
    return in_shape(run, y, x.shape)


def nf4_linear(x, weight, bias, dtype):
    """NF4Linear, without the Function where no gradient can be asked for. weight: an NF4Tensor."""
    arguments = (x, bias, dtype, weight.packed, weight.absmax, weight.nested, weight.format)
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        return NF4Linear.apply(*arguments)
    return nf4_forward(*arguments)


def lora_linear(x, W, A, B, bias, lora_bias, seed, scaling, dropout_p, dtype, absmax=None, nested=None, format=None):
    """LoraLinear, without the Function where no gradient can be asked for."""
    arguments = (x, W, A, B, bias, lora_bias, seed, scaling, dropout_p, dtype)
    if torch.is_grad_enabled() and any([t is not None and t.requires_grad for t in arguments[:6]]):
        return LoraLinear.apply(*arguments, absmax, nested, format)
    return forward(*arguments, packed_scales(absmax, nested, format))[0]
