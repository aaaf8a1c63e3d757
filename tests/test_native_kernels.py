"""The kernels by themselves: bits, the edges of matrices, offsets; lora_linear's tests hold their results under the error rule."""

import itertools
import mmap
import tempfile

import oracle
import pytest
import torch
import torch.nn.functional as F
from numerics import check

import lorakernels as lk
from lorakernels import backends, ops
from lorakernels.functional import lora_linear, multi_lora_linear

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def native_add(*arguments):
    """The native CPU kernel by itself."""
    from lorakernels.backends import cpu, native

    cpu.module().add_lowrank(*native.add_lowrank_arguments(*arguments))


needs_native_cpu = pytest.mark.skipif(
    backends.why_not("cpu", "cpu", F32) is not None, reason=f"native CPU kernels: {backends.why_not('cpu', 'cpu', F32)}"
)


def tile_rows():
    """Calls of as many rows, and those of fewer, have bits of their own: the rows of a tile on AMX."""
    return 16 if backends.load("cpu").module().isa() == "amx" else 1


@needs_native_cpu
@pytest.mark.parametrize("adapter", [F32, BF16], ids=["float32", "bfloat16"])
def test_native_kernels_bits_do_not_depend_on_threads_or_on_a_rows_place(adapter):
    y, u, v = torch.randn(300, 1500).bfloat16(), torch.randn(300, 16), torch.randn(1500, 16).to(adapter)
    seed, results, before = torch.tensor([9]), [], torch.get_num_threads()
    for count in (1, 2):
        torch.set_num_threads(count)
        results.append(y.clone())
        native_add(results[-1], u, v, 0.7, None, seed, 0.1)
        with lk.use_backend("cpu"):
            results.append(torch.cat([t.flatten() for t in (ops.lowrank_down(y, [v.t()], seed, 0.1), *ops.lowrank_grad(y, y, u, v, seed, 0.1, 0.7, adapter))]))
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[2]) and torch.equal(results[1], results[3])
    rows = tile_rows()
    whole = ops.lowrank_down(y, [v.t()], None, 0.0)
    plain = y.clone()
    native_add(plain, u, v, 0.7, None, None, 0.0)
    for m in (0, 3, 77, 127, 128, 300 - rows):
        assert torch.equal(ops.lowrank_down(y[m : m + rows], [v.t()], None, 0.0), whole[m : m + rows])
        row = y[m : m + rows].clone()
        native_add(row, u[m : m + rows], v, 0.7, None, None, 0.0)
        assert torch.equal(row, plain[m : m + rows])


@needs_native_cpu
@pytest.mark.parametrize("p", (0.0, 0.3))
@pytest.mark.parametrize("R", (3, 8, 16, 24))
def test_native_kernels_bits_of_few_rows_are_those_of_many(R, p):
    rows, most = (136, 130) if tile_rows() == 1 else (15, 14)
    x, y, u, v = torch.randn(8, 1000).bfloat16(), torch.randn(rows, 1500).bfloat16(), torch.randn(rows, R), torch.randn(1500, R)
    A, bias, seed = [torch.randn(R, 1000), torch.randn(R + 9, 1016)[:, 16:]], torch.randn(1500), torch.tensor([9])
    with lk.use_backend("cpu"):
        many = ops.lowrank_down(x, A, seed, p)
        whole = y.clone()
        native_add(whole, u, v, 0.7, bias, seed, p)
        for m in (1, 2, 3, 4, most):  # the last two of 130 rows are a task of their own
            assert torch.equal(ops.lowrank_down(x[:m], A, seed, p), many[:m])
            few = y[:m].clone()
            native_add(few, u[:m], v, 0.7, bias, seed, p)
            assert torch.equal(few, whole[:m])


@needs_native_cpu
@pytest.mark.parametrize("size", [8, 40])
@pytest.mark.parametrize("R", [1, 16, 20])
@pytest.mark.parametrize("base", [F32, BF16, F16], ids=["float32", "bfloat16", "float16"])
def test_products_keep_every_bit_of_a_float32_adapter(base, R, size):
    one, A, B = torch.eye(size).to(base), torch.randn(R, size), torch.randn(size, R)
    with lk.use_backend("cpu"):
        u = ops.lowrank_down(one, [A], None, 0.0)
        du, dA, dB = ops.lowrank_grad(one, one, u, B, None, 0.0, 1.0, F32)
    assert torch.equal(u, A.t()) and torch.equal(du, B) and torch.equal(dA, B.t()) and torch.equal(dB, A.t())


@needs_native_cpu
@pytest.mark.parametrize("base, adapter", [(F32, F32), (BF16, F32), (BF16, BF16)], ids=["float32", "bf16+float32", "bf16"])
@pytest.mark.parametrize("M", [30, 64])
def test_a_rows_bits_do_not_depend_on_how_many_have_its_adapter(base, adapter, M):
    cpu = backends.load("cpu")
    x, dy, A, B = torch.randn(M, 600).to(base), torch.randn(M, 500).to(base), torch.randn(2, 16, 600).to(adapter), torch.randn(2, 500, 16).to(adapter)
    few = torch.zeros(M, dtype=torch.int64)
    few[5:30:10] = 1
    results = []
    for ids in (few, torch.ones_like(few)):
        order, starts = cpu.multi_route(ids, 2)
        u = cpu.multi_lowrank_down(x, A, order, starts, None, None, None, None, None, 1)
        du = cpu.multi_lowrank_grad(dy, x, u[0], B, torch.ones(2), order, starts, None, None, None, None, None, adapter)[0]
        results.append([torch.empty_like(t).index_copy_(0, order, t)[few == 1] for t in (u[0], du)])
    assert all(torch.equal(a, b) for a, b in zip(*results))


