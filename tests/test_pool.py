"""Adapters of one pool: who is in the memory, which rows of a batch use which, a whole model on it."""

import contextlib
import copy
import pickle
import types

import pytest
import torch
from numerics import check
from test_multi import F32
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import lorakernels as lk
from lorakernels import multi_ops
from lorakernels.streams import Readers

BF16 = torch.bfloat16


# -- the pool ------------------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Children with the names of a transformer's."""

    def __init__(self, width=24, inner=40):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(width, width), nn.Linear(width, 8, bias=False), nn.Linear(width, 8)
        self.o_proj = nn.Linear(width, width)
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(width, inner), nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x):
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        x = x + self.o_proj(q + torch.cat([k, v, k], dim=-1))
        return x + self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def block(dtype=F32):
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block()).to(dtype)


CHAIN = (24 * 24 * 24 * 40) ** 2  # the lengths of a block's sums, one after the other, of two of them


def adapter_of(model, rank, seed, names=None, dtype=F32):
    """Tensors under PEFT's names."""
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and (names is None or name.rpartition(".")[2] in names):
            for kind, shape in (("lora_A", (rank, module.in_features)), ("lora_B", (module.out_features, rank))):
                tensors[f"base_model.model.{name}.{kind}.weight"] = torch.randn(*shape, generator=generator).to(dtype) * shape[1] ** -0.5
    return tensors


def by_hand(model, tensors, x, scaling, dtype=torch.float64):
    """A model's answer with one adapter added to its weights' products."""
    other = copy.deepcopy(model).to(dtype)
    for name, module in other.named_modules():
        key = f"base_model.model.{name}.lora_A.weight"
        if key in tensors:
            A, B = tensors[key].to(dtype), tensors[key.replace("lora_A", "lora_B")].to(dtype)
            module.register_forward_hook(lambda m, args, y, A=A, B=B: y + scaling * F.linear(F.linear(args[0], A), B))
    return other(x.to(dtype))


def alone(model, tensors, x, alpha):
    """The same in this library's layers with one adapter, which their own tests hold to the error rule: what a model adds to a
    layer's error, it adds to both."""
    other = copy.deepcopy(model)
    ranks = {key.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): A.shape[0] for key, A in tensors.items() if "lora_A" in key}
    lk.apply_lora(other, r=next(iter(ranks.values())), lora_alpha=alpha, target_modules=list(ranks))
    with torch.no_grad():
        for name in ranks:
            layer = other.get_submodule(name)
            layer.lora_A.copy_(tensors[f"base_model.model.{name}.lora_A.weight"]), layer.lora_B.copy_(tensors[f"base_model.model.{name}.lora_B.weight"])
    return other(x)


def served(model=None, capacity=64, **arguments):
    model = block() if model is None else model
    pool = lk.AdapterPool(model, capacity, **arguments)
    plain = copy.deepcopy(model)
    report = lk.serve_adapters(model, pool)
    return plain, model, pool, report


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_served_model(backend, device, dtype):
    """Each row's adapter, ranks and modules of their own; no adapter is the base's answer, bit for bit."""
    plain, model, pool, report = served(block(dtype).to(device))
    assert len(report.replaced) == 14 and not report.skipped
    adapters = {"all": adapter_of(plain, 5, 1), "attention": adapter_of(plain, 16, 2, ("q_proj", "v_proj")), "mlp": adapter_of(plain, 1, 3, ("down_proj", "up_proj"))}
    for name, tensors in adapters.items():
        pool.add(name, tensors, lora_alpha=8)
    names = ["mlp", None, "all", "attention", "all", None, "mlp"]
    x = torch.randn(7, 16, 24, device=device).to(dtype)
    with torch.no_grad(), pool.route(names):
        y = model(x)
    with torch.no_grad():
        base = plain(x)
        assert torch.equal(model(x), base)  # no route
        assert torch.equal(y[[1, 5]], base[[1, 5]])
        assert torch.equal(model(x, adapter_ids=names), y) and pool.open_route is None
        assert torch.equal(model(x, adapter_ids=torch.tensor([pool.id(n) if n else -1 for n in names], device=device)), y)
    for name, tensors in adapters.items():
        rows, rank = [i for i, n in enumerate(names) if n == name], tensors["base_model.model.0.up_proj.lora_A.weight" if name != "attention" else "base_model.model.0.q_proj.lora_A.weight"].shape[0]
        check(f"pool {name}", y[rows], by_hand(plain, tensors, x[rows], 8 / rank), alone(plain, tensors, x, 8)[rows], base=dtype, K=40)


