"""lora_linear, forward and every gradient, under the error rule on every usable backend."""

import oracle
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numerics import check
from oracle import make_case, with_mask

import lorakernels as lk
from lorakernels import backends, dropout, ops
from lorakernels.functional import lora_linear

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
MIXES = [(F32, F32), (BF16, F32), (BF16, BF16), (F16, F32), (F16, F16)]
MIX_IDS = [f"{str(b)[6:]}+{str(a)[6:]}" for b, a in MIXES]
mixes = pytest.mark.parametrize("base, adapter", MIXES, ids=MIX_IDS)

# each with its reason: empty; one row; a row block and its neighbours; primes; nothing a multiple of anything
M_VALUES = [0, 1, 2, 31, 32, 33, 63, 64, 65, 127, 129, 131]
R_VALUES = [1, 3, 8, 16, 17, 64, 257]
KN_VALUES = [(1, 1), (7, 5), (64, 128), (65, 127), (101, 131), (130, 257)]


@mixes
@pytest.mark.parametrize("M", M_VALUES)
def test_rows(backend, device, base, adapter, M):
    case = make_case(M, 72, 80, 8, base, adapter, device=device)
    oracle.hold(oracle.run(lora_linear, case), case)


@mixes
@pytest.mark.parametrize("R", R_VALUES)
def test_ranks(backend, device, base, adapter, R):
    case = make_case(37, 96, 75, R, base, adapter, device=device, bias=True, lora_bias=True)
    oracle.hold(oracle.run(lora_linear, case), case)


@mixes
@pytest.mark.parametrize("K, N", KN_VALUES)
def test_widths(backend, device, base, adapter, K, N):
    case = make_case(19, K, N, 5, base, adapter, device=device, bias=True, lora_bias=True)
    oracle.hold(oracle.run(lora_linear, case), case)


@mixes
@pytest.mark.parametrize("M, K, N, R", [(33, 96, 70, 8), (5, 21, 130, 17), (1, 8, 8, 1)])
@pytest.mark.parametrize("p", [0.1, 0.75])
def test_dropout(backend, device, base, adapter, M, K, N, R, p):
    case = with_mask(make_case(M, K, N, R, base, adapter, device=device, p=p))
    oracle.hold(oracle.run(lora_linear, case), case)


@pytest.mark.parametrize("M, K, N", [(16, 6144, 20), (16, 20, 6144), (1500, 24, 20)], ids=["columns of x", "columns of dy", "rows"])
def test_long_sums(backend, device, M, K, N):
    """Rounding must not grow with the length of a sum as one chain's does: float32's floor allows the square root of its logarithm."""
    generator = torch.Generator().manual_seed(2)
    x, W, A, B, dy = ((torch.randn(*size, generator=generator) * scale).to(device) for size, scale in (((M, K), 1), ((N, K), 0.01), ((3, K), K**-0.5), ((N, 3), 1), ((M, N), 1)))
    case = oracle.Case(x, W, A, B, dy, 2.0)  # the low-rank part is most of y
    oracle.hold(oracle.run(lora_linear, case), case)


def test_dropout_of_everything(backend, device):
    case = make_case(9, 24, 16, 4, F32, F32, device=device, p=1.0)
    results = oracle.run(lora_linear, case)
    assert torch.equal(results["y"], torch.nn.functional.linear(case.x, case.W))
    assert not results["A"].any() and not results["B"].any()


@mixes
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_adapters_that_share_x(backend, device, base, adapter, p):
    oracle.hold_shared(base, adapter, p, device)


@mixes
@pytest.mark.parametrize("p", [0.0, 0.25])
def test_autocast(backend, device, base, adapter, p):
    case = make_case(21, 40, 56, 8, base, adapter, device=device, bias=True, lora_bias=True, p=p)
    case = with_mask(case) if p else case
    for dtype in (BF16, F16):

        def inside(*arguments, **keywords):
            with torch.autocast(device, dtype=dtype):
                return lora_linear(*arguments, **keywords)

        torch.manual_seed(11)
        results = oracle.run(inside, case)
        assert results["y"].dtype == dtype
        oracle.hold(results, case, autocast=dtype, label=f"autocast {dtype} ")


