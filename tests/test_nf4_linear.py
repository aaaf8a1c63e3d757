"""Products with an NF4 weight, forward and backward, under the error rule; the layers over it; whole models."""

import copy
import itertools
import logging
import pickle
from dataclasses import replace

import oracle
import pytest
import torch
from numerics import check
from oracle import make_case
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import lorakernels as lk
from lorakernels import backends, dropout, nf4, ops
from lorakernels.backends import nf4_path
from lorakernels.functional import lora_linear, nf4_linear, quantize_nf4

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
MIXES = [(F32, F32), (BF16, F32), (BF16, BF16), (F16, F32), (F16, F16)]
IDS = ["float32", "bf16+float32", "bf16", "fp16+float32", "fp16"]


def pack(case, blocksize=64, nested=True):
    """(weight in NF4, the case with code * absmax as float32, the case with that rounded to the base's dtype)."""
    weight = quantize_nf4(case.W, blocksize, nested)
    return weight, replace(case, W=weight.dequantize(F32)), replace(case, W=weight.dequantize(case.W.dtype))


def hold(case, blocksize=64, nested=True, autocast=None, label=""):
    """lora_linear on the packed weight: exact is code * absmax in float64, eager multiplies the rounded dense weight."""
    weight, exact_case, eager_case = pack(case, blocksize, nested)
    leaves = {name: t.detach().clone().requires_grad_() for name, t in case.tensors().items() if name != "W"}
    with torch.autocast(case.x.device.type, dtype=autocast, enabled=autocast is not None):
        y = lora_linear(
            leaves["x"], weight, leaves["A"], leaves["B"], case.scaling, leaves.get("bias"), dropout_p=case.p, lora_bias=leaves.get("lora_bias")
        )  # fmt: skip
    y.backward(case.dy.to(y.dtype))
    exact, eager = oracle.in_float64(exact_case), oracle.peft_eager(eager_case, autocast)
    base, K = autocast or case.W.dtype, max(case.W.shape)
    for name, out in ({"y": y.detach()} | {name: leaf.grad for name, leaf in leaves.items()}).items():
        check(f"NF4 {label}{'y' if name == 'y' else 'd' + name}", out, exact[name], eager[name], base=base, K=K)
        assert out.dtype == eager[name].dtype and out.is_contiguous()


@pytest.mark.parametrize("base, adapter", MIXES, ids=IDS)
@pytest.mark.parametrize("N, K", [(1, 64), (48, 96), (64, 128), (70, 33), (3, 7)])
def test_shapes_and_dtypes(backend, device, base, adapter, N, K):
    for M, (blocksize, nested) in zip((1, 2, 5, 17), itertools.product((64, 256), (True, False))):
        hold(make_case(M, K, N, 3, base, adapter, device=device, bias=True, lora_bias=True), blocksize, nested, label=f"M={M} ")


@pytest.mark.parametrize("base", [F32, BF16])
@pytest.mark.parametrize("M", [0, 1, 2, 3, 4, 5, 9, 10, 12, 13, 16, 17, 20, 21, 33, 127, 128, 129, 384, 385, 600])
def test_rows_across_every_switch_of_kernel(backend, device, base, M):
    size = (128, 80) if M < 100 else (33, 24)  # the interpreter runs every program
    hold(make_case(M, *size, 4, base, F32, device=device, bias=True))


def test_every_switch_is_among_those_rows():
    assert (nf4_path.TILED_ROWS, nf4_path.PAIRED_ROWS, nf4_path.AVX2_ROWS, nf4_path.FEW_ROWS, nf4_path.AVX512_ROWS, nf4_path.FUSED_ROWS, nf4_path.SINGLES_ROWS) == (2, 9, 12, 16, 20, 128, 384)


@pytest.mark.parametrize("base", [F32, BF16])
@pytest.mark.parametrize("N, K, blocksize", [(19, 4160, 64), (3, 16576, 256), (5, 4112, 32), (90, 192, 64)])
def test_long_rows_on_the_processor(base, N, K, blocksize):
    """Rows of W whose last piece is not whole, for a row of x alone, a group, and more; scales of scales that change within a step."""
    if why := backends.why_not("cpu", "cpu", base):
        pytest.skip(why)
    with backends.use_backend("cpu"):
        for M in (1, 4, 7):
            hold(make_case(M, K, N, 3, base, F32, bias=True, lora_bias=True), blocksize, label="long ")
        rows = min(7, nf4_path.few_rows(backends.load("cpu").module().isa(), base, K))
        weight, x = quantize_nf4(torch.randn(N, K), blocksize), torch.randn(rows, K).to(base)
        assert torch.equal(nf4_linear(x, weight), torch.cat([nf4_linear(row, weight) for row in x.split(1)]))