def test_layers_that_share_x_share_one_product(monkeypatch):
    plain, model, pool, _ = served()
    pool.add("a", adapter_of(plain, 4, 1))
    widths, down = [], multi_ops.down
    monkeypatch.setattr(multi_ops, "down", lambda run, x, A, *rest: widths.append(A.shape[1]) or down(run, x, A, *rest))
    x = torch.randn(2, 24)
    with torch.no_grad(), pool.route(["a", None]):
        first = model(x)
        assert widths == [3, 1, 2, 1] * 2
        widths.clear()
        with torch.inference_mode():
            assert torch.equal(model(x.clone()), first) and widths == [1] * 14  # nothing tells there whether x has changed
    shared = model[0].q_proj.shared
    with torch.no_grad(), pool.route(["a", None]) as route:
        route.begin()
        model[0].q_proj(x)
        x.add_(1.0)  # in place, between the two
        k = model[0].k_proj(x)
        route.begin()
        assert torch.equal(k, copy.copy(model[0].k_proj)(x.clone()))
        model[0].q_proj(x), model[0].k_proj(x + 1)
        assert not shared.together  # what is given another x computes its own from then on


def test_flops_are_those_of_full_ranks():
    plain, model, pool, _ = served(nn.Sequential(nn.Linear(24, 20)).requires_grad_(False), max_rank=8)
    pool.add("a", adapter_of(plain, 4, 1))
    x = torch.randn(3, 24, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        model(x, adapter_ids=["a"] * 3).sum().backward()
    assert counter.get_total_flops() == 2 * (2 * 3 * 24 * 20 + 2 * 3 * 8 * (24 + 20))  # y and dx: the base and its adapter


def test_bitsandbytes_layers_are_left_with_the_reason():
    class Linear4bit(nn.Linear):
        pass

    model = nn.Sequential(Linear4bit(4, 4), nn.Linear(4, 4))
    model[0].weight.quant_state = object()
    pool = lk.AdapterPool(model, 4)
    assert list(pool.skipped) == ["0"] and "NF4Linear.from_bnb()" in pool.skipped["0"]
    assert lk.serve_adapters(copy.deepcopy(model), pool).replaced == ["1"]
    assert lk.apply_multi_lora(model, 2).replaced == ["1"]


def test_hooks_of_a_replaced_module_run_once():
    model, seen = nn.Sequential(nn.Linear(4, 3)), []
    model[0].register_forward_hook(lambda module, x, y: seen.append(1))
    pool = lk.AdapterPool(model, 4)
    lk.serve_adapters(model, pool)
    pool.add("a", {"0.lora_A.weight": torch.ones(1, 4), "0.lora_B.weight": torch.ones(3, 1)})
    x = torch.ones(1, 4)
    model(x), model(x, adapter_ids=["a"])
    assert len(seen) == 2


def test_gradients_reach_x():
    plain, model, pool, _ = served()
    tensors = adapter_of(plain, 4, 1)
    pool.add("a", tensors)
    x, dy = torch.randn(3, 24), torch.randn(3, 24)
    grads = []
    for call in (lambda x: by_hand(plain, tensors, x.double(), 1.0), lambda x: alone(plain, tensors, x, 4)):
        leaf = x.detach().clone().requires_grad_()
        y = call(leaf)
        y.backward(dy.to(y.dtype))
        grads.append(leaf.grad)
    leaf = x.clone().requires_grad_()
    with pool.route(["a"] * 3):
        model(leaf).backward(dy)
    check("pool dx", leaf.grad, *grads, base=F32, K=40)


@pytest.mark.parametrize("quantize", [False, True])
def test_bases_and_dtypes(quantize):
    """Over NF4, and adapters in the weights' own half precision."""
    model = nn.Sequential(nn.Linear(64, 48)).to(BF16)
    tensors, x = adapter_of(model, 6, 1, dtype=BF16), torch.randn(4, 64).to(BF16)
    if quantize:
        model[0] = lk.NF4Linear.from_linear(model[0])
    base = model(x)
    pools = lk.AdapterPool(model, 8), lk.AdapterPool(model, 8, dtype=None if quantize else BF16)
    assert pools[0].memory() == 8 * (64 + 48) * 4 and pools[1].memory() == 8 * (64 + 48) * (4 if quantize else 2)
    lk.serve_adapters(model, pools[1])
    pools[1].add("a", tensors)
    with torch.no_grad():
        y = model(x, adapter_ids=["a", None, "a", None])
    assert torch.equal(y[1::2], base[1::2])
    A, B = tensors.values()
    weight = model[0].base.weight.dequantize(F32) if quantize else model[0].weight
    exact = F.linear(x[::2].double(), weight.double(), model[0].bias.double()) + x[::2].double() @ A.double().t() @ B.double().t()
    eager = F.linear(x[::2], weight.to(BF16), model[0].bias) + F.linear(F.linear(x[::2], A), B)
    check("pool base", y[::2], exact, eager, base=BF16, K=64)


def test_directories_of_peft(tmp_path):
    """save_adapter's files, with ranks and alphas by pattern, give what the layers with that adapter give."""
    plain, model, pool, _ = served()
    trained = copy.deepcopy(plain)
    lk.apply_lora(trained, r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"], rank_pattern={"down_proj": 9}, alpha_pattern={"1.q_proj": 3}, use_rslora=True)
    for name, p in trained.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p)
    lk.save_adapter(trained, tmp_path)
    pool.add("it", tmp_path)
    x = torch.randn(3, 24)
    with torch.no_grad(), pool.route(["it"] * 3):
        check("pool from files", model(x), copy.deepcopy(trained).double()(x.double()), trained(x), base=F32, K=40)


def test_the_least_recently_used_leaves_and_comes_back_bit_for_bit():
    plain, model, pool, _ = served(capacity=10, slots=3)
    adapters = {name: adapter_of(plain, rank, i) for i, (name, rank) in enumerate({"a": 4, "b": 4, "c": 2}.items())}
    for name, tensors in adapters.items():
        pool.add(name, tensors)
    x = torch.randn(1, 24)
    with torch.no_grad():
        first = {name: model(x, adapter_ids=[name]) for name in adapters}
        old = pool.id("a")
        pool.id("c")
        pool.add("d", adapter_of(plain, 6, 9))  # b and a were used longest ago
        assert pool.resident() == ["c", "d"] and pool.names() == ["a", "b", "c", "d"] and pool.free_rows() == 2
        with pytest.raises(ValueError, match="is no adapter's, or whose adapter has left the pool"):
            model(x, adapter_ids=torch.tensor([old]))
        for name in ("a", "b", "c"):
            assert torch.equal(model(x, adapter_ids=[name]), first[name]), name
        pool.pin("a")
        with pool.route(["c", "b"]):
            with pytest.raises(RuntimeError, match="the pool has no room for 'd': 6 rank rows"):
                pool.pin("d")
            assert pool.resident() == ["a", "b", "c"]
        pool.unpin("a")
        with pytest.raises(RuntimeError, match="no room for 'a', 'b', 'c', 'd'"):
            pool.route(["a", "b", "c", "d"]).__enter__()
        pool.evict("a")
        assert pool.resident() == ["b", "c"]


def test_an_id_is_never_served_by_another_adapter():
    """Removed or replaced in an open route, an adapter's rows are nobody's until it closes."""
    plain, model, pool, _ = served(capacity=8)
    one, two = adapter_of(plain, 4, 1), adapter_of(plain, 4, 2)
    pool.add("one", one)
    x = torch.randn(2, 24)
    with torch.no_grad():
        ids = torch.tensor([pool.id("one"), -1])
        with pool.route(["one", None]) as route:
            first = model(x)
            pool.replace("one", two)
            with pytest.raises(RuntimeError, match="no room for 'three': 5 rank rows"):
                pool.add("three", adapter_of(plain, 5, 3))  # the old one's rows are not free yet
            with pytest.raises(ValueError, match="has left the pool"):
                model(x)
        pool.remove("one")
        pool.add("one", one)
        two_rows = torch.tensor([pool.id("one"), -1])
        with pool.route(two_rows):  # a tensor: whose rows it will name nobody knows, so nobody's are given away
            again = model(x)
            pool.remove("one")
            with pytest.raises(RuntimeError, match="no room for 'three': 5 rank rows"):
                pool.add("three", adapter_of(plain, 5, 3))
            pool.add("one", two)
            with pytest.raises(ValueError, match="has left the pool"):
                model(x)
            two_rows[0] = pool.id("one")
            assert not torch.equal(model(x), again)
        pool.remove("one")
        pool.add("one", one)
        for stale in (ids, torch.tensor([0, -1]), torch.tensor([5, -1]), torch.tensor([-2, -1])):
            with pytest.raises(ValueError, match="is no adapter's, or whose adapter has left the pool"):
                model(x, adapter_ids=stale)
        assert torch.equal(model(x, adapter_ids=["one", None]), first) and route.ids[0] != pool.id("one")
        assert torch.equal(again, first) and torch.equal(model(x, adapter_ids=None), plain(x))
    for copied in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="cannot be copied or pickled: copy the model before serve_adapters"):
            copied(model)