@needs_native_cpu
@pytest.mark.parametrize("base, adapter", [(F32, F32), (BF16, F32), (BF16, BF16)], ids=["float32", "bf16+float32", "bf16"])
def test_more_rows_than_parts_of_du_are_kept_of_at_a_time(base, adapter):
    with lk.use_backend("cpu"):
        oracle.hold_thin(300, 40, 8192, 257, base, adapter)


@needs_native_cpu
@pytest.mark.parametrize("adapter", [F32, BF16], ids=["float32", "bf16"])
def test_more_of_du_than_is_packed_at_a_time(adapter):
    with lk.use_backend("cpu"):
        oracle.hold_thin(6000 if adapter == F32 else 17000, 40, 24, 257, BF16, adapter)


@needs_native_cpu
@pytest.mark.parametrize("base, adapter", [(F32, F32), (BF16, F32), (BF16, BF16)], ids=["float32", "bf16+float32", "bf16"])
@pytest.mark.parametrize("R", [3, 16, 40])
def test_rows_and_columns_of_several_passes(R, base, adapter):
    """Whole tiles and what is left of them, in both directions; copies of rows whose mask is drawn."""
    with lk.use_backend("cpu"):
        oracle.hold_thin(506, 608, 352, R, base, adapter)
        case = oracle.with_mask(oracle.make_case(300, 160, 352, R, base, adapter, p=0.2))
        oracle.hold(oracle.run(lora_linear, case), case)


@needs_native_cpu
@pytest.mark.parametrize("M", [3, 40])
@pytest.mark.parametrize("R", [1, 16, 20, 40])
def test_what_a_float32_adapter_leaves_of_a_result_is_right(R, M):
    """Where the base's answer, rounded to bfloat16, cancels what the adapter adds. Of a finer base's the sums' own errors would be left."""
    u, v = torch.randn(M, R), torch.randn(70, R)
    exact = u.double() @ v.double().t()
    y = -exact.bfloat16()
    out = y.clone()
    native_add(out, u, v, 1.0, None, None, 0.0)
    check(f"rest R={R}", out, y.double() + exact, (y.float() + u @ v.t()).bfloat16(), base=BF16, K=R)


def layouts(matrix):
    """Its values as they may lie in memory: in order, turned, cut out of a larger one, every other column of one."""
    rows, columns = matrix.shape
    larger = torch.full((2, rows + 3, 2 * columns + 5), float("nan"), dtype=matrix.dtype)
    return matrix, matrix.t().contiguous().t(), larger[0, 1 : rows + 1, 3 : columns + 3].copy_(matrix), larger[1, :rows, : 2 * columns : 2].copy_(matrix)


@needs_native_cpu
@pytest.mark.parametrize("M", [0, 1, 2, 3, 4, 5, 8, 9, 37, 300])
@pytest.mark.parametrize("N, K", [(40, 64), (17, 75), (2060, 24), (5, 1030), (1, 1)])
@pytest.mark.parametrize("dtype", [BF16, F16], ids=["bfloat16", "float16"])
def test_the_product_of_half_precision_without_a_library(dtype, N, K, M):
    x, w, bias = torch.randn(M, K).to(dtype), torch.randn(N, K).to(dtype), torch.randn(2 * N).to(dtype)[::2]
    exact, eager = F.linear(x.double(), w.double(), bias.double()), F.linear(x, w, bias)
    for some_x, some_w in itertools.product(layouts(x), layouts(w)):
        check("y", backends.load("cpu").linear(some_x, some_w, bias), exact, eager, base=dtype, K=K)
    without = backends.load("cpu").linear(x, w, None)
    check("y", without, F.linear(x.double(), w.double()), F.linear(x, w), base=dtype, K=K)
    one = x[:1].expand(M, K)
    assert torch.equal(backends.load("cpu").linear(one, w, bias), backends.load("cpu").linear(one.contiguous(), w, bias))


@needs_native_cpu
@pytest.mark.parametrize("M", [3, 40, 600])
def test_that_products_bits_do_not_depend_on_threads_or_on_a_rows_place(M):
    linear, before, results = backends.load("cpu").linear, torch.get_num_threads(), []
    x, w = torch.randn(M, 1100).bfloat16(), torch.randn(2100, 1100).bfloat16()
    for count in (1, 2):
        torch.set_num_threads(count)
        results += [linear(x, w, None), linear(x.roll(1, 0), w, None).roll(-1, 0), linear(x, w.t().contiguous().t(), None)]
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[3]) and torch.equal(results[0], results[1]) and torch.equal(results[2], results[5])
    assert M == 3 or torch.equal(results[0], results[2])  # few rows meet W as it lies, in an order of their own