@pytest.mark.parametrize("base, adapter", MIXES, ids=IDS)
@pytest.mark.parametrize(
    "M, K, N, blocksize, nested",
    [(17, 64, 1, 64, True), (20, 192, 33, 32, False), (21, 320, 70, 64, False), (100, 96, 257, 128, True), (17, 100, 40, 32, True), (128, 1088, 31, 4096, True),
     (258, 64, 66, 64, True), (520, 128, 34, 64, True), (20, 64, 2089, 64, True), (20, 2113, 9, 64, False), (19, 2176, 301, 64, True),
     (100, 45120, 3, 64, True), (32, 832, 97, 128, False), (50, 704, 70, 64, True), (300, 2176, 70, 64, True)],
)  # fmt: skip
def test_tiles_that_are_decoded_on_their_way_on_the_processor(base, adapter, M, K, N, blocksize, nested):
    """Rows, columns and depth that end within a tile, a group, a block or a word of codes; more rows than are taken at a time; wide layers; long ones;
    sums that stay in registers, and columns or the depth first."""
    if why := backends.why_not("cpu", "cpu", base):
        pytest.skip(why)
    with backends.use_backend("cpu"):
        hold(make_case(M, K, N, 3, base, adapter, bias=True, lora_bias=True), blocksize, nested, label="tiles ")


@pytest.mark.parametrize("base", [F32, BF16])
def test_tiles_of_rows_anywhere_in_memory_on_the_processor(base):
    """A row's bits depend neither on the others, nor on where and how x lies, nor on the threads."""
    if why := backends.why_not("cpu", "cpu", base):
        pytest.skip(why)
    if backends.load("cpu").module().isa() == "portable":
        pytest.skip("where there are no vectors torch multiplies more than a few rows")
    with backends.use_backend("cpu"):
        weight, x = quantize_nf4(torch.randn(150, 192)), torch.randn(25, 192).to(base)
        dense = torch.randn(25, 150).to(base)
        product = lambda x, turned: ops.nf4_linear_lowrank(x, weight.packed, weight.absmax, weight.nested, *weight.format, turned, None, None, 1.0, None, None, None, 0.0)  # noqa: E731
        for rows, turned in ((x, False), (dense, True)):
            whole, threads = product(rows, turned), torch.get_num_threads()
            strided = torch.empty(rows.shape[1], 60, dtype=base).t()[3:53:2].copy_(rows)
            assert torch.equal(product(strided, turned), whole) and torch.equal(product(rows[:1].expand(25, -1), turned), whole[:1].expand(25, -1))
            many = 12 if base == F32 else 30 if turned else 6  # of more rows torch may be faster
            assert torch.equal(product(rows[:22], turned), whole[:22]) and torch.equal(product(rows.repeat(many, 1), turned), whole.repeat(many, 1))
            try:
                torch.set_num_threads(1 + threads % 2)
                assert torch.equal(product(rows, turned), whole)
            finally:
                torch.set_num_threads(threads)


@pytest.mark.parametrize("base", [F32, BF16])
def test_a_weight_of_many_slabs(backend, device, base, monkeypatch):
    """More columns than a slab has: each element of y and dx still is of one product."""
    module = backends.load(backend)
    weight, _, _ = pack(make_case(20, 136, 200, 3, base, F32, device=device))
    x, dy = (torch.randn(20, size, device=device).to(base) for size in (136, 200))

    def run():
        leaf = x.clone().requires_grad_()
        y = nf4_linear(leaf, weight)
        y.backward(dy)
        return y.detach(), leaf.grad

    whole = run()
    monkeypatch.setattr(module, "SLAB", 1)  # the smallest: 64 columns
    for name, cut, one, exact in zip(("y", "dx"), run(), whole, (x.double() @ weight.dequantize(F32).double().t(), dy.double() @ weight.dequantize(F32).double())):
        check(f"slabs {name}", cut, exact, one, base=base, K=200)
    hold(make_case(20, 136, 200, 3, base, F32, device=device, bias=True, lora_bias=True))


