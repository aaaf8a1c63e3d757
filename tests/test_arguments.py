"""Bad input: each public argument wrong in each plausible way raises an error that names it, and changes nothing."""

import copy
import math

import pytest
import torch
from torch import nn

import lorakernels as lk
from lorakernels.functional import lora_linear
from lorakernels.modules import LoraLinear

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


def arguments(**changes):
    good = dict(
        x=torch.randn(4, 8), weight=torch.randn(6, 8), lora_A=torch.randn(2, 8), lora_B=torch.randn(6, 2), scaling=1.0,
        bias=torch.randn(6), dropout_p=0.0, lora_bias=torch.randn(6),
    )  # fmt: skip
    return good | changes


def test_the_good_ones_are_good():
    lora_linear(**arguments())


@pytest.mark.parametrize(
    "changes, error, words",
    [
        (dict(x=[1.0]), TypeError, "x: expected a Tensor, got a list"),
        (dict(x=torch.tensor(1.0)), ValueError, "x: expected shape (..., K), got a 0-dimensional tensor"),
        (dict(x=torch.randn(4, 0), weight=torch.randn(6, 0), lora_A=torch.randn(2, 0)), ValueError, "x: expected shape (..., K) with K of at least 1"),
        (dict(x=torch.ones(4, 8, dtype=torch.int64)), TypeError, "x: expected a floating-point dtype"),
        (dict(x=torch.ones(4, 8, dtype=torch.complex64)), TypeError, "x: expected a floating-point dtype"),
        (dict(x=torch.eye(8).to_sparse()), TypeError, "x: expected a dense tensor (torch.strided), got layout torch.sparse_coo"),
        (dict(x=torch.nested.nested_tensor([torch.ones(2, 8), torch.ones(3, 8)])), TypeError, "x: expected a dense tensor (torch.strided), got a nested one"),
        (dict(lora_B=torch.ones(6, 2).to_sparse()), TypeError, "lora_B: expected a dense tensor (torch.strided), got layout torch.sparse_coo"),
        (dict(x=torch.randn(4, 7)), ValueError, "weight: expected shape (N, K=7), got (6, 8)"),
        (dict(x=torch.randn(4, 8).bfloat16()), TypeError, "weight: expected bfloat16 (x's dtype"),
        (dict(weight=None), TypeError, "weight: expected a Tensor, got a NoneType"),
        (dict(weight=torch.randn(8)), ValueError, "weight: expected shape (N, K=8), got (8,)"),
        (dict(weight=torch.randn(0, 8), lora_B=torch.randn(0, 2)), ValueError, "weight: expected shape (N, K) with N of at least 1, got (0, 8)"),
        (dict(weight=torch.randn(6, 8).half()), TypeError, "weight: expected float32"),
        (dict(weight=torch.randn(6, 8, device="meta")), ValueError, "weight: expected device cpu, as x is, got meta"),
        (dict(lora_A=torch.randn(2, 9)), ValueError, "lora_A: expected shape (R, K=8), got (2, 9)"),
        (dict(lora_A=torch.randn(8)), ValueError, "lora_A: expected shape (R, K=8), got (8,)"),
        (dict(lora_A=torch.randn(0, 8), lora_B=torch.randn(6, 0)), ValueError, "lora_A: expected a rank of at least 1"),
        (dict(lora_A=torch.randn(2, 8).bfloat16()), TypeError, "lora_A: expected float32 (the base's dtype or float32), got bfloat16"),
        (dict(lora_A=torch.randn(2, 8, device="meta")), ValueError, "lora_A: expected device cpu"),
        (dict(lora_B=torch.randn(6, 3)), ValueError, "lora_B: expected shape (N=6, R=2), got (6, 3)"),
        (dict(lora_B=torch.randn(2, 6)), ValueError, "lora_B: expected shape (N=6, R=2), got (2, 6)"),
        (dict(lora_B=torch.randn(6, 2).half()), TypeError, "lora_B: expected float32 (lora_A's dtype), got float16"),
        (dict(bias=torch.randn(5)), ValueError, "bias: expected shape (N=6), got (5,)"),
        (dict(bias=torch.randn(6).half()), TypeError, "bias: expected float32 (the weight's dtype), got float16"),
        (dict(lora_bias=torch.randn(6, 1)), ValueError, "lora_bias: expected shape (N=6), got (6, 1)"),
        (dict(lora_bias=torch.randn(6).double()), TypeError, "lora_bias: expected float32"),
        (dict(scaling=math.nan), ValueError, "scaling: expected a finite number, got nan"),
        (dict(scaling=-math.inf), ValueError, "scaling: expected a finite number, got -inf"),
        (dict(scaling="2"), TypeError, "scaling: expected a finite number, got a str"),
        (dict(scaling=True), TypeError, "scaling: expected a finite number, got a bool"),
        (dict(scaling=torch.tensor(2.0)), TypeError, "scaling: expected a finite number, got a Tensor"),
        (dict(dropout_p=-0.1), ValueError, "dropout_p: expected a probability in [0, 1], got -0.1"),
        (dict(dropout_p=1.5), ValueError, "dropout_p: expected a probability in [0, 1], got 1.5"),
        (dict(dropout_p=math.nan), ValueError, "dropout_p: expected a finite number, got nan"),
        (dict(dropout_p=None), TypeError, "dropout_p: expected a finite number, got a NoneType"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else None,
)
def test_lora_linear(changes, error, words):
    with pytest.raises(error) as caught:
        lora_linear(**arguments(**changes))
    assert words in str(caught.value)


def test_float64_base_refuses_float32_adapters():
    with pytest.raises(TypeError, match="lora_A: expected float64"):
        lora_linear(torch.randn(2, 4).double(), torch.randn(3, 4).double(), torch.randn(1, 4), torch.randn(3, 1))


@pytest.mark.parametrize(
    "changes, error, words",
    [
        (dict(r=0), ValueError, "r: expected an int of at least 1, got 0"),
        (dict(r=-1), ValueError, "r: expected an int of at least 1, got -1"),
        (dict(r=2.5), TypeError, "r: expected an int of at least 1, got 2.5"),
        (dict(r=True), TypeError, "r: expected an int of at least 1, got True"),
        (dict(r="8"), TypeError, "r: expected an int of at least 1, got '8'"),
        (dict(lora_alpha=math.nan), ValueError, "lora_alpha: expected a finite number"),
        (dict(lora_alpha=None), TypeError, "lora_alpha: expected a finite number, got a NoneType"),
        (dict(lora_dropout=1.1), ValueError, "lora_dropout: expected a probability"),
        (dict(lora_dropout="0.1"), TypeError, "lora_dropout: expected a finite number"),
        (dict(use_dora=True), ValueError, "use_dora: DoRA is not supported yet"),
        (dict(init_lora_weights="loftq"), ValueError, "init_lora_weights: expected one of True, False, 'gaussian', 'pissa', 'olora', got 'loftq'"),
        (dict(init_lora_weights=1), ValueError, "init_lora_weights: expected one of"),
        (dict(init_lora_weights="pissa", r=9), ValueError, "r: 'pissa' needs r <= min(in_features, out_features) = 6, got 9"),
        (dict(adapter_dtype=F16), TypeError, "adapter_dtype: expected torch.float32"),
        (dict(adapter_dtype=torch.ones(2)), TypeError, "adapter_dtype: expected torch.float32"),
        (dict(use_rslora=torch.ones(2)), TypeError, "use_rslora: expected a bool, got a Tensor"),
        (dict(use_dora=torch.ones(2)), TypeError, "use_dora: expected a bool, got a Tensor"),
        (dict(lora_bias=None), TypeError, "lora_bias: expected a bool, got a NoneType"),
        (dict(r=1 << 41), ValueError, "r: expected an int of at most 1099511627776, got 2199023255552"),
        (dict(lora_alpha=10**400), ValueError, "lora_alpha: expected a finite number, got 1000000"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else None,
)
def test_layers_and_models(changes, error, words):
    linear = nn.Linear(8, 6)
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 8))
    before = copy.deepcopy(model), [p.requires_grad for p in model.parameters()], [m for m in model]
    for call in (lambda: LoraLinear(8, 6, **changes), lambda: LoraLinear.from_linear(linear, **changes), lambda: lk.apply_lora(model, **changes)):
        with pytest.raises(error) as caught:
            call()
        assert words in str(caught.value)
    assert [m for m in model] == before[2] and [p.requires_grad for p in model.parameters()] == before[1]
    assert linear.weight.requires_grad


@pytest.mark.parametrize(
    "changes, error, words",
    [
        (dict(target_modules=["0", "nothing"]), ValueError, "target_modules: no module is named 'nothing'; the model's linear layers end in 0, 2"),
        (dict(target_modules=r"layers\.\d+"), ValueError, r"target_modules: no module is named 'layers\\.\\d+'"),
        (dict(target_modules="(["), ValueError, "target_modules: '([' is not a regular expression"),
        (dict(target_modules=[]), ValueError, "target_modules: expected at least one module name"),
        (dict(target_modules=None), TypeError, "target_modules: expected a regular expression or a list"),
        (dict(target_modules=[0]), TypeError, "target_modules: expected a regular expression or a list of module names, got [0]"),
        (dict(exclude_modules=3), TypeError, "exclude_modules: expected a regular expression or a list"),
        (dict(exclude_modules="("), ValueError, "exclude_modules: '(' is not a regular expression"),
        (dict(layers_to_transform="1", target_modules=["0"]), TypeError, "layers_to_transform: expected a layer index"),
        (dict(layers_to_transform=[-1], target_modules=["0"]), TypeError, "layers_to_transform: expected a layer index"),
        (dict(layers_to_transform=[0], target_modules="0"), ValueError, "layers_to_transform: expected target_modules to be a list"),
        (dict(layers_pattern=5), TypeError, "layers_pattern: expected"),
        (dict(rank_pattern=[3]), TypeError, "rank_pattern: expected a dict"),
        (dict(rank_pattern={"0": 0}), ValueError, "rank_pattern['0']: r: expected an int of at least 1, got 0"),
        (dict(rank_pattern={"(": 1}), ValueError, "rank_pattern: '(' is not a regular expression"),
        (dict(alpha_pattern={"0": "x"}), TypeError, "alpha_pattern['0']: lora_alpha: expected a finite number"),
        (dict(bias="some"), ValueError, "bias: expected one of none, all, lora_only, got 'some'"),
        (dict(modules_to_save=["2"]), ValueError, "modules_to_save: not supported"),
        (dict(fan_in_fan_out=True), ValueError, "fan_in_fan_out: weights stored as (in, out)"),
        (dict(quantize="int3"), ValueError, "quantize: expected None"),
        (dict(strict=torch.ones(2)), TypeError, "strict: expected a bool, got a Tensor"),
        (dict(fan_in_fan_out=None), TypeError, "fan_in_fan_out: expected a bool, got a NoneType"),
        (dict(rank_pattern={"2": 7}, init_lora_weights="pissa", target_modules=["0", "2"], r=2), ValueError, "r: 'pissa' needs r <= min(in_features, out_features) = 6, got 7"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else None,
)
def test_apply_lora(changes, error, words):
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 8))
    modules, weights = list(model), [p.detach().clone() for p in model.parameters()]
    with pytest.raises(error) as caught:
        lk.apply_lora(model, **changes)
    assert words in str(caught.value)
    assert list(model) == modules and all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters()))