def test_a_part_that_is_called_by_itself_has_the_adapters_of_now():
    """No forward of the model tells that one begins there: nothing is kept from one call of it to the next."""
    plain, model, pool, _ = served(capacity=8)
    ids, x = {}, torch.randn(2, 24)
    for seed, name in enumerate(("one", "two")):
        ids[name] = pool.add(name, adapter_of(plain, 4, seed))
    with torch.no_grad():
        want = {}
        for name in ids:
            with pool.route([name, None]):
                want[name] = model[0](x)
        given = torch.tensor([ids["one"], -1])
        with pool.route(given):
            whole = model(x)
            assert torch.equal(model[0](x), want["one"])
            given[0] = ids["two"]
            assert torch.equal(model[0](x), want["two"]) and not torch.equal(model(x), whole)
            pool.remove("two")
            with pytest.raises(ValueError, match="has left the pool"):
                model[0](x)
            with pytest.raises(ValueError, match="has left the pool"):
                model(x)
            given[0] = ids["one"]
            assert torch.equal(model[0](x), want["one"])  # after a forward that failed, too
        assert not torch.equal(want["one"], want["two"])


def test_ids_that_lie_elsewhere_are_fetched_for_each_forward():
    """Those of a list never change; a tensor's are the caller's to change."""
    plain, model, pool, _ = served(capacity=8)
    pool.add("one", adapter_of(plain, 4, 1))
    pool.tables = {torch.device("meta"): pool.tables[torch.device("cpu")]}
    for adapters, fetched in (["one", None], 1), (torch.tensor([pool.id("one"), -1]), 3):
        seen = []
        with pool.route(adapters) as route:
            for begin in (True, False, False):
                route.begin() if begin else route.end()
                with pytest.raises(RuntimeError):  # tables on the CPU are indexed by ids without values
                    route.of(torch.empty(2, 24, device="meta"))
                seen.append(route.on[torch.device("meta")])
        assert len({id(on) for on in seen}) == fetched


