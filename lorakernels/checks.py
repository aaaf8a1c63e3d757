"""Errors of plain arguments: TypeError or ValueError that names the argument, what came and what was expected. A leaf."""

import torch

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
FINITE = torch.finfo(torch.float64).max
LARGEST = 1 << 40  # size


def kind_of(value):
    return f"a {type(value).__name__}"


def names_of(dtypes):
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def check_tensor(name, value):
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {kind_of(value)}")
    return value


def check_layout(name, tensor):
    if tensor.layout is not torch.strided or tensor.is_nested:
        raise TypeError(f"{name}: expected a dense tensor (torch.strided), got {'a nested one' if tensor.is_nested else f'layout {tensor.layout}'}")


def check_data(name, value):
    """A dense tensor that has data."""
    check_layout(name, check_tensor(name, value))
    if value.is_meta:
        raise ValueError(f"{name}: expected a Tensor with data, got one on the meta device")
    return value


def check_finite(name, value, whose):
    """A tensor of finite values, in the dtype of whoever takes it."""
    if not bool(torch.isfinite(value).all()):
        raise ValueError(f"{name}: expected finite values in {value.dtype}, {whose} dtype")


def check_flag(name, value):
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected a bool, got {kind_of(value)}")
    return value


def check_number(name, value):
    """A finite int or float, as float."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a finite number, got {kind_of(value)}")
    if not abs(value) <= FINITE:  # also true for NaN, and for ints that no float holds; torch.compile cannot trace math.isfinite
        raise ValueError(f"{name}: expected a finite number, got {value!s:.40}")
    return float(value)


def check_probability(name, value):
    """A number in [0, 1], as float."""
    value = check_number(name, value)
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name}: expected a probability in [0, 1], got {value}")
    return value


def check_size(name, value):
    """An int of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int of at least 1, got {value!r}")
    if value < 1:
        raise ValueError(f"{name}: expected an int of at least 1, got {value!s:.40}")
    if value > LARGEST:
        raise ValueError(f"{name}: expected an int of at most {LARGEST}, got {value!s:.40}")


def check_float_dtype(name, value):
    """One of FLOATS."""
    if not isinstance(value, torch.dtype) or value not in FLOATS:
        raise TypeError(f"{name}: expected a floating-point dtype, got {value!s:.40}")
    return value


def adapter_dtype_over(base, asked, in_nf4=False):
    """What an adapter is kept in: by default float32 over a half-precision base or one in NF4, else the base's dtype."""
    if asked is None:
        return torch.float32 if base.itemsize == 2 or in_nf4 else base
    if not isinstance(asked, torch.dtype) or asked not in (base, torch.float32):
        raise TypeError(f"adapter_dtype: expected {base} (the base's) or torch.float32, got {asked!s:.40}")
    return asked
