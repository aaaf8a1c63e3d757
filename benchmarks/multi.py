"""Many adapters in one batch, each row its own: decoding and training, against PEFT's adapter_names and what else can be composed."""

import torch
from torch import nn
from torch.nn import functional as F

from lorakernels.functional import lora_linear, multi_lora_linear

from . import lora, peers, serving
from .cases import Case, Contender, Work, looking, ours, passes, recording
from .shapes import linears

NAME, MODES = "multi", ("decode", "fwd+bwd", "fwd")
DESIGN = {"cpu": [(4096, 4096)], "cuda": [(4096, 4096), (4096, 14336), (14336, 4096)]}
ADAPTERS = {"decode": [64, 256], "fwd": [8], "fwd+bwd": [8]}
TOKENS = {"decode": [64], "fwd": [512], "fwd+bwd": [512]}
GPU_TOKENS = {"decode": [64, 1, 8, 32, 128, 256], "fwd": [4096], "fwd+bwd": [8192, 4096]}
ROWS = ("distinct", "uniform", "zipf", "identical", "half none")


def cases(options):
    """Those that tell most first: as many adapters as rows."""
    gpu = options.device == "cuda"
    for shapes in options.shapes:
        for mode in options.modes(MODES[:2] if options.quick else MODES):
            layers = linears(shapes, DESIGN[options.device] if mode == "decode" or gpu else [(2048, 2048)])
            for K, N in layers if shapes != "awkward" or mode != "decode" else layers[:1]:
                for M in [2] if shapes == "calls" else options.tokens or (GPU_TOKENS if gpu else TOKENS)[mode][: 1 if options.quick else None]:
                    for dtype, adapter in options.dtypes:
                        for R in options.ranks or [16]:
                            for E in [2] if shapes == "calls" else ADAPTERS[mode][: 1 if options.quick else None]:
                                named = ROWS[:1] if mode == "decode" and (E != 64 or options.quick or shapes != "design") else ROWS if mode == "decode" else ("uniform",)
                                for rows in named:
                                    yield Case(NAME, mode, shapes, M, K, N, R, dtype, adapter, adapters=E, rows=rows, device=options.device)


