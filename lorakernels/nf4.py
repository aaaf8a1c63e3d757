"""The NF4 format as bitsandbytes stores it: codebook, tensor, quant state. A leaf; csrc/nf4.h holds the codebook for C++.

W (N, K) is flattened row by row and cut into blocks, which run on over the ends of rows. An element is a code of 4 bits, two
to a byte, the even element in the high half; its value is code * absmax of its block. With double quantisation absmax is a
byte: absmax = map[byte] * nested_absmax + offset, the product rounded, then the sum.
(Dettmers et al., "QLoRA", 2023; Dettmers et al., "8-bit Optimizers via Block-wise Quantization", 2022.)
"""

import json
from typing import NamedTuple, Optional

import torch

from .checks import check_data, check_float_dtype

CODES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCKSIZE = 256
TINY = 1e-38  # csrc/nf4.h: the smallest scale that a block is divided by
STATE_LIMIT = 1 << 14  # bytes of JSON; a real one has some two hundred
ELEMENTS_LIMIT = 1 << 48
FLOATS = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class Format(NamedTuple):
    """What the bytes mean: sizes of the weight and of its blocks."""

    N: int
    K: int
    blocksize: int
    nested_blocksize: int = NESTED_BLOCKSIZE


class NF4Tensor(NamedTuple):
    """A weight in NF4. Every stored piece is a plain uint8 tensor, so that no cast of a model reaches it.

    packed: two codes a byte. absmax: a byte a block where double-quantised, else the bytes of a float32. nested: the bytes of
    float32 [offset, map (256), nested_absmax], or None. quant_state: bitsandbytes' JSON as stored. dtype: what it was made from. storage: the dtype that packed had in its checkpoint.
    """

    packed: torch.Tensor
    absmax: torch.Tensor
    nested: Optional[torch.Tensor]
    quant_state: torch.Tensor
    format: Format
    dtype: torch.dtype
    storage: torch.dtype = torch.uint8

    @property
    def shape(self):
        return torch.Size((self.format.N, self.format.K))

    @property
    def blocksize(self):
        return self.format.blocksize

    @property
    def device(self):
        return self.packed.device

    def to(self, device):
        """The same on another device."""
        moved = (t if t is None else t.to(device) for t in (self.packed, self.absmax, self.nested, self.quant_state))
        return NF4Tensor(*moved, self.format, self.dtype, self.storage)

    def dequantize(self, dtype=None):
        """The weight (N, K) as a dense tensor: the format's values, each rounded once to dtype (its own by default).
        Raises TypeError for what is no floating-point dtype."""
        dequantize = torch.ops.lorakernels.dequantize_nf4  # by name: the operators stand above this file
        dtype = self.dtype if dtype is None else check_float_dtype("dtype", dtype)
        return dequantize(self.packed, self.absmax, self.nested, *self.format, 0, 0, *self.shape, dtype)

    def state_dict(self, prefix=""):
        """bitsandbytes' keys for a layer of that prefix ("weight", "weight.absmax", ...), byte for byte what was loaded."""
        return to_bnb(self, f"{prefix}weight")

    @classmethod
    def from_state_dict(cls, state_dict, prefix=""):
        """The weight of bitsandbytes' keys. Raises KeyError for one that lacks, ValueError for what does not fit together."""
        return from_bnb(state_dict, f"{prefix}weight")


def bytes_of(tensor):
    """A contiguous tensor's memory as a flat uint8 tensor."""
    return tensor.detach().contiguous().flatten().view(torch.uint8)


def floats_of(data):
    """The float32 values that a uint8 tensor's bytes are."""
    data = data.contiguous()
    return (data if data.data_ptr() % 4 == 0 and data.storage_offset() % 4 == 0 else data.clone()).view(torch.float32)


def codebook(device=None):
    return torch.tensor(CODES, dtype=torch.float32, device=device)


def boundaries(device=None):
    """Between neighbouring codes; a value takes the upper one where it is greater."""
    codes = codebook(device)
    return (codes[:-1] + codes[1:]) / 2


