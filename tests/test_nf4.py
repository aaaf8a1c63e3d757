"""The NF4 format: codes, scales, bytes; bitsandbytes' checkpoints, read and written; what is refused."""

import itertools
import json
import re
import types
from pathlib import Path

import pytest
import torch
from numerics import UNIT_ROUNDOFF
from safetensors.torch import load_file
from torch import nn

import lorakernels as lk
from lorakernels import backends, nf4, ops
from lorakernels.functional import quantize_nf4

ROOT = Path(__file__).parent.parent
GOLDEN = load_file(Path(__file__).parent / "data" / "nf4_bitsandbytes.safetensors")
NAMES = sorted({key.partition(".")[0] for key in GOLDEN})
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def golden(name):
    """bitsandbytes' keys of a recorded weight."""
    return {key.removeprefix(f"{name}."): value for key, value in GOLDEN.items() if key.startswith(f"{name}.weight")}


def same_bytes(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


# -- the codebook ------------------------------------------------------------------------------------------------------------


def test_codebook_is_the_native_one():
    header = ROOT / "csrc" / "nf4.h"
    text = header.read_text() if header.exists() else pytest.skip("no source tree")

    def numbers(name):
        body = re.search(rf"#define {name}\b(.*?)\n\n", text, re.S)[1]
        return torch.tensor([float(number) for number in re.findall(r"-?\d+\.\d+(?=f)", body)])

    assert torch.equal(numbers("LK_NF4_CODES"), nf4.codebook())
    assert torch.equal(numbers("LK_NF4_BOUNDARIES"), nf4.boundaries())
    decimals = re.findall(r"-?\d+\.\d+(?=f)", text.partition("#define LK_NF4_BOUNDARIES")[2])
    assert [float(number) for number in decimals[:15]] == nf4.boundaries().tolist()  # float32 values, which no compiler rounds again


def test_maps_are_bitsandbytes():
    assert torch.equal(golden("nested")["weight.quant_map"], nf4.codebook())
    assert torch.equal(golden("nested")["weight.nested_quant_map"], nf4.dynamic_map())


def test_many_scales_get_the_codes_that_few_get():
    """At every boundary, beside it, and anywhere: where a lookup stands in bucketize's place, and where it does not yet."""
    table = nf4.dynamic_map()
    boundaries = (table[:-1] + table[1:]) / 2
    edges = torch.cat([table, boundaries, torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1e-38, -1e-38, 1.0, -1.0])])
    edges = torch.cat([edges, edges.nextafter(edges + 1), edges.nextafter(edges - 1)])
    values = torch.cat([edges, torch.rand(1 << 16) * 2 - 1, torch.randn(1 << 12).exp() * 1e-7])
    expected = torch.bucketize(values, boundaries)
    assert torch.equal(nf4._boundaries_below(values, boundaries), expected)
    assert torch.equal(nf4._boundaries_below(values.view(-1, 1)[: 1 << 15], boundaries), expected.view(-1, 1)[: 1 << 15])


# -- quantise and dequantise ---------------------------------------------------------------------------------------------------


def codes_of(weight):
    """The 4-bit codes, one an element."""
    pairs = weight.packed.flatten()
    return torch.stack([pairs >> 4, pairs & 15], dim=1).flatten()[: weight.format.N * weight.format.K].view(weight.shape)


def test_boundaries_take_the_lower_code(backend, device):
    """Each boundary, the next float up and down, both zeros, in a block whose absmax is 1."""
    edges = nf4.boundaries()
    values = torch.cat([edges, torch.nextafter(edges, torch.tensor(2.0)), torch.nextafter(edges, torch.tensor(-2.0)), torch.tensor([0.0, -0.0, 1.0, -1.0])])
    row = torch.zeros(1, 64)
    row[0, : len(values)] = values
    got = codes_of(quantize_nf4(row.to(device), 64, False)).cpu()[0]
    below = torch.arange(15)
    expected = torch.cat([below, below + 1, below, torch.tensor([7, 7, 15, 0])]).to(torch.uint8)
    assert got[: len(values)].tolist() == expected.tolist()


