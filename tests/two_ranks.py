"""What tests/test_distributed.py runs on each of two gloo ranks: python two_ranks.py NAME RANK PORT."""

import copy
import os
import sys

import torch
import torch.distributed as dist
from numerics import check
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import lorakernels as lk
from lorakernels import functional

WIDTHS = 64, 96, 33
SUMS = WIDTHS[0] * WIDTHS[1]  # of the chain


def model(**arguments):
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 33))
    lk.apply_lora(made, **dict(r=4, lora_alpha=8, init_lora_weights=False) | arguments)
    return made


def inputs(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def step(network, x, seed=2):
    """y and the gradients of the sum of its squares, x's too; the seeds of dropout are the same each time."""
    torch.manual_seed(seed)
    x = x.detach().requires_grad_()
    y = network(x)
    y.float().square().sum().backward()
    return y.detach(), {"x": x.grad} | {name: p.grad for name, p in network.named_parameters() if p.requires_grad}


def alone_and_exact(network, x):
    """step() of one process: as it is, and in float64, which the bounds are taken from."""
    exact = copy.deepcopy(network).double()
    return step(network, x), step(exact, x.double())


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def hold(got, alone, exact, what, base=torch.float32):
    """y and gradients of two ranks under the error rule; those of one process in the same dtypes are the measure."""
    check(f"{what} y", whole(got[0]), exact[0], alone[0], base=base, K=SUMS)
    assert got[1].keys() == exact[1].keys()
    for name, grad in got[1].items():
        check(f"{what} {name}", whole(grad), exact[1][name], alone[1][name], base=base, K=SUMS)


def nf4_fsdp2(rank, mesh):
    alone, sharded = model(quantize="nf4"), model(quantize="nf4")
    # torch 2.11 cannot shard a parameter without a gradient's dtype: the packed bytes stay whole there
    old = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13)
    whole = {"ignored_params": {p for p in sharded.parameters() if not p.is_floating_point()}} if old else {}
    for layer in (sharded[0], sharded[2]):
        fully_shard(layer, mesh=mesh, **whole)
    fully_shard(sharded, mesh=mesh, **whole)
    data_parallel_step("nf4 fsdp2", rank, sharded, alone)


def data_parallel(rank, mesh):
    """A dense model under DDP and FSDP2."""
    data_parallel_step("ddp", rank, nn.parallel.DistributedDataParallel(model()), model())
    sharded = model()
    for layer in (sharded[0], sharded[2]):
        fully_shard(layer, mesh=mesh)
    data_parallel_step("fsdp2", rank, fully_shard(sharded, mesh=mesh), model())
    mixed = model()  # every weight gathered in bfloat16, gradients summed in float32
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in (mixed[0], mixed[2]):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(mixed, mesh=mesh, mp_policy=policy)
    y, grads = step(mixed, inputs(8, 64)[4 * rank : 4 * rank + 4])
    assert y.dtype == torch.bfloat16 and all(g.dtype == torch.float32 and torch.isfinite(whole(g)).all() for g in grads.values())


def data_parallel_step(what, rank, sharded, alone):
    """Each rank has half of the rows: its forward is bit-equal to one process on them, the gradients are those of all of them."""
    x = inputs(8, 64)
    mine = x[4 * rank : 4 * rank + 4]
    y, grads = step(sharded, mine)
    assert torch.equal(y, alone(mine)), what
    alone, exact = alone_and_exact(alone, x)
    for _, of_all in (alone, exact):
        of_all["x"] = of_all["x"][4 * rank : 4 * rank + 4]
    grads = {name.removeprefix("module."): g if name == "x" else whole(g) * 2 for name, g in grads.items()}  # parameters' are means over ranks
    hold((exact[0].float(), grads), alone, exact, what)  # y was compared above


def tensor_parallel(rank, mesh):
    """A column-parallel layer before a row-parallel one; with dropout the mask is that of one process, the first rank's."""
    for what, arguments, x in (
        ("plain", {}, inputs(8, 64)),
        ("sequences, lora_bias", dict(lora_bias=True), inputs(2, 5, 64)),
        ("dropout", dict(lora_dropout=0.3), inputs(8, 64)),
        ("trained biases, rank not divisible", dict(bias="all", r=5), inputs(7, 64)),
    ):
        alone, split = model(**arguments), model(**arguments)
        parallelize_module(split, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
        assert {p.device_mesh.size() for p in split.parameters()} == {2} and split[0].weight.to_local().shape == (48, 64) and split[2].weight.to_local().shape == (33, 48)
        hold(step(split, x, seed=2 + rank), *alone_and_exact(alone, x), f"tensor parallel, {what}")
    rows = distribute_module(model(), mesh)  # every weight whole on each rank, the rows apart
    got = step(rows, distribute_tensor(inputs(8, 64), mesh, [Shard(0)]))
    assert got[0].placements == (Shard(0),)
    hold(got, *alone_and_exact(model(), inputs(8, 64)), "rows apart")
    try:
        functional.lora_linear(inputs(8, 64), *[getattr(rows[0], name) for name in ("weight", "lora_A", "lora_B")])
    except RuntimeError as error:  # a kernel would read memory that a DTensor does not have
        assert "mixed torch.Tensor and DTensor" in str(error)
    else:
        raise AssertionError("no error")


if __name__ == "__main__":
    name, rank, port = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK=str(rank), WORLD_SIZE="2")
    dist.init_process_group("gloo", rank=rank, world_size=2)
    {"nf4_fsdp2": nf4_fsdp2, "data_parallel": data_parallel, "tensor_parallel": tensor_parallel}[name](rank, init_device_mesh("cpu", (2,)))
    dist.destroy_process_group()
    print("ok")