def _layouts(M, K, dtype, device):
    """x of shape (M, K) (or batched) with every stride that arrives in practice."""
    big = torch.randn(2 * M, 3, 2 * K, device=device).to(dtype)
    yield "sliced columns", big[:M, 0, :K]
    yield "sliced rows", big[::2, 0, :K]
    yield "every other column", big[:M, 0, ::2]
    yield "transposed", torch.randn(K, M, device=device).to(dtype).t()
    yield "expanded rows", torch.randn(1, K, device=device).to(dtype).expand(M, K)
    yield "one value", torch.randn(1, 1, device=device).to(dtype).expand(M, K)
    yield "misaligned", torch.randn(M * K + 1, device=device).to(dtype)[1:].view(M, K)
    yield "batched", big[:, :, :K]
    yield "batch transposed", big[:, :, :K].transpose(0, 1)
    yield "vector", big[0, 0, :K]
    yield "negated", torch._neg_view(big[:M, 0, :K])


@pytest.mark.parametrize("base, adapter", [(F32, F32), (BF16, F32)], ids=["float32", "bfloat16"])
def test_layouts_of_x(backend, device, base, adapter):
    for name, x in _layouts(14, 40, base, device):
        case = make_case(0, 40, 24, 4, base, adapter, device=device, x=x)
        case.dy = torch.randn(*x.shape[:-1], 24, device=device).to(base)
        leaf = case.x.detach().requires_grad_()
        y = lora_linear(leaf, case.W, case.A, case.B, case.scaling)
        y.backward(case.dy)
        exact, eager = oracle.in_float64(case), oracle.peft_eager(case)
        check(f"y, x {name}", y.detach(), exact["y"], eager["y"], base=base, K=40)
        check(f"dx, x {name}", leaf.grad, exact["x"], eager["x"], base=base, K=40)


@pytest.mark.parametrize("base, adapter", [(F32, F32), (BF16, F32)], ids=["float32", "bfloat16"])
def test_layouts_of_the_gradient(backend, device, base, adapter):
    for name, dy in _layouts(14, 40, base, device):
        case = make_case(0, 24, 40, 4, base, adapter, device=device, dy=dy, bias=True, lora_bias=True)
        case.x = torch.randn(*dy.shape[:-1], 24, device=device).to(base)
        oracle.hold(oracle.run(lora_linear, case), case, label=f"dy {name} ")


def test_layouts_of_the_parameters(backend, device):
    """W, A, B and the biases as views: tied, sliced out of a stack, transposed."""
    case = make_case(11, 40, 24, 6, BF16, F32, device=device, bias=True, lora_bias=True)
    stack = torch.randn(3, 12, 80, device=device)
    case.A = torch._neg_view(stack[1, ::2, ::2])
    case.B = torch.randn(6, 24, device=device).t()
    case.W = torch.randn(40, 24, device=device).to(BF16).t()
    case.bias = torch.randn(48, device=device).to(BF16)[::2]
    case.lora_bias = torch.randn(48, device=device)[::2]
    results = oracle.run(lora_linear, case)
    oracle.hold(results, case)
    # a gradient of a view takes the view's strides from autograd only for dense views; what the operator gives is contiguous
    assert results["A"].is_contiguous()