def test_a_block_of_zeros(backend, device):
    for tiny in (0.0, 1e-45, -1e-45):
        weight = quantize_nf4(torch.full((2, 64), tiny, device=device), 64, False)
        assert (codes_of(weight) == 7).all() and (weight.dequantize() == 0).all()


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_scales_down_to_the_smallest_numbers(backend, device, dtype):
    """Instructions that take subnormal numbers for zero must not meet them; signs and rounding at the edge stay, too."""
    scales = torch.tensor([1e-45, 1e-40, 1.17e-38, 1.2e-38, 1e-37, 7e-37, 8e-37, 1e-30, 6e-8, 3e38])
    row = torch.arange(64).flip(0).float() / 32 - 63 / 64
    with backends.use_backend("reference"):
        weight = quantize_nf4((row / row.abs().max()).expand(len(scales), 64), 64, False)
    weight = nf4.NF4Tensor(weight.packed, nf4.bytes_of(scales), None, weight.quant_state, weight.format, weight.dtype).to(device)
    exact = nf4.codebook()[codes_of(weight).cpu().long()] * scales[:, None]
    got = weight.dequantize(dtype).cpu()
    assert torch.equal(got, exact.to(dtype)) and torch.equal(got.signbit(), exact.to(dtype).signbit())


SHAPES = [(1, 64), (48, 96), (5, 128), (3, 160), (2, 3420), (64, 33), (3, 7), (1, 1)]


@pytest.mark.parametrize("N, K", SHAPES)
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_every_backend_gives_the_references_bytes_and_values(backend, device, N, K, dtype):
    kinds = itertools.product((32, 64, 256, 4096), (False, True)) if N * K < 5000 else ((64, True), (4096, False))
    for blocksize, nested in kinds:
        dense = torch.randn(N, K, generator=torch.Generator().manual_seed(blocksize)).to(dtype)
        with backends.use_backend("reference"):
            expected = quantize_nf4(dense, blocksize, nested)
        weight = quantize_nf4(dense.to(device), blocksize, nested)
        for piece in ("packed", "absmax", "nested", "quant_state"):
            want, got = getattr(expected, piece), getattr(weight, piece)
            assert (want is None and got is None) or torch.equal(want, got.cpu()), (piece, blocksize, nested)
        # the values by the format's own words, element by element: a block's scale, the product rounded in float32, then once
        scales = nf4.block_scales(expected.absmax, expected.nested, 256)
        block = torch.arange(N * K).view(N, K) // blocksize
        values = nf4.codebook()[codes_of(expected).long()] * scales[block]
        for out in (F32, BF16, F16):
            assert torch.equal(weight.dequantize(out).cpu(), values.to(out)), (out, blocksize, nested)
        n0, k0 = N // 3, K // 3
        window = ops.dequantize_nf4(weight.packed, weight.absmax, weight.nested, *weight.format, n0, k0, N - n0, K - k0, dtype)
        assert torch.equal(window.cpu(), values.to(dtype)[n0:, k0:])


@pytest.mark.parametrize("blocksize", nf4.BLOCKSIZES)
def test_every_block_size(backend, device, blocksize):
    dense = torch.randn(3, 2100)
    weight = quantize_nf4(dense.to(device), blocksize, False)
    with backends.use_backend("reference"):
        assert torch.equal(weight.packed.cpu(), quantize_nf4(dense, blocksize, False).packed)
    # never farther from an element than half the widest gap between codes, of its block's absmax, but for rounding
    gap = nf4.codebook().diff().max() / 2 * (1 + 4 * UNIT_ROUNDOFF[F32])
    bound = gap * nf4.floats_of(weight.absmax.cpu()).repeat_interleave(blocksize)[: dense.numel()]
    assert ((weight.dequantize().cpu() - dense).abs().flatten() <= bound).all()


def test_any_layout_of_the_weight(backend, device):
    dense = torch.randn(96, 40, device=device)
    want = quantize_nf4(dense.t().contiguous(), 64, True)
    assert torch.equal(quantize_nf4(dense.t(), 64, True).packed, want.packed)
    assert torch.equal(quantize_nf4(torch.nn.functional.pad(dense.t(), (3, 2))[:, 3:-2], 64, True).packed, want.packed)


