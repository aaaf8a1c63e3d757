"""Which kernel will run, and why."""

import torch

from . import backends
from .backends.nf4_path import nf4_path
from .models import check_model
from .modules import Adapter
from .multi_modules import MultiLoraLinear
from .nf4_modules import NF4Linear, QLoraLinear
from .pool_modules import PoolLinear

LAYERS = (Adapter, MultiLoraLinear, PoolLinear)


def explain(module_or_model, tokens=None):
    """A text that names, for a layer with an adapter, or with many, or for each kind of them in a model, the function behind every
    primitive.

    tokens: rows of x to plan for: the form of a product with NF4 depends on it. Raises TypeError, or ValueError where there is no such layer.
    """
    check_model(module_or_model)
    layers = [layer for layer in module_or_model.modules() if isinstance(layer, LAYERS)]
    if not layers:
        raise ValueError("module_or_model: expected a LoraLinear, QLoraLinear, MultiLoraLinear or PoolLinear, or a model that holds some; found none")
    if tokens is not None and (isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 0):
        raise ValueError(f"tokens: expected a number of rows, got {tokens!r}")
    kinds = {}
    for layer in layers:
        kinds.setdefault(_kind(layer), []).append(layer)
    return "\n".join(_describe(*kind, members, tokens) for kind, members in kinds.items())


def _kind(layer):
    """(class, whether W is in NF4, device, dtype, adapter's dtype, dropout, whether it is merged)."""
    if isinstance(layer, Adapter):
        packed, adapter, drop, merged = isinstance(layer, QLoraLinear), layer.lora_A.dtype, layer.lora_dropout, layer.merged
        weight = layer.weight
    else:
        packed, merged, weight = isinstance(layer.base, NF4Linear), False, layer.base.weight
        many = isinstance(layer, MultiLoraLinear)
        adapter, drop = (layer.lora_A.dtype, layer.lora_dropout) if many else (layer.rows_B.dtype, 0.0)
    return type(layer).__name__, packed, weight.device.type, weight.dtype, adapter, drop, merged


def _size(layer):
    rank = f"r={layer.r}" if isinstance(layer, Adapter) else layer.extra_repr()
    return f"{layer.in_features}->{layer.out_features} {rank}"


def _describe(kind, packed, device, dtype, adapter_dtype, dropout_p, merged, layers, tokens):
    lines = [f"{len(layers)} {kind} on {device}, base {_name(dtype)}, adapter {_name(adapter_dtype)}: {', '.join(sorted({_size(layer) for layer in layers}))}"]
    lines[0] += f", {tokens} tokens" if tokens is not None else ""
    if merged:
        return lines[0] + "\n  merged: F.linear"
    asked = f"backend {backends.forced()!r} was asked for" if backends.forced() else f"order on {device}: {', '.join(backends.ORDER.get(device, ('reference',)))}"
    lines.append(f"  {asked}; dropout {dropout_p}")
    product, one = "nf4_linear_lowrank" if packed else "linear_lowrank", isinstance(layers[0], Adapter)
    for name in ("lowrank_down", product, "lowrank_grad") if one else (product if packed else "base_product", "multi_lowrank_down", "multi_add_lowrank", "multi_lowrank_grad"):
        function = getattr(backends.chosen(device, dtype), name)
        lines.append(f"  {name}: {function.__module__.rpartition('backends.')[2]}: {' '.join(function.__doc__.partition(chr(10) * 2)[0].split())}")
    if packed and tokens is not None:
        for layer in {(layer.out_features, layer.in_features): layer for layer in layers}.values():
            N, K = layer.out_features, layer.in_features
            forms = [nf4_path(tokens, N, K, dtype, _architecture(device, dtype), turned) for turned in (False, True)]
            lines.append(f"  {tokens} rows by {K}->{N}: forward {forms[0]}, dx {forms[1]} (where the backend has that form)")
    if device == "cpu":
        reason = backends.why_not("cpu", "cpu", dtype)
        lines.append(f"  native CPU kernels: {reason or backends.load('cpu').module().isa()}")
    return "\n".join(lines)


def _architecture(device, dtype):
    if device == "cuda":
        return backends.load("triton").architecture(torch.empty(0, device=device))
    return "portable" if backends.why_not("cpu", "cpu", dtype) else backends.load("cpu").module().isa()


def _name(dtype):
    return str(dtype).removeprefix("torch.")
