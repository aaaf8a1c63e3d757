"""What only a GPU can show: streams, CUDA graphs, many repeats, real memory beyond 2**31 elements. Numbers on a GPU are
held by the other tests too, through their `backend` fixture; `-m gpu` chooses all of them."""

import oracle
import pytest
import torch
from numerics import check
from oracle import make_case
from test_multi import DISTRIBUTIONS, Case
from test_pool import adapter_of

import lorakernels as lk
from lorakernels import backends
from lorakernels.functional import lora_linear, nf4_linear, quantize_nf4
from lorakernels.modules import LoraLinear
from lorakernels.nf4_modules import QLoraLinear

pytestmark = pytest.mark.gpu

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
ON_GPU = [name for name in ("cuda", "triton", "composed", "reference") if torch.cuda.is_available() and backends.why_not(name, "cuda", BF16) is None]


@pytest.fixture(params=ON_GPU or ["none"])
def gpu_backend(request):
    with backends.use_backend(request.param):
        yield request.param


def step(layer, x):
    layer.zero_grad()
    y = layer(x)
    y.float().square().mean().backward()
    return [y.detach()] + [p.grad.clone() for p in layer.adapter_parameters()]


def layer_on_gpu(**arguments):
    return LoraLinear(512, 768, r=16, init_lora_weights=False, dtype=BF16, device="cuda", **arguments)


def test_every_built_backend_is_usable():
    assert set(ON_GPU) == {"cuda", "triton", "composed", "reference"}, backends.available()


def test_250_repeats_are_bit_equal(gpu_backend):
    layer, x = layer_on_gpu(lora_dropout=0.1), torch.randn(300, 512, device="cuda", dtype=BF16)
    torch.manual_seed(1)
    first = step(layer, x)
    for _ in range(250):
        torch.manual_seed(1)
        assert all(torch.equal(a, b) for a, b in zip(first, step(layer, x)))


def test_two_streams(gpu_backend):
    layer = layer_on_gpu()
    inputs = [torch.randn(2000, 512, device="cuda", dtype=BF16) for _ in range(2)]
    with torch.no_grad():
        alone = [layer(x) for x in inputs]
        streams = [torch.cuda.Stream() for _ in inputs]
        torch.cuda.synchronize()
        results = []
        for x, stream in zip(inputs, streams):
            with torch.cuda.stream(stream):
                torch.cuda._sleep(20_000_000)  # a launch on another stream would run before this ends
                late = x + 0
                results.append(layer(late))
        torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(alone, results))