def test_double_quantisation_is_the_nearest_of_its_map_and_deterministic():
    dense = torch.randn(256, 512)
    once, twice = quantize_nf4(dense, 64, False), quantize_nf4(dense, 64, True)
    assert torch.equal(once.packed, twice.packed)
    scales, values = nf4.floats_of(once.absmax), nf4.floats_of(twice.nested)
    got = nf4.block_scales(twice.absmax, twice.nested, 256)
    nested_absmax = values[257:].repeat_interleave(256)[: len(scales)]
    every = values[1:257][None, :] * nested_absmax[:, None] + values[0]  # what each byte would have given
    nearest = (every - scales[:, None]).abs().amin(dim=1)
    rounding = 4 * UNIT_ROUNDOFF[F32] * scales
    assert ((got - scales).abs() <= nearest + rounding).all()
    assert all(torch.equal(a, b) for a, b in zip(twice[:4], quantize_nf4(dense, 64, True)[:4]))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_weights_that_are_not_finite_are_refused_with_their_position(backend, device, value, dtype):
    for n, k in ((0, 0), (2, 5), (3, 96), (1, 63)):
        dense = torch.randn(4, 97, device=device).to(dtype)
        dense[n, k] = value
        with pytest.raises(ValueError, match=rf"weight: not finite at \[{n}, {k}\]"):
            quantize_nf4(dense)


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        (([1.0],), TypeError, "weight: expected a Tensor, got a list"),
        ((torch.ones(8),), ValueError, "weight: expected shape (N, K) with N and K of at least 1, got (8,)"),
        ((torch.ones(0, 8),), ValueError, "weight: expected shape (N, K) with N and K of at least 1, got (0, 8)"),
        ((torch.ones(2, 8).double(),), TypeError, "weight: expected bfloat16, float16, float32, got float64"),
        ((torch.ones(2, 8).to_sparse(),), TypeError, "weight: expected a dense tensor"),
        ((torch.ones(2, 8), 48), ValueError, "blocksize: expected one of 32, 64, 128"),
        ((torch.ones(2, 8), 64.0), ValueError, "blocksize: expected one of 32, 64, 128"),
        ((torch.ones(2, 8), 64, "yes"), TypeError, "double_quant: expected a bool, got a str"),
    ],
)
def test_arguments(arguments, error, words):
    with pytest.raises(error) as caught:
        quantize_nf4(*arguments)
    assert words in str(caught.value)


# -- bitsandbytes' bytes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_recorded_weights_come_back_byte_for_byte_and_value_for_value(backend, name):
    stored = golden(name)
    weight = lk.NF4Tensor.from_state_dict(stored)
    assert weight.shape == GOLDEN[f"{name}.source"].shape and weight.dtype == GOLDEN[f"{name}.source"].dtype
    if f"{name}.values" in GOLDEN:
        assert torch.equal(weight.dequantize(), GOLDEN[f"{name}.values"])
    layer = lk.NF4Linear.from_nf4(weight)
    layer(torch.randn(3, weight.shape[1]))
    for state in (weight.state_dict(), layer.state_dict()):
        assert state.keys() == stored.keys()
        assert all(same_bytes(state[key], stored[key]) for key in stored)


@pytest.mark.parametrize("name", NAMES)
def test_quantising_gives_bitsandbytes_codes(backend, name):
    """Not promised on near ties, where bitsandbytes' own backends differ; these draws have none."""
    source, stored = GOLDEN[f"{name}.source"], golden(name)
    recorded = lk.NF4Tensor.from_state_dict(stored)
    weight = quantize_nf4(source, recorded.blocksize, recorded.nested is not None)
    assert torch.equal(codes_of(weight), codes_of(recorded))
    if recorded.nested is None:
        assert torch.equal(weight.absmax, recorded.absmax)
    assert json.loads(bytes(weight.quant_state.tolist())).keys() == json.loads(bytes(recorded.quant_state.tolist())).keys()


