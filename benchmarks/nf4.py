"""Products with a weight in NF4, their dx, a QLoRA layer's training and quantising, against bitsandbytes, torchao and dense weights."""

import torch
from torch import nn
from torch.nn import functional as F

import lorakernels as lk
from lorakernels import nf4
from lorakernels.functional import lora_linear, nf4_linear

from . import lora, peers
from .cases import Case, Contender, Work, in_turn, looking, ours, passes, recording
from .machine import last_cache
from .shapes import linears

NAME, MODES = "nf4", ("decode", "fwd", "bwd", "fwd+bwd", "quantize")
DESIGN = [(4096, 14336), (14336, 4096), (4096, 4096)]  # (K, N): 14336x4096 as the design writes weights
TOKENS = {"decode": [1, 16, 4], "fwd": [256, 64], "bwd": [256], "fwd+bwd": [256], "quantize": [0]}
GPU_TOKENS = {"decode": [1, 16, 4, 8, 2], "fwd": [64, 4096, 17, 128, 256, 1024], "bwd": [4096, 64], "fwd+bwd": [8192, 4096], "quantize": [0]}


def cases(options):
    """Those that tell most first: one row of x, cold, where the bytes of the weight are all that counts."""
    for shapes in options.shapes:
        layers = linears(shapes, DESIGN)
        for mode in options.modes(MODES):
            if mode == "fwd+bwd" and shapes == "calls":
                continue
            table = (GPU_TOKENS if options.device == "cuda" else TOKENS)[mode]
            for K, N in [(4096, 4096)] if shapes == "design" and (options.quick or mode == "quantize") else layers[:1] if mode in ("fwd+bwd", "quantize", "bwd") else layers:
                for M in table if mode == "quantize" else [2] if shapes == "calls" else options.tokens or table[: 1 if options.quick else None]:
                    for dtype, adapter in options.dtypes:
                        cold = mode == "decode" and shapes != "calls"
                        yield Case(NAME, mode, shapes, M, K, N, 16 if mode == "fwd+bwd" else 0, dtype, adapter, cache="cold" if cold else "warm", device=options.device)
                        if cold and M == 1 and (K, N) == layers[0] and not options.quick:
                            yield Case(NAME, mode, shapes, M, K, N, 0, dtype, adapter, cache="warm", device=options.device)


def exact(weight):
    """code * absmax in float64."""
    scales = nf4.block_scales(weight.absmax, weight.nested, weight.format.nested_blocksize).double().repeat_interleave(weight.blocksize)
    codes = torch.stack([weight.packed >> 4, weight.packed & 15], dim=-1).flatten()[: weight.shape.numel()].long()
    return (nf4.codebook(weight.device).double()[codes] * scales[: len(codes)]).view(weight.shape)


def bnb_weight(bnb, weight):
    """bitsandbytes' own view of the same bytes: (packed, QuantState)."""
    pieces = {name.removeprefix("weight."): t for name, t in weight.state_dict().items() if name != "weight"}
    return weight.packed.view(-1, 1), bnb.functional.QuantState.from_dict(pieces, device=weight.device)


REPACKED = "bitsandbytes, repacked"  # its layer in eval mode, after its first forward


def repacking_lacks(bnb, case):
    if not bnb.functional.has_avx512bf16():
        return "its fused kernel needs AVX-512-BF16"
    if case.base != torch.bfloat16:
        return "its fused kernel computes in bfloat16"
    return f"its fused kernel needs N of whole 32, not {case.N}" if case.N % 32 else None


def repacked(bnb, weight):
    packed, state = bnb_weight(bnb, weight)
    return bnb.functional._convert_weight_packed_for_cpu(packed.clone(), state)


