"""The layers: parameters, state_dict, merging, repr; the maths is in functional."""

import math
import re

import torch
from torch import nn
from torch.nn import functional as F

from . import functional
from .checks import adapter_dtype_over, check_flag, check_float_dtype, check_number, check_probability, check_size

INITS = (True, False, "gaussian", "pissa", "olora")


class Adapter:
    """What layers with one adapter share, whatever holds their base: parameters lora_A (R, K), lora_B (N, R), lora_bias (N,)."""

    def _put_adapter(self, base_dtype, device, r, lora_alpha, lora_dropout, use_rslora, lora_bias, init_lora_weights, adapter_dtype):
        check_flag("use_rslora", use_rslora)
        check_flag("lora_bias", lora_bias)
        self.r, self.lora_alpha, self.lora_dropout = r, lora_alpha, float(lora_dropout)
        self.use_rslora, self.init_lora_weights = use_rslora, init_lora_weights
        self.scaling = lora_scaling(lora_alpha, r, use_rslora)
        factory = {"device": device, "dtype": adapter_dtype}
        self.lora_A = nn.Parameter(torch.empty(r, self.in_features, **factory))
        self.lora_B = nn.Parameter(torch.empty(self.out_features, r, **factory))
        self.register_parameter("lora_bias", nn.Parameter(torch.empty(self.out_features, **factory)) if lora_bias else None)
        self.adapter_enabled = True
        self.merged = False

    def adapter_parameters(self):
        """lora_A, lora_B and, where there is one, lora_bias."""
        return [p for p in (self.lora_A, self.lora_B, self.lora_bias) if p is not None]

    @torch.no_grad()
    def _draw_adapter(self):
        if self.init_lora_weights == "gaussian":
            nn.init.normal_(self.lora_A, std=1 / self.r)
            nn.init.zeros_(self.lora_B)
        else:
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
            if self.init_lora_weights:
                nn.init.zeros_(self.lora_B)
            else:
                nn.init.kaiming_uniform_(self.lora_B, a=math.sqrt(5))
        if self.lora_bias is not None:
            nn.init.zeros_(self.lora_bias)

    def _describe_adapter(self):
        text = f", r={self.r}, lora_alpha={self.lora_alpha}"
        text += f", lora_dropout={self.lora_dropout}" if self.lora_dropout else ""
        text += ", use_rslora=True" if self.use_rslora else ""
        return text + (", lora_bias=True" if self.lora_bias is not None else "")


