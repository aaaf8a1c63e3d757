"""Many adapters in one batch: the functions, the layer, forward and backward, under the error rule."""

import copy
import pickle

import oracle
import pytest
import torch
from numerics import check
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import lorakernels as lk
from lorakernels import backends, dropout, multi_ops
from lorakernels.functional import multi_lora_linear, nf4_linear, quantize_nf4, route, routed_linear

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
MIXES = [(F32, F32), (BF16, F32), (BF16, BF16), (F16, F32), (F16, F16)]
IDS = ["float32", "bf16+float32", "bf16", "fp16+float32", "fp16"]
mixes = pytest.mark.parametrize("base, adapter", MIXES, ids=IDS)



def geometric(M, E):
    """Segments of 1, 2, 3, 5, 7, 11, ... rows."""
    ids, i = [], 0
    while len(ids) < M:
        i += 1
        ids += [i % E] * int(1.5**i)
    return torch.tensor(ids[:M])


DISTRIBUTIONS = {
    "identical": lambda M, E: torch.full((M,), E - 1),
    "distinct": lambda M, E: torch.arange(M) % E,
    "skewed": lambda M, E: torch.tensor([0] + [E - 1] * (M - 1))[:M],
    "geometric": lambda M, E: geometric(M, E),
    "half none": lambda M, E: torch.where(torch.arange(M) % 2 == 0, -1, torch.arange(M) % E),
    "all none": lambda M, E: torch.full((M,), -1),
    "random": lambda M, E: torch.randint(-1, E, (M,), generator=torch.Generator().manual_seed(M)),
}


class Case:
    """One call and its gradient: stacks whose ranks beyond an adapter's own hold NaN, which nobody may read."""

    def __init__(self, M, K, N, E, ranks, ids, base, adapter, device="cpu", bias=True, p=0.0, x=None, dy=None, seed=0):
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape, dtype, size=1.0):
            return (torch.randn(*shape, generator=generator) * size).to(dtype).to(device)

        R = max(ranks)
        self.ids, self.ranks = ids.to(device), torch.tensor(ranks, dtype=torch.int64, device=device)
        self.x = draw(M, K, dtype=base) if x is None else x.to(base).to(device)
        self.dy = draw(M, N, dtype=base) if dy is None else dy.to(base).to(device)
        self.W, self.bias = draw(N, K, dtype=base, size=K**-0.5), draw(N, dtype=base) if bias else None
        self.A, self.B = draw(E, R, K, dtype=adapter, size=K**-0.5), draw(E, N, R, dtype=adapter, size=R**-0.5)
        self.scaling = torch.linspace(0.5, 2.0, E, device=device)
        for e, rank in enumerate(ranks):
            self.A[e, rank:], self.B[e, :, rank:] = float("nan"), float("nan")
        self.p = [p] * E if isinstance(p, float) else p
        self.mask = None

    def run(self, weight=None, ids=None, **arguments):
        """y and the gradients of x, A, B and bias."""
        leaves = {name: getattr(self, name).detach().requires_grad_() for name in ("x", "A", "B", "bias") if getattr(self, name) is not None}
        for leaf in leaves.values():
            leaf.grad = None
        torch.manual_seed(3)
        y = multi_lora_linear(
            leaves["x"], self.W if weight is None else weight, leaves["A"], leaves["B"], self.ids if ids is None else ids, self.scaling, leaves.get("bias"),
            ranks=self.ranks, dropout_p=self.p, **arguments,
        )  # fmt: skip
        y.backward(self.dy.to(y.dtype))
        return {"y": y.detach()} | {f"d{name}": leaf.grad for name, leaf in leaves.items()}

    def masks(self):
        """What the call's seed keeps, for each adapter's p."""
        torch.manual_seed(3)
        seed = dropout.draw_seed(self.x.device)
        return {p: dropout.keep_mask(seed, *self.x.shape, p) for p in set(self.p)}

    def by_hand(self, dtype, W):
        """The same adapter by adapter, as PEFT's layer computes: in float64, or in the case's own dtypes."""
        wide = dtype is not None
        cast = (lambda t: t.detach().to(dtype)) if wide else (lambda t: t.detach())
        x, A, B, bias = (None if t is None else cast(t).clone().requires_grad_() for t in (self.x, self.A, self.B, self.bias))
        masks = self.masks() if any(self.p) else None
        y = F.linear(x, cast(W), bias)
        parts = []
        for e, rank in enumerate(self.ranks.tolist()):
            rows = (self.ids == e).nonzero()[:, 0]
            if not len(rows):
                continue
            some = x[rows].to(A.dtype)
            if masks is not None and self.p[e]:
                some = some * (masks[self.p[e]][rows].to(A.dtype) * oracle.scale(self.p[e])).to(A.dtype)
            delta = F.linear(F.linear(some, A[e, :rank]), B[e, :, :rank]) * self.scaling[e].to(A.dtype)
            parts.append((rows, delta))
        wide_y = y.to(torch.promote_types(y.dtype, A.dtype))
        for rows, delta in parts:
            wide_y = wide_y.index_add(0, rows, delta.to(wide_y.dtype))
        y = wide_y.to(x.dtype)
        y.backward(self.dy.to(y.dtype))
        grads = {"dx": x.grad, "dA": A.grad, "dB": B.grad} | ({} if bias is None else {"dbias": bias.grad})
        return {"y": y.detach()} | {name: torch.zeros_like({"dA": A, "dB": B}[name]) if g is None else g for name, g in grads.items()}

    def hold(self, weight=None, label=""):
        exact_W, eager_W = (self.W, self.W) if weight is None else (weight.dequantize(F32), weight.dequantize(self.x.dtype))
        results, exact, eager = self.run(weight), self.by_hand(torch.float64, exact_W), self.by_hand(None, eager_W)
        K = max(self.W.shape)
        for name, out in results.items():
            assert out.dtype == eager[name].dtype and (name == "dx" or out.is_contiguous()), name  # autograd lays out a leaf's own
            check(f"multi {label}{name}", out, exact[name], eager[name], base=self.x.dtype, K=K)
        for e in range(len(self.ranks)):  # exactly nothing beyond an adapter's rank, and for adapters that no row names
            rank = self.ranks[e] if (self.ids == e).any() else 0
            assert not results["dA"][e, rank:].any() and not results["dB"][e, :, rank:].any()
        return results


