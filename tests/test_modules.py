"""LoraLinear: parameters, initialisation, merging, state_dict, copies."""

import copy
import io
import math
import pickle

import pytest
import torch
from numerics import check
from torch import nn

import lorakernels as lk
from lorakernels.modules import LoraLinear

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def trained(layer):
    """The layer with an adapter that does something."""
    with torch.no_grad():
        for parameter in layer.adapter_parameters():
            parameter.normal_(std=0.2)
    return layer


@pytest.mark.parametrize("dtype, adapter", [(F32, F32), (BF16, F32), (F16, F32)])
def test_parameters(dtype, adapter):
    layer = LoraLinear(12, 7, r=3, lora_bias=True, dtype=dtype)
    assert isinstance(layer, nn.Linear)
    assert {n: (tuple(p.shape), p.dtype, p.requires_grad) for n, p in layer.named_parameters()} == {
        "weight": ((7, 12), dtype, False),
        "bias": ((7,), dtype, False),
        "lora_A": ((3, 12), adapter, True),
        "lora_B": ((7, 3), adapter, True),
        "lora_bias": ((7,), adapter, True),
    }
    assert LoraLinear(4, 4, dtype=BF16, adapter_dtype=BF16).lora_A.dtype == BF16
    assert LoraLinear(4, 4, bias=False).bias is None


def test_scaling():
    assert LoraLinear(4, 4, r=4, lora_alpha=6).scaling == 1.5
    assert LoraLinear(4, 4, r=4, lora_alpha=6, use_rslora=True).scaling == 3.0


def test_starts_as_the_base():
    linear, x = nn.Linear(16, 9), torch.randn(5, 16)
    for init in (True, "gaussian"):
        layer = LoraLinear.from_linear(linear, r=4, init_lora_weights=init)
        assert torch.equal(layer(x), linear(x))
        assert layer.lora_A.any() and not layer.lora_B.any()
    assert LoraLinear.from_linear(linear, r=4, init_lora_weights=False).lora_B.any()


def test_initial_distributions_are_pefts():
    A = LoraLinear(4096, 8, r=64).lora_A
    assert A.abs().max() <= 1 / math.sqrt(4096) < A.abs().max() * 1.01  # kaiming_uniform(a=sqrt 5): bound 1/sqrt(K)
    A = LoraLinear(4096, 8, r=64, init_lora_weights="gaussian").lora_A
    assert abs(A.std().item() * 64 - 1) < 0.01


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("bias", [True, False])
def test_decomposing_inits_keep_the_function_and_match_peft(init, dtype, bias):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    linear, x = nn.Linear(24, 16, bias=bias, dtype=dtype), torch.randn(5, 24).to(dtype)
    before = linear.weight.detach().clone()
    layer = LoraLinear.from_linear(linear, r=4, lora_alpha=8, init_lora_weights=init)
    assert torch.equal(linear.weight, before)  # whoever holds the linear keeps its weight
    theirs = peft.get_peft_model(nn.Sequential(copy.deepcopy(linear)), peft.LoraConfig(r=4, lora_alpha=8, target_modules=["0"], init_lora_weights=init))
    exact = nn.functional.linear(x.double(), before.double(), None if linear.bias is None else linear.bias.double())
    check(f"y with {init}", layer(x), exact, theirs(x), base=dtype, K=24)
    peft_layer = theirs.base_model.model[0]
    if init == "pissa":
        U, S, Vh = torch.linalg.svd(before.double(), full_matrices=False)
        taken = (U[:, :4] * S[:4]) @ Vh[:4]
    else:
        Q, upper = torch.linalg.qr(before.double())
        taken = layer.scaling * (Q[:, :4] @ upper[:4])
    theirs_taken = layer.scaling * (peft_layer.lora_B.default.weight @ peft_layer.lora_A.default.weight)
    ours_taken = layer.scaling * (layer.lora_B @ layer.lora_A)
    check(f"BA of {init}", ours_taken.detach(), taken, theirs_taken.detach(), base=dtype, K=24)
    check(f"W of {init}", layer.weight.detach(), before.double() - taken, peft_layer.base_layer.weight.detach(), base=dtype, K=24)


def test_from_linear_shares_and_freezes_and_brings_hooks():
    linear, calls = nn.Linear(8, 8).eval(), []
    linear.register_forward_hook(lambda *_: calls.append("after"))
    linear.register_forward_pre_hook(lambda *_, **__: calls.append("before"), with_kwargs=True)
    layer = LoraLinear.from_linear(linear, r=2)
    assert layer.weight is linear.weight and layer.bias is linear.bias
    assert not layer.weight.requires_grad and not layer.bias.requires_grad and not layer.training
    linear.register_full_backward_hook(lambda *_: calls.append("gradient"))
    layer = LoraLinear.from_linear(linear, r=2)
    layer(torch.randn(2, 8)).sum().backward()
    assert calls == ["before", "after", "gradient"]