class LoraLinear(Adapter, nn.Linear):
    """nn.Linear with a low-rank adapter: y = x W^T + bias + scaling * (drop(x) A^T B^T + lora_bias)

    weight (N, K), bias (N,), lora_A (R, K), lora_B (N, R), lora_bias (N,) are the layer's own parameters; weight and bias
    start frozen. scaling = lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora.

    r: rank, at least 1. lora_alpha: any finite number. lora_dropout: on the adapter's input, in training only.
    init_lora_weights: True (A Kaiming-uniform, B zero: the layer starts as the base), "gaussian" (A normal with standard
    deviation 1/r), False (A and B random, for tests), "pissa" (Meng et al., 2024: the r largest singular directions of W)
    or "olora" (Büyükakyüz, 2024: the first r of its QR); the last two move what the adapter starts with out of W.
    adapter_dtype: None means float32 on a half-precision base, else the base's dtype.

    Raises TypeError or ValueError naming the argument.
    """

    def __init__(
        self, in_features, out_features, bias=True, *, r=8, lora_alpha=8, lora_dropout=0.0, use_rslora=False, use_dora=False,
        lora_bias=False, init_lora_weights=True, adapter_dtype=None, device=None, dtype=None,
    ):  # fmt: skip
        check_arguments(r, lora_alpha, lora_dropout, use_dora, init_lora_weights)
        check_size("in_features", in_features)
        check_size("out_features", out_features)
        check_flag("bias", bias)
        if dtype is not None:
            check_float_dtype("dtype", dtype)
        super().__init__(in_features, out_features, bias, device, dtype)
        self._put_adapter(self.weight.dtype, self.weight.device, r, lora_alpha, lora_dropout, use_rslora, lora_bias, init_lora_weights, adapter_dtype_over(self.weight.dtype, adapter_dtype))
        self.freeze_base()
        if not self.weight.is_meta:
            self.reset_adapter()

    @classmethod
    def from_linear(cls, linear, *, adapter_dtype=None, **arguments):
        """A LoraLinear over an nn.Linear's own weight and bias: shared, not copied, and frozen. Its hooks come along.

        Raises TypeError where `linear` is not exactly an nn.Linear with a plain floating-point weight; else as the
        constructor.
        """
        if type(linear) is not nn.Linear:
            raise TypeError(f"linear: expected a torch.nn.Linear, got a {type(linear).__name__}")
        why = why_unusable(linear)
        if why:
            raise TypeError(f"linear: {why}")
        weight = linear.weight
        layer = cls(
            linear.in_features, linear.out_features, linear.bias is not None,
            adapter_dtype=adapter_dtype, device="meta", dtype=weight.dtype, **arguments,
        )  # fmt: skip
        layer.weight, layer.bias = weight, linear.bias
        for name in ("lora_A", "lora_B", "lora_bias"):
            parameter = getattr(layer, name)
            if parameter is not None:
                setattr(layer, name, nn.Parameter(torch.empty_like(parameter, device=weight.device)))
        take_hooks(layer, linear)
        layer.reset_adapter()
        layer.freeze_base()
        return layer.train(linear.training)

    def freeze_base(self):
        """Stop gradients of weight and bias."""
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)

    def reset_parameters(self):
        """Draw weight, bias and adapter anew."""
        super().reset_parameters()
        if "lora_B" in self._parameters:  # nn.Linear's constructor calls this before there is an adapter
            self.reset_adapter()

    @torch.no_grad()
    def reset_adapter(self):
        """Start the adapter anew, as init_lora_weights says. "pissa" and "olora" replace weight by what they leave of it."""
        self._refuse_while_merged("reset_adapter")
        if self.init_lora_weights in ("pissa", "olora"):
            self._take_from_weight(self.init_lora_weights)
            if self.lora_bias is not None:
                nn.init.zeros_(self.lora_bias)
        else:
            self._draw_adapter()

    def _take_from_weight(self, init):
        if self.weight.is_meta:
            raise ValueError(f"init_lora_weights: {init!r} decomposes the weight, which is on the meta device; load it first")
        if self.r > min(self.weight.shape):
            raise ValueError(f"r: {init!r} needs r <= min(in_features, out_features) = {min(self.weight.shape)}, got {self.r}")
        weight = self.weight.float()
        if init == "pissa":
            U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
            root = (S[: self.r] / self.scaling).sqrt()
            B, A = U[:, : self.r] * root, root[:, None] * Vh[: self.r]
        else:
            Q, upper = torch.linalg.qr(weight)
            B, A = Q[:, : self.r], upper[: self.r]
        self.lora_A.copy_(A)
        self.lora_B.copy_(B)
        # a new parameter: whoever shares the old weight keeps it
        left = (weight - self.scaling * (B @ A)).to(self.weight.dtype)
        self.weight = nn.Parameter(left, requires_grad=self.weight.requires_grad)

    def forward(self, x):
        if self.merged or not self.adapter_enabled:
            return F.linear(x, *self._base_or_merged())
        return functional.lora_linear(
            x, self.weight, self.lora_A, self.lora_B, self.scaling, self.bias,
            dropout_p=self.lora_dropout, training=self.training, lora_bias=self.lora_bias,
        )  # fmt: skip

    # -- merging -------------------------------------------------------------------------------------------------------

    def _base_or_merged(self):
        if self.adapter_enabled or not self.merged:
            return self.weight, self.bias
        if "_base_weight" not in self._buffers:
            raise RuntimeError("the adapter cannot be disabled: it was merged with keep_base=False")
        return self._base_weight, self._base_bias

    def _refuse_while_merged(self, what):
        if getattr(self, "merged", False):
            raise RuntimeError(f"{what}: the adapter is merged; unmerge() first")

    @torch.no_grad()
    def _merged_weight(self, dtype=None):
        """(weight, bias) with the adapter added, rounded once to dtype (the base's own by default)."""
        dtype = dtype or self.weight.dtype
        wide = torch.float64 if self.weight.dtype == torch.float64 else torch.float32
        weight = torch.addmm(self.weight.to(wide), self.lora_B.to(wide), self.lora_A.to(wide), alpha=self.scaling)
        bias = self.bias
        if self.lora_bias is not None:
            delta = self.lora_bias.to(wide) * self.scaling
            bias = delta if bias is None else bias.to(wide) + delta
        return weight.to(dtype), None if bias is None else bias.to(dtype)

    @torch.no_grad()
    def merge(self, keep_base=True):
        """weight := W + scaling * B A, summed in float32 and rounded once; bias takes scaling * lora_bias likewise.

        The merged weight is a new parameter, so a module that shares the old one keeps it. keep_base holds on to the old
        one for an exact unmerge() and for disable_adapters; without it the adapter is spent: lora_B and lora_bias become
        zero, so that a state_dict means the same as the layer. Raises RuntimeError if already merged.
        """
        self._refuse_while_merged("merge")
        check_flag("keep_base", keep_base)
        weight, bias = self._merged_weight()
        if keep_base:
            self.register_buffer("_base_weight", self.weight, persistent=False)
            self.register_buffer("_base_bias", self.bias, persistent=False)
        else:
            self.lora_B.zero_()
            if self.lora_bias is not None:
                self.lora_bias.zero_()
        trains = self.weight.requires_grad, self.bias is not None and self.bias.requires_grad
        self.weight = nn.Parameter(weight, requires_grad=trains[0])
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=trains[1])
        self.merged = True

    @torch.no_grad()
    def unmerge(self):
        """Put back the weight and bias that merge() kept, bit for bit. Raises RuntimeError where there are none."""
        if not self.merged:
            raise RuntimeError("unmerge: the adapter is not merged")
        if "_base_weight" not in self._buffers:
            raise RuntimeError("unmerge: the base was not kept (merge(keep_base=False))")
        for name in ("weight", "bias"):
            base, merged = self._buffers.pop(f"_base_{name}"), getattr(self, name)
            if base is not None and not isinstance(base, nn.Parameter):  # .to() turned the kept parameter into a tensor
                base = nn.Parameter(base, requires_grad=merged.requires_grad)
            setattr(self, name, base)
        self.merged = False

    def to_linear(self, dtype=None):
        """A plain nn.Linear that computes what this layer does in eval mode: W + scaling * B A, rounded once to dtype
        (the weight's own by default). Shares nothing with the layer; frozen."""
        if dtype is not None:
            check_float_dtype("dtype", dtype)
        weight, bias = (self.weight, self.bias) if self.merged else self._merged_weight(dtype)
        linear = nn.Linear(self.in_features, self.out_features, bias is not None, device="meta")
        for name, value in (("weight", weight), ("bias", bias)):
            if value is not None:
                setattr(linear, name, nn.Parameter(value.detach().to(dtype or value.dtype, copy=True), requires_grad=False))
        return linear.train(self.training)

    # -- state_dict ----------------------------------------------------------------------------------------------------

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.merged and "_base_weight" in self._buffers:  # a checkpoint holds base and adapter apart
            destination.pop(prefix + "bias", None)
            for name, base in (("weight", self._base_weight), ("bias", self._base_bias)):
                if base is not None:
                    destination[prefix + name] = base if keep_vars else base.detach()

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        if self.merged:
            errors.append(f"{prefix}weight: the layer is merged; unmerge() before loading")
            return
        take_peft_names(state_dict, prefix, errors)
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)

    def extra_repr(self):
        return super().extra_repr() + self._describe_adapter() + (", merged" if self.merged else "")