def test_cat_and_slice_around_the_call(backend, device):
    """The gradient of a slice of a concatenation is itself a slice."""
    case = make_case(12, 16, 20, 3, F32, F32, device=device)
    a, b = (case.x.clone().requires_grad_() for _ in range(2))
    arguments = (case.W, case.A, case.B, case.scaling)
    both = torch.cat([lora_linear(a, *arguments), lora_linear(b, *arguments)], dim=-1)
    both[:, 10:30].sum().backward()
    half = torch.zeros_like(case.dy)
    half[:, 10:] = 1
    case.dy = half
    check("dx of a cat", a.grad, oracle.in_float64(case)["x"], oracle.peft_eager(case)["x"], base=F32, K=20)


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_shape_any_dtype(backend, device, data):
    sizes = st.sampled_from([1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 47, 64, 65, 97])
    M, K, N = data.draw(st.sampled_from([0, 1, 5, 16, 33])), data.draw(sizes), data.draw(sizes)
    R, p = data.draw(st.integers(1, 40)), data.draw(st.sampled_from([0.0, 0.0, 0.3]))
    base, adapter = data.draw(st.sampled_from(MIXES))
    bias, lora_bias = data.draw(st.booleans()), data.draw(st.booleans())
    case = make_case(M, K, N, R, base, adapter, device=device, bias=bias, lora_bias=lora_bias, p=p, seed=data.draw(st.integers(0, 999)))
    case.scaling = data.draw(st.sampled_from([0.0, -0.5, 1.0, 2.0, 1 / 3]))
    case = with_mask(case) if p else case
    oracle.hold(oracle.run(lora_linear, case), case, label=f"M={M} K={K} N={N} R={R} p={p} ")


# -- exactness beyond the rule ------------------------------------------------------------------------------------------


@mixes
def test_zero_B_gives_the_base_bit_for_bit(backend, device, base, adapter):
    case = make_case(17, 48, 40, 4, base, adapter, device=device, bias=True)
    y = lora_linear(case.x, case.W, case.A, torch.zeros_like(case.B), 2.0, case.bias)
    assert torch.equal(y, torch.nn.functional.linear(case.x, case.W, case.bias))


def test_every_backend_draws_the_same_mask(backend, device):
    """dx of a zero base is the mask itself, scaled: du A = 1 everywhere."""
    M, K, p = 37, 83, 0.3
    x = torch.zeros(M, K, device=device, requires_grad=True)
    W, A, B = torch.zeros(1, K, device=device), torch.ones(1, K, device=device), torch.ones(1, 1, device=device)
    torch.manual_seed(3)
    seed = dropout.draw_seed(device)
    torch.manual_seed(3)
    lora_linear(x, W, A, B, dropout_p=p).sum().backward()
    expected = oracle.keep(seed.item(), M, K, p).to(device) * torch.tensor(oracle.scale(p), dtype=F32, device=device)
    assert torch.equal(x.grad, expected.float())


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_repeats_give_the_same_bits(backend, device, threads):
    M, N = (65, 130) if backend == "triton" and device == "cpu" else (257, 700)  # the interpreter takes half a minute for what it repeats by nature
    case = make_case(M, 96, N, 16, BF16, F32, device=device, p=0.1)
    torch.manual_seed(5)
    first = oracle.run(lora_linear, case)
    for _ in range(3):
        torch.manual_seed(5)
        again = oracle.run(lora_linear, case)
        for name, out in first.items():
            assert torch.equal(out, again[name]), name


def test_each_call_has_its_own_mask(device):
    case = make_case(8, 64, 8, 2, F32, F32, device=device)
    arguments = (case.x, case.W, case.A, case.B)
    assert not torch.equal(lora_linear(*arguments, dropout_p=0.5), lora_linear(*arguments, dropout_p=0.5))
    assert torch.equal(lora_linear(*arguments, dropout_p=0.5, training=False), lora_linear(*arguments))


# -- memory: outputs are written whole and nothing beside them --------------------------------------------------------------


