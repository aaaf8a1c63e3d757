"""PEFT's adapter files: adapter_config.json and adapter_model.safetensors. Nothing is ever unpickled."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

from . import targets
from .checks import check_data, check_finite, check_flag
from .models import BIASES, check_model, check_pattern_values, lora_layers, put_adapters, some_lora_layers, train_biases, why_skipped
from .modules import Adapter, check_arguments
from .multi_modules import MultiLoraLinear
from .nf4_modules import NF4Linear

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
CONFIG_LIMIT = 1 << 20  # bytes; a real one has some two thousand
PREFIX = "base_model.model."
CHANGE_THE_BASE = ("pissa", "olora")

# What a config may say without changing what the adapter computes.
READ = {
    "peft_type", "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "rank_pattern", "alpha_pattern", "use_rslora", "bias", "lora_bias", "init_lora_weights",
}  # fmt: skip
INFORMATION = {
    "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_version", "megatron_core",
    "qalora_group_size", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "runtime_config", "ensure_weight_tying",
}  # fmt: skip


# -- saving --------------------------------------------------------------------------------------------------------------


def save_adapter(model, directory, index=None):
    """Write the model's adapters to `directory` as PEFT's files, which PEFT, load_adapter and AdapterPool.add read.

    Biases that train go along. index: which adapter of a model with many (apply_multi_lora). Raises ValueError where the model has no adapter, or where one was merged with
    keep_base=False, or where layers differ in what PEFT's config holds once for all.
    """
    from safetensors.torch import save_file

    directory = _path(directory)
    layers = dict(some_lora_layers(model)) if index is None else _one_of_many(model, index)
    spent = [name for name, layer in layers.items() if layer.merged and "_base_weight" not in layer._buffers]
    if spent:
        raise ValueError(f"model: {spent[0]} was merged with keep_base=False; its adapter is gone")
    tensors = {}
    for name, layer in layers.items():
        tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = layer.lora_A, layer.lora_B
        if layer.lora_bias is not None:
            tensors[f"{name}.lora_B.bias"] = layer.lora_bias
    for name, parameter in _trained_biases(model).items():
        owner = name.rpartition(".")[0]
        tensors[f"{owner}.base_layer.bias" if owner in layers else name] = parameter
    tensors = {PREFIX + name.lstrip("."): tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    config = json.dumps(_config(model, layers), indent=2, sort_keys=True)
    directory.mkdir(parents=True, exist_ok=True)
    _replace(directory / WEIGHTS, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    _replace(directory / CONFIG, lambda path: path.write_text(config))


def _one_of_many(model, index):
    """{name: what a layer with that adapter alone has}."""
    check_model(model)
    many = {name: layer for name, layer in model.named_modules() if isinstance(layer, MultiLoraLinear)}
    if not many:
        raise ValueError("index: expected None, for the model has no MultiLoraLinear")
    count = next(iter(many.values())).num_adapters
    if type(index) is not int or not 0 <= index < count:
        raise ValueError(f"index: expected an int from 0 to {count - 1}, got {index!r}")
    layers = {}
    for name, layer in many.items():
        r = layer.ranks[index].item()
        alpha = round(layer.scaling[index].item() * r, 6)
        layers[name] = SimpleNamespace(
            r=r, lora_alpha=int(alpha) if alpha == int(alpha) else alpha, lora_dropout=layer.lora_dropout[index], use_rslora=False, init_lora_weights=True,
            lora_A=layer.lora_A[index, :r], lora_B=layer.lora_B[index, :, :r], lora_bias=None, merged=False,
        )  # fmt: skip
    return layers


def _path(directory):
    if not isinstance(directory, (str, os.PathLike)):
        raise TypeError(f"directory: expected a path, got a {type(directory).__name__}")
    return Path(directory)


def _replace(path, write):
    """Write beside the file, then put it in place: an interrupted save leaves the old one whole."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(beside)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def _trained_biases(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad and name.rpartition(".")[2] == "bias"}


def _common(layers, what):
    values = {getattr(layer, what) if what != "lora_bias" else layer.lora_bias is not None for layer in layers.values()}
    if len(values) > 1:
        raise ValueError(f"model: its adapters differ in {what} ({', '.join(sorted(map(str, values)))}), which PEFT's config holds once")
    return values.pop()


def _config(model, layers):
    ranks, alphas = ([getattr(layer, what) for layer in layers.values()] for what in ("r", "lora_alpha"))
    r, alpha = (max(set(values), key=values.count) for values in (ranks, alphas))
    init = _common(layers, "init_lora_weights")
    biases = _trained_biases(model)
    own = {f"{name}.bias" for name in layers}
    linears = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, NF4Linear, MultiLoraLinear)) and name.removesuffix(".base") not in layers]
    linears += layers
    return {
        "peft_type": "LORA",
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": _common(layers, "lora_dropout"),
        "target_modules": targets.describe_exactly(layers, linears),
        "rank_pattern": {f"^{_escape(name)}": layer.r for name, layer in layers.items() if layer.r != r},
        "alpha_pattern": {f"^{_escape(name)}": layer.lora_alpha for name, layer in layers.items() if layer.lora_alpha != alpha},
        "use_rslora": _common(layers, "use_rslora"),
        "lora_bias": _common(layers, "lora_bias"),
        "init_lora_weights": init if init in CHANGE_THE_BASE else True,
        "bias": "none" if not biases else "lora_only" if set(biases) <= own else "all",
        "base_model_name_or_path": getattr(model, "name_or_path", None) or None,
        "task_type": "CAUSAL_LM" if type(model).__name__.endswith("ForCausalLM") else None,
        "inference_mode": True,
        "use_dora": False,
        "fan_in_fan_out": False,
        "modules_to_save": None,
    }


