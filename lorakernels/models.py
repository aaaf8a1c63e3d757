"""Whole models: put adapters on, switch them off, merge them, count them."""

import contextlib
import logging
import warnings

from torch import nn

from . import targets
from .checks import check_flag
from .modules import Adapter, LoraLinear, check_arguments, why_unusable
from .nf4_modules import PIECES, NF4Linear, QLoraLinear, is_bnb

logger = logging.getLogger("lorakernels")
BIASES = ("none", "all", "lora_only")


class Report(dict):
    """{module name: "replaced" or "skipped: why"}."""

    @property
    def replaced(self):
        return [name for name, what in self.items() if what == "replaced"]

    @property
    def skipped(self):
        return {name: what.removeprefix("skipped: ") for name, what in self.items() if what != "replaced"}

    def __str__(self):
        lines = [f"{len(self.replaced)} modules replaced, {len(self.skipped)} skipped"]
        return "\n".join(lines + [f"  {name}: {why}" for name, why in self.skipped.items()])


def apply_lora(
    model, r=8, lora_alpha=8, target_modules="all-linear", *, lora_dropout=0.0, use_rslora=False, use_dora=False, lora_bias=False,
    init_lora_weights=True, bias="none", exclude_modules=None, layers_to_transform=None, layers_pattern=None, rank_pattern=None,
    alpha_pattern=None, modules_to_save=None, fan_in_fan_out=False, adapter_dtype=None, quantize=None, strict=False,
):  # fmt: skip
    """Replace a model's linear modules by layers with an adapter, in place, and freeze everything but the adapters.

    nn.Linear becomes LoraLinear, or, with quantize="nf4", QLoraLinear over its weight in NF4; NF4Linear and bitsandbytes'
    Linear4bit (NF4) become QLoraLinear over the bytes that they hold.

    target_modules: a list of names or name ends, a regular expression over whole names, or "all-linear" (every linear
    module but the output head). exclude_modules, layers_to_transform, layers_pattern, rank_pattern, alpha_pattern and bias
    ("none", "all", "lora_only": which biases train) mean what they mean in PEFT's LoraConfig.

    Returns a Report of what was replaced and what was skipped and why; logs one line, warns when nothing was replaced, and
    with strict=True raises RuntimeError when nothing was, or a target was skipped. Bad arguments, and a name in
    target_modules that no module has, raise TypeError or ValueError naming them. After an error the model is as it was.
    """
    check_model(model)
    check_arguments(r, lora_alpha, lora_dropout, use_dora, init_lora_weights)
    check_flag("strict", strict)
    if modules_to_save is not None and not (isinstance(modules_to_save, (list, tuple)) and not modules_to_save):
        raise ValueError(f"modules_to_save: not supported, got {modules_to_save!r}; train those modules beside the adapter with requires_grad_()")
    if check_flag("fan_in_fan_out", fan_in_fan_out):
        raise ValueError("fan_in_fan_out: weights stored as (in, out), as in GPT-2's Conv1D, are not supported")
    if quantize not in (None, "nf4"):
        raise ValueError(f"quantize: expected None or 'nf4', got {quantize!r}")
    if quantize and init_lora_weights in ("pissa", "olora"):
        raise ValueError(f"init_lora_weights: {init_lora_weights!r} moves weight out of W, which in NF4 stays as it is")
    if bias not in BIASES:
        raise ValueError(f"bias: expected one of {', '.join(BIASES)}, got {bias!r}")
    for name, pattern in (("rank_pattern", rank_pattern), ("alpha_pattern", alpha_pattern)):
        check_pattern_values(name, pattern)
    wanted = find_targets(model, target_modules, exclude_modules, layers_to_transform, layers_pattern)

    common = dict(
        lora_dropout=lora_dropout, use_rslora=use_rslora, lora_bias=lora_bias, init_lora_weights=init_lora_weights, adapter_dtype=adapter_dtype
    )
    report, plan = report_on(model, wanted), {}
    for name in report.replaced:
        own = dict(r=targets.by_pattern(rank_pattern, name, r), lora_alpha=targets.by_pattern(alpha_pattern, name, lora_alpha))
        plan[name] = own | common
    if strict and (report.skipped or not plan):
        raise RuntimeError(f"apply_lora(strict=True): {report if report else 'no module was replaced'}")
    put_adapters(model, plan, quantize)
    train_biases(model, bias)
    _say(report)
    return report