def build(case, options):
    """The row's Work: x (M, K), dy (M, N), and as many weights (N, K), dense and in NF4, as the cache asks for."""
    if case.mode == "quantize":
        return build_quantize(case, options)
    device, dtype = case.device, case.base
    draw = lambda *shape: torch.randn(*shape, device=device)  # noqa: E731
    size = case.K * case.N
    copies = 1 if case.cache == "warm" else min(16, 1 + -(-2 * last_cache(device) // (size // 2)))
    dense = [draw(case.N, case.K) * case.K**-0.5 for _ in range(copies)]
    packed = [lk.quantize_nf4(w) for w in dense]
    dense = [w.to(dtype) for w in dense]
    trains = case.mode in ("bwd", "fwd+bwd")
    x, dy = draw(case.M, case.K).to(dtype).requires_grad_(trains), draw(case.M, case.N).to(dtype)
    leaves, parameters, A, B = {"x": x}, [*dense, *(w.packed for w in packed)], None, None
    if case.mode == "fwd+bwd":
        A, B = ((draw(*shape) * shape[1] ** -0.5).to(case.given).requires_grad_() for shape in ((case.R, case.K), (case.N, case.R)))
        leaves |= {"A": A, "B": B}
        parameters += [A, B]

    def contender(name, function, weights, leaves=leaves, **more):
        turn = in_turn(weights, lambda w: function(x, w))
        call, ready = passes(case.mode, turn, leaves, dy)
        return Contender(name, recording(call, trains), ready and recording(ready, trains), turns=len(weights), restart=turn.restart, **more)

    layer = (lambda x, w: lora_linear(x, w, A, B, lora.SCALING)) if A is not None else nf4_linear
    found, skipped = [contender("dense", lambda x, w: F.linear(x, w), dense, {"x": x}, bare=True)], {}
    for name, context in ours(device, dtype).items():
        found.append(contender(name, layer, packed, context=context))
    if A is not None:
        found.append(contender("lorakernels: dense LoRA", lambda x, w: lora_linear(x, w, A, B, lora.SCALING), dense, bare=True))
    if case.mode == "bwd":
        skipped["dequantize + product"] = "it keeps the dense weight: its dx is the dense one's"
    else:
        found.append(contender("dequantize + product", lambda x, w: plain(x, w.dequantize(dtype), A, B), packed))
    if reason := peers.why_not("bitsandbytes"):
        skipped["bitsandbytes"] = reason
    else:
        bnb = peers.module("bitsandbytes")
        states = [bnb_weight(bnb, w) for w in packed]
        found.append(contender("bitsandbytes", lambda x, w: with_adapter(bnb.matmul_4bit(x, w[0].t(), quant_state=w[1]), x, A, B), states))
        if device == "cpu" and not trains:
            if reason := repacking_lacks(bnb, case):
                skipped[REPACKED] = reason
            else:
                found.append(contender(REPACKED, lambda x, w: bnb.matmul_4bit(x, w[0], quant_state=w[1]), [repacked(bnb, w) for w in packed]))
        if A is not None:
            if reason := peers.why_not("peft"):
                skipped["PEFT + bitsandbytes"] = reason
            else:
                theirs = peft_bnb_layer(bnb, case, states[0], A, B)
                both = {"x": x, "A": theirs.lora_A.default.weight, "B": theirs.lora_B.default.weight}
                found.append(contender("PEFT + bitsandbytes", lambda x, w: w(x), [theirs], both))
    ao = peers.torchao_nf4(case.N, case.K)
    if isinstance(ao, str):
        skipped["torchao"] = ao
    elif copies > 1 and case.M > 1:
        skipped["torchao"] = "it dequantises the whole weight at every M: its row is M=1"
    else:
        its = [ao[0](w.to(dtype)) for w in dense]
        found.append(contender("torchao", lambda x, w: with_adapter(ao[1](x, w), x, A, B), its, mask=lambda: its[0].get_original_weight().double()))
    skipped["GemLite"] = peers.why_not("gemlite") or "its weights are integers, not NF4"

    some, look = looking(case.M, device)
    names = ("y",) if not trains else lora.results_of(case.mode) if A is not None else ("dx",)

    def reference(own):
        """A weight in a format of its own is held against its own dequantised one."""
        return lora.exact(names, some, None, x, dy, exact(packed[0]) if own is None else own, A, B)

    def eager(cast):
        """QLoRA as PEFT over bitsandbytes' dequantised weight computes it."""
        a, b = (t if t is None else t.detach().requires_grad_() for t in (A, B))
        call, ready = passes(case.mode, lambda: plain(x, packed[0].dequantize(dtype), a, b), {"x": x} | ({} if a is None else {"A": a, "B": b}), dy)
        if ready:
            ready()
        return {name: look(name, t).detach() for name, t in call().items()}, None

    products = 2 if case.mode == "fwd+bwd" else 1
    width = x.element_size()
    moved = products * (size / 2 + size / packed[0].blocksize + width * case.M * (case.K + case.N))
    flops = 2 * products * case.M * size + 6 * case.M * case.R * (case.K + case.N)
    return Work(found, reference, eager, {"y": case.K, "dx": case.N, "dA": case.M, "dB": case.M}, flops, moved, skipped, look, parameters)


def with_adapter(y, x, A, B):
    return y if A is None else (y + F.linear(F.linear(x.to(A.dtype), A), B) * lora.SCALING).to(x.dtype)


def plain(x, W, A, B):
    return with_adapter(F.linear(x, W), x, A, B)


def bnb_linear(bnb, K, N, dtype, packed, quant_state):
    """Its layer on a weight that is in 4 bits already."""
    linear = bnb.nn.Linear4bit(K, N, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta")
    linear.weight = bnb.nn.Params4bit(packed, requires_grad=False, quant_state=quant_state, quant_type="nf4", bnb_quantized=True, module=linear)
    linear.quant_state = quant_state
    return linear


def peft_bnb_layer(bnb, case, state, A, B):
    peft = peers.module("peft")
    linear = bnb_linear(bnb, case.K, case.N, case.base, *state)
    config = peft.LoraConfig(r=case.R, lora_alpha=lora.SCALING * case.R, target_modules=["0"], init_lora_weights=False)
    layer = peft.get_peft_model(nn.Sequential(linear), config, autocast_adapter_dtype=False).base_model.model[0]
    layer.lora_A.default.weight, layer.lora_B.default.weight = nn.Parameter(A.detach().clone()), nn.Parameter(B.detach().clone())
    return layer


def build_quantize(case, options):
    """The row's Work: a weight (N, K) into NF4. Errors are of the dequantised weight, over what rounding to 4 bits loses by itself."""
    w = torch.randn(case.N, case.K, device=case.device).to(case.base)
    found, skipped = [Contender("sum, a plain read", lambda: {"sum": w.sum()}, bare=True)], {}
    quantized = lambda: {"W": lk.quantize_nf4(w).dequantize(torch.float32)}  # noqa: E731
    for name, context in ours(case.device, case.base).items():
        found.append(Contender(name, lambda: {"packed": lk.quantize_nf4(w)}, context=context, look=quantized))
    if reason := peers.why_not("bitsandbytes"):
        skipped["bitsandbytes"] = reason
    else:
        four_bit = peers.module("bitsandbytes").functional
        again = lambda: {"W": four_bit.dequantize_4bit(*four_bit.quantize_4bit(w, compress_statistics=True, quant_type="nf4")).float()}  # noqa: E731
        found.append(Contender("bitsandbytes", lambda: {"packed": four_bit.quantize_4bit(w, compress_statistics=True, quant_type="nf4")}, look=again))
    if isinstance(ao := peers.torchao_nf4(case.N, case.K), str):
        skipped["torchao"] = ao
    else:
        found.append(Contender("torchao", lambda: {"packed": ao[0](w)}, look=lambda: {"W": ao[0](w).get_original_weight().float()}))
    plain = lk.quantize_nf4(w, double_quant=False).dequantize(torch.float32)
    return Work(found, lambda own: {"W": w.double()}, lambda cast: ({"W": plain}, None), {"W": 1}, 0, w.nbytes + w.numel() / 2, skipped)