class Stream:
    """One of a device's, that remembers what it was told, as its events do."""

    device = "cuda:0"

    def __init__(self, name, told):
        self.name, self.told = name, told

    def wait_event(self, event):
        self.told.append((self.name, "waits for", event.after))

    def synchronize(self):
        self.told.append(("the host", "waits for", self.name))


class Event:
    def record(self, stream):
        self.after = stream.name


def test_changes_wait_for_the_readers_of_every_stream(monkeypatch):
    """Without a GPU: what is told to streams that stand for a GPU's, around what is written."""
    told, capturing = [], [False]
    streams = {name: Stream(name, told) for name in ("first", "second", "loader")}
    current = [streams["first"]]
    cuda = types.SimpleNamespace(current_stream=lambda device: current[0], Event=Event, is_current_stream_capturing=lambda: capturing[0])
    monkeypatch.setattr("lorakernels.streams.torch", types.SimpleNamespace(cuda=cuda))
    plain, model, pool, _ = served(capacity=4)
    pool._readers = Readers([torch.device("cpu"), torch.device("cuda:0")])
    write = pool._write
    monkeypatch.setattr(pool, "_write", lambda adapter: told.append("written") or write(adapter))
    pool.add("one", adapter_of(plain, 4, 1))
    x = torch.randn(2, 24)
    for name in ("first", "second", "first"):
        current[0] = streams[name]
        model(x, adapter_ids=["one", None])
    capturing[0], current[0] = True, streams["loader"]
    model(x, adapter_ids=["one", None])  # it reads when it is replayed
    capturing[0] = False
    told.clear()
    pool.add("two", adapter_of(plain, 4, 2))  # in the rows that "one" leaves
    over, waits = ("the host", "waits for", "loader"), [("loader", "waits for", name) for name in ("first", "second")]
    assert told == [over, *waits, "written", over] and pool.resident() == ["two"]
    told.clear()
    pool.id("two"), pool.names()
    assert told == []  # nothing changes, nobody waits
    pool.remove("two")
    assert told == [over]


