"""LoRA on a dense base: y = x W^T + s drop(x) A^T B^T, against the frozen base (forward, and dx) and other ways of computing it."""

import torch
from torch import nn
from torch.nn import functional as F

from lorakernels import dropout
from lorakernels.modules import LoraLinear

from . import peers
from .cases import SEED, Case, Contender, Work, looking, ours, passes
from .shapes import linears

NAME, MODES = "lora", ("fwd+bwd", "fwd", "bwd")
DESIGN = {"cpu": [(2048, 2048), (576, 1536)], "cuda": [(4096, 4096), (4096, 14336), (14336, 4096)]}
TOKENS = {"cpu": [512, 2048], "cuda": [8192, 2048, 512]}
SCALING = 2.0


def cases(options):
    """Those that tell most first: the design's shapes, forward and backward, without dropout and with it."""
    quick = options.quick
    for shapes in options.shapes:
        for K, N in linears(shapes, DESIGN[options.device]):
            tokens = [2] if shapes == "calls" else options.tokens or TOKENS[options.device][: 1 if quick or (K, N) == (576, 1536) else None]
            for mode in options.modes(MODES[:1] if quick else MODES if shapes == "calls" else MODES[:2]):
                for M in tokens:
                    for dtype, adapter in options.dtypes:
                        for R in options.ranks or ([16] if quick or shapes != "design" or mode != "fwd+bwd" else [16, 64]):
                            for p in (0.0, 0.1) if mode == "fwd+bwd" and shapes != "calls" else (0.0,):
                                yield Case(NAME, mode, shapes, M, K, N, R, dtype, adapter, p, device=options.device)


class Plain(nn.Module):
    """PEFT's formula as a module: what torch.compile gets, and the measure of error."""

    def __init__(self, W, A, B, p):
        super().__init__()
        self.W, self.A, self.B, self.p = W, A, B, p

    def forward(self, x):
        u = F.linear(F.dropout(x.to(self.A.dtype), self.p), self.A)
        return (F.linear(x, self.W) + F.linear(u, self.B) * SCALING).to(x.dtype)


class InPlace(torch.autograd.Function):
    """The composition that fast training code uses: adapters cast to the base's dtype, addmm_ onto the base's product."""

    @staticmethod
    def forward(ctx, x, W, A, B, p):
        dropped, mask = torch.native_dropout(x, p, True) if p else (x, None)
        A_cast, B_cast = A.to(x.dtype), B.to(x.dtype)
        y = torch.mm(x, W.t())
        u = torch.mm(dropped, A_cast.t())
        y.addmm_(u, B_cast.t(), alpha=SCALING)
        ctx.save_for_backward(dropped, W, A_cast, B_cast, u, mask)
        ctx.p, ctx.dtype = p, A.dtype
        return y

    @staticmethod
    def backward(ctx, dy):
        dropped, W, A, B, u, mask = ctx.saved_tensors
        du = torch.mm(dy, B).mul_(SCALING)
        dx = torch.mm(dy, W)
        if mask is None:
            dx.addmm_(du, A)
        else:
            dx += torch.mm(du, A) * mask / (1 - ctx.p)
        return dx, None, torch.mm(du.t(), dropped).to(ctx.dtype), (SCALING * torch.mm(dy.t(), u)).to(ctx.dtype), None