@pytest.mark.parametrize("base, adapter", MIXES[:2], ids=IDS[:2])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_distributions_and_ranks(backend, device, base, adapter, distribution):
    ranks = [1, 3, 8, 16, 24]
    Case(23, 40, 33, 5, ranks, DISTRIBUTIONS[distribution](23, 5), base, adapter, device).hold(label=f"{distribution} ")


@pytest.mark.parametrize("M", [0, 1, 63, 64, 65, 1000])
def test_rows(backend, device, M):
    Case(M, 24, 17, 3, [2, 5, 4], DISTRIBUTIONS["random"](M, 3), F32, F32, device).hold(label=f"M={M} ")


@pytest.mark.parametrize("K, N", [(3424, 17), (17, 2049), (1000, 1000), (7392, 17), (17, 7392)])
def test_awkward_sizes(backend, device, K, N):
    # in Triton's interpreter 200 ranks of the larger sizes take a minute each, and what they add is more of the same tiles
    ranks = [1, 3, 17, 7] if backend == "triton" and device == "cpu" and max(K, N) > 2000 else [1, 64, 200, 7]
    Case(9, K, N, 4, ranks, DISTRIBUTIONS["random"](9, 4), BF16, F32, device).hold(label=f"{K}->{N} ")


@pytest.mark.parametrize("E", [1, 40, 300])
def test_many_resident_adapters(backend, device, E):
    Case(30, 16, 24, E, [1 + e % 9 for e in range(E)], DISTRIBUTIONS["random"](30, E), F32, F32, device).hold(label=f"E={E} ")


@mixes
def test_dropout_of_each_adapter(backend, device, base, adapter):
    Case(40, 72, 33, 4, [3, 8, 1, 5], DISTRIBUTIONS["random"](40, 4), base, adapter, device, p=[0.0, 0.3, 0.6, 0.3]).hold()