def report_on(model, wanted, why_not=None):
    """The Report of what will be replaced among the modules that are wanted. why_not(model, name): why_skipped by default."""
    names = [name for name, _ in model.named_modules(remove_duplicate=False) if name and name in wanted]
    return Report({name: f"skipped: {why}" if (why := (why_not or why_skipped)(model, name)) else "replaced" for name in names})


def why_not_many(model, name):
    """None where a layer with many adapters can take a module's place, else the reason."""
    if is_bnb(model.get_submodule(name)):
        return "a bitsandbytes Linear4bit; put NF4Linear.from_bnb() of it in its place first"
    return why_skipped(model, name)


def put_adapters(model, plan, quantize=None):
    """Replace the module at each name of `plan` by a layer with those arguments, and freeze all but the adapters.

    Every layer is built before the first is put in place; after an error the model is as it was. A module that stands in
    several places becomes one layer, with the arguments of its first name.
    """
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    layers = {}
    try:
        for name, arguments in plan.items():
            linear = model.get_submodule(name)
            if id(linear) not in layers:
                layers[id(linear)] = adapted(linear, quantize, **arguments)
    except BaseException:
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)
        raise
    if plan:
        adapters = {id(p) for _, layer in lora_layers(model) for p in layer.adapter_parameters()}
        for parameter, _ in trained:
            if id(parameter) not in adapters:
                parameter.requires_grad_(False)
    taken = any(is_bnb(model.get_submodule(name)) for name in plan)
    for name in plan:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layers[id(model.get_submodule(name))])
    if taken:
        _forget_quantiser(model)


def adapted(linear, quantize=None, **arguments):
    """The layer with an adapter that takes a module's place."""
    if is_bnb(linear):
        return QLoraLinear.from_bnb(linear, **arguments)
    if type(linear) is NF4Linear:
        return QLoraLinear.in_place_of(linear, linear.weight, **arguments)
    return (QLoraLinear if quantize else LoraLinear).from_linear(linear, **arguments)


def _forget_quantiser(model):
    """Clear the marks of transformers' quantiser: its Trainer refuses a quantised model that it does not know to have adapters."""
    for module in model.modules():
        for flag in ("is_loaded_in_4bit", "is_quantized"):
            if getattr(module, flag, False):
                setattr(module, flag, False)
        for name in ("quantization_method", "hf_quantizer"):
            if name in vars(module):
                delattr(module, name)


def check_model(model):
    """TypeError unless it is an nn.Module; ValueError where a parameter waits for its shape."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got a {type(model).__name__}")
    for name, parameter in model.named_parameters():
        if nn.parameter.is_lazy(parameter):
            raise ValueError(f"model: {name} has no shape yet (a lazy module's); run a batch through the model first")


def check_pattern_values(argument, patterns):
    """rank_pattern or alpha_pattern: a dict from regular expressions to valid values, or an error naming the argument."""
    if patterns is None:
        return
    if not isinstance(patterns, dict):
        raise TypeError(f"{argument}: expected a dict from name patterns to numbers, got a {type(patterns).__name__}")
    for pattern, value in patterns.items():
        targets.check_pattern(argument, pattern)
        try:
            check_arguments(value if argument == "rank_pattern" else 1, value, 0.0, False, True)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{argument}[{pattern!r}]: {error}") from None


def find_targets(model, target_modules, exclude_modules, layers_to_transform, layers_pattern):
    if isinstance(target_modules, str) and target_modules.lower() == "all-linear":
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        names = [name for name, module in model.named_modules(remove_duplicate=False) if isinstance(module, (nn.Linear, NF4Linear)) and name and module is not head]
        target_modules = names or [""]
    names = targets.check_names("target_modules", target_modules, none_allowed=False)
    exclude = targets.check_names("exclude_modules", exclude_modules)
    targets.check_names("layers_pattern", layers_pattern)
    layers = [layers_to_transform] if isinstance(layers_to_transform, int) else layers_to_transform
    if layers is not None and (not isinstance(layers, (list, tuple)) or not all(type(i) is int and i >= 0 for i in layers)):
        raise TypeError(f"layers_to_transform: expected a layer index or a list of them, got {layers_to_transform!r}")
    if layers is not None and isinstance(names, str):
        raise ValueError("layers_to_transform: expected target_modules to be a list beside it, got a regular expression")
    every = [name for name, _ in model.named_modules(remove_duplicate=False)]
    unknown = [n for n in ([names] if isinstance(names, str) else names) if n and not any(targets.matches(n if n is names else [n], key) for key in every)]
    if unknown:
        known = sorted({name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, (nn.Linear, NF4Linear))})
        raise ValueError(f"target_modules: no module is named {', '.join(map(repr, unknown))}; the model's linear layers end in {', '.join(known) or 'nothing'}")
    return targets.Targets(names, exclude, layers, layers_pattern)


def why_skipped(model, name):
    """None where a layer with an adapter can take the place of the module of that name, else the reason."""
    module, parent = model.get_submodule(name), model.get_submodule(name.rpartition(".")[0])
    if isinstance(module, Adapter):
        return "it has an adapter already"
    if type(module) is NF4Linear or is_bnb(module):
        return None
    if not isinstance(module, nn.Linear):
        return f"a {type(module).__name__} is not an nn.Linear"
    if type(module) is not nn.Linear:
        return f"a {type(module).__name__} does more than an nn.Linear, or is read by its parent without being called"
    if isinstance(parent, nn.TransformerEncoderLayer):
        return "nn.TransformerEncoderLayer reads its weight without calling it, in eval mode"
    if hasattr(module, "_hf_hook"):
        return "accelerate has replaced its forward (device_map offloading)"
    return why_unusable(module)


def train_biases(model, bias):
    """Let the biases that PEFT's `bias` names be trained."""
    if bias == "all":
        for name, parameter in model.named_parameters():
            if name.rpartition(".")[2] == "bias":
                parameter.requires_grad_(True)
    elif bias == "lora_only":
        for _, layer in lora_layers(model):
            if layer.bias is not None:
                layer.bias.requires_grad_(True)