@pytest.mark.parametrize("base, adapter", MIXES, ids=IDS)
def test_dropout(backend, device, base, adapter):
    case = make_case(21, 72, 40, 4, base, adapter, device=device, bias=True, p=0.3)
    torch.manual_seed(5)
    case.mask = dropout.keep_mask(dropout.draw_seed(device), 21, 72, 0.3)
    torch.manual_seed(5)
    hold(case)


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_autocast(backend, device, dtype):
    hold(make_case(9, 64, 48, 4, F32, F32, device=device, bias=True, lora_bias=True), autocast=dtype)


@pytest.mark.parametrize("M", [3, 20])
def test_layouts(backend, device, M):
    K, N = 72, 40
    big = torch.randn(2 * M, 2 * K, device=device)
    weight, exact_case, _ = pack(make_case(M, K, N, 2, F32, F32, device=device))
    W = exact_case.W
    bias = torch.randn(2 * N, device=device)[::2]
    for x in (big[::2, ::2], big[:M, :K], torch.randn(K, M, device=device).t(), torch.randn(1, K, device=device).expand(M, K), torch.randn(M * K + 1, device=device)[1:].view(M, K), torch._neg_view(big[:M, 1 : K + 1])):
        check("layout y", nf4_linear(x, weight, bias), x.double() @ W.double().t() + bias.double(), x @ W.t() + bias, base=F32, K=K)
    for dy in (torch.randn(1, 1, device=device).expand(M, N), torch.randn(N, M, device=device).t(), torch.randn(2 * M, 2 * N, device=device)[::2, ::2]):
        x = torch.randn(M, K, device=device, requires_grad=True)
        nf4_linear(x, weight).backward(dy)
        check("layout dx", x.grad, dy.double() @ W.double(), dy @ W, base=F32, K=N)


def test_leading_dimensions(backend, device):
    weight = quantize_nf4(torch.randn(24, 64, device=device))
    x = torch.randn(2, 3, 64, device=device)
    assert nf4_linear(x, weight).shape == (2, 3, 24) and nf4_linear(x[0, 0], weight).shape == (24,)
    assert torch.equal(nf4_linear(x, weight).view(6, 24), nf4_linear(x.view(6, 64), weight))


def test_bits_do_not_depend_on_repeats_threads_or_rows_beside(backend, device):
    weight = quantize_nf4(torch.randn(130, 200, device=device))
    x = torch.randn(8, 200, device=device)
    first = nf4_linear(x, weight)
    assert all(torch.equal(nf4_linear(x, weight), first) for _ in range(3))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(nf4_linear(x, weight), first) or backend != "cpu"
    finally:
        torch.set_num_threads(before)
    if backend == "cpu":  # few rows: each is summed in an order of its own
        assert all(torch.equal(nf4_linear(x[m : m + 1], weight), first[m : m + 1]) for m in range(8))


def test_forward_and_backward_use_the_same_weight(backend, device):
    """Columns of W from the forward of unit rows, rows of W from the backward of unit gradients."""
    weight = quantize_nf4(torch.randn(40, 96, device=device).bfloat16())
    x = torch.eye(96, device=device).bfloat16().requires_grad_()
    y = nf4_linear(x, weight)
    (dx,) = torch.autograd.grad(y, x, torch.eye(96, 40, device=device).bfloat16())
    exact = weight.dequantize(F32)
    check("W by forward", y.detach().t(), exact.double(), exact.bfloat16(), base=BF16, K=96)
    check("W by backward", dx[:40], exact.double(), exact.bfloat16(), base=BF16, K=96)
    assert torch.equal(y.detach().t(), dx[:40])


def test_no_dense_weight_is_kept_for_backward(backend, device):
    weight = quantize_nf4(torch.randn(256, 256, device=device))
    x = torch.randn(4, 256, device=device, requires_grad=True)
    A, B = (torch.randn(*shape, device=device, requires_grad=True) for shape in ((4, 256), (256, 4)))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        lora_linear(x, weight, A, B)
    sizes = {t.data_ptr(): t.numel() * t.element_size() for t in kept}
    own = sum(t.numel() * t.element_size() for t in (x, A, B, weight.packed, weight.absmax, weight.nested))
    assert sum(sizes.values()) == own + 4 * 4 * 4  # u beside