@pytest.mark.parametrize("base", [F32, BF16])
def test_nf4_base(backend, device, base):
    for M in (6, 40):
        case = Case(M, 64, 48, 3, [2, 7, 16], DISTRIBUTIONS["random"](M, 3), base, F32, device)
        case.hold(quantize_nf4(case.W), label=f"NF4 M={M} ")


@mixes
def test_split_over_K(backend, device, base, adapter, monkeypatch):
    """As a GPU splits it where rows are few: also u of a backward, which wants it whole."""
    assert [multi_ops.splits_of(*shape) for shape in [(64, 4096, "cuda"), (64, 1100, "cuda"), (1, 17, "cuda"), (8192, 4096, "cuda"), (64, 4096, "cpu")]] == [8, 2, 1, 1, 1]
    monkeypatch.setattr(multi_ops, "splits_of", lambda *_: 3)
    case = Case(9, 200, 40, 4, [3, 17, 8, 1], DISTRIBUTIONS["random"](9, 4), base, adapter, device)
    y = case.hold(label="split ")["y"]
    with torch.no_grad():
        assert torch.equal(multi_lora_linear(case.x, case.W, case.A, case.B, case.ids, case.scaling, case.bias, ranks=case.ranks), y)


def test_rows_in_order_for_several_layers(backend, device):
    case = Case(9, 40, 24, 4, [3, 17, 8, 1], DISTRIBUTIONS["random"](9, 4), F32, F32, device)
    once = route(case.ids, case.x.shape, 4)
    for name, out in case.run(ids=once).items():
        assert torch.equal(out, case.run()[name])
    for x, E, words in ((case.x[:8], 4, "for 8 rows and 4 adapters, got it for 9 and 4"), (case.x, 3, "for 9 rows and 3 adapters, got it for 9 and 4")):
        with pytest.raises(ValueError, match=words):
            multi_lora_linear(x, case.W, case.A[:E], case.B[:E], once, 1.0)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_rows_are_sorted_by_adapter(backend, device, dtype):
    """Within an adapter in their own order; first those without one, last those whose id is none."""
    far = torch.iinfo(dtype)
    for M, E in ((0, 3), (1, 1), (64, 64), (200, 3), (50, 300)):
        ids = torch.randint(-1, E, (2 * M,), dtype=dtype, device=device)[::2]
        if M > 1:
            ids[[M // 2, 0, M - 1, 1]] = torch.tensor([E, far.max, -2, far.min], dtype=dtype, device=device)
        ranks = [id if -1 <= id < E else E for id in ids.tolist()]
        order, starts = multi_ops.multi_route(ids, E)
        assert order.dtype == starts.dtype == torch.int64
        assert order.tolist() == sorted(range(M), key=lambda row: (ranks[row], row))
        assert starts.tolist() == [sum(rank < e for rank in ranks) for e in range(E + 1)]


def test_layouts(backend, device):
    M, K, N, ids = 21, 40, 24, DISTRIBUTIONS["random"](21, 3)
    for x in (torch.randn(2 * M, 2 * K)[::2, ::2], torch.randn(K, M).t(), torch.randn(1, K).expand(M, K), torch.randn(M * K + 1)[1:].view(M, K)):
        Case(M, K, N, 3, [2, 5, 4], ids, F32, F32, device, x=x).hold(label="layout ")
    for dy in (torch.randn(2 * M, 2 * N)[::2, ::2], torch.randn(N, M).t(), torch.randn(1, 1).expand(M, N)):
        Case(M, K, N, 3, [2, 5, 4], ids, F32, F32, device, dy=dy).hold(label="layout ")


def test_ids_of_a_batch_of_sequences(backend, device):
    case = Case(12, 16, 8, 3, [2, 2, 2], torch.tensor([0] * 4 + [-1] * 4 + [2] * 4), F32, F32, device)
    flat = case.run()["y"]
    x = case.x.view(3, 4, 16)
    for ids in (torch.tensor([0, -1, 2], device=device), case.ids.view(3, 4), case.ids.view(3, 4).int()):
        y = multi_lora_linear(x, case.W, case.A, case.B, ids, case.scaling, case.bias, ranks=case.ranks)
        assert torch.equal(y.view(12, 8), flat)


@mixes
def test_a_rows_bits_are_its_own(backend, device, base, adapter):
    """Whatever the adapters beside it, and wherever it stands; without an adapter it is the base's (F.linear's, on most processors), bit for bit."""
    M, E = 37, 4
    case = Case(M, 72, 40, E, [16, 3, 8, 20], torch.randint(-1, E, (M,), generator=torch.Generator().manual_seed(1)), base, adapter, device)
    whole = case.run()
    others = case.ids.clone()
    others[1::2] = torch.randint(-1, E, others[1::2].shape, generator=torch.Generator().manual_seed(2)).to(device)
    changed = case.run(ids=others)
    if backend == "cpu":  # where torch multiplies the rows of each adapter, its sums' order is torch's
        for name in ("y", "dx"):
            assert torch.equal(changed[name][::2], whole[name][::2])
    plain = backends.chosen(case.x.device.type, base).base_product(case.x, case.W, case.bias)
    assert torch.equal(whole["y"][case.ids == -1], plain[case.ids == -1])
    none = case.run(ids=torch.full_like(case.ids, -1))
    assert torch.equal(none["y"], plain) and torch.equal(none["dx"][case.ids == -1], whole["dx"][case.ids == -1])
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(case.run().values(), whole.values()))


@mixes
def test_a_rows_bits_are_its_own_however_many_rows_its_adapter_has(backend, device, base, adapter):
    few = torch.zeros(64, dtype=torch.int64)
    few[5:50:20] = 1
    case = Case(64, 72, 40, 2, [16, 20], few, base, adapter, device, p=[0.0, 0.2])
    rows, alone, beside = few == 1, case.run(ids=torch.where(case.ids == 1, 1, -1)), case.run()
    assert torch.equal(alone["dA"][1], beside["dA"][1]) and torch.equal(alone["dB"][1], beside["dB"][1])
    if backend == "cpu":  # where torch multiplies the rows of each adapter, its sums' order is torch's
        many = case.run(ids=torch.ones_like(case.ids))
        for name in ("y", "dx"):
            assert torch.equal(many[name][rows], beside[name][rows]) and torch.equal(alone[name][rows], beside[name][rows])


@mixes
def test_the_order_of_rows_moves_no_bit(backend, device, base, adapter):
    M, order = 41, torch.randperm(41, generator=torch.Generator().manual_seed(5))
    case = Case(M, 72, 40, 4, [16, 3, 8, 20], DISTRIBUTIONS["random"](M, 4), base, adapter, device, bias=False)
    case.W.zero_()  # the base's product is torch's, whose sums may follow a row's place
    first = case.run()
    for name in ("x", "dy", "ids"):
        setattr(case, name, getattr(case, name)[order.to(device)])
    second = case.run()
    for name in ("y", "dx"):
        moved = first[name][order.to(device)]
        check(f"multi moved {name}", second[name], moved.double(), moved, base=base, K=72)
        assert torch.equal(second[name], moved) or backend != "cpu"  # NumPy's and torch's sums may follow a row's place too


@pytest.mark.parametrize("base, adapter", MIXES[:3], ids=IDS[:3])
@pytest.mark.parametrize("M, E, distribution, p", [(300, 9, "geometric", 0.3), (600, 400, "distinct", 0.0), (1000, 9, "skewed", 0.0)])
def test_bits_do_not_depend_on_threads_however_uneven_the_adapters_are(base, adapter, M, E, distribution, p):
    """Some of unequal cost; many; and one with nearly all rows, work enough to be shared out by itself, beside another."""
    if why := backends.why_not("cpu", "cpu", base):
        pytest.skip(why)
    case = Case(M, 300, 70, E, ([16, 3, 8, 20, 1, 5, 9, 2, 16] * E)[:E], DISTRIBUTIONS[distribution](M, E), base, adapter, p=p)
    before, results = torch.get_num_threads(), []
    with backends.use_backend("cpu"):
        case.hold()
        try:
            for threads in (2, 1, 3):
                torch.set_num_threads(threads)
                results.append(case.run())
        finally:
            torch.set_num_threads(before)
    for name in ("dA", "dB"):  # the base's product is torch's
        assert all(torch.equal(result[name], results[0][name]) for result in results)


def test_training_one_adapter_beside_others_gives_the_same_bits(backend, device):
    """An adapter's gradients are those of the batch in which every other row has no adapter."""
    case = Case(50, 40, 24, 3, [4, 8, 2], DISTRIBUTIONS["random"](50, 3), F32, F32, device, p=[0.2, 0.0, 0.5])
    whole = case.run()
    for e in range(3):
        alone = case.run(ids=torch.where(case.ids == e, case.ids, -1))
        assert torch.equal(alone["dA"][e], whole["dA"][e]) and torch.equal(alone["dB"][e], whole["dB"][e])


def test_one_adapter_is_lora_linear(backend, device):
    case = Case(20, 40, 24, 1, [6], torch.zeros(20, dtype=torch.int64), F32, F32, device)
    y = multi_lora_linear(case.x, case.W, case.A, case.B, case.ids, 1.5, case.bias)
    one = lk.functional.lora_linear(case.x, case.W, case.A[0], case.B[0], 1.5, case.bias)
    check("multi of one", y, one.double(), one, base=F32, K=40)
    assert torch.equal(y, one) or backend != "cpu"


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_autocast(backend, device, dtype):
    case = Case(9, 64, 48, 2, [4, 4], torch.tensor([0, 1, -1] * 3), F32, F32, device)
    with torch.autocast(device, dtype=dtype):
        y = multi_lora_linear(case.x, case.W, case.A, case.B, case.ids, case.scaling, case.bias, ranks=case.ranks)
        eager = F.linear(case.x, case.W, case.bias)
        for e in range(2):
            rows = case.ids == e
            eager[rows] += (F.linear(F.linear(case.x[rows], case.A[e]), case.B[e]) * case.scaling[e]).to(dtype)
    assert y.dtype == dtype
    check("multi autocast", y, case.by_hand(torch.float64, case.W)["y"], eager, base=dtype, K=64)


def test_what_is_kept_for_backward(backend, device):
    """x (shared), u and the order of rows beside the parameters: no gathered rows, no gathered adapters."""
    case = Case(64, 48, 32, 4, [8, 8, 8, 8], DISTRIBUTIONS["random"](64, 4), F32, F32, device, bias=False, p=0.1)
    kept = []
    leaves = [t.requires_grad_() for t in (case.x, case.A, case.B)]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        multi_lora_linear(leaves[0], case.W, leaves[1], leaves[2], case.ids, case.scaling, ranks=case.ranks, dropout_p=case.p)
    sizes = {t.data_ptr(): t.numel() * t.element_size() for t in kept}
    named = sum(t.numel() * t.element_size() for t in (*leaves, case.W, case.scaling, case.ranks))
    assert sum(sizes.values()) == named + 64 * 8 * 4 + 64 * 8 + 5 * 8 + 8 + 4 * 4  # u, order, starts, seed, thresholds


# -- torch -------------------------------------------------------------------------------------------------------------------


def layer(**arguments):
    torch.manual_seed(0)
    made = lk.MultiLoraLinear.from_linear(nn.Linear(24, 20), num_adapters=3, max_rank=4, ranks=[1, 4, 2], **arguments)
    nn.init.normal_(made.lora_B)
    return made


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compile_has_no_break_and_changes_nothing(compiler):
    torch._dynamo.reset()
    module, x, ids = layer(), torch.randn(7, 24), torch.tensor([0, 1, 2, -1, 0, 1, 1])
    double = copy.deepcopy(module).double()

    def step(call, module, x):
        module.zero_grad()
        leaf = x.clone().requires_grad_()
        call(leaf, ids).square().sum().backward()
        return leaf.grad, module.lora_A.grad.clone(), module.lora_B.grad.clone()

    with lk.use_backend("reference"):
        exact = step(double, double, x.double())
    results = step(module, module, x), step(torch.compile(module, fullgraph=True, backend=compiler), module, x)
    for expected, eager, traced in zip(exact, *results):
        check("multi compiled", traced, expected, eager, base=F32, K=24 * 4 * 20)


def test_opcheck(backend, device):
    case = Case(6, 16, 8, 2, [3, 3], torch.tensor([0, 1, 1, 0, 0, 1]), F32, F32, device)  # all of u is somebody's
    order, starts, tiles = multi_ops.route(case.ids, 2)
    ops, seed, thresholds = torch.ops.lorakernels, torch.tensor([5], device=device), torch.tensor([9000, 0], dtype=torch.int32, device=device)
    x, u, y, A, B = case.x, torch.randn(6, 3, device=device), torch.randn(6, 8, device=device), torch.nan_to_num(case.A), torch.nan_to_num(case.B)
    with torch.no_grad():
        torch.library.opcheck(ops.multi_lowrank_down.default, (x, A, order, starts, tiles, case.ranks, None, seed, thresholds, 1))
        torch.library.opcheck(ops.multi_route.default, (case.ids, 2))
        torch.library.opcheck(ops.multi_add_lowrank.default, (y, u[None], B, case.scaling, order, starts, tiles, None, None, None, None))
        torch.library.opcheck(ops.multi_lowrank_grad.default, (y, x, u, B, case.scaling, order, starts, tiles, case.ranks, None, seed, thresholds, F32))


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_draws_the_same_mask(reentrant):
    module, x, ids = layer(lora_dropout=0.5), torch.randn(7, 24), torch.tensor([0, 1, 2, -1, 0, 1, 1])
    results = []
    for call in (module, lambda *a: checkpoint(module, *a, use_reentrant=reentrant)):
        module.zero_grad()
        leaf = x.clone().requires_grad_()
        torch.manual_seed(1)
        call(leaf, ids).square().sum().backward()
        results.append([leaf.grad, module.lora_A.grad.clone(), module.lora_B.grad.clone()])
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "state_dict"])
def test_copies_and_casts(how):
    module, x, ids = layer(lora_alpha=[2, 8, 3]), torch.randn(4, 24), torch.tensor([0, 1, 2, -1])
    if how == "deepcopy":
        other = copy.deepcopy(module)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(module))
    else:
        other = lk.MultiLoraLinear.from_linear(nn.Linear(24, 20), num_adapters=3, max_rank=4)
        other.load_state_dict(module.state_dict())
    assert torch.equal(other(x, ids), module(x, ids))
    other.bfloat16()
    assert other.scaling.dtype == F32 and torch.equal(other.scaling, module.scaling) and other(x.bfloat16(), ids).dtype == BF16