def test_cuda_graph_replays_with_other_inputs(gpu_backend):
    layer, x = layer_on_gpu(), torch.randn(64, 512, device="cuda", dtype=BF16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(layer, x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    layer.zero_grad()
    with torch.cuda.graph(graph):
        y = layer(x)
        y.float().square().mean().backward()
    for seed in range(3):
        torch.manual_seed(seed)
        fresh = torch.randn_like(x)
        x.copy_(fresh)
        for p in layer.adapter_parameters():
            p.grad.zero_()
        graph.replay()
        replayed = [y.clone()] + [p.grad.clone() for p in layer.adapter_parameters()]
        with torch.no_grad():
            assert torch.equal(replayed[0], layer(fresh))
        twin = LoraLinear(512, 768, r=16, dtype=BF16, device="cuda")
        twin.load_state_dict(layer.state_dict())
        for a, b in zip(replayed[1:], step(twin, fresh)[1:]):
            check("graph replay", a, b.double(), b, base=BF16, K=768)


def test_cuda_graph_draws_a_new_mask_each_replay(gpu_backend):
    layer = layer_on_gpu(lora_dropout=0.5)
    x = torch.randn(64, 512, device="cuda", dtype=BF16)
    with torch.no_grad():
        layer(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        graph.replay()
        first = y.clone()
        graph.replay()
    assert not torch.equal(first, y)


def test_more_than_2_to_the_31_elements(gpu_backend):
    M, N, R = 70_000, 32_768, 8  # 2.29e9 elements, 4.6 GB
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("needs 40 GiB of GPU memory")
    x, W = torch.randn(M, 16, device="cuda", dtype=BF16), torch.randn(N, 16, device="cuda", dtype=BF16)
    A, B = torch.randn(R, 16, device="cuda"), torch.randn(N, R, device="cuda")
    with torch.no_grad():
        y = lora_linear(x, W, A, B, 0.5)
        for rows in (slice(0, 64), slice(M - 64, M)):
            exact = x[rows].double() @ W.double().t() + 0.5 * (x[rows].double() @ A.double().t()) @ B.double().t()
            eager = ((x[rows] @ W.t()).float() + 0.5 * (x[rows].float() @ A.t()) @ B.t()).to(BF16)
            check("beyond 2**31 elements", y[rows], exact, eager, base=BF16, K=16)


def test_large_shapes(gpu_backend):
    for K, N in ((4096, 4096), (4096, 14336), (14336, 4096)):
        case = make_case(8192, K, N, 16, BF16, F32, device="cuda")
        with torch.no_grad():
            y = lora_linear(case.x, case.W, case.A, case.B, 1.5)
            rows = slice(4096, 4096 + 256)
            x = case.x[rows]
            exact = x.double() @ case.W.double().t() + 1.5 * (x.double() @ case.A.double().t()) @ case.B.double().t()
            eager = ((x @ case.W.t()).float() + 1.5 * (x.float() @ case.A.t()) @ case.B.t()).to(BF16)
            check(f"M=8192 K={K} N={N}", y[rows], exact, eager, base=BF16, K=K)


@pytest.mark.parametrize("base, adapter", [(BF16, F32), (BF16, BF16), (F16, F32), (F32, F32)])
@pytest.mark.parametrize("M, R", [(512, 16), (512, 64), (8192, 16), (8192, 20), (8192, 64), (20_000, 16)])
def test_large_thin_products(gpu_backend, M, R, base, adapter):
    """u, du, dA and dB, in every form that the sizes choose; repeats are bit-equal."""
    first = oracle.hold_thin(M, 4096, 2048, R, base, adapter, "cuda")
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(first.values(), oracle.hold_thin(M, 4096, 2048, R, base, adapter, "cuda").values()))


@pytest.mark.parametrize("K, N", [(4096, 4096), (4096, 14336), (14336, 4096), (3420, 4096)])
def test_large_nf4_weights(gpu_backend, K, N):
    """Rows across every switch of kernel, forward and dx."""
    weight = quantize_nf4(torch.randn(N, K, device="cuda").mul_(K**-0.5).to(BF16))
    dense = weight.dequantize(F32)
    for M in (1, 8, 9, 16, 17, 128, 129, 4096):
        x, dy = torch.randn(M, K, device="cuda").to(BF16).requires_grad_(), torch.randn(M, N, device="cuda").to(BF16)
        y = nf4_linear(x, weight)
        y.backward(dy)
        for name, out, exact, eager in (
            ("y", y.detach(), x.detach().double() @ dense.double().t(), x.detach() @ dense.to(BF16).t()),
            ("dx", x.grad, dy.double() @ dense.double(), dy @ dense.to(BF16)),
        ):
            check(f"NF4 M={M} K={K} N={N} {name}", out, exact, eager, base=BF16, K=max(K, N))


@pytest.mark.parametrize("rows", [4, 16, 64, 300])
def test_250_repeats_of_nf4_are_bit_equal(gpu_backend, rows):
    layer, x = QLoraLinear(512, 768, r=16, init_lora_weights=False, dtype=BF16, device="cuda"), torch.randn(rows, 512, device="cuda", dtype=BF16)
    first = step(layer, x)
    for _ in range(250):
        assert all(torch.equal(a, b) for a, b in zip(first, step(layer, x)))


@pytest.mark.parametrize("rows", [4, 64, 300])
def test_nf4_in_a_cuda_graph(gpu_backend, rows):
    layer, x = QLoraLinear(512, 768, r=16, init_lora_weights=False, dtype=BF16, device="cuda"), torch.randn(rows, 512, device="cuda", dtype=BF16)
    with torch.no_grad():
        layer(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        x.copy_(torch.randn_like(x))
        graph.replay()
        assert torch.equal(y, layer(x))


@pytest.mark.parametrize("M, E, ranks", [(1, 1, [16]), (64, 64, [16] * 64), (64, 64, [1 + e % 64 for e in range(64)]), (4096, 8, [8, 16, 24, 200, 1, 3, 64, 16])])
def test_many_adapters(gpu_backend, M, E, ranks):
    """Decode and training sizes, forward and backward; repeats are bit-equal."""
    for base, adapter in ((BF16, BF16), (BF16, F32)):
        case = Case(M, 4096, 4096, E, ranks, DISTRIBUTIONS["random"](M, E), base, adapter, "cuda")
        first = case.hold(label=f"GPU M={M} E={E} ")
        for _ in range(20):
            assert all(torch.equal(a, b) for a, b in zip(first.values(), case.run().values()))


def test_a_pool_in_a_cuda_graph():
    """Captured with one adapter, replayed with other ids, with an adapter that came later and one that has gone: nothing is baked in."""
    if "triton" not in ON_GPU:
        pytest.skip("needs Triton")
    with backends.use_backend("triton"), torch.no_grad():
        model = torch.nn.Sequential(*(torch.nn.Linear(256, 256, device="cuda", dtype=BF16) for _ in range(3)))
        pool = lk.AdapterPool(model, 64)
        tensors = [adapter_of(model, rank, rank) for rank in (4, 16, 9)]
        lk.serve_adapters(model, pool)
        ids, x = torch.full((8,), -1, device="cuda"), torch.randn(8, 256, device="cuda", dtype=BF16)
        ids[:2] = pool.add("a", tensors[0])
        with pool.route(ids):
            model(x)  # makes the flag of the device
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y = model(x)
            b = pool.add("b", tensors[1])
            ids.copy_(torch.tensor([b, -1, pool.id("a"), b, b, -1, pool.id("a"), b]))
            graph.replay()
            assert torch.equal(y, model(x)) and not y.isnan().any()
            lk.check()
        gone = pool.id("a")
        pool.remove("a")
        pool.add("c", tensors[2])
        with pool.route(ids):
            graph.replay()
            assert (y.isnan().all(1) == (ids == gone)).all()
            assert torch.equal(torch.nan_to_num(y), torch.nan_to_num(model(x)))
            with pytest.raises(ValueError, match="adapter_ids: "):
                lk.check()


def test_a_pool_changes_while_another_stream_reads_it():
    if "triton" not in ON_GPU:
        pytest.skip("needs Triton")
    with backends.use_backend("triton"), torch.no_grad():
        model = torch.nn.Sequential(*(torch.nn.Linear(512, 512, device="cuda", dtype=BF16) for _ in range(4)))
        pool, names = lk.AdapterPool(model, 16, max_rank=16), ("a", "b", "c")
        tensors = {name: adapter_of(model, 16, seed) for seed, name in enumerate(names)}
        lk.serve_adapters(model, pool)
        x, alone = torch.randn(64, 512, device="cuda", dtype=BF16), {}
        for name in names:
            pool.add(name, tensors[name])
            alone[name] = model(x, adapter_ids=[name] * 64)
        streams, results = [torch.cuda.Stream() for _ in names], []
        torch.cuda.synchronize()
        for _ in range(3):
            for name, stream in zip(names, streams):  # each takes the rows of the one before, which may still be at work
                with torch.cuda.stream(stream):
                    with pool.route([name] * 64):
                        torch.cuda._sleep(20_000_000)
                        results.append((name, model(x)))
        torch.cuda.synchronize()
    assert all(torch.equal(alone[name], y) for name, y in results)


def test_routing_waits_for_nothing():
    if "triton" not in ON_GPU:
        pytest.skip("needs Triton")
    with backends.use_backend("triton"), torch.no_grad():
        model = torch.nn.Sequential(torch.nn.Linear(256, 256, device="cuda", dtype=BF16))
        pool, tensors = lk.AdapterPool(model, 64), adapter_of(model, 4, 4)
        lk.serve_adapters(model, pool)
        pool.add("a", tensors)
        ids, x = torch.tensor([pool.id("a"), -1], device="cuda"), torch.randn(2, 256, device="cuda", dtype=BF16)
        model(x, adapter_ids=ids)
        torch.cuda.set_sync_debug_mode("error")
        try:
            model(x, adapter_ids=ids)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_launch_follows_the_tensors_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    for name in ON_GPU:
        with backends.use_backend(name), torch.no_grad():
            layer, x = layer_on_gpu().to("cuda:1"), torch.randn(8, 512, device="cuda:1", dtype=BF16)
            with torch.cuda.device(0):
                first = layer(x)
            with torch.cuda.device(1):
                assert torch.equal(first, layer(x))


def test_nothing_waits_for_the_device(gpu_backend):
    layer, x = layer_on_gpu(lora_dropout=0.1), torch.randn(64, 512, device="cuda", dtype=BF16, requires_grad=True)
    step(layer, x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(x).float().square().mean().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