def block_scales(absmax, nested, nested_blocksize):
    """absmax of every block, float32."""
    if nested is None:
        return floats_of(absmax)
    values = floats_of(nested)
    per_block = values[257:].repeat_interleave(nested_blocksize)[: absmax.numel()]
    return values[1:257][absmax.flatten().long()] * per_block + values[0]


# -- double quantisation -------------------------------------------------------------------------------------------------------


def dynamic_map():
    """The signed 8-bit map of "8-bit Optimizers": seven decades, each with twice the values of the one below; float32, sorted."""
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1)
        means = (10.0 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2)).tolist()
        values += means + [-v for v in means]
    return torch.tensor(sorted(values), dtype=torch.float32)


def _boundaries_below(values, boundaries):
    """How many of the sorted boundaries (float32) lie below each value (float32, finite), as int64 in values' shape.

    That is torch.bucketize, which takes 35 ns for a value. Of many, each looks up the count of the least float with its upper sixteen
    bits, among which one boundary of dynamic_map's lies at most, and is compared with that one: 12 ns."""
    if values.numel() < 1 << 16:
        return torch.bucketize(values, boundaries)
    upper = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32) << 16  # negative ones first
    least = torch.where(upper < 0, upper | 0xFFFF, upper).view(torch.float32)
    count = torch.bucketize(least, boundaries)[(values.contiguous().view(torch.int32) >> 16) + (1 << 15)]
    return count + (values > torch.cat([boundaries, boundaries.new_tensor([float("inf")])])[count])


def double_quantize(absmax):
    """(uint8 codes, nested bytes) of float32 scales, in blocks of 256. On the CPU: the same bytes for every device."""
    scales = absmax.cpu()
    offset = scales.double().mean().float()
    rest = scales - offset
    count = rest.numel()
    blocks = torch.nn.functional.pad(rest, (0, -count % NESTED_BLOCKSIZE)).view(-1, NESTED_BLOCKSIZE)
    most = blocks.abs().amax(dim=1)
    table = dynamic_map()
    codes = _boundaries_below(blocks / most.clamp(min=TINY)[:, None], (table[:-1] + table[1:]) / 2).to(torch.uint8)
    nested = torch.cat([offset[None], table, most])
    return codes.flatten()[:count].to(absmax.device), bytes_of(nested).to(absmax.device)


# -- bitsandbytes' keys --------------------------------------------------------------------------------------------------------


def make_quant_state(format, dtype, nested):
    """The JSON that bitsandbytes writes, as uint8."""
    state = {"quant_type": "nf4", "blocksize": format.blocksize, "dtype": str(dtype).removeprefix("torch."), "shape": [format.N, format.K]}
    if nested is not None:
        state |= {"nested_blocksize": format.nested_blocksize, "nested_dtype": "float32", "nested_offset": floats_of(nested)[0].item()}
    return torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


def to_bnb(weight, key):
    """bitsandbytes' keys of a weight."""
    out = {key: weight.packed.view(weight.storage).reshape(-1, 1)}
    if weight.nested is None:
        out[f"{key}.absmax"] = floats_of(weight.absmax)
    else:
        values = floats_of(weight.nested)
        out |= {f"{key}.absmax": weight.absmax, f"{key}.nested_absmax": values[257:].clone(), f"{key}.nested_quant_map": values[1:257].clone()}
    out[f"{key}.quant_map"] = codebook(weight.device)
    out[f"{key}.quant_state.bitsandbytes__nf4"] = weight.quant_state
    return out


def bnb_keys(state_dict, key):
    """Those of a state_dict's keys that hold the weight `key` in bitsandbytes' form; none where it is dense."""
    found = [name for name in state_dict if name.startswith(f"{key}.")]
    return [key, *found] if key in state_dict and any(name.startswith(f"{key}.quant_state.bitsandbytes__") for name in found) else []


