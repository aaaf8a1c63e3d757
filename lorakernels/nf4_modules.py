"""The layers over an NF4 weight: parameters, state_dict in bitsandbytes' keys, take-over of its modules; no maths."""

import torch
from torch import nn

from . import functional, nf4
from .checks import adapter_dtype_over, check_flag, check_float_dtype, check_size
from .modules import Adapter, check_arguments, take_hooks, take_peft_names, why_unusable
from .nf4 import NF4Tensor
from .pages import on_huge_pages

PIECES = ("packed", "absmax", "nested", "quant_state")


class NF4Linear(nn.Module):
    """y = x W^T + bias with W (N, K) in NF4, frozen

    Its pieces are uint8 parameters (packed, absmax, nested, quant_state), which no cast of a model changes; `weight` is the
    NF4Tensor of them. A state_dict has bitsandbytes' keys, byte for byte as loaded. bias (N,), frozen.
    double_quant, blocksize: as quantize_nf4. dtype: of the weight that is quantised, and of bias.

    Raises TypeError or ValueError naming the argument.
    """

    def __init__(self, in_features, out_features, bias=True, *, double_quant=True, blocksize=64, device=None, dtype=None):
        check_size("in_features", in_features)
        check_size("out_features", out_features)
        check_flag("bias", bias)
        if dtype is not None:
            check_float_dtype("dtype", dtype)
        super().__init__()
        linear = nn.Linear(in_features, out_features, bias, device, dtype)
        self._take(functional.quantize_nf4(linear.weight, blocksize, double_quant), linear.bias)

    @classmethod
    def from_linear(cls, linear, *, double_quant=True, blocksize=64):
        """Quantise an nn.Linear's weight; its bias is shared and frozen, its hooks come along, `linear` stays as it was.

        Raises TypeError where `linear` is not exactly an nn.Linear with a plain weight, ValueError where its weight is not finite.
        """
        return cls.in_place_of(linear, _quantized(linear, double_quant, blocksize))

    @classmethod
    def from_bnb(cls, linear4bit):
        """Take over a live bitsandbytes Linear4bit (NF4), byte for byte; bitsandbytes need not be installed.

        Raises TypeError where it is none, ValueError where its quant state does not fit together.
        """
        return cls.in_place_of(linear4bit, _taken(linear4bit))

    @classmethod
    def from_nf4(cls, weight, bias=None):
        """A layer over an NF4Tensor (N, K) and a bias (N,)."""
        if not isinstance(weight, NF4Tensor):
            raise TypeError(f"weight: expected an NF4Tensor, got a {type(weight).__name__}")
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._take(weight, bias)
        return layer

    @classmethod
    def in_place_of(cls, linear, weight, **adapter):
        """A layer over an NF4Tensor (N, K) that takes the place of `linear`: its bias, hooks and mode."""
        layer = cls.from_nf4(weight, linear.bias, **adapter)
        take_hooks(layer, linear)
        return layer.train(linear.training)

    def _take(self, weight, bias):
        self.out_features, self.in_features = weight.shape
        self._put_weight(weight)
        if bias is not None and not isinstance(bias, nn.Parameter):
            bias = nn.Parameter(bias)
        self.register_parameter("bias", None if bias is None else bias.requires_grad_(False))

    def _put_weight(self, weight):
        on_huge_pages(weight.packed)
        for name in PIECES:
            piece = getattr(weight, name)
            self.register_parameter(name, None if piece is None else nn.Parameter(piece, requires_grad=False))
        self.format, self.dtype, self.storage = weight.format, weight.dtype, weight.storage

    @property
    def weight(self):
        """The NF4Tensor."""
        return NF4Tensor(self.packed, self.absmax, self.nested, self.quant_state, self.format, self.dtype, self.storage)

    def forward(self, x):
        return functional.nf4_linear(x, self.weight, self._bias_for(x))

    def _bias_for(self, x):
        # compute runs in x's dtype, as bitsandbytes' does: the bias follows; what is no tensor of numbers is the function's to refuse
        if self.bias is None or not isinstance(x, torch.Tensor) or self.bias.dtype == x.dtype or not x.is_floating_point():
            return self.bias
        return self.bias.to(x.dtype)

    def to_linear(self, dtype=None):
        """A plain nn.Linear with the weight dequantised to dtype (what it was made from by default), frozen."""
        return _dense(self, self.weight.dequantize(dtype), self.bias)

    # -- state_dict ----------------------------------------------------------------------------------------------------

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if type(self.packed.data) is not torch.Tensor or self.packed.is_meta:  # sharded: the pieces as they are
            return
        for name in PIECES:
            destination.pop(prefix + name, None)
        destination.update(self.weight.state_dict(prefix))

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        key = prefix + "weight"
        names = nf4.bnb_keys(state_dict, key)
        loaded = None
        try:
            if names:
                loaded = nf4.from_bnb(state_dict, key)
                if loaded.shape != self.weight.shape:
                    raise ValueError(f"{key}: expected shape {tuple(self.weight.shape)}, got {tuple(loaded.shape)}")
            elif key in state_dict:
                raise ValueError(f"{key}: a weight without bitsandbytes' keys ({key}.absmax, ...), for a layer in NF4; quantise it first")
        except (KeyError, TypeError, ValueError) as error:
            errors.append(str(error))
            return
        for name in names:
            state_dict.pop(name)
        absent = []
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, absent, unexpected, errors)
        if loaded is not None:
            absent = [name for name in absent if name.removeprefix(prefix) not in PIECES]
            if not errors:
                if not metadata.get("assign_to_params_buffers", False):
                    loaded = loaded._replace(packed=loaded.packed.clone())  # the other pieces are made anew
                self._put_weight(loaded if self.packed.is_meta else loaded.to(self.packed.device))
        missing += absent

    def extra_repr(self):
        text = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{text}, blocksize={self.format.blocksize}, double_quant={self.nested is not None}"


