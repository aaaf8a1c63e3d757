"""The CUDA C++ kernels' own bodies, compiled as host C++ and run by fibers (csrc/emulation), under the error rule."""

from dataclasses import replace

import oracle
import pytest
import torch
from emulated_cuda import build, put_on_emulation
from numerics import check
from oracle import make_case

from lorakernels import dropout, functional, nf4, ops
from lorakernels.backends import cuda, native, reference, triton
from lorakernels.backends.native import add_lowrank_arguments
from lorakernels.functional import lora_linear

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@pytest.fixture(scope="module")
def emulated():
    return build()


def hold(module, M, N, R, dtype, v_dtype, p=0.0, transposed=False, bias=False, order=0, shift=0):
    """One call on a window of a larger matrix; raises AssertionError where a value is wrong or what is around it changed."""
    frame = torch.randn(M + 130, N + 272 + shift).to(dtype)  # room for what a faulty block would write
    around = frame.clone()
    y = frame[1 : M + 1, 8 + shift : 8 + shift + N]
    start = torch.randn(M, N).to(dtype)
    y.copy_(start)
    u, v = torch.randn(M, R), torch.randn(N, R).to(v_dtype)
    v = v.t().contiguous().t() if transposed else v
    b = torch.randn(N).to(v_dtype) if bias else None
    seed = torch.tensor([77]) if p else None
    module.seed(order)
    module.add_lowrank(0, *add_lowrank_arguments(y, u, v, 0.5, b, seed, p))
    kept = dropout.keep_mask(seed, M, N, p) * dropout.scale(p) if p else torch.ones(M, N)
    added = torch.zeros(N) if b is None else b
    exact = start.double() + 0.5 * ((u.double() @ v.double().t()) * kept.double() + added.double())
    eager = (start.float() + 0.5 * ((u @ v.float().t()) * kept.float() + added.float())).to(dtype)
    check(f"CUDA emulated {M}x{N} R={R}", y.clone(), exact, eager, base=dtype, K=R)
    around[1 : M + 1, 8 + shift : 8 + shift + N] = y
    assert torch.equal(frame, around), "wrote outside its matrix"


@pytest.mark.parametrize("dtype, v_dtype", [(F32, F32), (BF16, F32), (BF16, BF16), (F16, F32), (F16, F16)])
@pytest.mark.parametrize("M, N, R", [(1, 1, 1), (63, 127, 3), (64, 128, 16), (65, 136, 33), (3, 257, 65), (130, 40, 257)])
def test_shapes(emulated, dtype, v_dtype, M, N, R):
    hold(emulated, M, N, R, dtype, v_dtype, bias=True)
    hold(emulated, M, N, R, dtype, v_dtype, transposed=True, shift=1)  # misaligned rows take the narrow path


@pytest.mark.parametrize("dtype, v_dtype, R", [(BF16, F32, 12), (F16, F16, 20)])
def test_a_warp_walks_several_tiles(emulated, dtype, v_dtype, R):
    hold(emulated, 4224 + 10, 1024, R, dtype, v_dtype, bias=True)  # two tiles of 16 rows


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("p", [0.1, 0.6])
def test_dropout(emulated, dtype, p):
    hold(emulated, 70, 150, 5, dtype, F32, p=p, bias=True)
    hold(emulated, 64, 128, 16, dtype, F32, p=p)


@pytest.mark.parametrize("order", range(4))
def test_any_order_of_warps(emulated, order):
    hold(emulated, 65, 130, 70, BF16, F32, order=order)


# -- the whole backend on the emulation: cuda.py with the launches replaced ------------------------------------------------


@pytest.fixture
def on_emulation(emulated, monkeypatch):
    put_on_emulation(emulated, monkeypatch)
    return emulated


def layer_case(M, K, N, R, base, adapter, p=0.0, **layout):
    case = make_case(M, K, N, R, base, adapter, bias=True, lora_bias=True, p=p, **layout)
    if p:
        torch.manual_seed(11)
        case.mask = dropout.keep_mask(dropout.draw_seed("cpu"), M, K, p)
    return case


def hold_layer(case, label=""):
    torch.manual_seed(11)
    results = oracle.run(lora_linear, case)
    oracle.hold(results, case, label=label)
    return results


# one row and rank; below, at and beyond a tile of 32 x 128 x 16; several groups of rows and slabs; nothing a multiple; whole 16 bytes, with
# 24, 64, 65 and an odd number of ranks
@pytest.mark.parametrize("base, adapter", [(F32, F32), (BF16, F32), (BF16, BF16), (F16, F32), (F16, F16)])
@pytest.mark.parametrize("M, K, N, R", [(0, 8, 8, 2), (1, 1, 1, 1), (31, 127, 130, 3), (64, 128, 128, 16), (150, 260, 70, 17), (33, 72, 300, 70), (70, 136, 264, 24), (40, 264, 72, 64), (17, 64, 136, 65), (100, 200, 64, 5)])
def test_whole_layer(on_emulation, base, adapter, M, K, N, R):
    hold_layer(layer_case(M, K, N, R, base, adapter))
    if M:
        hold_layer(layer_case(M, K, N, R, base, adapter, p=0.3))