def test_from_linear_on_meta_then_loaded():
    with torch.device("meta"):
        layer = LoraLinear.from_linear(nn.Linear(8, 6), r=2)
    assert layer.lora_A.is_meta and layer(torch.empty(3, 8, device="meta")).shape == (3, 6)
    source = trained(LoraLinear(8, 6, r=2))
    layer = layer.to_empty(device="cpu")
    layer.load_state_dict(source.state_dict())
    x = torch.randn(3, 8)
    assert torch.equal(layer(x), source(x))


# -- merging -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("bias, lora_bias", [(True, True), (False, True), (True, False), (False, False)])
def test_merge_is_rounded_once_and_unmerge_is_exact(dtype, bias, lora_bias):
    layer = trained(LoraLinear(40, 24, bias, r=3, lora_alpha=5, lora_bias=lora_bias, dtype=dtype)).eval()
    weight, old_bias = layer.weight, layer.bias
    exact = weight.double() + layer.scaling * (layer.lora_B.double() @ layer.lora_A.double())
    in_float32 = (weight.float() + layer.scaling * (layer.lora_B @ layer.lora_A)).to(dtype)
    x = torch.randn(5, 40).to(dtype)
    y = layer(x).detach()
    layer.merge()
    assert layer.merged
    check("merged W", layer.weight.detach(), exact.detach(), in_float32.detach(), base=dtype, K=40)
    merged = nn.functional.linear(x.double(), layer.weight.double(), None if layer.bias is None else layer.bias.double())
    check("y of the merged layer", layer(x).detach(), merged.detach(), y, base=dtype, K=40)
    layer.unmerge()
    assert layer.weight is weight and layer.bias is old_bias
    assert torch.equal(layer(x), y)


def test_merge_twice_and_unmerge_twice_raise():
    layer = LoraLinear(4, 4)
    layer.merge()
    with pytest.raises(RuntimeError, match="merge: the adapter is merged"):
        layer.merge()
    with pytest.raises(RuntimeError, match="reset_adapter: the adapter is merged"):
        layer.reset_adapter()
    layer.unmerge()
    with pytest.raises(RuntimeError, match="unmerge: the adapter is not merged"):
        layer.unmerge()


def test_merge_leaves_a_shared_weight_alone():
    a, b = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
    b.weight = a.weight
    before = a.weight.detach().clone()
    layer = trained(LoraLinear.from_linear(a, r=2))
    layer.merge(keep_base=False)
    assert torch.equal(b.weight, before) and not torch.equal(layer.weight, before)


def test_merge_without_keeping_the_base():
    layer, x = trained(LoraLinear(8, 8, r=2, lora_bias=True)), torch.randn(3, 8)
    y = layer(x)
    layer.merge(keep_base=False)
    merged = layer(x)
    with pytest.raises(RuntimeError, match="unmerge: the base was not kept"):
        layer.unmerge()
    fresh = LoraLinear(8, 8, r=2, lora_bias=True)
    fresh.load_state_dict(layer.state_dict())
    check("loaded from a merged layer", fresh(x).detach(), merged.double().detach(), y.detach(), base=F32, K=8)


def test_state_dict_of_a_merged_layer_is_unmerged():
    layer = trained(LoraLinear(8, 8, r=2, lora_bias=True, bias=False))
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    layer.merge()
    after = layer.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    with pytest.raises(RuntimeError, match="the layer is merged; unmerge"):
        layer.load_state_dict(before)


def test_moving_a_merged_layer_keeps_the_unmerge():
    layer = trained(LoraLinear(8, 8, r=2))
    layer.merge()
    layer = copy.deepcopy(layer).double()
    layer.unmerge()
    assert layer.weight.dtype == torch.float64 and isinstance(layer.weight, nn.Parameter)


@pytest.mark.parametrize("merged", [False, True])
def test_to_linear(merged):
    layer = trained(LoraLinear(16, 8, r=2, lora_bias=True, dtype=BF16)).eval()
    exact = (layer.weight.double() + layer.scaling * (layer.lora_B.double() @ layer.lora_A.double())).detach()
    if merged:
        layer.merge()
    linear = layer.to_linear()
    assert type(linear) is nn.Linear and linear.weight.dtype == BF16 and not linear.weight.requires_grad
    check("to_linear", linear.weight.detach(), exact, exact.bfloat16(), base=BF16, K=16)
    assert layer.to_linear(F32).weight.dtype == F32
    with torch.no_grad():
        linear.weight.zero_()
    assert layer.weight.any()


def test_to_linear_in_float32_is_not_rounded_to_the_base_first():
    layer = trained(LoraLinear(16, 8, r=2, dtype=BF16))
    exact = (layer.weight.double() + layer.scaling * (layer.lora_B.double() @ layer.lora_A.double())).detach()
    wide = layer.to_linear(F32).weight.detach()
    check("to_linear(float32)", wide, exact, exact.float(), base=F32, K=16)