class QLoraLinear(Adapter, NF4Linear):
    """NF4Linear with a low-rank adapter: y = x W^T + bias + scaling * (drop(x) A^T B^T + lora_bias)

    W in NF4 as in NF4Linear, the adapter's arguments and parameters as in LoraLinear. Merging is refused: an NF4 weight
    cannot hold the sum; to_linear() gives a dense layer. "pissa" and "olora" are refused: they move weight out of W.
    adapter_dtype None: float32.

    Raises TypeError or ValueError naming the argument.
    """

    def __init__(
        self, in_features, out_features, bias=True, *, r=8, lora_alpha=8, lora_dropout=0.0, use_rslora=False, use_dora=False,
        lora_bias=False, init_lora_weights=True, adapter_dtype=None, double_quant=True, blocksize=64, device=None, dtype=None,
    ):  # fmt: skip
        _check_adapter(r, lora_alpha, lora_dropout, use_dora, init_lora_weights)
        super().__init__(in_features, out_features, bias, double_quant=double_quant, blocksize=blocksize, device=device, dtype=dtype)
        self._put(r, lora_alpha, lora_dropout, use_rslora, lora_bias, init_lora_weights, adapter_dtype)

    @classmethod
    def from_linear(cls, linear, *, double_quant=True, blocksize=64, **adapter):
        """As NF4Linear.from_linear, with an adapter of those arguments (r, lora_alpha, ...)."""
        return cls.in_place_of(linear, _quantized(linear, double_quant, blocksize), **adapter)

    @classmethod
    def from_bnb(cls, linear4bit, **adapter):
        """As NF4Linear.from_bnb, with an adapter of those arguments (r, lora_alpha, ...)."""
        return cls.in_place_of(linear4bit, _taken(linear4bit), **adapter)

    @classmethod
    def from_nf4(
        cls, weight, bias=None, *, r=8, lora_alpha=8, lora_dropout=0.0, use_rslora=False, use_dora=False, lora_bias=False,
        init_lora_weights=True, adapter_dtype=None,
    ):  # fmt: skip
        """A layer over an NF4Tensor (N, K) and a bias (N,), with an adapter of those arguments."""
        _check_adapter(r, lora_alpha, lora_dropout, use_dora, init_lora_weights)
        layer = super().from_nf4(weight, bias)
        layer._put(r, lora_alpha, lora_dropout, use_rslora, lora_bias, init_lora_weights, adapter_dtype)
        return layer

    def _put(self, r, lora_alpha, lora_dropout, use_rslora, lora_bias, init_lora_weights, adapter_dtype):
        self._put_adapter(self.dtype, self.packed.device, r, lora_alpha, lora_dropout, use_rslora, lora_bias, init_lora_weights, adapter_dtype_over(self.dtype, adapter_dtype, in_nf4=True))
        if not self.packed.is_meta:
            self.reset_adapter()

    def reset_adapter(self):
        """Start the adapter anew, as init_lora_weights says."""
        self._draw_adapter()

    def forward(self, x):
        if not self.adapter_enabled:
            return super().forward(x)
        return functional.lora_linear(
            x, self.weight, self.lora_A, self.lora_B, self.scaling, self._bias_for(x),
            dropout_p=self.lora_dropout, training=self.training, lora_bias=self.lora_bias,
        )  # fmt: skip

    def merge(self, keep_base=True):
        """Refused with RuntimeError."""
        raise RuntimeError("merge: an NF4 weight cannot hold W + scaling * B A without losing most of it; to_linear() gives a dense layer")

    @torch.no_grad()
    def to_linear(self, dtype=None):
        """A plain nn.Linear that computes what this layer does in eval mode: W + scaling * B A, summed in float32 and rounded
        once to dtype (what W was made from by default). Frozen."""
        dtype = self.dtype if dtype is None else check_float_dtype("dtype", dtype)
        weight = torch.addmm(self.weight.dequantize(torch.float32), self.lora_B.float(), self.lora_A.float(), alpha=self.scaling)
        bias = self.bias
        if self.lora_bias is not None:
            bias = self.lora_bias.float() * self.scaling + (0.0 if bias is None else bias.float())
        return _dense(self, weight.to(dtype), bias)

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        take_peft_names(state_dict, prefix, errors)
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)

    def extra_repr(self):
        return super().extra_repr() + self._describe_adapter()