def test_the_old_list_form_and_a_live_quant_state():
    weight = lk.NF4Tensor.from_state_dict(golden("nested"))
    stored = golden("nested")
    state = [stored["weight.absmax"], weight.shape, BF16, 64, [torch.tensor(0.0), [stored["weight.nested_absmax"], stored["weight.nested_quant_map"]]], "nf4"]
    offset = nf4.floats_of(weight.nested)[0]
    state[4][0] = offset
    taken = nf4.from_quant_state(stored["weight"], state)
    assert all(torch.equal(a, b) for a, b in zip(taken[:4], weight[:4]))
    plain = golden("plain")
    taken = nf4.from_quant_state(plain["weight"], [plain["weight.absmax"], (8, 64), BF16, 64, None, "nf4", plain["weight.quant_map"]])
    assert all(same_bytes(plain[key], value) for key, value in taken.state_dict().items())
    with pytest.raises(ValueError, match="quant_type: expected nf4, got 'fp4'"):
        nf4.from_quant_state(plain["weight"], [plain["weight.absmax"], (8, 64), BF16, 64, None, "fp4"])
    with pytest.raises(ValueError, match="expected .absmax, shape"):
        nf4.from_quant_state(plain["weight"], [plain["weight.absmax"]])


@pytest.mark.parametrize("packed_now", [True, False])
def test_what_bitsandbytes_has_repacked_is_refused(packed_now):
    plain = golden("plain")
    state = types.SimpleNamespace(packing_format_for_cpu=packed_now, absmax=plain["weight.absmax"].bfloat16())
    with pytest.raises(ValueError, match="before its first forward"):
        nf4.from_quant_state(plain["weight"], state)


def test_a_live_linear4bit_is_taken_over():
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed; the recorded bytes stand for it")
    for nested, storage in itertools.product((True, False), (torch.uint8, BF16)):
        linear = bnb.nn.Linear4bit(96, 48, quant_type="nf4", compress_statistics=nested, quant_storage=storage)
        linear.weight = bnb.nn.Params4bit(torch.randn(48, 96), requires_grad=False, quant_type="nf4", compress_statistics=nested, quant_storage=storage).to("cpu")
        stored = linear.state_dict()
        layer = lk.QLoraLinear.from_bnb(linear, r=4)
        state = layer.state_dict()
        assert all(same_bytes(state[key], stored[key]) for key in stored)


