"""Which rows of a batch use which adapter of a pool, and the tables that kernels read of those."""

import torch

from . import functional

SLOTS = 1 << 20  # an id is generation * SLOTS + slot
NONE, NOBODY = -1, -1  # an id's; a generation's


class Tables:
    """What the kernels read of a device's adapters; updated in place, so that a captured graph sees other adapters too."""

    def __init__(self, device, modules, slots, max_rank):
        self.pages = torch.zeros(slots, max_rank, dtype=torch.int64, device=device)
        self.generation = torch.full((slots,), NOBODY, dtype=torch.int64, device=device)
        self.ranks = torch.zeros(modules, slots, dtype=torch.int64, device=device)
        self.scaling = torch.zeros(modules, slots, dtype=torch.float32, device=device)

    def slots_of(self, ids):
        """Ids -> slots; -1 stays, an id whose adapter has gone becomes one slot too many."""
        slots = len(self.generation)
        slot = ids & (SLOTS - 1)
        known = (ids >= 0) & (slot < slots) & (self.generation[slot.clamp(max=slots - 1)] == ids // SLOTS)
        return torch.where(ids == NONE, ids, torch.where(known, slot, slots))


class Orders:
    """What functional.route makes, once for each shape of x and forward of a model; outside of forwards, for each x."""

    def __init__(self):
        self.made = None

    def begin(self):
        """A forward of the model begins: what was made before is made again, within a graph that is being captured too."""
        self.made = {}  # a new one: torch.compile would take another program where it finds the old one empty, as at first

    def end(self):
        """It has ended: a part of the model that is called by itself tells nobody, and what it finds may be of other ids."""
        self.made = None

    def of(self, x, ids, E):
        """For x (..., K) and the ids that ids(device) gives."""
        if self.made is None:
            return functional.route(ids(x.device), x.shape, E)
        key = x.shape[:-1], x.device
        if key not in self.made:
            self.made[key] = functional.route(ids(x.device), x.shape, E)
        return self.made[key]


class Route:
    """The adapters of a batch's rows; `of` gives their order for an x. given: the ids are a tensor of the caller's, who may change them."""

    def __init__(self, pool, ids, given):
        self.pool, self.ids, self.given, self.on, self.orders = pool, ids, given, {ids.device: ids}, Orders()

    def begin(self):
        """A forward of the model begins."""
        if self.given:
            self.on = {self.ids.device: self.ids}
        self.orders.begin()

    def end(self):
        """It has ended."""
        self.orders.end()

    @property
    def in_forward(self):
        """Whether layers that are given the same x get the same routed rows."""
        return self.orders.made is not None

    def of(self, x):
        """Routed rows of x (..., K); ValueError for a device without a pool, and on the CPU for an id that has ended."""
        if x.device not in self.pool.tables:
            raise ValueError(f"x: expected a device that the pool was made for ({', '.join(map(str, self.pool.tables))}), got {x.device}")
        tables = self.pool.tables[x.device]

        def slots_on(device):
            if device not in self.on or (self.given and not self.in_forward):
                self.on[device] = self.ids.to(device, non_blocking=True)
            slots = tables.slots_of(self.on[device])
            if not x.is_cuda and not torch.compiler.is_compiling() and (gone := (slots == len(tables.generation)).nonzero()).numel():
                at = tuple(gone[0].tolist())
                raise ValueError(f"adapter_ids: row {at[0] if len(at) == 1 else at} has the id {self.ids[at].item()}, which is no adapter's, or whose adapter has left the pool")
            return slots

        return self.orders.of(x, slots_on, len(tables.generation))
