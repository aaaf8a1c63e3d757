"""Which kernel will run, and why."""

import torch

from . import backends
from .backends.nf4_path import nf4_path
from .models import lora_layers
from .modules import Adapter
from .nf4_modules import QLoraLinear


def explain(module_or_model, tokens=None):
    """A text that names, for a layer with an adapter or each kind of them in a model, the function behind every primitive.

    tokens: rows of x to plan for: the form of a product with NF4 depends on it. Raises TypeError, or ValueError where there is no such layer.
    """
    if isinstance(module_or_model, Adapter):
        layers = [("", module_or_model)]
    else:
        layers = lora_layers(module_or_model)
        if not layers:
            raise ValueError("module_or_model: expected a LoraLinear, a QLoraLinear or a model that holds some; found none")
    if tokens is not None and (isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 0):
        raise ValueError(f"tokens: expected a number of rows, got {tokens!r}")
    kinds = {}
    for _, layer in layers:
        kind = (type(layer).__name__, layer.weight.device.type, layer.weight.dtype, layer.lora_A.dtype, layer.lora_dropout, layer.merged)
        kinds.setdefault(kind, []).append(layer)
    return "\n".join(_describe(*kind, members, tokens) for kind, members in kinds.items())


def _describe(kind, device, dtype, adapter_dtype, dropout_p, merged, layers, tokens):
    shapes = sorted({f"{layer.in_features}->{layer.out_features} r={layer.r}" for layer in layers})
    lines = [f"{len(layers)} {kind} on {device}, base {_name(dtype)}, adapter {_name(adapter_dtype)}: {', '.join(shapes)}"]
    lines[0] += f", {tokens} tokens" if tokens is not None else ""
    if merged:
        return lines[0] + "\n  merged: F.linear"
    asked = f"backend {backends.forced()!r} was asked for" if backends.forced() else f"order on {device}: {', '.join(backends.ORDER.get(device, ('reference',)))}"
    lines.append(f"  {asked}; dropout {dropout_p}")
    product = "nf4_linear_lowrank" if kind == QLoraLinear.__name__ else "linear_lowrank"
    for name in ("lowrank_down", product, "lowrank_grad"):
        function = backends.select(name, device, dtype)
        lines.append(f"  {name}: {function.__module__.rpartition('backends.')[2]}: {' '.join(function.__doc__.partition(chr(10) * 2)[0].split())}")
    if product == "nf4_linear_lowrank" and tokens is not None:
        for layer in {(layer.out_features, layer.in_features): layer for layer in layers}.values():
            N, K = layer.out_features, layer.in_features
            forms = [nf4_path(tokens, N, K, dtype, _architecture(device), turned) for turned in (False, True)]
            lines.append(f"  {tokens} rows by {K}->{N}: forward {forms[0]}, dx {forms[1]} (where the backend has that form)")
    if device == "cpu":
        reason = backends.why_not("cpu", "cpu", dtype)
        lines.append(f"  native CPU kernels: {reason or backends.load('cpu').module().isa()}")
    return "\n".join(lines)


def _architecture(device):
    return backends.load("triton").architecture(torch.empty(0, device=device)) if device == "cuda" else "cpu"


def _name(dtype):
    return str(dtype).removeprefix("torch.")
