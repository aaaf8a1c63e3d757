"""Repairs Triton's interpreter, which keeps bfloat16 as uint16: its dot products multiply bit patterns and its casts
truncate (triton-lang/triton#11584). The repair turns itself off where the interpreter gets both right."""

import inspect

import numpy as np


def broken():
    """Whether this Triton's interpreter gets a bfloat16 cast or product wrong."""
    import triton.language as tl
    from triton.runtime import interpreter

    value = np.array([1.0 + 2.0**-8 + 2.0**-9, -3.0078125], dtype=np.float32)  # rounds up; rounds to even
    builder = interpreter.InterpreterBuilder()
    cast = builder.create_fp_trunc(interpreter.TensorHandle(value, tl.float32), tl.bfloat16).data
    two = interpreter.TensorHandle(np.full((1, 1), 0x4000, dtype=np.uint16), tl.bfloat16)
    zero = interpreter.TensorHandle(np.zeros((1, 1), dtype=np.float32), tl.float32)
    product = builder.create_dot(two, two, zero, None, 0).data
    return cast.tolist() != round_bf16(value).tolist() or product.item() != 4.0


def round_bf16(value):
    """float32 -> bfloat16 bits, to nearest even; a NaN stays a quiet NaN."""
    bits = np.ascontiguousarray(value, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(value), (bits >> 16) | 0x40, rounded).astype(np.uint16)


def widen_bf16(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


def repair():
    """Patch the interpreter if it needs it. Returns whether it did."""
    import triton.language as tl
    from triton.runtime import interpreter

    _repair_index(interpreter)
    if not broken():
        return False
    convert, dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot

    def _convert_float(input, input_dtype, output_dtype, rounding_mode):
        if (input_dtype, output_dtype) == (tl.float32, tl.bfloat16):
            return round_bf16(input)
        if (input_dtype, output_dtype) == (tl.bfloat16, tl.float32):
            return widen_bf16(input).view(np.uint32)
        return convert(input, input_dtype, output_dtype, rounding_mode)

    def create_dot(self, a, b, *rest):
        wide = [
            interpreter.TensorHandle(widen_bf16(h.data), tl.float32) if h.dtype.scalar == tl.bfloat16 else h for h in (a, b)
        ]
        return dot(self, *wide, *rest)

    interpreter._convert_float = _convert_float
    interpreter.InterpreterBuilder.create_dot = create_dot
    return True


def _repair_index(interpreter):
    """Triton 3.6 reads a loop bound as int(array of one element), which NumPy refuses since 2.4."""
    if "squeeze" in inspect.getsource(interpreter._patch_lang_tensor):
        return
    patch = interpreter._patch_lang_tensor

    def _patch_lang_tensor(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = _patch_lang_tensor