@pytest.mark.parametrize(
    "call",
    [
        lambda: lk.apply_lora("model"),
        lambda: lk.merge_adapters(None),
        lambda: lk.print_trainable_parameters([]),
        lambda: lk.save_adapter(3, "nowhere"),
        lambda: lk.load_adapter(3, "nowhere"),
        lambda: lk.explain("model"),
        lambda: lk.disable_adapters(3).__enter__(),
    ],
)
def test_what_is_not_a_model(call):
    with pytest.raises(TypeError, match="model: expected a torch.nn.Module"):
        call()


@pytest.mark.parametrize("change", [lambda model: lk.apply_lora(model, r=2, target_modules="all-linear"), lambda model: lk.apply_multi_lora(model, num_adapters=2), lambda model: lk.AdapterPool(model, 8)])
def test_a_model_whose_shapes_are_not_known_yet(change):
    model = nn.Sequential(nn.Linear(8, 6), nn.LazyLinear(4))
    modules = list(model)
    with pytest.raises(ValueError, match="model: 1.weight has no shape yet"):
        change(model)
    assert list(model) == modules and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("call", [lk.merge_adapters, lambda m: lk.save_adapter(m, "nowhere"), lambda m: lk.disable_adapters(m).__enter__()])
def test_model_without_adapters(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="it has no layer with an adapter; apply_lora"):
        call(nn.Linear(2, 2))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "positional, keywords, error, words",
    [
        ((0, 4), {}, ValueError, "in_features: expected an int of at least 1, got 0"),
        ((4, -2), {}, ValueError, "out_features: expected an int of at least 1, got -2"),
        ((4.0, 4), {}, TypeError, "in_features: expected an int of at least 1, got 4.0"),
        ((4, None), {}, TypeError, "out_features: expected an int of at least 1, got None"),
        ((4, 4), dict(dtype=torch.int8), TypeError, "dtype: expected a floating-point dtype, got torch.int8"),
        ((4, 4), dict(dtype="bf16"), TypeError, "dtype: expected a floating-point dtype, got bf16"),
        ((4, 4, torch.ones(2)), {}, TypeError, "bias: expected a bool, got a Tensor"),
        ((4, 10**400), {}, ValueError, "out_features: expected an int of at most"),
    ],
)
def test_layer_sizes_and_dtype(positional, keywords, error, words):
    with pytest.raises(error) as caught:
        LoraLinear(*positional, **keywords)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: LoraLinear(4, 4).to_linear("bf16"), "dtype: expected a floating-point dtype, got bf16"),
        (lambda: lk.QLoraLinear(4, 4).to_linear(torch.int8), "dtype: expected a floating-point dtype, got torch.int8"),
        (lambda: lk.NF4Linear(4, 4).weight.dequantize(torch.ones(2)), "dtype: expected a floating-point dtype, got tensor"),
        (lambda: lk.NF4Linear(4, 4, None), "bias: expected a bool, got a NoneType"),
        (lambda: LoraLinear(4, 4).merge(torch.ones(2)), "keep_base: expected a bool, got a Tensor"),
        (lambda: lora_linear(torch.ones(1, 4), torch.ones(4, 4), torch.ones(1, 4), torch.ones(4, 1), training=torch.ones(2)), "training: expected a bool, got a Tensor"),
        (lambda: lk.MultiLoraLinear(nn.Linear(4, 4), num_adapters=1, max_rank=1)(None, torch.zeros(1, dtype=torch.int64)), "x: expected a Tensor, got a NoneType"),
    ],
)
def test_flags_and_dtypes(call, words):
    with pytest.raises(TypeError) as caught:
        call()
    assert words in str(caught.value)


