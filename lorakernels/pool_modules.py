"""The layer of a model that serves from an AdapterPool: it holds its base and knows its place in the pool, which holds the rest."""

import torch
from torch import nn

from . import functional
from .modules import take_hooks
from .nf4_modules import NF4Linear


class Shared:
    """What the layers that are given the same x have in common: their rows of A, and u of all of them, computed by the first.

    rows_A (P, G, K), ranks (G, E), scaling (G, E), pages (E, R): part g is the g-th layer's.
    """

    def __init__(self, rows_A, ranks, scaling, pages):
        self.rows_A, self.ranks, self.scaling, self.pages = rows_A, ranks, scaling, pages
        self.together = rows_A.shape[1] > 1
        self._of = None  # (x, its version, routed, u, parts that have had it)

    def down(self, x, routed, part):
        """The part's columns of u; None where it shares nothing and has to compute them itself."""
        if not self.together or torch.compiler.is_compiling() or x.is_inference():  # an inference tensor cannot tell whether it has changed
            return None
        if self._of is not None:
            seen, version, order, u, had = self._of
            if seen is x and version == x._version and order is routed and part not in had:
                had.add(part)
                if len(had) == self.rows_A.shape[1]:
                    self._of = None
                return self._columns(u, part)
            if len(had) == 1 and part not in had and order is routed:
                self.together, self._of = False, None  # cross-attention and the like: they are given different x
                return None
        with torch.no_grad():  # a gradient goes through du, and takes each layer's own
            u = functional.pooled_down(x, self.rows_A, routed, self.ranks, self.pages)
        self._of = x, x._version, routed, u, {part}
        return self._columns(u, part)

    def _columns(self, u, part):
        R = self.pages.shape[1]
        return u[..., part * R : (part + 1) * R]


class PoolLinear(nn.Module):
    """y = base(x) + scaling_e * x A_e^T B_e^T for each row's adapter e of an AdapterPool, as the pool's open route has it

    base: an nn.Linear or NF4Linear. Rows without adapter, and all rows while no route is open, get the base's own answer.
    Gradients flow to x and to what of the base requires them; the pool's adapters get none.
    """

    def __init__(self, base, pool, shared, part, rows_B):
        super().__init__()
        self.base, self.in_features, self.out_features = base, base.in_features, base.out_features
        self.pool, self.shared, self.part, self.rows_B = pool, shared, part, rows_B
        take_hooks(self, base)
        self.train(base.training)

    @property
    def weight(self):
        return self.base.weight

    @property
    def bias(self):
        return self.base.bias

    def forward(self, x):
        """x (..., K) -> y (..., N)."""
        route = self.pool.open_route
        if route is None:
            return self.base.forward(x)  # its hooks are this layer's
        base, shared, part = self.base, self.shared, self.part
        bias = base._bias_for(x) if isinstance(base, NF4Linear) else base.bias
        routed = route.of(x)
        u = shared.down(x, routed, part) if route.in_forward else None
        return functional.routed_linear(
            x, base.weight, bias, shared.rows_A[:, part : part + 1], self.rows_B, shared.scaling[part], routed, shared.ranks[part], shared.pages, u
        )  # fmt: skip

    def extra_repr(self):
        return f"max_rank={self.shared.pages.shape[1]}, slots={self.shared.pages.shape[0]}"
