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


class Route:
    """The adapters of a batch's rows. `of` gives their order for an x, made once for each shape and forward of the model."""

    def __init__(self, pool, ids):
        self.pool, self.ids, self.on, self.made = pool, ids, {ids.device: ids}, {}

    def begin(self):
        """A forward of the model begins: what was made before is made again, within a graph that is being captured too."""
        self.made.clear()

    def of(self, x):
        """(order, starts, tiles) for x (..., K); ValueError for a device without a pool, and on the CPU for an id that has ended."""
        key = x.shape[:-1], x.device
        if key not in self.made:
            if x.device not in self.pool.tables:
                raise ValueError(f"x: expected a device that the pool was made for ({', '.join(map(str, self.pool.tables))}), got {x.device}")
            if x.device not in self.on:
                self.on[x.device] = self.ids.to(x.device, non_blocking=True)
            tables = self.pool.tables[x.device]
            slots = tables.slots_of(self.on[x.device])
            if not x.is_cuda and not torch.compiler.is_compiling() and (gone := (slots == len(tables.generation)).nonzero()).numel():
                at = tuple(gone[0].tolist())
                raise ValueError(f"adapter_ids: row {at[0] if len(at) == 1 else at} has the id {self.ids[at].item()}, which is no adapter's, or whose adapter has left the pool")
            self.made[key] = functional.route(slots, x.shape, len(tables.generation))
        return self.made[key]
