"""Whole models with many adapters: put on, trained each by its own optimiser, saved one by one."""

import copy

import pytest
import torch
from numerics import check
from test_multi import F32
from test_pool import CHAIN, adapter_of, alone, blind, block, by_hand  # noqa: F401
from torch import nn
from torch.utils.checkpoint import checkpoint

import lorakernels as lk
from lorakernels import multi_ops

RANKS, ALPHAS = [1, 5, 3], [2, 5, 12]


def model_of_three(**arguments):
    """(plain model, the same with three adapters, their tensors by PEFT's names)."""
    plain = block()
    model = copy.deepcopy(plain)
    report = lk.apply_multi_lora(model, 3, RANKS, ALPHAS, **arguments)
    assert len(report.replaced) == 14
    tensors = [adapter_of(plain, rank, e) for e, rank in enumerate(RANKS)]
    for e, own in enumerate(tensors):
        for name in report.replaced:
            A, B = (own[f"base_model.model.{name}.lora_{kind}.weight"] for kind in "AB")
            model.get_submodule(name).load_adapter(e, A, B, lora_alpha=ALPHAS[e])
    return plain, model, tensors


def test_each_sequence_has_its_adapter():
    plain, model, tensors = model_of_three()
    x, ids = torch.randn(5, 6, 24), torch.tensor([2, -1, 0, 1, 2])
    with torch.no_grad():
        y = model(x, adapter_ids=ids)
        assert torch.equal(model(x), plain(x)) and torch.equal(y[1], plain(x)[1])
        assert torch.equal(model(x, adapter_ids=ids[:, None].expand(5, 6).int()), y)
        for e, (rank, alpha) in enumerate(zip(RANKS, ALPHAS)):
            rows = ids == e
            check("multi model", y[rows], by_hand(plain, tensors[e], x[rows], alpha / rank), alone(plain, tensors[e], x, alpha)[rows], base=F32, K=40)
    assert {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_trained_at_once_or_each_alone_gives_the_same_bits(reentrant):
    """Own optimisers and rates; also where the forward comes again in backward, with the ids that it had."""
    _, start, _ = model_of_three()
    steps = [(torch.randn(6, 4, 24), torch.randn(6, 4, 24), torch.randperm(6) % 3) for _ in range(3)]

    def train(only=None):
        model = copy.deepcopy(start)
        for layer in model.modules():
            if isinstance(layer, lk.MultiLoraLinear):
                assert layer.batch is model[0].q_proj.batch
        if reentrant is not None:
            inner = model[0].forward
            model[0].forward = lambda x: checkpoint(inner, x, use_reentrant=reentrant)
        adapters = lk.adapter_parameters(model)
        optimisers = [torch.optim.AdamW(adapter.values(), lr=rate) for adapter, rate in zip(adapters, (1e-2, 1e-3, 3e-2))]
        for x, target, ids in steps:
            ids = ids if only is None else torch.where(ids == only, ids, -1)
            loss = (model(x.requires_grad_(), adapter_ids=ids) - target).square().sum((1, 2))
            loss[ids >= 0].sum().backward()
            for e, optimiser in enumerate(optimisers):
                if only in (None, e):
                    optimiser.step()
                optimiser.zero_grad()
        assert all(p.grad is None for p in model.parameters())
        return adapters

    whole = train()
    for e in range(3):
        alone = train(e)[e]
        assert all(torch.equal(p, whole[e][name]) for name, p in alone.items())
        before = lk.adapter_parameters(copy.deepcopy(start))[e]
        assert not any(torch.equal(p, before[name]) for name, p in alone.items())


def test_rows_are_ordered_once_a_forward(monkeypatch):
    _, model, _ = model_of_three()
    made, route = [], multi_ops.route
    monkeypatch.setattr(multi_ops, "route", lambda ids, E: made.append(ids) or route(ids, E))
    x = torch.randn(5, 6, 24)
    first = model(x, adapter_ids=torch.tensor([2, -1, 0, 1, 2]))
    assert len(made) == 1
    second = model(x, adapter_ids=torch.tensor([2, -1, 1, 1, 2]))
    assert len(made) == 2
    assert not torch.equal(first[2], second[2]) and torch.equal(first[3], second[3])
    with pytest.raises(ValueError, match="adapter_ids: .* got 3 for row 0"):
        model(x, adapter_ids=torch.full((5,), 3))
    with pytest.raises(ValueError, match="adapter_ids: expected shape"):
        model(x, adapter_ids=torch.zeros(4, dtype=torch.int64))


def test_a_training_step_reads_nothing_on_the_host(blind):  # noqa: F811
    _, model, _ = model_of_three(lora_dropout=0.25)
    x, ids = torch.randn(5, 6, 24, requires_grad=True), torch.tensor([2, -1, 0, 1, 2])
    with blind() as launched:
        model(x, adapter_ids=ids).backward(torch.ones(5, 6, 24))
    assert len(launched) == 14 * 6  # two forward; du, dA, dB and dx's part


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compile_has_no_break(compiler):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    _, model, _ = model_of_three()
    x, batches = torch.randn(5, 24), [torch.tensor(ids) for ids in ([2, -1, 0, 1, 2], [0, 0, 0, 0, 0], [-1, -1, 1, 1, 2])]
    with lk.use_backend("reference"):
        double = copy.deepcopy(model).double()
        results = [double(x.double(), adapter_ids=ids) for ids in batches]
    compiled = torch.compile(model, fullgraph=True, backend=compiler)
    for ids, exact in zip(batches, results):
        check("multi model compiled", compiled(x, adapter_ids=ids), exact, model(x, adapter_ids=ids), base=F32, K=CHAIN)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_gradients_add_up_in_the_views():
    _, model, _ = model_of_three()
    other = copy.deepcopy(model)
    adapters, x, ids = lk.adapter_parameters(model), torch.randn(4, 24), torch.tensor([0, 1, 1, -1])
    for _ in range(2):
        model(x, adapter_ids=ids).square().sum().backward()
        other(x, adapter_ids=ids).square().sum().backward()
    stack = other[1].up_proj
    for e, rank in enumerate(RANKS):
        assert torch.equal(adapters[e]["1.up_proj.lora_A"].grad, stack.lora_A.grad[e, :rank])
        assert torch.equal(adapters[e]["1.up_proj.lora_B"].grad, stack.lora_B.grad[e, :, :rank])


def test_saved_one_by_one_and_served(tmp_path):
    """PEFT's files of one of many: back on a plain model, and in a pool, it computes what it did."""
    plain, model, _ = model_of_three()
    x, served = torch.randn(3, 24), copy.deepcopy(plain)
    pool = lk.AdapterPool(served, 9)
    lk.serve_adapters(served, pool)
    for e in range(3):
        lk.save_adapter(model, tmp_path / str(e), index=e)
        pool.add(str(e), tmp_path / str(e))
    with torch.no_grad():
        y = model(x, adapter_ids=torch.arange(3))
        assert torch.equal(served(x, adapter_ids=["0", "1", "2"]), y)
        for e, (rank, alpha) in enumerate(zip(RANKS, ALPHAS)):
            single = copy.deepcopy(plain)
            lk.load_adapter(single, tmp_path / str(e))
            assert (single[0].q_proj.r, single[0].q_proj.lora_alpha) == (rank, alpha)
            check("one of many", y[e], single.double()(x[e].double()), y[e], base=F32, K=40)
    for index, words in ((3, "index: expected an int from 0 to 2, got 3"), (True, "index: expected an int from 0 to 2"), ("0", "index: expected an int")):
        with pytest.raises(ValueError, match=words):
            lk.save_adapter(model, tmp_path / "no", index=index)
    with pytest.raises(ValueError, match="index: expected None"):
        lk.save_adapter(plain, tmp_path / "no", index=0)
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        ({"num_adapters": 0}, ValueError, "num_adapters: expected an int of at least 1, got 0"),
        ({"ranks": [1, 2]}, ValueError, "ranks: expected 3 values, one for each adapter, got 2"),
        ({"ranks": 2.5}, TypeError, "ranks: expected an int of at least 1"),
        ({"lora_alpha": float("nan")}, ValueError, "lora_alpha: expected a finite number"),
        ({"lora_dropout": [0.1, 2.0, 0.1]}, ValueError, "lora_dropout: expected a probability"),
        ({"target_modules": ["nobody"]}, ValueError, "target_modules: no module is named 'nobody'"),
        ({"adapter_dtype": torch.bfloat16}, TypeError, "adapter_dtype: expected torch.float32"),
    ],
)
def test_arguments(arguments, error, words):
    model = block()
    before = {name: (p.requires_grad, p) for name, p in model.named_parameters()}
    with pytest.raises(error) as caught:
        lk.apply_multi_lora(model, **({"num_adapters": 3} | arguments))
    assert words in str(caught.value)
    assert all(type(m) is not lk.MultiLoraLinear for m in model.modules())
    assert {name: (p.requires_grad, p) for name, p in model.named_parameters()} == before
    for wrong, words in ((nn.Sequential(nn.ReLU()), "target_modules"), (3, "model: expected a torch.nn.Module")):
        with pytest.raises((TypeError, ValueError), match=words):
            lk.apply_multi_lora(wrong, 2)
    with pytest.raises(ValueError, match="model: it has no MultiLoraLinear"):
        lk.adapter_parameters(model)
