"""Rank rows that stand anywhere in place of stacks, and ids that are none: what a pool asks of the kernels."""

import pytest
import torch
from numerics import check
from test_native_kernels import far_rows
from test_multi import DISTRIBUTIONS, F32, IDS, MIXES, Case
from torch.nn import functional as F

import lorakernels as lk
from lorakernels import adapter_ids, multi_ops
from lorakernels.functional import multi_lora_linear, quantize_nf4

BF16 = torch.bfloat16


# -- rank rows under the kernels -----------------------------------------------------------------------------------------------


def rank_rows(case, seed=0):
    """The stacks of a case as rows that stand anywhere among others, which hold NaN."""
    E, R = case.A.shape[:2]
    total = int(case.ranks.sum())
    rows = torch.randperm(total + 5, generator=torch.Generator().manual_seed(seed))[:total].tolist()
    A, B = (torch.full((total + 5, size), float("nan"), dtype=case.A.dtype, device=case.A.device) for size in (case.A.shape[2], case.B.shape[1]))
    pages = torch.zeros(E, R, dtype=torch.int64)
    for e, rank in enumerate(case.ranks.tolist()):
        mine, rows = rows[:rank], rows[rank:]
        pages[e, :rank] = torch.tensor(mine)
        A[mine], B[mine] = case.A[e, :rank], case.B[e, :, :rank].t()
    return A, B, pages.to(case.A.device)


@pytest.mark.parametrize("base, adapter", MIXES, ids=IDS)
def test_rank_rows_give_the_bits_of_stacks(backend, device, base, adapter):
    for M, p in ((23, 0.0), (23, 0.4), (3, 0.0)):
        case = Case(M, 72, 40, 4, [16, 3, 8, 20], DISTRIBUTIONS["random"](M, 4), base, adapter, device, p=p)
        whole, (A, B, pages) = case.hold(), rank_rows(case)
        x = case.x.clone().requires_grad_()
        torch.manual_seed(3)
        y = multi_lora_linear(x, case.W, A, B, case.ids, case.scaling, case.bias, ranks=case.ranks, pages=pages, dropout_p=case.p)
        y.backward(case.dy)
        exact, eager = case.by_hand(torch.float64, case.W), case.by_hand(None, case.W)
        for name, out in (("y", y.detach()), ("dx", x.grad)):
            check(f"rank rows {name}", out, exact[name], eager[name], base=base, K=72)
            assert torch.equal(out, whole[name]) or backend in ("composed", "reference")  # torch sums in an order that follows the layout


def test_rank_rows_over_nf4(backend, device):
    case = Case(9, 64, 48, 3, [2, 7, 16], DISTRIBUTIONS["random"](9, 3), BF16, F32, device)
    (A, B, pages), weight = rank_rows(case), quantize_nf4(case.W)
    y = multi_lora_linear(case.x, weight, A, B, case.ids, case.scaling, case.bias, ranks=case.ranks, pages=pages)
    check("rank rows over NF4", y, case.by_hand(torch.float64, weight.dequantize(F32))["y"], case.by_hand(None, weight.dequantize(BF16))["y"], base=BF16, K=64)
    assert torch.equal(y, case.run(weight)["y"]) or backend in ("composed", "reference")


def test_rank_rows_beyond_31_bits(backend, device):
    if device != "cpu":
        pytest.skip("on the CPU: a file that is one hole is no GPU memory")
    A, B, x, W = far_rows(), far_rows(), torch.randn(3, 40).half(), torch.randn(40, 40).half()
    pages, ids = torch.tensor([[3, 0], [2, 1]]), torch.tensor([1, -1, 0])
    y = multi_lora_linear(x, W, A, B, ids, 0.5, pages=pages)
    exact, eager = F.linear(x.double(), W.double()), F.linear(x, W).float()
    for row, e in ((0, 1), (2, 0)):
        a, b = (torch.stack([t[p] for p in pages[e].tolist()]) for t in (A, B))
        exact[row] += 0.5 * (x[row].double() @ a.double().t()) @ b.double()
        eager[row] += 0.5 * (x[row] @ a.t()).float() @ b.float()
    check("rank rows 2**30 apart", y, exact, eager.half(), base=torch.float16, K=40)


@pytest.mark.parametrize("splits", [1, 3])
def test_several_matrices_that_share_x(backend, device, splits):
    """One product with the rows of all of them, each of its own rank, 0 too."""
    P, G, K, E, R, M = 30, 3, 40 if splits == 1 else 200, 4, 8, 17
    ids = DISTRIBUTIONS["random"](M, E).to(device)
    rows = torch.randn(P, G, K, device=device)
    pages = torch.randperm(P)[: E * 7].view(E, 7)
    pages = F.pad(pages, (0, R - 7)).to(device)
    ranks = torch.tensor([[1, 7, 3, 4], [5, 0, 7, 2], [0, 6, 1, 7]], device=device)
    for x in (torch.randn(M, K, device=device), torch.randn(M, 2 * K, device=device).to(BF16)[:, ::2]):
        order, starts, tiles = multi_ops.route(ids, E)
        parts = multi_ops.multi_lowrank_down(x, rows, order, starts, tiles, ranks, pages, None, None, splits)
        assert parts.shape == (splits, M, G * R)
        together = parts.sum(0)
        for g in range(G):
            alone = multi_ops.multi_lowrank_down(x, rows[:, g : g + 1], order, starts, tiles, ranks[g], pages, None, None, splits).sum(0)
            exact, eager, written = torch.zeros_like(alone).double(), torch.zeros_like(alone), torch.zeros_like(alone).bool()
            for place, row in enumerate(order.tolist()):
                e = ids[row].item()
                rank = ranks[g, e].item() if e >= 0 else 0
                for out in (exact, eager):
                    out[place, :rank] = x[row].to(out.dtype) @ rows[pages[e, :rank], g].to(out.dtype).t()
                written[place, :rank] = True
            part = together[:, g * R : (g + 1) * R]
            for u in (part, alone):
                check("shared shrink", torch.where(written, u, 0.0), exact, eager, base=F32, K=K)
            assert torch.equal(part[written], alone[written])


