"""The layer with many adapters: parameters and their loading; the maths is in functional."""

import math

import torch
from torch import nn

from . import dropout, functional
from .checks import adapter_dtype_over, check_data, check_finite, check_float_dtype, check_number, check_probability, check_size, check_tensor
from .modules import take_hooks, why_unusable
from .nf4_modules import NF4Linear
from .routes import Orders


class Batch:
    """The adapter_ids that a model was called with, for its layers, and the order of rows that they make. They stay until it is
    called again: a checkpointed forward comes once more, within backward."""

    def __init__(self):
        self.ids, self.orders = None, Orders()

    def take(self, module, arguments, named):
        """The model's forward pre-hook."""
        named = dict(named)
        self.ids = named.pop("adapter_ids", None)
        self.orders.begin()
        return arguments, named

    def of(self, x, num_adapters):
        """Routed rows of x (..., K)."""
        ids = self.ids
        return self.orders.of(x, lambda device: ids.to(device, non_blocking=True) if isinstance(ids, torch.Tensor) else ids, num_adapters)


class MultiLoraLinear(nn.Module):
    """y = base(x) + scaling_e * drop(x) A_e^T B_e^T for each row's adapter e of E; rows with id -1 get the base's own answer

    base: an nn.Linear or NF4Linear, frozen. lora_A (E, R, K), lora_B (E, N, R) parameters, R = max_rank; ranks (E,), which of
    R each adapter uses, and scaling (E,) = lora_alpha / rank buffers. Adapters start as LoraLinear's: A Kaiming-uniform, B zero.

    num_adapters, max_rank: at least 1. ranks: None (max_rank each) or a list of E. lora_alpha: a number or a list of E; None: each
    adapter's rank. lora_dropout: a number or a list of E, in training only. adapter_dtype: None means float32 on a
    half-precision or NF4 base, else the base's dtype.

    Raises TypeError or ValueError naming the argument.
    """

    def __init__(self, base, *, num_adapters, max_rank, ranks=None, lora_alpha=None, lora_dropout=0.0, adapter_dtype=None):
        if not isinstance(base, NF4Linear) and type(base) is not nn.Linear:
            raise TypeError(f"base: expected a torch.nn.Linear or an NF4Linear, got a {type(base).__name__}")
        if type(base) is nn.Linear and why_unusable(base):
            raise TypeError(f"base: {why_unusable(base)}")
        check_size("num_adapters", num_adapters)
        check_size("max_rank", max_rank)
        super().__init__()
        self.in_features, self.out_features, self.num_adapters, self.max_rank = base.in_features, base.out_features, num_adapters, max_rank
        ranks = _each("ranks", max_rank if ranks is None else ranks, num_adapters)
        for rank in ranks:
            check_size("ranks", rank)
            if rank > max_rank:
                raise ValueError(f"ranks: expected ranks of at most max_rank={max_rank}, got {rank}")
        alphas = ranks if lora_alpha is None else _each("lora_alpha", lora_alpha, num_adapters)
        scaling = [check_number("lora_alpha", alpha) / rank for alpha, rank in zip(alphas, ranks)]
        self.lora_dropout = tuple(check_probability("lora_dropout", p) for p in _each("lora_dropout", lora_dropout, num_adapters))
        weight = base.packed if isinstance(base, NF4Linear) else base.weight
        dtype = base.dtype if isinstance(base, NF4Linear) else weight.dtype
        adapter_dtype = adapter_dtype_over(dtype, adapter_dtype, isinstance(base, NF4Linear))
        self.base, self.batch = base.requires_grad_(False), None
        factory = {"device": weight.device, "dtype": adapter_dtype}
        self.lora_A = nn.Parameter(torch.empty(num_adapters, max_rank, base.in_features, **factory))
        self.lora_B = nn.Parameter(torch.empty(num_adapters, base.out_features, max_rank, **factory))
        self._made_with = ranks, scaling
        for name, dtype in (("ranks", torch.int64), ("scaling", torch.float32), ("thresholds", torch.int32)):
            self.register_buffer(name, torch.empty(num_adapters, dtype=dtype, device=weight.device), persistent=name != "thresholds")
        self._fill_tables()
        if not weight.is_meta:
            self.reset_adapters()

    def _fill_tables(self):
        """ranks, scaling and thresholds as the layer was made with them."""
        thresholds = [dropout.threshold(p) for p in self.lora_dropout]
        for table, values in zip((self.ranks, self.scaling, self.thresholds), (*self._made_with, thresholds)):
            table.copy_(torch.tensor(values, dtype=table.dtype))

    @classmethod
    def from_linear(cls, linear, **arguments):
        """A layer over an nn.Linear or NF4Linear, shared and frozen; its hooks come along. Arguments as the constructor's."""
        layer = cls(linear, **arguments)
        take_hooks(layer, linear)
        return layer.train(linear.training)

    @torch.no_grad()
    def reset_adapters(self):
        """Draw every A anew and set every B to zero; what lies beyond an adapter's rank is zero."""
        nn.init.zeros_(self.lora_A)
        nn.init.zeros_(self.lora_B)
        for e, rank in enumerate(self.ranks.tolist()):
            nn.init.kaiming_uniform_(self.lora_A[e, :rank], a=math.sqrt(5))

    @torch.no_grad()
    def load_adapter(self, index, lora_A, lora_B, lora_alpha=None):
        """Put one adapter's lora_A (r, K) and lora_B (N, r) in place `index`, r at most max_rank; scaling lora_alpha / r (1 by
        default); they may be this layer's own. Raises TypeError or ValueError naming the argument, and changes nothing then."""
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < self.num_adapters:
            raise ValueError(f"index: expected an int from 0 to {self.num_adapters - 1}, got {index!r}")
        for name, value in (("lora_A", lora_A), ("lora_B", lora_B)):
            check_float_dtype(name, check_data(name, value).dtype)
            if value.dim() != 2:
                raise ValueError(f"{name}: expected a matrix, got {tuple(value.shape)}")
        rank = lora_A.shape[0]
        if not 1 <= rank <= self.max_rank or lora_A.shape[1] != self.in_features:
            raise ValueError(f"lora_A: expected shape (r, {self.in_features}) with r from 1 to {self.max_rank}, got {tuple(lora_A.shape)}")
        if lora_B.shape != (self.out_features, rank):
            raise ValueError(f"lora_B: expected shape ({self.out_features}, {rank}), got {tuple(lora_B.shape)}")
        scaling = 1.0 if lora_alpha is None else check_number("lora_alpha", lora_alpha) / rank
        own = [value.to(self.lora_A.device, self.lora_A.dtype, copy=True) for value in (lora_A, lora_B)]
        for name, value in zip(("lora_A", "lora_B"), own):
            check_finite(name, value, "the layer's")
        self.lora_A[index].zero_()[:rank] = own[0]
        self.lora_B[index].zero_()[:, :rank] = own[1]
        self.ranks[index], self.scaling[index] = rank, scaling

    def _apply(self, function, recurse=True):
        scaling = self.scaling
        super()._apply(function, recurse)
        if scaling.is_meta and not self.scaling.is_meta:  # to_empty(): what has no values
            self._fill_tables()
        elif self.scaling.dtype != torch.float32:  # a cast of the model is no reason to round it
            self.scaling = scaling.to(self.scaling.device)
        return self

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        ranks = state_dict.get(f"{prefix}ranks")
        if isinstance(ranks, torch.Tensor) and ranks.shape == self.ranks.shape and not ranks.is_meta:  # kernels rely on them
            if ranks.dtype != torch.int64 or not bool(((ranks >= 1) & (ranks <= self.max_rank)).all()):
                errors.append(f"{prefix}ranks: expected int64 from 1 to max_rank={self.max_rank}, got {ranks.dtype} {ranks.tolist()!s:.80}")
                return
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        if self.scaling.dtype != torch.float32:  # load_state_dict(assign=True) takes what it is given
            self.scaling = self.scaling.float()

    def forward(self, x, adapter_ids=None):
        """x (..., K); adapter_ids of shape x.shape[:-1], or (batch,) for x (batch, tokens, K). Without them those that the model was
        called with (apply_multi_lora), and without those the base's own answer."""
        check_tensor("x", x)
        if adapter_ids is not None:
            routed = functional.route(adapter_ids, x.shape, self.num_adapters)
        elif self.batch is not None and self.batch.ids is not None:
            routed = self.batch.of(x, self.num_adapters)
        else:
            return self.base.forward(x)  # its hooks are this layer's
        bias = self.base.bias
        if isinstance(self.base, NF4Linear):
            bias = self.base._bias_for(x)
        thresholds = self.thresholds if self.training and any(self.lora_dropout) else None
        return functional.routed_linear(
            x, self.base.weight, bias, self.lora_A, self.lora_B, self.scaling, routed, self.ranks, thresholds=thresholds
        )  # fmt: skip

    def extra_repr(self):
        return f"num_adapters={self.num_adapters}, max_rank={self.max_rank}"


def _each(name, value, count):
    """A list of one value for each adapter."""
    if not isinstance(value, (list, tuple)):
        return [value] * count
    if len(value) != count:
        raise ValueError(f"{name}: expected {count} values, one for each adapter, got {len(value)}")
    return list(value)