def _escape(name):
    return name.replace(".", r"\.")


# -- loading -------------------------------------------------------------------------------------------------------------


def load_adapter(model, directory):
    """Put a PEFT LoRA adapter on a model: onto its layers with adapters, or onto the linear modules that the file names.

    Returns the names of the adapted modules. Everything is read and checked first: after an error (FileNotFoundError,
    ValueError or TypeError, naming the file, field, module or tensor) the model is as it was.
    """
    check_model(model)
    directory = _path(directory)
    config = _read_config(directory / CONFIG)
    adapters, biases = _read_weights(directory)
    plan = {name: _check_module(model, config, name, pieces) for name, pieces in adapters.items()}
    fresh = {name: arguments for name, arguments in plan.items() if arguments is not None}
    _check_biases(model, biases)
    missing = [name for name, _ in lora_layers(model) if name not in adapters]
    if missing:
        raise ValueError(f"{WEIGHTS}: it has nothing for {missing[0]}, which has an adapter in the model")
    put_adapters(model, fresh)
    with torch.no_grad():
        for name, pieces in adapters.items():
            layer = model.get_submodule(name)
            layer.lora_A.copy_(pieces["lora_A.weight"])
            layer.lora_B.copy_(pieces["lora_B.weight"])
            if layer.lora_bias is not None:
                layer.lora_bias.copy_(pieces["lora_B.bias"])
        for name, value in biases.items():
            model.get_parameter(name).copy_(value)
    train_biases(model, config["bias"])
    return list(adapters)


def read_adapter(directory):
    """(function from a module's name to its (r, lora_alpha, use_rslora), {module: {"lora_A.weight": tensor, ...}}) of a directory whose
    adapter is its matrices alone: no biases, and a base as it came. Errors as load_adapter's."""
    directory = _path(directory)
    config = _read_config(directory / CONFIG)
    adapters, biases = _read_weights(directory)
    if biases:
        raise ValueError(f"{directory / WEIGHTS}: {next(iter(biases))}: a bias that was trained goes with its own model alone")
    if config["init_lora_weights"] in CHANGE_THE_BASE:
        raise ValueError(f"{directory / CONFIG}: init_lora_weights={config['init_lora_weights']!r} changed the base weights, which several adapters share here")
    return lambda name: (*_rank_and_alpha(config, name), bool(config.get("use_rslora"))), adapters


def _rank_and_alpha(config, name):
    return targets.by_pattern(config.get("rank_pattern"), name, config["r"]), targets.by_pattern(config.get("alpha_pattern"), name, config["lora_alpha"])


