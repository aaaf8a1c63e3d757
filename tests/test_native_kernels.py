"""The kernels by themselves: bits, the edges of matrices, offsets; lora_linear's tests hold their results under the error rule."""

import mmap
import tempfile

import pytest
import torch
from numerics import check

import lorakernels as lk
from lorakernels import backends, ops

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def native_add(*arguments):
    """The native CPU kernel by itself."""
    from lorakernels.backends import cpu, native

    cpu.module().add_lowrank(*native.add_lowrank_arguments(*arguments))


needs_native_cpu = pytest.mark.skipif(
    backends.why_not("cpu", "cpu", F32) is not None, reason=f"native CPU kernels: {backends.why_not('cpu', 'cpu', F32)}"
)


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
    whole = ops.lowrank_down(y, [v.t()], None, 0.0)
    assert torch.equal(ops.lowrank_down(y[77:78], [v.t()], None, 0.0), whole[77:78])
    plain = y.clone()
    native_add(plain, u, v, 0.7, None, None, 0.0)
    for m in (0, 3, 127, 128, 299):
        row = y[m : m + 1].clone()
        native_add(row, u[m : m + 1], v, 0.7, None, None, 0.0)
        assert torch.equal(row, plain[m : m + 1])


@needs_native_cpu
@pytest.mark.parametrize("p", (0.0, 0.3))
@pytest.mark.parametrize("R", (3, 8, 16, 24))
def test_native_kernels_bits_of_few_rows_are_those_of_many(R, p):
    x, y, u, v = torch.randn(8, 1000).bfloat16(), torch.randn(136, 1500).bfloat16(), torch.randn(136, R), torch.randn(1500, R)
    A, bias, seed = [torch.randn(R, 1000), torch.randn(R + 9, 1016)[:, 16:]], torch.randn(1500), torch.tensor([9])
    with lk.use_backend("cpu"):
        many = ops.lowrank_down(x, A, seed, p)
        whole = y.clone()
        native_add(whole, u, v, 0.7, bias, seed, p)
        for m in (1, 2, 3, 4, 130):  # the last two of 130 rows are a task of their own
            assert torch.equal(ops.lowrank_down(x[:m], A, seed, p), many[:m])
            few = y[:m].clone()
            native_add(few, u[:m], v, 0.7, bias, seed, p)
            assert torch.equal(few, whole[:m])


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