def test_nothing_is_lost_by_a_malformed_adapter(tmp_path):
    plain, model, pool, _ = served(capacity=12, max_rank=8)
    good = adapter_of(plain, 4, 1)
    kept = pool.add("kept", good)
    key = "base_model.model.0.q_proj.lora_A.weight"
    rslora = {"adapter": good | {"base_model.model.0.q_proj.bias": torch.ones(24)}}
    wrong = [
        ({"adapter": good | {key: torch.full((4, 24), float("nan"))}}, ValueError, "0.q_proj.lora_A: expected finite values in torch.float32, the pool's dtype"),
        ({"adapter": good | {key: torch.ones(4, 23)}}, ValueError, "0.q_proj.lora_A: expected shape (4, 24), got (4, 23)"),
        ({"adapter": good | {key: torch.ones(3, 24)}}, ValueError, "0.q_proj.lora_B: expected shape (24, 3), got (24, 4)"),
        ({"adapter": good | {key: torch.ones(4, 24, dtype=torch.int32)}}, ValueError, "expected a floating-point tensor"),
        ({"adapter": good | {"0.head.lora_A.weight": torch.ones(4, 24), "0.head.lora_B.weight": torch.ones(4, 4)}}, ValueError, "0.head: not one of the modules"),
        ({"adapter": {k: v for k, v in good.items() if k != key}}, ValueError, "0.q_proj: expected both lora_A.weight and lora_B.weight"),
        ({"adapter": good | {"base_model.model.0.q_proj.lora_B.bias": torch.ones(24)}}, ValueError, "0.q_proj: lora_bias is not supported in a pool"),
        (rslora, ValueError, "0.q_proj.bias: a pool holds no biases"),
        ({"adapter": adapter_of(plain, 9, 1)}, ValueError, "expected a rank from 1 to max_rank=8, got 9"),
        ({"adapter": {}}, ValueError, "it holds no LoRA tensors"),
        ({"adapter": {"x": 3}}, TypeError, "expected tensors by name, got 'x': a int"),
        ({"adapter": good | {key: torch.ones(4, 24).to_sparse()}}, TypeError, "q_proj.lora_A.weight: expected a dense tensor"),
        ({"adapter": good | {key: torch.ones(4, 24, device="meta")}}, ValueError, "q_proj.lora_A.weight: expected a Tensor with data"),
        ({"adapter": good, "use_rslora": None}, TypeError, "use_rslora: expected a bool, got a NoneType"),
        ({"adapter": 3}, TypeError, "adapter: expected a directory or a dict of tensors, got a int"),
        ({"adapter": tmp_path / "nowhere"}, FileNotFoundError, "adapter_config.json"),
        ({"adapter": good, "lora_alpha": float("inf")}, ValueError, "lora_alpha: expected a finite number"),
        ({"adapter": tmp_path, "lora_alpha": 3}, ValueError, "lora_alpha, use_rslora: a directory's adapter_config.json has its own"),
    ]
    before = [t.clone() for t in (*pool.tables.values(),)[0].__dict__.values()]
    x = torch.randn(1, 24)
    with torch.no_grad():
        first = model(x, adapter_ids=["kept"])
        for arguments, error, words in wrong:
            for method, name in ((pool.add, "new"), (pool.replace, "kept")):
                with pytest.raises(error) as caught:
                    method(name, **arguments)
                assert words in str(caught.value)
        with pytest.raises(ValueError, match="name: 'kept' is in the pool already"):
            pool.add("kept", good)
        with pytest.raises(RuntimeError, match="no room for 'kept'"):
            pool.pin("kept"), pool.add("pinned", adapter_of(plain, 8, 2)), pool.pin("pinned"), pool.replace("kept", adapter_of(plain, 8, 2))
        pool.remove("pinned")
        for method in (pool.remove, pool.pin, pool.unpin, pool.evict, pool.id, lambda name: pool.route([name]).__enter__(), lambda name: pool.replace(name, good)):
            with pytest.raises(ValueError, match="name: the pool has no adapter 'nobody'; it has 'kept'"):
                method("nobody")
        for adapters, error, words in (
            ("kept", TypeError, "adapters: expected a list of names, ids and None"),
            ([1.5], TypeError, "adapters: expected names, ids and None, got 1.5"),
            ([7], ValueError, "adapters: 7 is no adapter's id"),
            (torch.ones(1), TypeError, "adapters: expected int64 ids"),
        ):
            with pytest.raises(error, match=words):
                pool.route(adapters).__enter__()
        with pytest.raises(ValueError, match=r"adapter_ids: expected shape \(1,\), got \(2,\)"):
            model(x, adapter_ids=["kept", None])
        assert pool.names() == ["kept"] and pool.id("kept") == kept and torch.equal(model(x, adapter_ids=["kept"]), first) and pool.open_route is None
    tables = (*pool.tables.values(),)[0]
    assert torch.equal(before[1][kept % (1 << 20)], tables.generation[kept % (1 << 20)]) and int((tables.generation >= 0).sum()) == 1