@pytest.mark.parametrize("M, K, N, R", [(33, 40, 50, 8), (37, 65, 31, 17)])
def test_fresh_memory_is_never_read_and_nothing_is_written_beside_it(backend, device, monkeypatch, M, K, N, R):
    """Every new buffer starts as NaN between two bands of NaN: none may reach a result, and the bands stay."""
    real, linear, frames, band = torch.Tensor.new_empty, torch.nn.functional.linear, [], 64

    def poisoned(self, *size, **keywords):
        out = real(self, *size, **keywords)
        if not out.is_floating_point():
            return out
        frame = real(self, (out.numel() + 2 * band,), **keywords).fill_(float("nan"))
        frames.append(frame)
        return frame[band : band + out.numel()].view(out.shape)

    def framed(*operands):  # what torch makes and a kernel then adds to
        y = linear(*operands)
        return poisoned(y, *y.shape).copy_(y)

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    monkeypatch.setattr(torch.nn.functional, "linear", framed)
    case = with_mask(make_case(M, K, N, R, BF16, F32, device=device, bias=True, lora_bias=True, p=0.2))
    results = oracle.run(lora_linear, case)
    monkeypatch.undo()
    oracle.hold(results, case)
    assert len(frames) >= 5
    assert all(frame[:band].isnan().all() and frame[-band:].isnan().all() for frame in frames)


