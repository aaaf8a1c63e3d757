"""A decoder layer and whole models (Llama's architecture, random weights): a training step (forward, backward, AdamW), a decode step.

LoRA and QLoRA over all linears, and 8 adapters in one batch, against PEFT (with bitsandbytes). AdamW is torch's, for everyone, at a
learning rate of 0: it does all of its work, and the next call finds the same adapters.
"""

import copy

import torch
from torch import nn
from torch.nn import functional as F

import lorakernels as lk

from . import lora, multi, nf4, peers
from .cases import Case, Contender, Work, ours
from .shapes import MODELS

NAME, MODES = "model", ("fwd+bwd", "decode")
R, E, PAST = 16, 8, 32
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def cases(options):
    """Those that tell most first: a layer's training, then a whole small model's."""
    names = [name for name in options.shapes if name in MODELS] or (["smollm2-135m"] if "design" in options.shapes else [])
    if options.device == "cuda" and options.shapes == ["design"]:
        names = ["llama3-8b"]
    for name in names:
        size = MODELS[name]
        tokens = (options.tokens or [4096 if options.device == "cuda" else 256])[:1]
        for mode in options.modes(MODES[:1] if options.quick else MODES):
            for what in ("layer",) if options.quick or options.device == "cpu" and size.hidden > 2048 else ("layer", "model"):
                for kind in ("LoRA",) if options.quick else ("LoRA", "QLoRA", "8 adapters"):
                    for dtype, adapter in options.dtypes:
                        M = 8 if mode == "decode" else tokens[0]
                        yield Case(NAME, mode, name, M, size.hidden, 0, R, dtype, adapter, rows=f"{what}, {kind}", device=options.device)


def layers_of(case):
    size = MODELS[case.shapes]
    return 1 if case.rows.startswith("layer") else min(size.layers, 30 if size.hidden < 2048 else 8)


def weights(case):
    """How many elements the weights that a token meets have."""
    size = MODELS[case.shapes]
    one = size.hidden * (2 * size.queries + 2 * size.keys + 3 * size.between)
    return layers_of(case) * one + (0 if case.rows.startswith("layer") else size.hidden * size.vocabulary)


def base_model(case):
    """Frozen; a layer is a model of one that knows few words."""
    from transformers import LlamaConfig, LlamaForCausalLM

    size, layer = MODELS[case.shapes], case.rows.startswith("layer")
    config = LlamaConfig(
        hidden_size=size.hidden, intermediate_size=size.between, num_hidden_layers=layers_of(case),
        num_attention_heads=size.queries // size.head, num_key_value_heads=size.keys // size.head, head_dim=size.head, vocab_size=64 if layer else size.vocabulary,
    )  # fmt: skip
    with torch.device(case.device):
        return LlamaForCausalLM(config).to(case.base).eval().requires_grad_(False)


def targets(model):
    """[(name, linear, where it hangs)] of all that get adapters."""
    return [(name, m, model.get_submodule(name.rpartition(".")[0])) for name, m in model.named_modules() if name.rpartition(".")[2] in TARGETS]


class Plain(nn.Module):
    """PEFT's formula over a weight, for one adapter or, with stacks and ids, for many."""

    def __init__(self, W, A, B, ids=None):
        super().__init__()
        self.W, self.A, self.B, self.ids = nn.Parameter(W.detach(), requires_grad=False), nn.Parameter(A.detach().clone()), nn.Parameter(B.detach().clone()), ids

    def forward(self, x):
        if self.ids is None:
            return (F.linear(x, self.W) + F.linear(F.linear(x.to(self.A.dtype), self.A), self.B) * lora.SCALING).to(x.dtype)
        rows = self.ids.repeat_interleave(x.shape[1])
        return multi.loop(x.flatten(0, 1), self.W, self.A, self.B, rows).view(*x.shape[:-1], -1)