def damaged(**changes):
    stored = {key: value.clone() for key, value in golden("nested").items()}
    state = json.loads(bytes(stored["weight.quant_state.bitsandbytes__nf4"].tolist()))
    for key, value in changes.items():
        if key in state or key == "extra":
            state[key] = value
        else:
            stored[f"weight.{key}" if key != "weight" else key] = value
    if any(key in state for key in changes):
        stored["weight.quant_state.bitsandbytes__nf4"] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return {key: value for key, value in stored.items() if value is not None}


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(weight=torch.zeros(511, 1, dtype=torch.uint8)), "expected 512 bytes of codes for shape [8, 128], got 511"),
        (dict(weight=torch.zeros(1, 512, dtype=torch.uint8)), "are of a transposed weight"),
        (dict(absmax=torch.zeros(15, dtype=torch.uint8)), "weight.absmax: expected 16 scales, got 15"),
        (dict(absmax=torch.zeros(16)), "weight.absmax: expected uint8 (double-quantised), got float32"),
        (dict(nested_absmax=torch.tensor([float("nan")])), "weight.nested_absmax: not finite at 0"),
        (dict(nested_absmax=torch.zeros(2)), "weight.nested_absmax: expected 1 float32 values, got 2"),
        (dict(nested_absmax=torch.zeros(1).bfloat16()), "weight.nested_absmax: expected 1 float32 values, got 1 of bfloat16"),
        (dict(nested_absmax=None), "one lacks"),
        (dict(nested_quant_map=torch.zeros(255)), "weight.nested_quant_map: expected 256 float32 values, got 255"),
        (dict(quant_map=torch.linspace(-1, 1, 16)), "weight.quant_map: not NF4's codebook"),
        (dict(quant_type="fp4"), "quant_type: expected nf4, got 'fp4'"),
        (dict(shape=[8, -128]), "shape: expected an int from 1"),
        (dict(shape=[1 << 40, 1 << 40]), "elements"),
        (dict(shape=[8]), "shape: expected [N, K], got [8]"),
        (dict(shape=[8.0, 128]), "shape: expected an int from 1"),
        (dict(blocksize=48), "blocksize: expected one of 32"),
        (dict(blocksize="64"), "blocksize: expected one of 32"),
        (dict(dtype="float64"), "dtype: expected one of bfloat16, float16, float32, got 'float64'"),
        (dict(nested_blocksize=0), "nested_blocksize: expected an int from 2"),
        (dict(nested_blocksize=100), "nested_blocksize: expected a power of two"),
        (dict(nested_offset=None), "nested_offset: expected a finite number that float32 holds, got None"),
        (dict(nested_offset=float("nan")), "nested_offset: expected a finite number that float32 holds, got nan"),
        (dict(nested_offset=-1e308), "nested_offset: expected a finite number that float32 holds, got -1e+308"),
        (dict(nested_offset=10**400), "nested_offset: expected a finite number that float32 holds, got 1000000"),
        (dict(nested_absmax=torch.tensor([3e38]), nested_offset=2e38), "go beyond float32"),
        (dict(quant_map=nf4.codebook().to(torch.complex64)), "weight.quant_map: not NF4's codebook"),
        ({"quant_state.bitsandbytes__nf4": torch.zeros(1 << 20, dtype=torch.uint8)}, "expected at most 16384 bytes of JSON"),
        ({"quant_state.bitsandbytes__nf4": torch.zeros(9, dtype=torch.uint8)}, "not JSON"),
        ({"quant_state.bitsandbytes__nf4": torch.tensor(list(b"[1, 2]"), dtype=torch.uint8)}, "expected a JSON object, got a list"),
        ({"quant_state.bitsandbytes__nf4": torch.zeros(9)}, "expected a uint8 tensor"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_damaged_quant_states_raise_and_change_nothing(changes, words):
    stored = damaged(**changes)
    with pytest.raises(ValueError) as caught:
        lk.NF4Tensor.from_state_dict(stored)
    assert words in str(caught.value)
    layer = lk.NF4Linear(128, 8, bias=False, dtype=BF16)
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    with pytest.raises(RuntimeError) as caught:
        layer.load_state_dict(stored)
    assert words in str(caught.value)
    assert all(same_bytes(value, before[key]) for key, value in layer.state_dict().items())


@pytest.mark.parametrize("key", golden("nested"))
@pytest.mark.parametrize(
    "value, error, words",
    [("x", TypeError, "expected a Tensor, got a str"), (torch.zeros(1, device="meta"), ValueError, "expected a Tensor with data, got one on the meta device")],
    ids=["str", "meta"],
)
def test_what_is_no_tensor_is_named(key, value, error, words):
    layer, stored = lk.NF4Linear(128, 8, bias=False, dtype=BF16), golden("nested") | {key: value}
    with pytest.raises(error) as caught:
        lk.NF4Tensor.from_state_dict(stored)
    assert str(caught.value) == f"{key}: {words}"
    with pytest.raises(RuntimeError, match=f"{key}: {words}" if value != "x" else key):  # torch has words of its own for a str
        layer.load_state_dict(stored)


def test_nan_scales_of_a_plain_weight():
    stored = {key: value.clone() for key, value in golden("plain").items()}
    stored["weight.absmax"][3] = float("nan")
    with pytest.raises(ValueError, match="weight.absmax: not finite at 3"):
        lk.NF4Tensor.from_state_dict(stored)


def test_a_dense_or_missing_weight_for_an_nf4_layer():
    layer = lk.NF4Linear(64, 8, bias=False)
    with pytest.raises(RuntimeError, match="a weight without bitsandbytes' keys"):
        layer.load_state_dict({"weight": torch.randn(8, 64)})
    with pytest.raises(RuntimeError, match="Missing key"):
        layer.load_state_dict({})
    with pytest.raises(RuntimeError, match="expected shape"):
        nn.ModuleList([layer]).load_state_dict({f"0.{key}": value for key, value in golden("nested").items()})
    with pytest.raises(KeyError):
        lk.NF4Tensor.from_state_dict({"weight": torch.randn(8, 64)})