# -- errors ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [lk.NF4Linear(8, 8), lk.QLoraLinear(8, 8)], ids=["NF4Linear", "QLoraLinear"])
def test_a_layer_refuses_what_is_no_tensor(layer):
    with pytest.raises(TypeError, match="x: expected a Tensor, got a list"):
        layer([1.0] * 8)


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        (lambda w: (torch.randn(3, 65), w), ValueError, "weight: expected shape (N, K=65), got (48, 64)"),
        (lambda w: (torch.randn(3, 64), torch.randn(48, 64)), TypeError, "weight: expected an NF4Tensor, got a Tensor"),
        (lambda w: (torch.randn(3, 64, device="meta"), w), ValueError, "weight: expected device meta, as x is, got cpu"),
        (lambda w: (torch.ones(3, 64, dtype=torch.int32), w), TypeError, "x: expected a floating-point dtype"),
        (lambda w: (torch.tensor(1.0), w), ValueError, "x: expected shape (..., K)"),
        (lambda w: (torch.randn(3, 64), w, torch.randn(47)), ValueError, "bias: expected shape (N=48), got (47,)"),
        (lambda w: (torch.randn(3, 64), w, torch.randn(48).bfloat16()), TypeError, "bias: expected float32 (x's dtype), got bfloat16"),
    ],
)
def test_arguments(arguments, error, words):
    with pytest.raises(error) as caught:
        nf4_linear(*arguments(quantize_nf4(torch.randn(48, 64))))
    assert words in str(caught.value)


def test_arguments_of_lora_linear_on_nf4():
    weight, x = quantize_nf4(torch.randn(48, 64)), torch.randn(3, 64)
    for A, B, words in ((torch.randn(2, 63), torch.randn(48, 2), "lora_A: expected shape"), (torch.randn(2, 64), torch.randn(47, 2), "lora_B: expected shape (N=48")):
        with pytest.raises(ValueError) as caught:
            lora_linear(x, weight, A, B)
        assert words in str(caught.value)
    with pytest.raises(RuntimeError, match="create_graph=True"):
        leaf = x.clone().requires_grad_()
        torch.autograd.grad(nf4_linear(leaf, weight).sum(), leaf, create_graph=True)


# -- the layers ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [lk.NF4Linear, lk.QLoraLinear])
def test_from_linear_shares_the_bias_and_leaves_the_linear_alone(kind):
    linear = nn.Linear(64, 48).eval()
    before = linear.weight.clone()
    layer = kind.from_linear(linear)
    assert layer.bias is linear.bias and not layer.bias.requires_grad and not layer.training
    assert torch.equal(linear.weight, before) and linear.weight.requires_grad
    assert layer.weight.shape == (48, 64) and layer.weight.dtype == F32
    assert isinstance(layer, nn.Module) and not isinstance(layer, nn.Linear)
    with torch.no_grad():
        assert torch.equal(layer(torch.ones(2, 64)), nf4_linear(torch.ones(2, 64), layer.weight, layer.bias))  # B starts at zero


@pytest.mark.parametrize("make", [lambda: lk.NF4Linear.from_linear(nn.Identity()), lambda: lk.QLoraLinear.from_bnb(nn.Linear(4, 4)), lambda: lk.NF4Linear.from_nf4(torch.ones(2, 2))])
def test_take_over_of_what_is_not_theirs(make):
    with pytest.raises(TypeError, match="expected a"):
        make()


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_inits_that_move_weight_are_refused(init):
    with pytest.raises(ValueError, match="init_lora_weights: '" + init):
        lk.QLoraLinear(8, 8, init_lora_weights=init)
    model = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(ValueError, match="init_lora_weights: '" + init):
        lk.apply_lora(model, quantize="nf4", init_lora_weights=init)
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize("cast", [lambda m: m.bfloat16(), lambda m: m.half(), lambda m: m.double().float(), lambda m: m.to(torch.bfloat16)])
def test_casting_a_model_leaves_codes_and_scales_alone(cast):
    for nested in (True, False):
        layer = lk.QLoraLinear(64, 48, double_quant=nested, dtype=BF16, r=2)
        before = layer.weight.dequantize(F32)
        cast(layer)
        assert torch.equal(layer.weight.dequantize(F32), before)
        layer(torch.randn(2, 64).to(layer.bias.dtype))


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "state_dict"])
def test_copies(how):
    layer = lk.QLoraLinear(64, 48, r=3, init_lora_weights=False, dtype=BF16)
    if how == "deepcopy":
        other = copy.deepcopy(layer)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(layer))
    else:
        other = lk.QLoraLinear(64, 48, r=3, dtype=F16, double_quant=False, blocksize=128)  # all of that is the checkpoint's to say
        other.bias.data = other.bias.data.bfloat16()
        other.load_state_dict(layer.state_dict())
    x = torch.randn(2, 64).bfloat16()
    assert torch.equal(other(x), layer(x)) and other.weight.dtype == BF16
    assert all(getattr(other, name).data_ptr() != getattr(layer, name).data_ptr() for name in ("packed", "absmax", "nested", "lora_A"))