def _read_config(path):
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; an adapter directory holds {CONFIG} and {WEIGHTS}")
    if path.stat().st_size > CONFIG_LIMIT:
        raise ValueError(f"{path}: expected at most {CONFIG_LIMIT} bytes, got {path.stat().st_size}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path}: expected a JSON object, got a {type(config).__name__}")
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type: expected LORA, got {config.get('peft_type')!r}")
    for field, value in config.items():
        if value and field not in READ and field not in INFORMATION:
            raise ValueError(f"{path}: {field}={value!r} is not supported")
    config = {"r": 8, "lora_alpha": 8, "bias": "none", "lora_dropout": 0.0, "init_lora_weights": True} | config
    init = config["init_lora_weights"]
    if init not in CHANGE_THE_BASE and str(init).startswith(("pissa_niter", "corda", "loftq", "lora_ga")):
        raise ValueError(f"{path}: init_lora_weights={init!r} changed the base weights in a way that cannot be repeated here")
    if config["bias"] not in BIASES:
        raise ValueError(f"{path}: bias: expected one of {', '.join(BIASES)}, got {config['bias']!r}")
    try:
        check_arguments(config["r"], config["lora_alpha"], config["lora_dropout"], False, True)
        for field in ("rank_pattern", "alpha_pattern"):
            check_pattern_values(field, config.get(field))
        for field in ("use_rslora", "lora_bias"):
            check_flag(field, config.get(field) or False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None
    return config


def _read_weights(directory):
    """({module: {"lora_A.weight": tensor, ...}}, {parameter name: bias})."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = directory / WEIGHTS
    if not path.is_file():
        pickled = directory / "adapter_model.bin"
        hint = f"; {pickled.name} is a pickle, which is never read: save it again with safe_serialization=True" if pickled.exists() else ""
        raise FileNotFoundError(f"{path}: no such file{hint}")
    try:
        tensors = load_file(path)
    except (SafetensorError, ValueError, OSError) as error:
        raise ValueError(f"{path}: not a whole safetensors file: {error}") from None
    adapters, biases = sort_tensors(tensors, path)
    if not adapters:
        raise ValueError(f"{path}: it holds no LoRA tensors")
    return adapters, biases


def sort_tensors(tensors, path):
    """What _read_weights returns, of tensors by PEFT's names; `path` is what errors speak of."""
    adapters, biases = {}, {}
    for key, tensor in tensors.items():
        if not isinstance(key, str) or not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{path}: expected tensors by name, got {key!r}: a {type(tensor).__name__}")
        check_data(f"{path}: {key}", tensor)
        name = key.removeprefix(PREFIX)
        if not tensor.is_floating_point():
            raise ValueError(f"{path}: {key}: expected a floating-point tensor, got {tensor.dtype}")
        for kind in ("lora_A.weight", "lora_B.weight", "lora_B.bias"):
            if name == kind or name.endswith(f".{kind}"):
                _put_once(adapters.setdefault(name.removesuffix(kind).rstrip("."), {}), kind, tensor, f"{path}: {key}")
                break
        else:
            if name.rpartition(".")[2] != "bias":
                raise ValueError(f"{path}: {key}: not a LoRA tensor or a bias")
            _put_once(biases, name.replace(".base_layer.bias", ".bias"), tensor, f"{path}: {key}")
    return adapters, biases


def _put_once(values, name, value, where):
    if name in values:
        raise ValueError(f"{where}: a second value for the same {name}")
    values[name] = value


def _check_module(model, config, name, pieces):
    """The adapter's arguments for a module that gets its adapter now, None for one that has it."""
    where = f"{WEIGHTS}: {name}"
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise ValueError(f"{where}: the model has no such module") from None
    if not isinstance(module, Adapter) and (why := why_skipped(model, name)):
        raise ValueError(f"{where}: {why}")
    if not name and not isinstance(module, Adapter):
        raise ValueError(f"{WEIGHTS}: its adapter is of the model itself, which cannot be replaced in its own place; LoraLinear.from_linear() makes the layer that takes it")
    A, B = (pieces.get(kind) for kind in ("lora_A.weight", "lora_B.weight"))
    if A is None or B is None:
        raise ValueError(f"{where}: expected both lora_A.weight and lora_B.weight")
    r, alpha = _rank_and_alpha(config, name)
    for kind, tensor, shape in (("lora_A", A, (r, module.in_features)), ("lora_B", B, (module.out_features, r))):
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{where}.{kind}: expected shape {shape} (rank {r} by {CONFIG}), got {tuple(tensor.shape)}")
    lora_bias = pieces.get("lora_B.bias")
    if bool(config.get("lora_bias")) != (lora_bias is not None):
        raise ValueError(f"{where}: lora_bias={bool(config.get('lora_bias'))} in {CONFIG}, but lora_B.bias is {'missing' if lora_bias is None else 'there'}")
    if lora_bias is not None and tuple(lora_bias.shape) != (module.out_features,):
        raise ValueError(f"{where}.lora_B.bias: expected shape ({module.out_features},), got {tuple(lora_bias.shape)}")
    dtype = module.lora_A.dtype if isinstance(module, Adapter) else torch.float64 if module.weight.dtype == torch.float64 else torch.float32
    for kind, tensor in pieces.items():
        check_finite(f"{where}.{kind}", tensor.to(dtype), "the adapter's")
    init = config["init_lora_weights"] if config["init_lora_weights"] in CHANGE_THE_BASE else True
    wanted = dict(r=r, lora_alpha=alpha, use_rslora=bool(config.get("use_rslora")))
    if not isinstance(module, Adapter):
        return wanted | dict(lora_dropout=config["lora_dropout"], lora_bias=lora_bias is not None, init_lora_weights=init)
    if module.merged:
        raise ValueError(f"{where}: its adapter is merged; unmerge it first")
    have = {key: getattr(module, key) for key in wanted}
    changed_base = module.init_lora_weights if module.init_lora_weights in CHANGE_THE_BASE else True
    if have != wanted or (module.lora_bias is None) != (lora_bias is None) or changed_base != init:
        raise ValueError(f"{where}: the model's adapter has {have}, init_lora_weights={module.init_lora_weights!r}; the file's has {wanted}, init_lora_weights={init!r}")
    return None


def _check_biases(model, biases):
    for name, value in biases.items():
        try:
            parameter = model.get_parameter(name)
        except AttributeError:
            raise ValueError(f"{WEIGHTS}: {name}: the model has no such parameter") from None
        if parameter.shape != value.shape:
            raise ValueError(f"{WEIGHTS}: {name}: expected shape {tuple(parameter.shape)}, got {tuple(value.shape)}")
        check_finite(f"{WEIGHTS}: {name}", value.to(parameter.dtype), "the model's")