def peft_layer(linear, A, B, p):
    peft = peers.module("peft")
    holder = nn.Sequential(nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta"))
    holder[0] = linear
    config = peft.LoraConfig(r=A.shape[0], lora_alpha=SCALING * A.shape[0], lora_dropout=p, target_modules=["0"], init_lora_weights=False)
    layer = peft.get_peft_model(holder, config, autocast_adapter_dtype=False).base_model.model[0]
    layer.lora_A.default.weight, layer.lora_B.default.weight = nn.Parameter(A.detach().clone()), nn.Parameter(B.detach().clone())
    return layer


def exact(names, some, mask, x, dy, W, A=None, B=None):
    """{name: float64} of a layer's results: y (M, N) and dx (M, K) in the rows `some`, dA (R, K), dB (N, R). A, B None: the base alone.

    mask: None, or what x (M, K) is multiplied by on its way to A.
    """
    X, G, W, A, B = (t if t is None else t.detach().double() for t in (x, dy, W, A, B))
    if A is None:
        wanted = {"y": lambda: X[some] @ W.t(), "dx": lambda: G[some] @ W}
        return {name: wanted[name]() for name in names}
    D, du = X if mask is None else X * mask, SCALING * (G @ B)
    down = du[some] @ A
    wanted = {"y": lambda: X[some] @ W.t() + SCALING * (D[some] @ A.t()) @ B.t(), "dx": lambda: G[some] @ W + (down if mask is None else down * mask[some]),
              "dA": lambda: du.t() @ D, "dB": lambda: SCALING * G.t() @ (D @ A.t())}  # fmt: skip
    return {name: wanted[name]() for name in names}


def build(case, options):
    """The row's Work: x (M, K), dy (M, N) and W (N, K) of the base's dtype, A (R, K) and B (N, R) of the adapters'."""
    device, dtype, p = case.device, case.base, case.p
    draw = lambda *shape: torch.randn(*shape, device=device)  # noqa: E731
    x, dy = draw(case.M, case.K).to(dtype).requires_grad_(), draw(case.M, case.N).to(dtype)
    linear = nn.Linear(case.K, case.N, bias=False, device=device, dtype=dtype).requires_grad_(False)
    A, B = ((draw(*shape) * shape[1] ** -0.5).to(case.given).requires_grad_() for shape in ((case.R, case.K), (case.N, case.R)))
    layer = LoraLinear.from_linear(linear, r=case.R, lora_alpha=SCALING * case.R, lora_dropout=p, adapter_dtype=case.given)
    layer.lora_A, layer.lora_B = A, B = nn.Parameter(A.detach()), nn.Parameter(B.detach())
    W = linear.weight

    def contender(name, module, leaves=None, **more):
        call, ready = passes(case.mode, lambda: module(x), leaves or {"x": x, "A": A, "B": B}, dy)
        return Contender(name, call, ready, **more)

    ones = lambda dtype: torch.ones(case.M, case.K, dtype=dtype, device=device)  # noqa: E731
    theirs = (lambda: F.dropout(ones(case.given), p).double()) if p else None
    found, skipped = [contender("base", linear, {"x": x}, bare=True)], {}
    for name, context in ours(device, dtype, fused=True).items():
        mask = (lambda: dropout.keep_mask(dropout.draw_seed(device), case.M, case.K, p).double() * dropout.scale(p)) if p else None
        found.append(contender(name, layer, context=context, mask=mask))
    if reason := peers.why_not("peft"):
        skipped["PEFT"] = reason
    else:
        peft = peft_layer(linear, A, B, p)
        found.append(contender("PEFT", peft, {"x": x, "A": peft.lora_A.default.weight, "B": peft.lora_B.default.weight}, mask=theirs))
    in_place = (lambda: torch.native_dropout(ones(dtype), p, True)[0].double()) if p else None
    found.append(contender("addmm_", lambda x: InPlace.apply(x, W, A, B, p), cast=True, mask=in_place))
    if p:
        skipped["torch.compile"] = "the mask that it draws cannot be drawn again outside, so its result cannot be compared"
    elif reason := options.without_compile():
        skipped["torch.compile"] = reason
    else:
        found.append(contender("torch.compile", torch.compile(Plain(W, A, B, p))))
    for name, peer in peers.lora(options.peers).items():
        if isinstance(peer, str) or p:
            skipped[name] = peer if isinstance(peer, str) else "not compared with dropout: its mask is its own"
        else:
            found.append(contender(name, lambda x, peer=peer: peer(x, W, A, B, SCALING), cast=True))

    some, look = looking(case.M, device)

    def reference(mask):
        return exact(results_of(case.mode), some, mask, x, dy, W, A, B)

    def eager(cast):
        a, b = ((t.detach().to(dtype) if cast else t.detach()).requires_grad_() for t in (A, B))
        torch.manual_seed(SEED)
        call, ready = passes(case.mode, lambda: Plain(W, a, b, p)(x), {"x": x, "A": a, "B": b}, dy)
        if ready:
            ready()
        found = {name: look(name, t) for name, t in call().items()}
        torch.manual_seed(SEED)
        return found, (F.dropout(ones(a.dtype), p).double() if p else None)

    products = {"fwd": 1, "bwd": 1, "fwd+bwd": 2}[case.mode]
    thin = {"fwd": 2, "bwd": 4, "fwd+bwd": 6}[case.mode] * case.M * case.R * (case.K + case.N)
    size = {"float32": 4}.get(case.dtype, 2)
    moved = products * size * (case.M * (case.K + case.N) + case.K * case.N) + products * A.element_size() * case.R * (case.K + case.N)
    lengths = {"y": case.K, "dx": case.N, "dA": case.M, "dB": case.M}
    return Work(found, reference, eager, lengths, 2 * products * case.M * case.K * case.N + thin, moved, skipped, look, [W, A, B])


def results_of(mode):
    return {"fwd": ("y",), "bwd": ("dx", "dA", "dB"), "fwd+bwd": ("y", "dx", "dA", "dB")}[mode]