@pytest.mark.parametrize("base", [F32, BF16])
def test_whole_layer_in_any_layout(on_emulation, base):
    M, K, N = 35, 40, 48
    for x in (torch.randn(2 * M, 2 * K)[::2, ::2], torch.randn(K, M).t(), torch.randn(1, K).expand(M, K), torch.randn(M * K + 1)[1:].view(M, K)):
        hold_layer(layer_case(M, K, N, 5, base, F32, x=x.to(base)))
    for dy in (torch.randn(2 * M, 2 * N)[::2, ::2], torch.randn(N, M).t(), torch.randn(1, 1).expand(M, N), torch.randn(M * N + 1)[1:].view(M, N)):
        hold_layer(layer_case(M, K, N, 5, base, F32, dy=dy.to(base)))


@pytest.mark.parametrize("base, adapter", [(F32, F32), (BF16, F32), (BF16, BF16), (F16, F32), (F16, F16)])
@pytest.mark.parametrize("R", [6, 40])
def test_whole_layer_with_adapters_of_any_layout(on_emulation, base, adapter, R):
    M, K, N = 35, 72, 136
    generator = torch.Generator().manual_seed(5)
    turned = {"A": torch.randn(K, R, generator=generator).t() * K**-0.5, "B": torch.randn(R, N, generator=generator).t() * R**-0.5}
    sliced = {"A": torch.randn(R, 2 * K, generator=generator)[:, ::2] * K**-0.5, "B": torch.randn(N, R + 3, generator=generator)[:, 1 : R + 1] * R**-0.5}
    for some in (turned, sliced):
        hold_layer(replace(layer_case(M, K, N, R, base, adapter), **{name: t.to(adapter) for name, t in some.items()}))


def hold_sums_that_cancel(base):
    """Few products, of which little may be left: every bit of a float32 adapter counts."""
    for seed in range(40):
        oracle.hold_thin(1, 8, 8, 1, base, F32, seed=seed)


@pytest.mark.parametrize("base", [BF16, F16])
def test_sums_that_cancel(on_emulation, base):
    hold_sums_that_cancel(base)


@pytest.mark.parametrize("base, adapter", [(BF16, F32), (BF16, BF16), (F16, F32)])
@pytest.mark.parametrize("R", [6, 20])
def test_more_rows_share_a_block(on_emulation, base, adapter, R):
    """Beyond 4096 rows, where other forms of the kernels run."""
    oracle.hold_thin(4096 + 40, 72, 136, R, base, adapter)


def window(rows, columns, left=3):
    """A matrix in the middle of NaN: what is read beside it shows. left=8: its rows are 16-byte aligned."""
    frame = torch.full((rows + 2, columns + 16), float("nan"))
    frame[1:-1, left : left + columns] = torch.randn(rows, columns)
    return frame[1:-1, left : left + columns]


def hold_windows(base):
    hold_layer(layer_case(33, 71, 45, 5, base, F32, x=window(33, 71).to(base), dy=window(33, 45).to(base)))
    hold_layer(layer_case(33, 72, 48, 6, base, F32, x=window(33, 72, 8).to(base), dy=window(33, 48, 8).to(base)))


@pytest.mark.parametrize("base", [F32, BF16])
def test_nothing_is_read_beside_the_matrices(on_emulation, base):
    hold_windows(base)


@pytest.mark.parametrize("order", range(4))
def test_whole_layer_in_any_order_of_warps_and_blocks(on_emulation, order):
    case, results = layer_case(70, 200, 140, 20, BF16, F32, p=0.2), []
    for seed in (order, order + 100):
        on_emulation.seed(seed)
        results.append(hold_layer(case))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def hold_many_rows():
    """More than 256 groups of 64 rows: a program adds to its own part of dB from its second group on. dB alone, where no
    sum over warps stands between two groups."""
    for base, R in ((F32, 2), (BF16, 2), (BF16, 3)):
        dy, u = torch.randn(256 * 64 + 70, 8).to(base), torch.randn(256 * 64 + 70, R)
        dB = ops.lowrank_grad(dy, None, u, None, None, 0.0, 1.5, F32)[2]
        check("dB of many rows", dB, 1.5 * dy.double().t() @ u.double(), 1.5 * dy.float().t() @ u, base=base, K=len(dy))