def test_saved_bytes(device):
    """Between forward and backward: x shared, u in float32, the seed; no mask, no copy of x."""
    case = make_case(64, 128, 96, 8, BF16, F32, device=device)
    leaves = [t.requires_grad_() for t in (case.x, case.A, case.B)]
    saved = {}

    def pack(tensor):
        saved[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        lora_linear(leaves[0], case.W, leaves[1], leaves[2], dropout_p=0.5)
    given = {t.data_ptr() for t in (case.x, case.W, case.A, case.B)}
    assert given <= set(saved)
    extra = sum(t.numel() * t.element_size() for address, t in saved.items() if address not in given)
    assert extra == 64 * 8 * 4 + 8  # u, seed


def test_saved_x_is_the_callers_even_when_rows_need_a_copy(device):
    x = torch.randn(4, 6, 16, device=device).transpose(0, 1).requires_grad_()
    A, B = torch.randn(2, 16, device=device, requires_grad=True), torch.randn(8, 2, device=device)
    y = lora_linear(x, torch.randn(8, 16, device=device), A, B)
    assert any(t is not None and t.data_ptr() == x.data_ptr() for t in y.grad_fn.saved_tensors)


TRITON_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.skipif(backends.why_not("triton", TRITON_DEVICE, F32) is not None, reason=f"triton: {backends.why_not('triton', TRITON_DEVICE, F32)}")
def test_launches_of_triton_kernels(monkeypatch):
    """2 of ours forward and 4 backward, beside a product of torch's in each; one less in each with the fused product."""
    from lorakernels.backends import triton as ours
    from lorakernels.backends.triton import kernels, matmul

    launched = []

    class Counted:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            launched.append(self.kernel.__name__)
            return self.kernel[grid]

    for module, names in ((kernels, ("lowrank_down", "add_lowrank", "lowrank_grad_up", "lowrank_grad_down", "sum_parts")), (matmul, ("linear_lowrank",))):
        for name in names:
            monkeypatch.setattr(module, name, Counted(getattr(module, name)))
    for chosen, forward, backward in ((ours.linear_lowrank_composed, 2, 4), (ours.linear_lowrank_fused, 2, 4)):
        monkeypatch.setattr(ours, "linear_lowrank", chosen)
        case = make_case(20, 24, 36, 5, BF16, F32, device=TRITON_DEVICE)
        leaves = [t.requires_grad_() for t in (case.x, case.A, case.B)]
        with lk.use_backend("triton"):
            y = lora_linear(leaves[0], case.W, leaves[1], leaves[2], dropout_p=0.2)
            assert len(launched) == forward, launched
            y.backward(case.dy)
        assert len(launched) == forward + backward, launched
        del launched[:]


# -- gradients in general --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.filterwarnings("ignore:lorakernels runs torch.float64")
def test_gradcheck(p):
    case = make_case(5, 9, 7, 3, F64, F64, bias=True, lora_bias=True)

    def function(x, W, A, B, bias, lora_bias):
        torch.manual_seed(2)
        return lora_linear(x, W, A, B, 1.3, bias, lora_bias=lora_bias, dropout_p=p)

    inputs = [t.double().requires_grad_() for t in case.tensors().values()]
    assert torch.autograd.gradcheck(function, inputs)


def test_second_backward_raises_rather_than_lies():
    case = make_case(5, 9, 7, 3, F32, F32)
    x = case.x.requires_grad_()
    with pytest.raises(RuntimeError, match="create_graph=True"):
        torch.autograd.grad(lora_linear(x, case.W, case.A, case.B).sum(), x, create_graph=True)


@pytest.mark.parametrize("needs", ["x", "A", "B", "W", "bias", "lora_bias", "xA", "AB", "xB"])
def test_only_what_is_needed_is_computed(backend, device, needs, monkeypatch):
    case = make_case(6, 16, 12, 3, BF16, F32, device=device, bias=True, lora_bias=True)
    wanted = [name for name in case.NAMES if name == needs or (len(needs) == 2 and name in needs)]
    leaves = {name: t.detach().requires_grad_(name in wanted) for name, t in case.tensors().items()}
    ran = []
    real = backends.chosen

    class Watched:
        def __init__(self, *kind):
            self.module = real(*kind)

        def __getattr__(self, name):
            ran.append(name)
            return getattr(self.module, name)

    monkeypatch.setattr(backends, "chosen", Watched)
    y = lora_linear(leaves["x"], leaves["W"], leaves["A"], leaves["B"], 1.5, leaves["bias"], lora_bias=leaves["lora_bias"])
    del ran[:]
    y.backward(case.dy)
    assert ("linear_lowrank" in ran) == ("x" in wanted)
    assert ("lowrank_grad" in ran) == bool({"x", "A", "B"} & set(wanted))
    exact, eager = oracle.in_float64(case), oracle.peft_eager(case)
    for name, leaf in leaves.items():
        assert (leaf.grad is not None) == (name in wanted), name
        if name in wanted:
            assert leaf.grad.dtype == leaf.dtype and leaf.grad.is_contiguous()
            check(f"d{name} alone", leaf.grad, exact[name], eager[name], base=BF16, K=16)


def test_no_graph_without_gradients():
    case = make_case(3, 8, 8, 2, F32, F32)
    assert lora_linear(case.x, case.W, case.A, case.B).grad_fn is None
    case.A.requires_grad_()
    with torch.no_grad():
        assert lora_linear(case.x, case.W, case.A, case.B).grad_fn is None


def test_in_place_change_between_forward_and_backward_raises():
    case = make_case(3, 8, 8, 2, F32, F32)
    x = case.x.requires_grad_()
    y = lora_linear(x, case.W, case.A, case.B)
    with torch.no_grad():
        case.A.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_backend_that_was_asked_for_runs_or_raises():
    case = make_case(3, 8, 8, 2, F64, F64)
    with lk.use_backend("cpu"), pytest.raises(RuntimeError, match="'cpu' was asked for.*float64"):
        lora_linear(case.x, case.W, case.A, case.B)
    with pytest.raises(ValueError, match="backend: expected one of .* got 'fast'"), lk.use_backend("fast"):
        pass


def test_what_is_dropped_is_zero_whatever_it_was(backend, device):
    """Not finite times zero would not be."""
    torch.manual_seed(5)
    seed = dropout.draw_seed(device)
    x, A = torch.ones(16, 24, device=device), torch.ones(1, 24, device=device)
    x[~dropout.keep_mask(seed, 16, 24, 0.5)] = float("inf")
    for dtype in (F32, BF16):
        assert torch.isfinite(ops.lowrank_down(x.to(dtype), [A], seed, 0.5)).all()