def test_layer_over_nf4_and_loading_an_adapter():
    base = lk.NF4Linear(24, 20)
    module, x = lk.MultiLoraLinear.from_linear(base, num_adapters=2, max_rank=8), torch.randn(4, 24)
    assert {name for name, p in module.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    single = lk.LoraLinear(24, 20, r=3, lora_alpha=6, init_lora_weights=False)
    module.load_adapter(1, single.lora_A, single.lora_B, lora_alpha=6)
    y = module(x, torch.tensor([-1, 1, 0, 1]))
    plain = nf4_linear(x, base.weight, base.bias)
    assert torch.equal(y[[0, 2]], plain[[0, 2]])  # adapter 0 starts as nothing
    exact = plain.double() + 2.0 * x.double() @ single.lora_A.double().t() @ single.lora_B.double().t()
    check("multi over NF4", y[[1, 3]], exact[[1, 3]], (plain + 2.0 * x @ single.lora_A.t() @ single.lora_B.t())[[1, 3]], base=F32, K=24)


def test_an_adapter_may_be_given_to_itself():
    module = layer()
    A, B = module.lora_A.detach().clone(), module.lora_B.detach().clone()
    module.load_adapter(1, module.lora_A[1, :2], module.lora_B[1, :, :2], lora_alpha=8)
    assert module.ranks[1] == 2 and module.scaling[1] == 4.0
    assert torch.equal(module.lora_A[1, :2], A[1, :2]) and torch.equal(module.lora_B[1, :, :2], B[1, :, :2])
    assert not module.lora_A[1, 2:].any() and not module.lora_B[1, :, 2:].any() and torch.equal(module.lora_A[0], A[0])


def test_a_layer_made_on_meta_gets_its_tables():
    arguments = dict(num_adapters=3, max_rank=4, ranks=[1, 4, 2], lora_alpha=[2, 4, 16], lora_dropout=[0.0, 0.5, 0.25])
    with torch.device("meta"):
        module = lk.MultiLoraLinear(nn.Linear(24, 20), **arguments)
    module = module.to_empty(device="cpu")
    want = lk.MultiLoraLinear(nn.Linear(24, 20), **arguments)
    for table in ("ranks", "scaling", "thresholds"):
        assert torch.equal(getattr(module, table), getattr(want, table))
    module.load_state_dict(want.state_dict())
    x, ids = torch.randn(5, 24), torch.tensor([0, 1, 2, -1, 1])
    assert torch.equal(module.eval()(x, ids), want.eval()(x, ids))


@pytest.mark.parametrize("ranks", [torch.tensor([1, 4, 5]), torch.tensor([0, 1, 1]), torch.tensor([1, 1, 1], dtype=torch.int32)])
@pytest.mark.parametrize("assign", [True, False])
def test_ranks_of_a_state_dict_that_the_stacks_have_not(ranks, assign):
    module = layer()
    before = module.ranks.clone()
    with pytest.raises(RuntimeError, match="ranks: expected int64 from 1 to max_rank=4"):
        module.load_state_dict(module.state_dict() | {"ranks": ranks}, assign=assign)
    assert torch.equal(module.ranks, before)


def test_scaling_of_a_state_dict_stays_float32():
    module = layer()
    module.load_state_dict(module.state_dict() | {"scaling": module.scaling.double()}, assign=True)
    assert module.scaling.dtype == F32 and torch.equal(module.scaling, layer().scaling)


@pytest.mark.parametrize("name", ["cpu", "triton"])
def test_kernels_read_no_rank_beyond_the_stacks(name):
    """A table that was changed behind its layer's back: what lies behind an adapter's own is neither read nor written."""
    if why := backends.why_not(name, "cpu", F32):
        pytest.skip(why)
    A, B, x, ids = torch.randn(2, 3, 24), torch.randn(2, 20, 3), torch.randn(6, 24), torch.tensor([0, 1, 1, 0, -1, 1])
    routed = route(ids, x.shape, 2)

    def run(ranks):
        leaves = [t.detach().requires_grad_() for t in (x, A, B)]
        y = routed_linear(leaves[0], torch.ones(20, 24), None, *leaves[1:], torch.ones(2), routed, ranks)
        y.backward(torch.ones_like(y))
        return [y.detach(), *(t.grad for t in leaves)]

    with backends.use_backend(name):
        for beyond, within in ((1 << 40, 3), (-7, 0)):
            assert all(torch.equal(a, b) for a, b in zip(run(torch.tensor([beyond, 3])), run(torch.tensor([within, 3]))))


# -- errors ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"adapter_ids": torch.tensor([0, 1, 2])}, ValueError, "adapter_ids: expected ids from -1 (no adapter) to 1, got 2 for row 2"),
        ({"adapter_ids": torch.tensor([0, -2, 1])}, ValueError, "adapter_ids: expected ids from -1 (no adapter) to 1, got -2 for row 1"),
        ({"adapter_ids": torch.tensor([0, 1])}, ValueError, "adapter_ids: expected shape (3,), got (2,)"),
        ({"adapter_ids": torch.tensor([0.0, 1.0, 0.0])}, TypeError, "adapter_ids: expected int32 or int64, got float32"),
        ({"adapter_ids": [0, 1, 0]}, TypeError, "adapter_ids: expected a Tensor, got a list"),
        ({"lora_A": torch.ones(2, 4)}, ValueError, "lora_A: expected shape (E, R, K) with E of at least 1, got (2, 4)"),
        ({"lora_A": torch.ones(0, 2, 4), "lora_B": torch.ones(0, 5, 2)}, ValueError, "lora_A: expected shape (E, R, K) with E of at least 1"),
        ({"lora_A": torch.ones(3, 2, 4)}, ValueError, "lora_B: expected E=3 adapters, as lora_A has, got 2"),
        ({"lora_B": torch.ones(2, 5, 3)}, ValueError, "lora_B: expected shape (N=5, R=2)"),
        ({"scaling": torch.ones(3)}, ValueError, "scaling: expected a number or float32 of shape (2,), got float32 (3,)"),
        ({"scaling": float("nan")}, ValueError, "scaling: expected a finite number"),
        ({"ranks": torch.tensor([1, 3])}, ValueError, "ranks: expected ranks from 1 to 2 (lora_A's), got [1, 3]"),
        ({"ranks": torch.tensor([1, 0])}, ValueError, "ranks: expected ranks from 1 to 2"),
        ({"ranks": [1, 2]}, TypeError, "ranks: expected int64 of shape (2,), got a list"),
        ({"dropout_p": [0.1]}, ValueError, "dropout_p: expected a number or 2 of them, got 1"),
        ({"dropout_p": 1.5}, ValueError, "dropout_p: expected a probability"),
        ({"check_ids": "never"}, ValueError, "check_ids: expected 'sync', 'async' or 'off'"),
    ],
)
def test_arguments(change, error, words):
    arguments = {"x": torch.ones(3, 4), "weight": torch.ones(5, 4), "lora_A": torch.ones(2, 2, 4), "lora_B": torch.ones(2, 5, 2), "adapter_ids": torch.tensor([0, 1, -1]), "scaling": 1.0}
    with pytest.raises(error) as caught:
        multi_lora_linear(**(arguments | change))
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "make, error, words",
    [
        (lambda: lk.MultiLoraLinear(nn.Identity(), num_adapters=1, max_rank=1), TypeError, "base: expected a torch.nn.Linear or an NF4Linear"),
        (lambda: lk.MultiLoraLinear(nn.Linear(2, 2), num_adapters=0, max_rank=1), ValueError, "num_adapters: expected an int of at least 1"),
        (lambda: lk.MultiLoraLinear(nn.Linear(2, 2), num_adapters=2, max_rank=1, ranks=[1]), ValueError, "ranks: expected 2 values"),
        (lambda: lk.MultiLoraLinear(nn.Linear(2, 2), num_adapters=1, max_rank=1, ranks=[2]), ValueError, "ranks: expected ranks of at most max_rank=1, got 2"),
        (lambda: lk.MultiLoraLinear(nn.Linear(2, 2), num_adapters=1, max_rank=1, adapter_dtype=BF16), TypeError, "adapter_dtype: expected"),
        (lambda: layer().load_adapter(3, torch.ones(1, 24), torch.ones(20, 1)), ValueError, "index: expected an int from 0 to 2"),
        (lambda: layer().load_adapter(0, torch.ones(5, 24), torch.ones(20, 5)), ValueError, "lora_A: expected shape (r, 24) with r from 1 to 4"),
        (lambda: layer().load_adapter(0, torch.ones(2, 24), torch.ones(20, 3)), ValueError, "lora_B: expected shape (20, 2), got (20, 3)"),
        (lambda: layer().load_adapter(0, torch.full((2, 24), float("inf")), torch.ones(20, 2)), ValueError, "lora_A: expected finite values in torch.float32, the layer's dtype"),
        (lambda: layer().load_adapter(0, torch.ones(24), torch.ones(20, 2)), ValueError, "lora_A: expected a matrix, got (24,)"),
        (lambda: layer().load_adapter(0, torch.ones(2, 24), torch.ones(20, 2, device="meta")), ValueError, "lora_B: expected a Tensor with data"),
        (lambda: layer().load_adapter(0, torch.ones(2, 24).to_sparse(), torch.ones(20, 2)), TypeError, "lora_A: expected a dense tensor"),
        (lambda: layer().load_adapter(0, torch.ones(2, 24, dtype=torch.complex64), torch.ones(20, 2)), TypeError, "lora_A: expected a floating-point dtype, got torch.complex64"),
    ],
)
def test_arguments_of_the_layer(make, error, words):
    with pytest.raises(error) as caught:
        make()
    assert words in str(caught.value)
