"""Whole models with many adapters that train at once."""

import torch
from torch import nn

from .models import check_model, find_targets, report_on, why_not_many
from .checks import check_size
from .multi_modules import Batch, MultiLoraLinear


def apply_multi_lora(
    model, num_adapters, ranks=8, lora_alpha=None, target_modules="all-linear", *, exclude_modules=None, lora_dropout=0.0, adapter_dtype=None
):  # fmt: skip
    """Replace a model's linear modules by MultiLoraLinear, in place, and freeze everything but the adapters

    Then model(..., adapter_ids=ids) gives each sequence, or each row, its adapter: int32 or int64 ids of shape (batch,) or
    (batch, tokens), -1 for none. Without adapter_ids the model gives its base's own answer.

    num_adapters: E. ranks, lora_alpha, lora_dropout: a number for all, or a list of E; scaling is lora_alpha / rank, 1 by default.
    target_modules, exclude_modules: as apply_lora's. Returns a Report of what was replaced, and of what was skipped and why.

    Raises TypeError or ValueError naming the argument; the model is then as it was.
    """
    check_model(model)
    check_size("num_adapters", num_adapters)
    every = ranks if isinstance(ranks, (list, tuple)) else [ranks]
    for rank in every:
        check_size("ranks", rank)
    wanted = find_targets(model, target_modules, exclude_modules, None, None)
    report = report_on(model, wanted, why_not_many)
    if not report.replaced:
        raise ValueError(f"target_modules: nothing to put adapters on. {report}")
    arguments = dict(num_adapters=num_adapters, max_rank=max(every), ranks=ranks, lora_alpha=lora_alpha, lora_dropout=lora_dropout, adapter_dtype=adapter_dtype)
    trained, batch, layers = [(p, p.requires_grad) for p in model.parameters()], Batch(), {}
    try:
        for name in report.replaced:
            linear = model.get_submodule(name)
            if id(linear) not in layers:
                layers[id(linear)] = MultiLoraLinear.from_linear(linear, **arguments)
                layers[id(linear)].batch = batch
    except BaseException:
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)
        raise
    model.requires_grad_(False)
    for name in report.replaced:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layers[id(model.get_submodule(name))])
    model.register_forward_pre_hook(batch.take, with_kwargs=True)
    return report


def adapter_parameters(model):
    """[{parameter name: Parameter}] of each adapter, for an optimiser of its own

    Each Parameter is a view of a layer's stack, of the adapter's true rank: what an optimiser does to it, it does to the model. A
    backward puts each adapter's gradient into them, adding to what is there, and none into the stacks. Call it once, when the
    model is on its device and in its dtype; call zero_grad() on the optimisers, not on the model. Raises ValueError where the
    model has no MultiLoraLinear.
    """
    check_model(model)
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, MultiLoraLinear)]
    if not layers:
        raise ValueError("model: it has no MultiLoraLinear; apply_multi_lora() first")
    adapters = [{} for _ in range(layers[0][1].num_adapters)]
    for name, layer in layers:
        for e, rank in enumerate(layer.ranks.tolist()):
            adapters[e][f"{name}.lora_A"] = nn.Parameter(layer.lora_A.detach()[e, :rank])
            adapters[e][f"{name}.lora_B"] = nn.Parameter(layer.lora_B.detach()[e, :, :rank])
        layer.lora_A.register_post_accumulate_grad_hook(_hand_out([adapter[f"{name}.lora_A"] for adapter in adapters]))
        layer.lora_B.register_post_accumulate_grad_hook(_hand_out([adapter[f"{name}.lora_B"] for adapter in adapters]))
    return adapters


def _hand_out(views):
    """A stack's gradient to its adapters."""

    @torch.no_grad()
    def hook(stack):
        for e, view in enumerate(views):
            own = stack.grad[e][tuple(slice(size) for size in view.shape)]
            view.grad = own if view.grad is None else view.grad + own
        stack.grad = None

    return hook