def test_more_rows_than_programs_share_the_parts(on_emulation):
    hold_many_rows()
    hold_layer(layer_case(256 * 64 + 70, 8, 8, 2, BF16, F32))


def hold_nf4(N, K, dtype, blocksize, nested):
    """Bytes and values are the reference's; a window, its surroundings untouched; a whole layer forward and backward."""
    dense = torch.randn(N, K).to(dtype)
    weight = functional.quantize_nf4(dense, blocksize, nested)
    packed, absmax = reference.quantize_nf4(dense, blocksize)
    assert torch.equal(weight.packed, packed) and (nested or torch.equal(weight.absmax, nf4.bytes_of(absmax)))
    pieces = (*weight[:3], *weight.format)
    for n0, k0, rows, columns in ((0, 0, N, K), (N // 3, K // 3, N - N // 3, K - K // 3), (0, K // 8 // 2 * 8, N, K - K // 8 // 2 * 8)):
        frame = torch.full((rows + 2, columns + 48), 7.0).to(dtype)
        out = frame[1 : rows + 1, 16 : 16 + columns]
        cuda.launch("dequantize_nf4", dense, (native.nf4_weight(*pieces), n0, k0, rows, columns, native.matrix(out)))
        assert torch.equal(out, reference.dequantize_nf4(*pieces, n0, k0, rows, columns, dtype))
        out.fill_(7.0)
        assert (frame == 7.0).all(), "wrote outside its window"


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("N, K, blocksize", [(1, 1, 32), (3, 7, 64), (5, 96, 64), (4, 128, 32), (2, 2100, 4096), (3, 1040, 1024)])
def test_nf4(on_emulation, N, K, dtype, blocksize):
    for nested in (True, False):
        hold_nf4(N, K, dtype, blocksize, nested)


def hold_nf4_linear(module, M, N, K, dtype, blocksize, nested, R=0, v_dtype=F32, x=None, order=0):
    """y of few rows, with a bias and, where R, a low-rank term, in a window whose surroundings stay untouched."""
    weight = functional.quantize_nf4((torch.randn(N, K) * K**-0.5).to(dtype), blocksize, nested)
    x = torch.randn(M, K).to(dtype) if x is None else x
    bias, lowrank_bias = torch.randn(N).to(dtype), torch.randn(N).to(v_dtype) if R else None
    u, v = (torch.randn(M, R), torch.randn(N, R).to(v_dtype)) if R else (None, None)
    frame = torch.full((M + 2, N + 19), 7.0).to(dtype)
    y = frame[1 : M + 1, 1 : N + 1]
    module.seed(order)
    lowrank = add_lowrank_arguments(y, u, v, 0.5, lowrank_bias, None, 0.0)
    module.nf4_linear(0, native.nf4_weight(*weight[:3], *weight.format), native.matrix(x), native.vector(bias), *lowrank)
    dense = weight.dequantize(F32)
    exact, eager = x.double() @ dense.double().t() + bias.double(), torch.addmm(bias, x, dense.to(dtype).t())
    if R:
        exact += 0.5 * (u.double() @ v.double().t() + lowrank_bias.double())
        eager = (eager.float() + 0.5 * (u @ v.float().t() + lowrank_bias.float())).to(dtype)
    check(f"NF4 emulated M={M} N={N} K={K}", y.clone(), exact, eager, base=dtype, K=K)
    out = y.clone()
    y.fill_(7.0)
    assert (frame == 7.0).all(), "wrote outside its matrix"
    return x, weight, out


# one and two groups of 8 rows; a K of one segment of 64, of several steps of 128 for each warp and of half a step at the end;
# rows that begin within blocks and within bytes; 1, 2 and 4 tiles to a block
@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize(
    "M, N, K, blocksizes",
    [(1, 16, 64, (64, 4096)), (8, 40, 192, (64, 128)), (9, 33, 1088, (64, 256)), (16, 70, 2176, (64,)), (3, 17, 7, (32, 64)), (16, 20, 96, (32, 64)), (5, 10, 855, (64,)),
     (4, 37, 128, (32,)), (5, 4100, 64, (64,)), (12, 4100, 128, (64,)), (3, 8450, 64, (64,)), (9, 8450, 64, (64,))],
)  # fmt: skip
def test_nf4_linear(emulated, dtype, M, N, K, blocksizes):
    for blocksize in blocksizes:
        hold_nf4_linear(emulated, M, N, K, dtype, blocksize, True, R=3)
        hold_nf4_linear(emulated, M, N, K, dtype, blocksize, False, R=17 if N < 100 else 0, v_dtype=dtype)


def test_nf4_linear_of_any_layout(emulated):
    M, K = 5, 128
    for x in (torch.randn(2 * M, 2 * K)[::2, ::2], torch.randn(M * K + 1)[1:].view(M, K), torch.randn(K, M).t(), torch.randn(1, K).expand(M, K)):
        hold_nf4_linear(emulated, M, 24, K, BF16, 64, True, R=2, x=x.to(BF16))


@pytest.mark.parametrize("M, dtype", [(17, BF16), (1, F32)])
def test_nf4_linear_is_refused_where_it_has_no_form(emulated, M, dtype):
    with pytest.raises(RuntimeError, match="refused"):
        hold_nf4_linear(emulated, M, 16, 64, dtype, 64, True)


@pytest.mark.parametrize("order", range(4))
def test_nf4_rows_have_bits_of_their_own(on_emulation, order):
    """In any order of warps, and whichever rows are beside them."""
    x, weight, y = hold_nf4_linear(on_emulation, 16, 40, 1280, BF16, 64, True, order=order)
    for m in (0, 7, 8, 15):
        for rows in (x[m : m + 1], x[max(0, m - 3) : m + 1]):
            assert torch.equal(functional.nf4_linear(rows, weight)[-1], functional.nf4_linear(x, weight)[m])


def test_the_backend_takes_the_form_that_the_table_names(on_emulation, monkeypatch):
    seen = []
    monkeypatch.setattr(cuda, "launch", lambda name, tensor, arguments: seen.append(name) or getattr(on_emulation, name)(0, *arguments))
    monkeypatch.setattr(triton, "nf4_linear_lowrank_fused", lambda x, *rest: seen.append("fused") or torch.zeros(x.shape[0], 48))
    weight = functional.quantize_nf4(torch.randn(48, 64).to(BF16))
    u, v = torch.randn(16, 2), torch.randn(48, 2)
    for M, dtype, names in ((16, BF16, ["nf4_linear"]), (17, BF16, ["fused"]), (129, BF16, ["dequantize_nf4", "add_lowrank"]), (4, F32, ["dequantize_nf4", "add_lowrank"])):
        del seen[:]
        cuda.nf4_linear_lowrank(torch.randn(M, 64).to(dtype), *weight[:3], *weight.format, False, u[:1].expand(M, 2).contiguous(), v, 1.0, None, None, None, 0.0)
        assert seen == names


@pytest.mark.parametrize("base", [F32, BF16])
def test_nf4_layer(on_emulation, base, monkeypatch):
    monkeypatch.setattr(cuda, "SLAB", 1)  # 64 columns at a time
    case = make_case(9, 136, 200, 3, base, F32, bias=True)
    weight = functional.quantize_nf4(case.W)
    leaves = {name: t.clone().requires_grad_() for name, t in case.tensors().items() if name != "W"}
    y = lora_linear(leaves["x"], weight, leaves["A"], leaves["B"], case.scaling, leaves["bias"])
    y.backward(case.dy)
    exact, eager = oracle.in_float64(replace(case, W=weight.dequantize(F32))), oracle.peft_eager(replace(case, W=weight.dequantize(base)))
    for name, out in ({"y": y.detach()} | {name: leaf.grad for name, leaf in leaves.items()}).items():
        check(f"NF4 emulated {name}", out, exact[name], eager[name], base=base, K=200)


@pytest.mark.parametrize("base, adapter", [(F32, F32), (BF16, F32), (F16, F16)])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_adapters_that_share_x(on_emulation, base, adapter, p):
    oracle.hold_shared(base, adapter, p)


def test_each_result_alone(on_emulation):
    case = make_case(40, 24, 36, 5, BF16, F32)
    u = ops.lowrank_down(case.x, [case.A], None, 0.0)
    du, dA, dB = ops.lowrank_grad(case.dy, case.x, u, case.B, None, 0.0, 1.5, F32)
    for x, u_in, B in ((None, None, case.B), (None, u, None), (case.x, None, case.B), (None, u, case.B)):
        alone = ops.lowrank_grad(case.dy, x, u_in, B, None, 0.0, 1.5, F32)
        for got, whole, wanted in zip(alone, (du, dA, dB), (B is not None, x is not None, u_in is not None)):
            assert torch.equal(got, whole) if wanted else got.numel() == 0


def test_launches(on_emulation):
    """Of our own kernels: 2 forward (and a product of torch's), 4 backward (and a product), with or without dropout."""
    for p in (0.0, 0.2):
        case = make_case(40, 24, 36, 5, BF16, F32, p=p)
        leaves = [t.requires_grad_() for t in (case.x, case.A, case.B)]
        start = on_emulation.launches()
        y = lora_linear(leaves[0], case.W, leaves[1], leaves[2], dropout_p=p)
        assert on_emulation.launches() - start == 2
        y.backward(case.dy)
        assert on_emulation.launches() - start == 2 + 4