def test_meta_then_loaded():
    with torch.device("meta"):
        layer = lk.QLoraLinear(64, 48, r=3, bias=False)
    assert layer.packed.is_meta and layer.lora_A.is_meta
    source = lk.QLoraLinear(64, 48, r=3, bias=False, init_lora_weights=False)
    layer.load_state_dict(source.state_dict(), assign=True)
    x = torch.randn(2, 64)
    assert torch.equal(layer(x), source(x))


def test_to_linear_and_merge(backend, device):
    layer = lk.QLoraLinear(64, 48, r=3, init_lora_weights=False, lora_bias=True, device=device).eval()
    nn.init.normal_(layer.lora_bias)
    x = torch.randn(5, 64, device=device)
    dense = layer.to_linear()
    exact = x.double() @ (layer.weight.dequantize(F32).double() + layer.scaling * layer.lora_B.double() @ layer.lora_A.double()).t()
    exact += layer.bias.double() + layer.scaling * layer.lora_bias.double()
    with torch.no_grad():
        check("to_linear", dense(x), exact, layer(x), base=F32, K=64)
    with pytest.raises(RuntimeError, match="to_linear.. gives a dense layer"):
        layer.merge()


def test_repr_and_explain():
    layer = lk.QLoraLinear(64, 48, r=3, lora_alpha=6)
    assert "in_features=64, out_features=48, bias=True, blocksize=64, double_quant=True, r=3, lora_alpha=6" in repr(layer)
    text = lk.explain(layer)
    assert "1 QLoraLinear on cpu" in text and "nf4_linear_lowrank: cpu" in text
    assert "8 rows by 64->48: forward few, dx " in lk.explain(layer, tokens=8) and "forward few" not in lk.explain(layer, tokens=21)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_compile_has_no_break_and_changes_nothing(compiler, dtype):
    torch._dynamo.reset()
    model = nn.Sequential(lk.QLoraLinear(24, 20, r=3, init_lora_weights=False, dtype=dtype), lk.NF4Linear(20, 16, dtype=dtype))
    compiled = torch.compile(model, fullgraph=True, backend=compiler)
    x = torch.randn(3, 24).to(dtype)
    results = []
    for call in (model, compiled):
        model.zero_grad()
        leaf = x.clone().requires_grad_()
        y = call(leaf)
        y.float().square().sum().backward()
        results.append([y.detach(), leaf.grad, model[0].lora_A.grad.clone(), model[0].lora_B.grad.clone()])
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_opcheck(backend, device):
    weight = quantize_nf4(torch.randn(20, 24, device=device))
    pieces = (*weight[:3], *weight.format)
    u, v, x = (torch.randn(*shape, device=device) for shape in ((5, 3), (20, 3), (5, 24)))
    torch.library.opcheck(torch.ops.lorakernels.nf4_linear_lowrank.default, (x, *pieces, False, u, v, 0.5, torch.randn(20, device=device), None, None, 0.0))
    torch.library.opcheck(torch.ops.lorakernels.nf4_linear_lowrank.default, (torch.randn(5, 20, device=device), *pieces, True, None, None, 1.0, None, None, None, 0.0))
    torch.library.opcheck(torch.ops.lorakernels.dequantize_nf4.default, (*pieces, 2, 3, 10, 11, BF16))
    torch.library.opcheck(torch.ops.lorakernels.quantize_nf4.default, (torch.randn(20, 24, device=device), 64))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_draws_the_same_mask(reentrant):
    layer = lk.QLoraLinear(64, 48, r=3, lora_dropout=0.5, init_lora_weights=False)
    x = torch.randn(6, 64, requires_grad=True)
    results = []
    for call in (layer, lambda x: checkpoint(layer, x, use_reentrant=reentrant)):
        layer.zero_grad()
        torch.manual_seed(3)
        y = call(x)
        y.square().sum().backward()
        results.append((y.detach(), layer.lora_A.grad.clone(), layer.lora_B.grad.clone()))
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_flops_are_a_dense_layers():
    counts = []
    for layer in (nn.Linear(64, 48), lk.NF4Linear(64, 48)):
        with FlopCounterMode(display=False) as counter:
            layer(torch.randn(5, 64))
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]