def _say(report):
    if report.replaced:
        why = "".join(f"; {name}: {reason}" for name, reason in list(report.skipped.items())[:3])
        logger.info("apply_lora: %d modules replaced, %d skipped%s", len(report.replaced), len(report.skipped), why)
    else:
        warnings.warn(f"apply_lora replaced nothing. {report}", stacklevel=3)


def lora_layers(model, remove_duplicate=True):
    """[(name, layer)] of a model's layers with an adapter."""
    check_model(model)
    return [(name, m) for name, m in model.named_modules(remove_duplicate=remove_duplicate) if isinstance(m, Adapter)]


def some_lora_layers(model):
    """The same, or ValueError where there is none."""
    layers = lora_layers(model)
    if not layers:
        raise ValueError("model: it has no layer with an adapter; apply_lora() or load_adapter() first")
    return layers


@contextlib.contextmanager
def disable_adapters(model):
    """Inside, the model gives its base's own answer. Raises RuntimeError for layers merged with keep_base=False."""
    layers = [layer for _, layer in some_lora_layers(model)]
    for layer in layers:
        if layer.merged and "_base_weight" not in layer._buffers:
            raise RuntimeError("disable_adapters: the adapter was merged with keep_base=False")
    before = [layer.adapter_enabled for layer in layers]
    try:
        for layer in layers:
            layer.adapter_enabled = False
        yield model
    finally:
        for layer, enabled in zip(layers, before):
            layer.adapter_enabled = enabled


def merge_adapters(model, keep_base=False):
    """Fold every adapter into its weight (LoraLinear.merge). Returns how many. Merged layers are left as they are.

    Raises RuntimeError, before any is merged, where one is over NF4."""
    layers = [layer for _, layer in some_lora_layers(model) if not layer.merged]
    for layer in layers:
        if isinstance(layer, QLoraLinear):
            layer.merge()  # raises, with the reason
    for layer in layers:
        layer.merge(keep_base=keep_base)
    return len(layers)


def count_parameters(model):
    """(trainable, all) parameter counts; a shared parameter counts once, a weight in NF4 as its elements."""
    check_model(model)
    sizes = {id(p): p.numel() for p in model.parameters()}
    for layer in model.modules():
        if isinstance(layer, NF4Linear):
            sizes.update((id(getattr(layer, name)), 0) for name in PIECES)
            sizes[id(layer.packed)] = layer.out_features * layer.in_features
    return sum(sizes[id(p)] for p in model.parameters() if p.requires_grad), sum(sizes[id(p)] for p in model.parameters())


def print_trainable_parameters(model):
    """Print the counts on one line, in PEFT's format."""
    trainable, total = count_parameters(model)
    print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / max(total, 1):.4f}")