def from_bnb(state_dict, key):
    """The NF4Tensor of bitsandbytes' keys; everything is checked before anything is used."""
    states = [name for name in state_dict if name.startswith(f"{key}.quant_state.bitsandbytes__")]
    if key not in state_dict or f"{key}.absmax" not in state_dict or not states:
        raise KeyError(f"{key}: expected {key}, {key}.absmax and {key}.quant_state.bitsandbytes__nf4 in the state_dict")
    blob = state_dict[states[0]]
    state = _read_state(blob, states[0])
    if f"{key}.quant_map" in state_dict:
        _check_map(state_dict[f"{key}.quant_map"], f"{key}.quant_map")
    nested = None
    if f"{key}.nested_absmax" in state_dict or "nested_offset" in state:
        if f"{key}.nested_quant_map" not in state_dict or f"{key}.nested_absmax" not in state_dict or "nested_offset" not in state:
            raise ValueError(f"{key}: a double-quantised weight has nested_absmax, nested_quant_map and a nested_offset; one lacks")
        nested = (state["nested_offset"], state_dict[f"{key}.nested_quant_map"], state_dict[f"{key}.nested_absmax"], state.get("nested_blocksize", NESTED_BLOCKSIZE))
    return build(state_dict[key], state_dict[f"{key}.absmax"], nested, state, blob, key)


def from_quant_state(data, quant_state, name="weight"):
    """The NF4Tensor of a live Params4bit: its data and its QuantState, or the list that old versions keep."""
    if hasattr(quant_state, "packing_format_for_cpu") and quant_state.absmax.dtype == torch.bfloat16:  # False after state_dict(), which restores the codes alone
        raise ValueError(f"{name}: a forward on the CPU has repacked its codes and rounded its scales to bfloat16; take a model over before its first forward")
    if isinstance(quant_state, (list, tuple)):
        if len(quant_state) < 6:
            raise ValueError(f"{name}.quant_state: expected [absmax, shape, dtype, blocksize, nested, quant_type, ...], got {len(quant_state)} entries")
        absmax, shape, dtype, blocksize, second, quant_type = quant_state[:6]
        offset, second = (None, None) if second is None else second
        code = quant_state[6] if len(quant_state) > 6 else None
    else:
        absmax, shape, dtype, blocksize, quant_type = (getattr(quant_state, a) for a in ("absmax", "shape", "dtype", "blocksize", "quant_type"))
        offset, second, code = getattr(quant_state, "offset", None), getattr(quant_state, "state2", None), getattr(quant_state, "code", None)
    if code is not None:
        _check_map(code, f"{name}.quant_map")
    state = {"quant_type": quant_type, "blocksize": blocksize, "dtype": str(dtype).removeprefix("torch."), "shape": list(shape)}
    nested = None
    if second is not None:
        if isinstance(second, (list, tuple)):
            nested_absmax, nested_map, nested_blocksize = second[0], second[1], NESTED_BLOCKSIZE
        else:
            nested_absmax, nested_map, nested_blocksize = second.absmax, second.code, second.blocksize
        nested = (float(offset), nested_map, nested_absmax, nested_blocksize)
    return build(data, absmax, nested, state, None, name)


def _read_state(blob, name):
    check_data(name, blob)
    if blob.dtype != torch.uint8:
        raise ValueError(f"{name}: expected a uint8 tensor, got {str(blob.dtype).removeprefix('torch.')}")
    if blob.numel() > STATE_LIMIT:
        raise ValueError(f"{name}: expected at most {STATE_LIMIT} bytes of JSON, got {blob.numel()}")
    try:
        state = json.loads(bytes(blob.flatten().tolist()).decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}: not JSON: {error}") from None
    if not isinstance(state, dict):
        raise ValueError(f"{name}: expected a JSON object, got a {type(state).__name__}")
    return state


def _check_map(table, name):
    check_data(name, table)
    if table.numel() != 16 or table.is_complex() or not torch.equal(table.detach().float().flatten().cpu(), codebook()):
        raise ValueError(f"{name}: not NF4's codebook")


def _count(value, name, low=1, high=ELEMENTS_LIMIT):
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"{name}: expected an int from {low} to {high}, got {value!r}")
    return value


