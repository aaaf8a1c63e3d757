"""PyTorch's own machinery around the layer: compile, opcheck, autocast, checkpointing, FLOPs, meta, streams."""

import subprocess
import sys
from functools import partial

import oracle
import pytest
import torch
from numerics import check
from oracle import make_case
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import lorakernels as lk
from lorakernels import ops
from lorakernels.functional import lora_linear
from lorakernels.modules import LoraLinear

F32, BF16 = torch.float32, torch.bfloat16


def layer_and_input(dtype=F32, p=0.0, **keywords):
    layer = LoraLinear(24, 20, r=3, lora_dropout=p, lora_bias=True, init_lora_weights=False, dtype=dtype, **keywords)
    return layer, torch.randn(2, 5, 24).to(dtype).requires_grad_()


def gradients(layer, x, call):
    layer.zero_grad()
    x.grad = None
    y = call(x)
    y.float().square().sum().backward()
    return [y.detach(), x.grad.clone()] + [p.grad.clone() for p in layer.adapter_parameters()]


@pytest.mark.parametrize("compiler", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile_has_no_break_and_changes_nothing(backend, device, compiler, dtype, dynamic):
    torch._dynamo.reset()
    layer, x = layer_and_input(dtype, device=device)
    x = x.detach().to(device).requires_grad_()
    compiled = torch.compile(layer, fullgraph=True, backend=compiler, dynamic=dynamic)
    for a, b in zip(gradients(layer, x, compiled), gradients(layer, x, layer)):
        if compiler == "inductor":  # its own sum over dy, for the bias, runs in another order
            check("compiled", a, b.double(), b, base=dtype, K=24)
        else:
            assert torch.equal(a, b)
    with torch.no_grad():
        assert torch.equal(compiled(x), layer(x))


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_dropout_is_consistent_between_forward_and_backward(backend, device, compiler):
    """y = sum of the kept columns, dx = the kept columns: forward and backward drew the same mask."""
    torch._dynamo.reset()
    A, B, W = torch.ones(1, 40, device=device), torch.ones(1, 1, device=device), torch.zeros(1, 40, device=device)
    x = torch.ones(6, 40, device=device, requires_grad=True)

    @torch.compile(fullgraph=True, backend=compiler)
    def function(x):
        return lora_linear(x, W, A, B, dropout_p=0.5)

    y = function(x)
    y.sum().backward()
    assert torch.equal(x.grad.sum(1, keepdim=True), y.detach())
    assert len(x.grad.unique()) == 2
    with torch.no_grad():
        assert not torch.equal(function(x), y)


@pytest.mark.parametrize("where", ["inside", "outside"])
def test_compile_under_autocast(where):
    torch._dynamo.reset()
    layer, x = layer_and_input()

    def inside(x):
        with torch.autocast("cpu", dtype=BF16):
            return layer(x)

    if where == "inside":
        compiled = torch.compile(inside, fullgraph=True, backend="aot_eager")
    else:
        core = torch.compile(layer, fullgraph=True, backend="aot_eager")

        def compiled(x):
            with torch.autocast("cpu", dtype=BF16):
                return core(x)

    for a, b in zip(gradients(layer, x, compiled), gradients(layer, x, inside)):
        assert torch.equal(a, b)


@pytest.mark.parametrize("seeded", [False, True], ids=["plain", "dropout"])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_opcheck(backend, device, seeded, dtype):
    case = make_case(5, 16, 12, 3, dtype, F32, device=device, bias=True, lora_bias=True)
    seed, p = (torch.tensor([5], device=device), 0.25) if seeded else (None, 0.0)
    u = torch.randn(5, 3, device=device)
    calls = {
        "lowrank_down": (case.x, [case.A], seed, p),
        "linear_lowrank": (case.x, case.W, u, case.B, 0.5, case.bias, case.lora_bias, seed, p),
        "lowrank_grad": (case.dy, case.x, u, case.B, seed, p, 0.5, F32),
    }
    for name, arguments in calls.items():
        torch.library.opcheck(getattr(torch.ops.lorakernels, name).default, arguments)
    for some in ((None, None, case.B), (None, u, None), (case.x, None, case.B), (None, u, case.B)):
        torch.library.opcheck(torch.ops.lorakernels.lowrank_grad.default, (case.dy, *some, seed, p, 0.5, dtype))


@pytest.mark.parametrize("call", [ops.lowrank_down, torch.ops.lorakernels.lowrank_down])
@pytest.mark.parametrize("which", ["x", "A"])
def test_primitive_called_by_hand_on_what_needs_gradients_raises(backend, device, call, which):
    case = make_case(5, 16, 12, 3, F32, F32, device=device)
    getattr(case, which).requires_grad_()
    with pytest.raises(RuntimeError, match="lowrank_down does not support automatic differentiation"):
        call(case.x, [case.A], None, 0.0)


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_activation_checkpointing_draws_the_same_mask_again(backend, device, reentrant, p):
    first = LoraLinear(24, 24, r=3, lora_dropout=p, init_lora_weights=False, device=device)
    second = LoraLinear(24, 20, r=3, lora_dropout=p, init_lora_weights=False, device=device)
    block, results = nn.Sequential(first, nn.GELU(), second), []
    for wrap in (lambda x: block(x), lambda x: checkpoint(block, x, use_reentrant=reentrant)):
        torch.manual_seed(4)
        x = torch.randn(6, 24, device=device, requires_grad=True)
        block.zero_grad()
        wrap(x).square().sum().backward()
        results.append([x.grad] + [q.grad.clone() for q in block.parameters() if q.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_layer_used_twice_and_graph_kept():
    layer, x = layer_and_input(p=0.3)
    square = LoraLinear(24, 24, r=3, lora_dropout=0.3, init_lora_weights=False)
    y = layer(square(square(x)))
    y.sum().backward(retain_graph=True)
    once = x.grad.clone()
    y.sum().backward()
    assert torch.equal(x.grad, 2 * once)


@torch.no_grad()
def test_traced_and_exported_layers_compute_the_layer(backend, device):
    layer, x = layer_and_input(device=device)
    x, other = x.detach().to(device), torch.randn(3, 4, 24, device=device)
    traced = torch.jit.trace(layer, x)
    exported = torch.export.export(layer, (x,), dynamic_shapes={"x": {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}}).module()
    for call in (traced, exported):
        assert torch.equal(call(other), layer(other))


def test_flops_are_counted():
    layer, x = layer_and_input()
    M, K, N, R = 10, 24, 20, 3
    with FlopCounterMode(display=False) as counter:
        y = layer(x)
    assert counter.get_total_flops() == 2 * M * (K * N + R * (K + N))
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 2 * M * (K * N + 2 * R * (K + N))  # dx; du and dB; du A and dA


def test_flops_are_counted_when_the_counter_is_imported_after_the_layer():
    script = """
import torch, lorakernels as lk
layer = lk.LoraLinear(24, 20, r=3)
layer(torch.randn(10, 24))
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as counter:
    layer(torch.randn(10, 24))
assert counter.get_total_flops() == 2 * 10 * (24 * 20 + 3 * (24 + 20)), counter.get_total_flops()
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd="/")


def test_selective_checkpointing_sees_the_operators_by_name():
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    seen = []

    def policy(context, operator, *args, **kwargs):
        seen.append(str(operator))
        return CheckpointPolicy.PREFER_RECOMPUTE

    layer, x = layer_and_input()
    checkpoint(layer, x, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(policy)).sum().backward()
    assert any("lorakernels.linear_lowrank" in name for name in seen)


def test_meta_and_fake_tensors():
    from torch._subclasses import FakeTensorMode

    with torch.device("meta"):
        layer = LoraLinear(24, 20, r=3, lora_dropout=0.1)
        y = layer(torch.empty(2, 5, 24))
    assert y.is_meta and y.shape == (2, 5, 20)
    with FakeTensorMode():
        layer = LoraLinear(24, 20, r=3, dtype=BF16)
        x = torch.empty(2, 5, 24, dtype=BF16, requires_grad=True)
        y = layer(x)
        y.sum().backward()
        assert y.dtype == BF16 and x.grad.shape == x.shape and layer.lora_A.grad.dtype == F32


def test_autocast_saves_x_as_given_and_returns_each_gradient_in_its_own_dtype():
    layer, x = layer_and_input()
    with torch.autocast("cpu", dtype=BF16):
        y = layer(x)
    assert y.dtype == BF16
    assert any(t is not None and t.data_ptr() == x.data_ptr() for t in y.grad_fn.saved_tensors)
    y.float().sum().backward()
    assert x.grad.dtype == F32 and all(p.grad.dtype == F32 for p in layer.adapter_parameters())


def test_backward_inside_autocast_is_the_one_outside():
    layer, x = layer_and_input()
    outside = gradients(layer, x, layer)
    layer.zero_grad()
    x.grad = None
    y = layer(x)
    with torch.autocast("cpu", dtype=BF16):
        y.float().square().sum().backward()
    for a, b in zip(outside[1:], [x.grad] + [p.grad for p in layer.adapter_parameters()]):
        assert torch.equal(a, b)


def test_trainable_weight_under_autocast():
    case = make_case(7, 24, 20, 3, F32, F32, bias=True)

    def inside(*arguments, **keywords):
        with torch.autocast("cpu", dtype=BF16):
            return lora_linear(*arguments, **keywords)

    oracle.hold(oracle.run(inside, case), case, autocast=BF16, label="trainable W, autocast ")


def test_gradients_accumulate():
    layer, x = layer_and_input()
    once = gradients(layer, x, layer)[2:]
    layer(x).square().sum().backward()
    for a, p in zip(once, layer.adapter_parameters()):
        check("accumulated", p.grad, 2 * a.double(), 2 * a, base=F32, K=24)


def test_saved_tensor_hooks_can_offload():
    layer, x = layer_and_input()
    plain = gradients(layer, x, layer)
    with torch.autograd.graph.save_on_cpu():
        offloaded = gradients(layer, x, layer)
    assert all(torch.equal(a, b) for a, b in zip(plain, offloaded))


@pytest.mark.parametrize("make", [lk.LoraLinear.from_linear, lk.QLoraLinear.from_linear, lk.NF4Linear.from_linear, partial(lk.MultiLoraLinear.from_linear, num_adapters=2, max_rank=2)], ids=["LoraLinear", "QLoraLinear", "NF4Linear", "MultiLoraLinear"])
@pytest.mark.parametrize("shape", [(16,), (4, 16), (2, 3, 16)], ids=str)
def test_what_comes_after_a_layer_may_change_its_result_in_place(make, shape):
    """nn.ReLU(inplace=True), x += residual: as after nn.Linear."""
    layer = make(nn.Linear(16, 8))
    arguments = (torch.zeros(shape[:-1], dtype=torch.int64),) if isinstance(layer, lk.MultiLoraLinear) else ()
    results = []
    for in_place in (False, True):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0), requires_grad=True)
        layer.zero_grad()
        y = layer(x, *arguments)
        if in_place:
            y += 1
            y.relu_()
        else:
            y = torch.relu(y + 1)
        y.square().sum().backward()
        results.append([y.detach(), *(t.grad.clone() for t in (x, *layer.parameters()) if t.grad is not None)])
    assert len(results[0]) > 1 and all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_two_threads_train_at_once():
    import threading

    layers = [layer_and_input() for _ in range(2)]
    alone = [gradients(layer, x, layer) for layer, x in layers]
    results = [None, None]

    def work(i):
        for _ in range(20):
            results[i] = gradients(*layers[i], layers[i][0])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for mine, expected in zip(results, alone):
        assert all(torch.equal(a, b) for a, b in zip(mine, expected))


def test_use_backend_reaches_the_backward(monkeypatch):
    layer, x = layer_and_input()
    ran = []
    real = lk.backends.chosen
    monkeypatch.setattr(lk.backends, "chosen", lambda *a: ran.append(real(*a).__name__) or real(*a))
    with lk.use_backend("reference"):
        layer(x).sum().backward()
    assert ran == ["lorakernels.backends.reference"] * 2  # forward and backward