def replaced(model, make):
    """A copy of the model whose linears are what `make(name, linear)` gives."""
    model = copy.deepcopy(model)
    for name, linear, parent in targets(model):
        setattr(parent, name.rpartition(".")[2], make(name, linear))
    return model


def build(case, options):
    """The row's Work: a frozen model called with embeddings (sequences, tokens, hidden), and copies of it with the same adapters."""
    device, dtype, (_, kind) = case.device, case.base, case.rows.split(", ")
    decodes, many, four_bit = case.mode == "decode", kind == "8 adapters", kind == "QLoRA"
    batch = E if decodes or many else max(1, case.M // 128)
    model = base_model(case)
    shape = (batch, 1 if decodes else max(1, case.M // batch), model.config.hidden_size)
    x = torch.randn(*shape, device=device).to(dtype).requires_grad_(not decodes)
    past = torch.randn(batch, PAST, model.config.hidden_size, device=device).to(dtype)
    ids = torch.arange(batch, device=device) % E
    stack = (E,) if many else ()
    drawn = {}
    for name, linear, _ in targets(model):
        N, K = linear.weight.shape
        drawn[name] = tuple((torch.randn(*stack, *size, device=device) * size[1] ** -0.5 * 0.2).to(case.given) for size in ((R, K), (N, R)))
    packed = {name: lk.quantize_nf4(linear.weight) for name, linear, _ in targets(model)} if four_bit else None

    def contender(name, run, parameters, **more):
        """run(inputs_embeds=, ...) gives a model's output."""
        keep = {}
        optimizer = torch.optim.AdamW(parameters, lr=0.0, foreach=True) if parameters and not decodes else None

        def decode():
            with torch.no_grad():
                return {"y": run(inputs_embeds=x, past_key_values=keep["cache"], use_cache=True).logits}

        def cache():
            if "cache" not in keep:
                with torch.no_grad():
                    keep["cache"] = run(inputs_embeds=past, use_cache=True).past_key_values
            if (more := keep["cache"].get_seq_length() - PAST) > 0:
                keep["cache"].crop(-more)  # a step before has grown it

        def train():
            y = run(inputs_embeds=x, use_cache=False).logits
            found = torch.autograd.grad(y.float().square().mean(), [x, *parameters])
            for parameter, gradient in zip(parameters, found[1:]):
                parameter.grad = gradient
            if optimizer:
                optimizer.step()
            return {"y": y, "dx": found[0]} | ({"dAB": found[1:]} if parameters else {})

        return Contender(name, decode if decodes else train, cache if decodes else None, **more)

    def plain(float64):
        def make(name, linear):
            W = linear.weight if packed is None else nf4.exact(packed[name]) if float64 else packed[name].dequantize(dtype)
            return Plain(W, *drawn[name], ids if many else None)

        made = replaced(model, make)
        return made.double() if float64 else made

    def parameters_of(made):
        return [t for name, _, parent in targets(made) for t in own(getattr(parent, name.rpartition(".")[2]))]

    mine = copy.deepcopy(model)
    if many:
        lk.apply_multi_lora(mine, E, ranks=R, lora_alpha=lora.SCALING * R, target_modules=TARGETS, adapter_dtype=case.given)
    else:
        lk.apply_lora(mine, r=R, lora_alpha=lora.SCALING * R, target_modules=TARGETS, quantize="nf4" if four_bit else None, adapter_dtype=case.given)
    for name, layer, _ in targets(mine):
        for parameter, value in zip(own(layer), drawn[name]):
            parameter.data.copy_(value)
    run = (lambda **named: mine(adapter_ids=ids, **named)) if many else mine
    found, skipped = [contender("base", model, [], bare=True)], {}
    for name, context in ours(device, dtype).items():
        if not (many and name == "lorakernels: cuda"):
            found.append(contender(name, run, own_parameters(mine), context=context))
    kept = [*model.parameters(), *mine.parameters()]
    name = "PEFT + bitsandbytes" if four_bit else "PEFT"
    reason = peers.why_not("peft") or (four_bit and peers.why_not("bitsandbytes")) or (many and not decodes and "its adapter_names does not train")
    if reason:
        skipped[name] = reason
    else:
        theirs, run = peft_model(case, model, drawn, packed, ids if many else None)
        found.append(contender(name, run, theirs))
        kept += theirs
    if not four_bit and not many and not reason:
        if why := peers.why_not("liger_kernel") if device == "cuda" else "its Triton kernels need a GPU":
            skipped["PEFT + Liger"] = why
        else:
            from liger_kernel.transformers import apply_liger_kernel_to_llama

            faster = copy.deepcopy(model)
            apply_liger_kernel_to_llama(model=faster, fused_linear_cross_entropy=False)
            theirs, run = peft_model(case, faster, drawn, packed, None)
            found.append(contender("PEFT + Liger", run, theirs))

    def look(name, value):
        return torch.cat([t.flatten() for t in value]) if name == "dAB" else value

    def results(float64):
        made = plain(float64)
        one = contender("plain", made, parameters_of(made))
        if float64:
            nonlocal x, past
            before, (x, past) = (x, past), (x.detach().double().requires_grad_(x.requires_grad), past.double())
        try:
            if one.ready:
                one.ready()
            return {name: look(name, value).detach() for name, value in one.call().items()}
        finally:
            if float64:
                x, past = before

    exact = []

    def reference(mask):
        if not exact:
            exact.append(results(True))
        return exact[0]

    work = sum(linear.weight.numel() for _, linear, _ in targets(model))
    thin = sum(sum(linear.weight.shape) for _, linear, _ in targets(model)) * R
    M, products = shape[0] * shape[1], 1 if decodes else 2
    length = MODELS[case.shapes].hidden ** (7 * model.config.num_hidden_layers)
    lengths = dict.fromkeys(("y", "dx", "dAB"), length)
    flops = 2 * products * M * (work + thin * (1 if decodes else 1.5))
    return Work(found, reference, lambda cast: (results(False), None), lengths, flops, products * work * (0.5 if four_bit else x.element_size()), skipped, look, kept)


def own(layer):
    """A layer's A and B, this library's or Plain's; PEFT's are found by name."""
    return [layer.A, layer.B] if isinstance(layer, Plain) else [layer.lora_A, layer.lora_B]


def own_parameters(model):
    return [t for _, layer, _ in targets(model) for t in own(layer)]


def peft_model(case, model, drawn, packed, ids):
    """(its A's and B's in the order of the linears, how to call it)."""
    peft = peers.module("peft")
    model = copy.deepcopy(model)
    if packed is not None:
        bnb = peers.module("bitsandbytes")
        for name, linear, parent in targets(model):
            setattr(parent, name.rpartition(".")[2], nf4.bnb_linear(bnb, linear.in_features, linear.out_features, case.base, *nf4.bnb_weight(bnb, packed[name])))
    config = peft.LoraConfig(r=R, lora_alpha=lora.SCALING * R, target_modules=TARGETS, init_lora_weights=False)
    wrapped = peft.get_peft_model(model, config, adapter_name="0", autocast_adapter_dtype=False)
    if ids is not None:
        for e in range(1, E):
            wrapped.add_adapter(str(e), config, autocast_adapter_dtype=False)
    wrapped.eval()
    parameters = []
    for name, _, _ in targets(wrapped.base_model.model):
        layer = wrapped.base_model.model.get_submodule(name)
        for kind, value in zip(("lora_A", "lora_B"), drawn[name]):
            for e, some in enumerate(value if ids is not None else [value]):
                weights = getattr(layer, kind)[str(e)]
                weights.weight = nn.Parameter(some.clone(), requires_grad=True)
                parameters.append(weights.weight)
    run = wrapped if ids is None else lambda **named: wrapped(adapter_names=[str(e) for e in ids.tolist()], **named)
    return parameters, run