@pytest.mark.parametrize(
    "make, error, words",
    [
        (lambda m: lk.AdapterPool(3, 4), TypeError, "model: expected a torch.nn.Module"),
        (lambda m: lk.AdapterPool(m, 0), ValueError, "capacity: expected an int of at least 1, got 0"),
        (lambda m: lk.AdapterPool(m, 4, max_rank=513), ValueError, "max_rank: expected at most 512, got 513"),
        (lambda m: lk.AdapterPool(m, 4, slots=2.5), TypeError, "slots: expected an int of at least 1"),
        (lambda m: lk.AdapterPool(m, 4, target_modules=["nothing"]), ValueError, "target_modules: no module is named 'nothing'"),
        (lambda m: lk.AdapterPool(m, 4, dtype=torch.int8), TypeError, "dtype: expected a floating-point dtype"),
        (lambda m: lk.AdapterPool(m, 4, dtype=BF16), TypeError, "dtype: expected torch.float32 (0.k_proj's) or torch.float32"),
        (lambda m: lk.AdapterPool(nn.Sequential(nn.ReLU()), 4), ValueError, "target_modules: nothing that a pool can serve"),
        (lambda m: lk.serve_adapters(m, m), TypeError, "pool: expected an AdapterPool"),
        (lambda m: lk.serve_adapters(nn.Sequential(nn.Linear(2, 2)), lk.AdapterPool(m, 4)), ValueError, "pool: it was made for a model with 0.k_proj"),
        (lambda m: lk.serve_adapters(m.__class__(Block(16), Block(16)), lk.AdapterPool(m, 4)), ValueError, "pool: 0.k_proj was 24 -> 8 on cpu, and is 16 -> 8"),
    ],
)
def test_arguments_of_the_pool(make, error, words):
    with pytest.raises(error) as caught:
        make(block())
    assert words in str(caught.value)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compile_has_no_break(compiler):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    plain, model, pool, _ = served()
    adapters = {"a": adapter_of(plain, 4, 1), "b": adapter_of(plain, 2, 2), None: {}}
    pool.add("a", adapters["a"])
    compiled, x = torch.compile(model, fullgraph=True, backend=compiler), torch.randn(3, 24)
    for names in (["a", None, "a"], [None, "a", "b"], None, ["b", "b", None], *[["a"] * 3] * 12):  # routes and adapters of one shape are one program
        if names and "b" in names and "b" not in pool:
            pool.add("b", adapters["b"])
        with torch.no_grad(), pool.route(names) if names else contextlib.nullcontext():
            exact = torch.stack([by_hand(plain, adapters[name], row, 1.0) for name, row in zip(names or [None] * 3, x)])
            check("pool compiled", compiled(x), exact, model(x), base=F32, K=CHAIN)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