def adapter_ids(rows, M, E):
    """Whom each row belongs to, in an order of no meaning."""
    generator = torch.Generator().manual_seed(1)
    if rows == "distinct":
        ids = torch.cat([torch.randperm(E, generator=generator) for _ in range(-(-M // E))])[:M]
    elif rows == "identical":
        ids = torch.zeros(M, dtype=torch.int64)
    elif rows == "zipf":  # the real one, of exponent 1.5
        ids = torch.multinomial(torch.arange(1, E + 1).double() ** -1.5, M, replacement=True, generator=generator)
    else:  # all that are resident where the batch trains, else the square root of the rows, as in serving benchmarks
        ids = torch.arange(M) % min(E, max(E if M >= 512 else 1, round(M**0.5)))
    if rows == "half none":
        ids[torch.arange(M) % 2 == 1] = -1
    return ids[torch.randperm(M, generator=generator)]


def peft_layer(linear, A, B):
    """PEFT's own layer with one adapter for each of the stacks, to be called with adapter_names."""
    peft = peers.module("peft")
    holder = nn.Sequential(nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta"))
    holder[0] = linear
    config = peft.LoraConfig(r=A.shape[1], lora_alpha=lora.SCALING * A.shape[1], target_modules=["0"], init_lora_weights=False)
    model = peft.get_peft_model(holder, config, adapter_name="0", autocast_adapter_dtype=False)
    for e in range(1, len(A)):
        model.add_adapter(str(e), config, autocast_adapter_dtype=False)
    layer = model.base_model.model[0].eval()
    for e in range(len(A)):
        layer.lora_A[str(e)].weight, layer.lora_B[str(e)].weight = (nn.Parameter(t[e].detach().clone()) for t in (A, B))
    return layer


def loop(x, W, A, B, ids):
    """PEFT's formula: the rows of one adapter after the other's."""
    y = F.linear(x, W)
    for e in ids.unique().tolist():
        if e >= 0:
            at = (ids == e).nonzero().flatten()
            y = y.index_add(0, at, (F.linear(F.linear(x[at].to(A.dtype), A[e]), B[e]) * lora.SCALING).to(y.dtype))
    return y


def build(case, options):
    """The row's Work: x (M, K), dy (M, N), W (N, K), stacks A (E, R, K) and B (E, N, R), and an id for each row."""
    device, dtype, E = case.device, case.base, case.adapters
    trains = case.mode == "fwd+bwd"
    draw = lambda *shape: torch.randn(*shape, device=device)  # noqa: E731
    x, dy = draw(case.M, case.K).to(dtype).requires_grad_(trains), draw(case.M, case.N).to(dtype)
    linear = nn.Linear(case.K, case.N, bias=False, device=device, dtype=dtype).requires_grad_(False)
    W = linear.weight.detach()
    A, B = ((draw(*shape) * shape[2] ** -0.5).to(case.given).requires_grad_(trains) for shape in ((E, case.R, case.K), (E, case.N, case.R)))
    ids = adapter_ids(case.rows, case.M, E).to(device)
    leaves = {"x": x, "A": A, "B": B}

    def contender(name, forward, leaves=leaves, **more):
        call, ready = passes(case.mode, forward, leaves, dy)
        return Contender(name, recording(call, trains), ready and recording(ready, trains), **more)

    found, skipped = [contender("base", lambda: F.linear(x, W), {"x": x}, bare=True)], {}
    for name, context in ours(device, dtype).items():
        if name != "lorakernels: cuda":  # has none of these kernels
            found.append(contender(name, lambda: multi_lora_linear(x, W, A, B, ids, lora.SCALING), context=context))
    if not trains:
        at = torch.randperm(E * case.R, device=device)  # a pool's rank rows stand anywhere
        pages, rows_A, rows_B = torch.argsort(at).view(E, case.R), A.reshape(-1, case.K)[at], B.transpose(1, 2).reshape(-1, case.N)[at]
        found.append(contender("lorakernels: rank rows", lambda: multi_lora_linear(x, W, rows_A, rows_B, ids, lora.SCALING, pages=pages)))
    if trains:
        found.append(contender("lorakernels: one adapter", lambda: lora_linear(x, W, A[0], B[0], lora.SCALING), {"x": x, "A": A, "B": B}, bare=True))
        skipped["PEFT"] = "its adapter_names does not train"
    elif reason := peers.why_not("peft"):
        skipped["PEFT"] = reason
    elif E > 64:
        skipped["PEFT"] = "its time does not depend on adapters that no row names: see 64"
    else:
        layer, names = peft_layer(linear, A, B), ["__base__" if e < 0 else str(e) for e in ids.tolist()]
        found.append(contender("PEFT", lambda: layer(x, adapter_names=names)))
    if case.rows != "distinct" or trains:
        found.append(contender("one adapter after the other", lambda: loop(x, W, A, B, ids)))
    if (ids < 0).any():
        skipped["gather + bmm"] = skipped["torch._grouped_mm"] = "rows without an adapter have no place in it"
    else:
        gathered = lambda: F.linear(x, W) + (torch.bmm(B[ids], torch.bmm(A[ids], x.to(A.dtype)[:, :, None]))[:, :, 0] * lora.SCALING).to(dtype)  # noqa: E731
        found.append(contender("gather + bmm", gathered))
        order = torch.argsort(ids, stable=True)
        back, ends = torch.argsort(order), torch.bincount(ids, minlength=E).cumsum(0).int()

        def grouped():
            u = torch._grouped_mm(x.to(A.dtype)[order], A.transpose(1, 2), offs=ends)
            return F.linear(x, W) + (torch._grouped_mm(u, B.transpose(1, 2), offs=ends)[back] * lora.SCALING).to(dtype)

        try:
            with torch.no_grad():
                grouped()
            found.append(contender("torch._grouped_mm", grouped, cast=device == "cuda"))
        except (RuntimeError, AttributeError) as error:
            skipped["torch._grouped_mm"] = str(error).splitlines()[0][:100]
    for name, peer in serving.multi(options.peers).items():
        if isinstance(peer, str) or trains or (ids < 0).any():
            skipped[name] = peer if isinstance(peer, str) else "does not train" if trains else "not called with rows of no adapter"
        else:
            add = peer(A.to(dtype), B.to(dtype), ids, lora.SCALING)
            found.append(contender(name, lambda add=add: add(F.linear(x, W), x), cast=True))

    some, look = looking(case.M, device)

    def reference(mask):
        X, G, W64, A64, B64 = (t.detach().double() for t in (x, dy, W, A, B))
        low, down = torch.zeros_like(G), torch.zeros_like(X)
        dA, dB = torch.zeros_like(A64), torch.zeros_like(B64)
        for e in set(ids.tolist()) - {-1}:
            at = ids == e
            u, du = X[at] @ A64[e].t(), lora.SCALING * G[at] @ B64[e]
            low[at], down[at] = lora.SCALING * u @ B64[e].t(), du @ A64[e]
            if trains:
                dA[e], dB[e] = du.t() @ X[at], lora.SCALING * G[at].t() @ u
        found = {"y": X[some] @ W64.t() + low[some]}
        return found | ({"dx": G[some] @ W64 + down[some], "dA": dA, "dB": dB} if trains else {})

    def eager(cast):
        a, b = ((t.detach().to(dtype) if cast else t.detach()).requires_grad_(trains) for t in (A, B))
        call, _ = passes(case.mode, lambda: loop(x, W, a, b, ids), {"x": x, "A": a, "B": b}, dy)
        return {name: look(name, t).detach() for name, t in recording(call, trains)().items()}, None

    products, width = (2 if trains else 1), x.element_size()
    used = len(set(ids.tolist()) - {-1})
    moved = products * (width * (case.M * (case.K + case.N) + case.K * case.N) + used * A.element_size() * case.R * (case.K + case.N))
    flops = 2 * products * case.M * case.K * case.N + (6 if trains else 2) * int((ids >= 0).sum()) * case.R * (case.K + case.N)
    return Work(found, reference, eager, {"y": case.K, "dx": case.N, "dA": case.M, "dB": case.M}, flops, moved, skipped, look, [W, A, B])