@needs_native_cpu
def test_that_product_of_more_rows_than_are_widened_at_a_time():
    x, w, bias = torch.randn(600, 8200).bfloat16(), torch.randn(24, 8200).bfloat16(), torch.randn(24).bfloat16()
    check("y", backends.load("cpu").linear(x, w, bias), F.linear(x.double(), w.double(), bias.double()), F.linear(x, w, bias), base=BF16, K=8200)


@needs_native_cpu
@pytest.mark.parametrize("dtype", [BF16, F16], ids=["bfloat16", "float16"])
def test_layers_on_a_processor_without_a_library_for_their_dtype(monkeypatch, dtype):
    """All of a layer's products, of one adapter and of many, with that product in torch's place."""
    cpu = backends.load("cpu")
    calls = []
    monkeypatch.setattr(cpu, "left_to_torch", lambda dtype: False)
    monkeypatch.setattr(cpu, "linear", lambda *operands, real=cpu.linear: calls.append(operands) or real(*operands))
    with lk.use_backend("cpu"):
        case = oracle.make_case(21, 72, 40, 8, dtype, F32, bias=True)
        oracle.hold(oracle.run(lora_linear, case), case)
        assert len(calls) == 2  # y and dx
        x, ids = case.x.clone().requires_grad_(), torch.arange(21) % 3 - 1
        y = multi_lora_linear(x, case.W, torch.randn(2, 4, 72), torch.randn(2, 40, 4), ids, torch.ones(2), case.bias)
        y.sum().backward()
    assert len(calls) == 4 and torch.equal(y[ids == -1], cpu.linear(case.x, case.W, case.bias)[ids == -1])


@needs_native_cpu
@pytest.mark.parametrize("adapter", [F32, BF16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("base", [BF16, F16], ids=["bfloat16", "float16"])
def test_native_kernels_bits_stay_where_nothing_is_added(base, adapter):
    """Every number of a half-precision dtype: there are instructions that take the subnormal ones for zero."""
    y = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(base)
    y = y[~y.isnan()][: 60 * 1000].reshape(60, 1000)
    for rows in (60, 3):
        before = y[:rows].clone()
        native_add(y[:rows], torch.ones(rows, 8), torch.zeros(1000, 8, dtype=adapter), 0.5, None, None, 0.0)
        assert torch.equal(y[:rows], before)


@needs_native_cpu
@pytest.mark.parametrize("base", [F32, BF16, F16], ids=["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("N, R", [(1, 1), (23, 3), (24, 16), (47, 17), (49, 65), (481, 8)])
def test_in_place_add_stays_inside_its_matrix(base, N, R):
    """The native kernel on a window of a larger matrix: what is around keeps its bits, the window gets its sum."""
    M = 131
    frame = torch.randn(M + 4, N + 9).to(base)
    around = frame.clone()
    window = frame[2 : M + 2, 5 : N + 5]
    start = torch.randn(M, N).to(base)
    window.copy_(start)
    u, v, bias = torch.randn(M, R), torch.randn(R, N).t(), torch.randn(N)
    native_add(window, u, v, 0.5, bias, None, 0.0)
    exact = start.double() + 0.5 * (u.double() @ v.double().t() + bias.double())
    eager = (start.float() + 0.5 * (u @ v.t() + bias)).to(base)
    check("window", window, exact, eager, base=base, K=R)
    around[2 : M + 2, 5 : N + 5] = window
    assert torch.equal(frame, around)


# -- more than 2**31 elements, without the memory for it -----------------------------------------------------------------


def far_rows():
    """y (4, 40) whose rows lie 2**30 elements apart in a file that is one hole: only the touched pages take room."""
    stride, M, N = 2**30 + 8, 4, 40
    file = tempfile.TemporaryFile()
    file.truncate(2 * (stride * (M - 1) + N))
    y = torch.frombuffer(mmap.mmap(file.fileno(), 0), dtype=F16).as_strided((M, N), (stride, 1))
    return y.copy_(torch.randn(M, N))


def launch_triton(y, u, v):
    from lorakernels.backends.triton import kernels

    kernels.add_lowrank[(1,)](y, u, v, u, u, *y.shape, 3, 2.0, 0, 1.0, y.stride(0), 3, 3, 1, 0, False, False, 2, 16, 64, 16)


@pytest.mark.parametrize("name, launch", [("cpu", lambda y, u, v: native_add(y, u, v, 2.0, None, None, 0.0)), ("triton", launch_triton)])
def test_offsets_beyond_31_bits(name, launch):
    if backends.why_not(name, "cpu", F16):
        pytest.skip(f"on the CPU: {backends.why_not(name, 'cpu', F16)}")
    y, u, v = far_rows(), torch.randn(4, 3), torch.randn(40, 3)
    start = y.clone()
    launch(y, u, v)
    exact, eager = start.double() + 2 * (u.double() @ v.double().t()), (start.float() + 2 * (u @ v.t())).half()
    check("rows 2**30 apart", y.clone(), exact, eager, base=F16, K=3)