@pytest.mark.parametrize("call", [lk.save_adapter, lk.load_adapter])
@pytest.mark.parametrize("directory", [3, None, ["a"]])
def test_directory_is_a_path(call, directory):
    with pytest.raises(TypeError, match="directory: expected a path, got a"):
        call(nn.Sequential(LoraLinear(4, 4)), directory)


def test_from_linear_takes_only_plain_linears():
    for other in (nn.Conv1d(1, 1, 1), LoraLinear(4, 4), "linear", nn.modules.linear.NonDynamicallyQuantizableLinear(4, 4)):
        with pytest.raises(TypeError, match=f"linear: expected a torch.nn.Linear, got a {type(other).__name__}"):
            LoraLinear.from_linear(other)


def test_pissa_on_meta():
    with pytest.raises(ValueError, match="init_lora_weights: 'pissa' decomposes the weight, which is on the meta device"):
        LoraLinear.from_linear(nn.Linear(4, 4, device="meta"), r=2, init_lora_weights="pissa")


@pytest.mark.parametrize("tokens", [-1, 2.5, "8", True])
def test_explain_tokens(tokens):
    with pytest.raises(ValueError, match="tokens: expected a number of rows"):
        lk.explain(LoraLinear(4, 4), tokens=tokens)


def test_explain_of_a_model_without_adapters():
    with pytest.raises(ValueError, match="found none"):
        lk.explain(nn.Linear(2, 2))