@pytest.fixture
def blind(monkeypatch):
    """Within it Triton's launches are noted, not run, and every way for a tensor's value to reach Python is closed: what is left is
    what a captured graph replays."""
    lk.backends.load("triton")

    class Nothing:
        """In a kernel's place: what is launched reads on the device."""

        def __getitem__(self, grid):
            assert all(type(size) is int for size in grid)
            return lambda *arguments, **tile: launched.append(arguments)

    class Closed(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), named=None):
            assert "_local_scalar_dense" not in str(function) and "nonzero" not in str(function) and "is_nonzero" not in str(function), function
            return function(*arguments, **(named or {}))

    from lorakernels.backends.triton import multi

    launched = []
    for name in ("multi_down", "multi_add", "multi_outer"):
        monkeypatch.setattr(multi, name, Nothing())

    @contextlib.contextmanager
    def within():
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # on the CPU ids are looked at, except where a program is made
        with Closed(), lk.use_backend("triton"):
            yield launched

    return within


def test_a_step_reads_nothing_on_the_host(blind):
    plain, model, pool, _ = served()
    pool.add("a", adapter_of(plain, 4, 1)), pool.add("b", adapter_of(plain, 2, 2))
    tables, x = next(iter(pool.tables.values())), torch.randn(5, 24)
    ids = torch.tensor([pool.id("a"), -1, pool.id("b"), 3, pool.id("a")])
    with torch.no_grad(), blind() as launched:
        model(x, adapter_ids=ids)
        slots = tables.slots_of(ids)
    assert len(launched) == 28
    assert slots.tolist() == [pool.id("a") % (1 << 20), -1, pool.id("b") % (1 << 20), len(tables.generation), pool.id("a") % (1 << 20)]