# -- whole models ------------------------------------------------------------------------------------------------------------


def small_model():
    return nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 33), nn.ReLU(), nn.Linear(33, 8))


def test_apply_lora_quantises_saves_and_loads(tmp_path, caplog):
    model = small_model()
    other = copy.deepcopy(model)
    with caplog.at_level(logging.INFO, logger="lorakernels"):
        report = lk.apply_lora(model, r=4, target_modules=["0", "2"], quantize="nf4", init_lora_weights=False)
    assert report.replaced == ["0", "2"] and "2 modules replaced" in caplog.text
    assert [type(model[i]).__name__ for i in (0, 2, 4)] == ["QLoraLinear", "QLoraLinear", "Linear"]
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {f"{i}.lora_{x}" for i in (0, 2) for x in "AB"}
    x = torch.randn(3, 64)
    lk.save_adapter(model, tmp_path)
    for i in (0, 2):
        other[i] = lk.NF4Linear.from_linear(other[i])
    assert lk.load_adapter(other, tmp_path) == ["0", "2"]
    assert torch.equal(other(x), model(x))
    with lk.disable_adapters(model):
        base = model(x)
    assert torch.equal(base, model[4](torch.relu(nf4_linear(torch.relu(nf4_linear(x, model[0].weight, model[0].bias)), model[2].weight, model[2].bias))))
    with pytest.raises(RuntimeError, match="cannot hold"):
        lk.merge_adapters(model)


def test_a_bitsandbytes_model_is_taken_over_without_bitsandbytes():
    """A stand-in with the class's name and attributes: what from_bnb reads."""

    class State:
        pass

    class Linear4bit(nn.Linear):
        pass

    model, want = small_model(), small_model()
    want.load_state_dict(model.state_dict())
    for i in (0, 2):
        weight = quantize_nf4(model[i].weight.detach())
        stored = weight.state_dict()
        linear = Linear4bit(model[i].in_features, model[i].out_features)
        linear.weight, linear.bias = nn.Parameter(stored["weight"], requires_grad=False), model[i].bias
        state, second = State(), State()
        state.absmax, state.shape, state.code, state.dtype, state.blocksize, state.quant_type = stored["weight.absmax"], weight.shape, stored["weight.quant_map"], F32, 64, "nf4"
        second.absmax, second.code, second.blocksize = stored["weight.nested_absmax"], stored["weight.nested_quant_map"], 256
        state.offset, state.state2 = nf4.floats_of(weight.nested)[0], second
        linear.weight.quant_state = state
        model[i] = linear
    model.is_quantized, model.is_loaded_in_4bit, model.hf_quantizer, model.quantization_method = True, True, object(), "bitsandbytes"
    report = lk.apply_lora(model, r=4, target_modules=["0", "2"])
    assert len(report.replaced) == 2 and isinstance(model[0], lk.QLoraLinear)
    assert not model.is_quantized and not model.is_loaded_in_4bit and not hasattr(model, "hf_quantizer") and not hasattr(model, "quantization_method")
    lk.apply_lora(want, r=4, target_modules=["0", "2"], quantize="nf4")
    x = torch.randn(3, 64)
    assert torch.equal(model(x), want(x))
    assert all(torch.equal(a, b) for a, b in zip(model[0].weight[:4], want[0].weight[:4]))


def test_parameters_are_counted_as_elements(capsys):
    model, dense = small_model(), small_model()
    lk.apply_lora(dense, r=4)
    lk.apply_lora(model, r=4, quantize="nf4")
    lk.print_trainable_parameters(model)
    lk.print_trainable_parameters(dense)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == lines[1]


def test_training_moves_the_adapter_and_nothing_else():
    model = small_model()
    lk.apply_lora(model, r=4, quantize="nf4")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    x, target = torch.randn(32, 64), torch.randn(32, 8)
    losses = []
    for _ in range(30):
        loss = (model(x) - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if not p.requires_grad)