def build(data, absmax, nested, state, blob, name):
    """An NF4Tensor of parts that fit together, or ValueError naming what does not."""
    if state.get("quant_type") != "nf4":
        raise ValueError(f"{name}: quant_type: expected nf4, got {state.get('quant_type')!r}")
    shape = state.get("shape")
    if not isinstance(shape, list) or len(shape) != 2:
        raise ValueError(f"{name}: shape: expected [N, K], got {shape!r}")
    N, K = (_count(size, f"{name}: shape") for size in shape)
    if N * K > ELEMENTS_LIMIT:
        raise ValueError(f"{name}: shape: {shape} has more than {ELEMENTS_LIMIT} elements")
    blocksize = state.get("blocksize")
    if type(blocksize) is not int or blocksize not in BLOCKSIZES:
        raise ValueError(f"{name}: blocksize: expected one of {', '.join(map(str, BLOCKSIZES))}, got {blocksize!r}")
    if state.get("dtype") not in FLOATS:
        raise ValueError(f"{name}: dtype: expected one of {', '.join(FLOATS)}, got {state.get('dtype')!r}")
    check_data(name, data)
    check_data(f"{name}.absmax", absmax)
    if data.dim() == 2 and data.shape[0] == 1 and data.shape[1] > 1:
        raise ValueError(f"{name}: codes of shape {tuple(data.shape)} are of a transposed weight, a form that bitsandbytes has given up; expected (n, 1)")
    packed = bytes_of(data)
    if packed.numel() != (N * K + 1) // 2:
        raise ValueError(f"{name}: expected {(N * K + 1) // 2} bytes of codes for shape {shape}, got {packed.numel()}")
    blocks = -(-N * K // blocksize)
    if absmax.numel() != blocks:
        raise ValueError(f"{name}.absmax: expected {blocks} scales, got {absmax.numel()}")
    bytes_nested, nested_blocksize = None, NESTED_BLOCKSIZE
    if nested is None:
        if absmax.dtype != torch.float32:
            raise ValueError(f"{name}.absmax: expected float32 scales, got {str(absmax.dtype).removeprefix('torch.')}")
        _check_finite(absmax, f"{name}.absmax")
    else:
        offset, table, nested_absmax, nested_blocksize = nested
        if absmax.dtype != torch.uint8:
            raise ValueError(f"{name}.absmax: expected uint8 (double-quantised), got {str(absmax.dtype).removeprefix('torch.')}")
        if _count(nested_blocksize, f"{name}: nested_blocksize", 2, 1 << 20) & (nested_blocksize - 1):
            raise ValueError(f"{name}: nested_blocksize: expected a power of two, got {nested_blocksize}")
        for part, want, what in ((table, 256, "nested_quant_map"), (nested_absmax, -(-blocks // nested_blocksize), "nested_absmax")):
            check_data(f"{name}.{what}", part)
            if part.dtype != torch.float32 or part.numel() != want:
                raise ValueError(f"{name}.{what}: expected {want} float32 values, got {part.numel()} of {str(part.dtype).removeprefix('torch.')}")
            _check_finite(part, f"{name}.{what}")
        if isinstance(offset, bool) or not isinstance(offset, (int, float)) or not abs(offset) <= torch.finfo(torch.float32).max:
            raise ValueError(f"{name}: nested_offset: expected a finite number that float32 holds, got {offset!r:.40}")
        if abs(offset) + (table.double().abs().max() * nested_absmax.double().abs().max()).item() > torch.finfo(torch.float32).max:
            raise ValueError(f"{name}: scales of its nested_quant_map, nested_absmax and nested_offset go beyond float32")
        parts = [torch.tensor([offset], dtype=torch.float32, device=packed.device), table.detach().flatten(), nested_absmax.detach().flatten()]
        bytes_nested = bytes_of(torch.cat([part.to(packed.device) for part in parts]))
    format = Format(N, K, blocksize, nested_blocksize)
    dtype = FLOATS[state["dtype"]]
    blob = make_quant_state(format, dtype, bytes_nested) if blob is None else blob.detach().flatten().clone()
    return NF4Tensor(packed, bytes_of(absmax).clone(), bytes_nested, blob.to(packed.device), format, dtype, data.dtype)


def _check_finite(tensor, name):
    finite = torch.isfinite(tensor)
    if not bool(finite.all()):
        raise ValueError(f"{name}: not finite at {int((~finite).flatten().nonzero()[0])}")