# -- state_dict and copies -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [("lora_A.weight", "lora_B.weight", "lora_B.bias"), ("lora_A.default.weight", "lora_B.default.weight", "lora_B.default.bias")])
def test_loads_pefts_in_memory_names(names):
    source = trained(LoraLinear(8, 6, r=2, lora_bias=True))
    state = dict(zip(names, (source.lora_A, source.lora_B, source.lora_bias))) | {"base_layer.weight": source.weight, "base_layer.bias": source.bias}
    model = nn.ModuleDict({"q": LoraLinear(8, 6, r=2, lora_bias=True)})
    model.load_state_dict({f"q.{name}": value.detach() for name, value in state.items()})
    x = torch.randn(3, 8)
    assert torch.equal(model["q"](x), source(x))


def test_two_adapters_in_one_state_dict_are_refused():
    layer = LoraLinear(8, 6, r=2)
    state = layer.state_dict() | {"lora_A.other.weight": torch.zeros(2, 8)}
    with pytest.raises(RuntimeError, match="lora_A.other.weight: a second value for lora_A"):
        layer.load_state_dict(state)


def test_wrong_rank_in_a_state_dict_is_named():
    with pytest.raises(RuntimeError, match="size mismatch for lora_A"):
        LoraLinear(8, 6, r=2).load_state_dict(LoraLinear(8, 6, r=3).state_dict())


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("merged", [False, True])
def test_copies(how, merged):
    layer = trained(LoraLinear(8, 6, r=2, lora_dropout=0.5, lora_bias=True, dtype=BF16)).eval()
    if merged:
        layer.merge()
    if how == "deepcopy":
        twin = copy.deepcopy(layer)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(layer))
    else:
        buffer = io.BytesIO()
        torch.save(layer, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    x = torch.randn(3, 8).to(BF16)
    assert torch.equal(twin(x), layer(x)) and repr(twin) == repr(layer)
    with torch.no_grad():
        twin.lora_A.zero_()
    assert layer.lora_A.any()
    if merged:
        twin.unmerge()
        assert layer.merged


def test_repr():
    layer = LoraLinear(8, 6, r=2, lora_alpha=4, lora_dropout=0.1, use_rslora=True)
    assert repr(layer) == "LoraLinear(in_features=8, out_features=6, bias=True, r=2, lora_alpha=4, lora_dropout=0.1, use_rslora=True)"


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_one_optimiser_step_moves_the_adapter_and_nothing_else(dtype):
    layer = LoraLinear(16, 8, r=2, dtype=dtype)
    frozen = [layer.weight.clone(), layer.bias.clone()]
    optimiser = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):  # B leaves zero in the first step; then A moves
        before = layer.lora_A.detach().clone(), layer.lora_B.detach().clone()
        layer(torch.randn(4, 16).to(dtype)).float().square().sum().backward()
        optimiser.step()
        optimiser.zero_grad()
    assert not torch.equal(before[0], layer.lora_A) and not torch.equal(before[1], layer.lora_B)
    assert torch.equal(frozen[0], layer.weight) and torch.equal(frozen[1], layer.bias)


def test_trainable_weight_and_bias_get_gradients():
    layer = LoraLinear(8, 8, r=2).requires_grad_(True)
    layer(torch.randn(3, 8)).sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


def test_dropout_only_in_training():
    layer, x = trained(LoraLinear(32, 8, r=2, lora_dropout=0.5)), torch.randn(4, 32)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_explain_names_the_kernel():
    text = lk.explain(LoraLinear(8, 8, dtype=BF16), tokens=4)
    assert "4 tokens" in text
    for name in ("lowrank_down", "linear_lowrank", "lowrank_grad"):
        assert f"  {name}: " in text
    with lk.use_backend("reference"):
        assert "linear_lowrank: reference" in lk.explain(LoraLinear(8, 8))
    if lk.backends.available()["cpu"] == "ok":
        assert "linear_lowrank: cpu" in text


def test_explain_knows_every_layer():
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 8))
    pool = lk.AdapterPool(copy.deepcopy(model), 16, slots=2, max_rank=4)
    served = copy.deepcopy(model)
    lk.serve_adapters(served, pool)
    many = lk.MultiLoraLinear(lk.NF4Linear.from_linear(nn.Linear(64, 32)), num_adapters=2, max_rank=3)
    for module, words in (
        (served, ("2 PoolLinear on cpu", "8->6 max_rank=4, slots=2", "F.linear", "multi_lowrank_down: ", "multi_add_lowrank: ")),
        (many, ("1 MultiLoraLinear on cpu", "64->32 num_adapters=2, max_rank=3", "nf4_linear_lowrank: ", "5 rows by 64->32: forward few", "multi_lowrank_grad: ")),
    ):
        text = lk.explain(module, tokens=5)
        assert all(word in text for word in words), text