def test_opcheck(backend, device):
    case = Case(6, 16, 8, 2, [3, 3], torch.tensor([0, 1, 1, 0, 0, 1]), F32, F32, device)  # all of u is somebody's
    A, B, pages = rank_rows(case)
    A, B, operators = torch.nan_to_num(A)[:, None], torch.nan_to_num(B)[:, :, None], torch.ops.lorakernels
    order, starts, tiles = multi_ops.route(case.ids, 2)
    u, y = torch.randn(6, 3, device=device), torch.randn(6, 8, device=device)
    with torch.no_grad():
        torch.library.opcheck(operators.multi_lowrank_down.default, (case.x, A, order, starts, tiles, case.ranks, pages, None, None, 1))
        torch.library.opcheck(operators.multi_add_lowrank.default, (y, u[None], B, case.scaling, order, starts, tiles, case.ranks, pages, None, None))
        torch.library.opcheck(operators.multi_lowrank_grad.default, (y, None, None, B, case.scaling, order, starts, tiles, case.ranks, pages, None, None, F32))


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"pages": torch.tensor([[0, 4], [1, 2]])}, ValueError, "pages: expected rows from 0 to 3, got 0 to 4"),
        ({"pages": torch.tensor([[0, -1], [1, 2]])}, ValueError, "pages: expected rows from 0 to 3, got -1 to 2"),
        ({"pages": torch.tensor([0, 1])}, TypeError, "pages: expected int64 of shape (E, R)"),
        ({"pages": torch.tensor([[0], [1]], dtype=torch.int32)}, TypeError, "pages: expected int64 of shape (E, R)"),
        ({"pages": [[0]]}, TypeError, "pages: expected int64 of shape (E, R)"),
        ({"pages": torch.tensor([[0, 1], [1, 2]]).t()}, ValueError, "pages: expected the ranks of an adapter side by side"),
        ({"lora_A": torch.ones(4, 3)}, ValueError, "lora_A: expected shape (P, K=4), got (4, 3)"),
        ({"lora_B": torch.ones(3, 5)}, ValueError, "lora_B: expected shape (P=4, N=5), got (3, 5)"),
        ({"lora_B": torch.ones(4, 5).double()}, TypeError, "lora_B: expected float32"),
        ({"lora_A": torch.ones(4, 4, requires_grad=True)}, ValueError, "lora_A: rank rows with pages get no gradient"),
        ({"adapter_ids": torch.tensor([0, 1, 2])}, ValueError, "adapter_ids: expected ids from -1 (no adapter) to 1, got 2 for row 2"),
    ],
)
def test_arguments_of_rank_rows(change, error, words):
    arguments = {"x": torch.ones(3, 4), "weight": torch.ones(5, 4), "lora_A": torch.ones(4, 4), "lora_B": torch.ones(4, 5), "adapter_ids": torch.tensor([0, 1, -1])}
    arguments |= {"scaling": 1.0, "pages": torch.tensor([[0, 1], [2, 3]])}
    with pytest.raises(error) as caught:
        multi_lora_linear(**(arguments | change))
    assert words in str(caught.value)


# -- ids that are none ---------------------------------------------------------------------------------------------------------


def test_a_row_with_an_id_out_of_range_is_nan(backend, device):
    """Never the base's answer, where nobody looks at the ids before the kernels do."""
    case = Case(40, 8, 6, 2, [2, 2], torch.tensor([0, 1, -1, 1] * 10), F32, F32, device)
    wrong = case.ids.clone()
    wrong[[1, 7, 38]] = torch.tensor([2, -9, 1 << 40], device=device)
    others = [m for m in range(40) if m not in (1, 7, 38)]
    for base in (F32, BF16, torch.float16):
        x, W = case.x.to(base).detach().requires_grad_(), case.W.to(base)
        y = multi_lora_linear(x, W, case.A, case.B, wrong, case.scaling, check_ids="off")
        whole = multi_lora_linear(x.detach(), W, case.A, case.B, case.ids, case.scaling)
        assert y[[1, 7, 38]].isnan().all()
        check("beside NaN", y[others], whole[others].double(), whole[others], base=base, K=8)
        assert torch.equal(y[others], whole[others]) or backend == "triton"  # NumPy's sums follow a row's place in its tile
        y.backward(torch.ones_like(y))
        assert x.grad[[1, 7, 38]].isnan().all() and not x.grad[others].isnan().any()


def test_the_flag_of_a_device():
    """What happens on a GPU, with the CPU in its place: the flag is raised by the next call with ids, or by check(), once."""
    wrong, right = torch.tensor([False, True]), torch.tensor([False, False])
    try:
        lk.check()
        adapter_ids.note(right)
        adapter_ids.note(wrong)
        with pytest.raises(ValueError, match="adapter_ids: an earlier call on cpu had an id that is no adapter's"):
            adapter_ids.note(right)
        adapter_ids.note(right)
        adapter_ids.note(wrong)
        with pytest.raises(ValueError, match="adapter_ids: a call on cpu had an id"):
            lk.check()
        lk.check()
    finally:
        adapter_ids._flags.clear()