def is_bnb(module):
    """Whether a module is a quantised bitsandbytes Linear4bit; looked at by name, so that bitsandbytes need not be there."""
    return any(kind.__name__ == "Linear4bit" for kind in type(module).__mro__) and getattr(getattr(module, "weight", None), "quant_state", None) is not None


def _check_adapter(r, lora_alpha, lora_dropout, use_dora, init_lora_weights):
    check_arguments(r, lora_alpha, lora_dropout, use_dora, init_lora_weights)
    if init_lora_weights in ("pissa", "olora"):
        raise ValueError(f"init_lora_weights: {init_lora_weights!r} moves weight out of W, which in NF4 stays as it is")


def _quantized(linear, double_quant, blocksize):
    if type(linear) is not nn.Linear:
        raise TypeError(f"linear: expected a torch.nn.Linear, got a {type(linear).__name__}")
    why = why_unusable(linear)
    if why:
        raise TypeError(f"linear: {why}")
    return functional.quantize_nf4(linear.weight, blocksize, double_quant)


def _taken(linear4bit):
    if not is_bnb(linear4bit):
        raise TypeError(f"linear4bit: expected a quantised bitsandbytes Linear4bit, got a {type(linear4bit).__name__}; move it to its device first, which quantises it")
    return nf4.from_quant_state(linear4bit.weight.data, linear4bit.weight.quant_state)


def _dense(layer, weight, bias):
    linear = nn.Linear(layer.in_features, layer.out_features, bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().to(weight.dtype, copy=True), requires_grad=False)
    return linear.train(layer.training)