def take_hooks(layer, linear):
    """Let a layer that takes a module's place run its hooks."""
    for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        getattr(layer, hooks).update(getattr(linear, hooks))
    layer._is_full_backward_hook = linear._is_full_backward_hook
    layer._forward_hooks_with_kwargs.update(linear._forward_hooks_with_kwargs)
    layer._forward_hooks_always_called.update(linear._forward_hooks_always_called)
    layer._forward_pre_hooks_with_kwargs.update(linear._forward_pre_hooks_with_kwargs)


def why_unusable(linear):
    """None where an nn.Linear's weight can be a LoraLinear's, else the reason."""
    weight = linear._parameters.get("weight")
    if weight is None:
        return "its weight is computed by a hook (weight_norm, spectral_norm), not a parameter"
    if type(weight.data) is not torch.Tensor:
        return f"its weight is a {type(weight.data).__name__}, not a plain tensor"
    if weight.dtype not in functional.FLOATS:
        return f"its weight is {str(weight.dtype).removeprefix('torch.')}, not bfloat16, float16, float32 or float64"
    return None


def lora_scaling(lora_alpha, r, use_rslora):
    """lora_alpha / r, or lora_alpha / sqrt(r)."""
    return lora_alpha / (math.sqrt(r) if use_rslora else r)


def check_arguments(r, lora_alpha, lora_dropout, use_dora, init_lora_weights):
    """The constructor's argument errors, for callers that build many layers."""
    check_size("r", r)
    check_number("lora_alpha", lora_alpha)
    check_probability("lora_dropout", lora_dropout)
    if check_flag("use_dora", use_dora):
        raise ValueError("use_dora: DoRA is not supported yet")
    if not any(init_lora_weights is known or (isinstance(known, str) and init_lora_weights == known) for known in INITS):
        raise ValueError(f"init_lora_weights: expected one of {', '.join(map(repr, INITS))}, got {init_lora_weights!r}")


def take_peft_names(state_dict, prefix, errors):
    """Rename PEFT's in-memory names (lora_A.weight, lora_A.<adapter>.weight, base_layer.weight) to the layer's own."""
    pattern = re.compile(re.escape(prefix) + r"(?:(lora_[AB])(?:\.[^.]+)?\.(weight|bias)|base_layer\.(weight|bias))")
    for key in list(state_dict):
        match = pattern.fullmatch(key) if key.startswith(prefix) else None
        if match is None:
            continue
        adapter, kind, base = match.groups()
        name = prefix + (base or ("lora_bias" if kind == "bias" else adapter))
        if name in state_dict:
            errors.append(f"{key}: a second value for {name}; load one adapter at a time")
            continue
        state_dict[name] = state_dict.pop(key)
